"""Memory as context (MAC, titans specification section 12.1): attention over a segment and over what the memory recalls for it.

Per segment, with the weights W at its start: h_j = M(q_j; W) recalls for token j; y_j = softmax over persistent tokens, h_i and x_i
(i <= j); the memory learns from norm(y_j); r_j = M(q'(y_j); W_j) with the writes up to j; o_j = W_O fuse(norm(y_j), r_j). The drawing of
the paper shows all h of the segment to all its tokens and reads the weights after it, which leaks: `form='paper'`, for encoders.
A segment has `window` real tokens of a document (that of the attention), so that cuts and padding move nothing.
"""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.layers.conv import find_taps, next_tail, short_conv
from memjax.layers.linear import Linear, partitioned
from memjax.layers.lora import NOISE, Lora
from memjax.layers.norm import RMSNorm
from memjax.memory.base import confidence, only_real, where_rows
from memjax.memory.neural_inputs import NeuralInputs, same_tap, unit
from memjax.memory.registry import make_memory
from memjax.models.fuse import Fuse
from memjax.models.segments import ContextTokens, cut_rows, put, scan_segments, scan_tokens
from memjax.ops.attention import attend
from memjax.ops.neural_layout import lay_out


@struct.dataclass
class ContextState:
  """Keys and values of the segment's tokens (with lookback those of the segment before it first) and of what was recalled for them,
  slots of the segment; tokens in it; is there a segment before it; tail of the raw recall queries; the memory's weights at its start
  minus the learned ones, where a segment is longer than a chunk."""
  token: tuple[jax.Array, jax.Array]            # [B, G, M, K]
  recalled: tuple[jax.Array, jax.Array]         # [B, G, S, K], empty where learned queries recall
  slot_B: jax.Array
  past_B: jax.Array
  tail_BxTxE: jax.Array
  start: Any = None


class Recall(nn.Module):
  """Queries to the memory at the segment's start, from the tokens or learned, and the vectors that its answers become."""
  config: Any
  shape: tuple[int, int, int]
  width: int
  learned: int = 0
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  std: float = 0.0
  lora: Lora = Lora()

  def setup(self):
    (H, K, _), shared, p = self.shape, dict(std=self.std, dtype=self.dtype, lora=self.lora), self.config.proj
    self.norm = RMSNorm(self.epsilon, self.dtype, name='norm')
    self.out = Linear(self.width, ('heads', 'embed'), name='out', **shared)
    if self.learned:
      self.own = self.param('learned', partitioned(nn.initializers.normal(1.0), (None, 'heads')), (self.learned, H * K))
      return
    self.query = Linear(H * K, ('embed', 'heads'), name='query', **shared)
    if p.conv_width: self.taps = self.param('taps', partitioned(same_tap, (None, 'heads')), (p.conv_width, H * K))

  def queries(self, x_BxLxD: jax.Array, tail_BxTxE: jax.Array, **flow) -> tuple[jax.Array, jax.Array]:
    """(queries [B, L, H, K] by convolution over written tokens of a document, activation and norm; next tail)."""
    p, (H, K, _) = self.config.proj, self.shape
    x = self.query(x_BxLxD).astype(jnp.promote_types(jnp.float32, self.dtype))
    if p.conv_width:
      taps = find_taps(p.conv_width, x.shape[1], **flow)
      x, tail_BxTxE = short_conv(x, self.taps, tail_BxTxE, taps), next_tail(x, tail_BxTxE, taps)
    if p.activation: x = jax.nn.silu(x)
    return unit(x.reshape(*x.shape[:2], H, K), p.qk_norm).astype(self.dtype), tail_BxTxE

  def constants(self, rows: int) -> jax.Array:
    """The learned queries, [B, N, H, K]."""
    H, K, _ = self.shape
    own = unit(self.own.reshape(1, self.learned, H, K), self.config.proj.qk_norm).astype(self.dtype)
    return jnp.broadcast_to(own, (rows, *own.shape[1:]))

  def vectors(self, read_BxLxHxV: jax.Array) -> jax.Array:
    """h [B, L, D]."""
    return self.out(self.norm(read_BxLxHxV.reshape(*read_BxLxHxV.shape[:2], -1)))


def context_state(config: ModelConfig, names: tuple[str, str], batch: int) -> ContextState:
  """The empty state of the attention's part of ':mac'."""
  attention, memory = (make_memory(config.mixers[name], config.width, dtype=jnp.dtype(config.dtype), parent=None) for name in names)
  titans, S, (H, K, _), wide = config.block.titans, attention.config.window, memory.shape, memory.state_dtype
  pair = lambda size: (jnp.zeros((batch, attention.groups, size, attention.head_width), wide),) * 2
  start = {name: jnp.zeros((batch, H, *shape), wide) for name, shape in memory.rule.network.fast.items()}
  count = jnp.zeros((batch,), jnp.int32)
  tail = jnp.zeros((batch, 0 if titans.learned else max(memory.config.proj.conv_width - 1, 0), H * K), wide)
  return ContextState(pair(S * (1 + titans.lookback)), pair(0 if titans.learned else S), count, count, tail,
                      start if memory.config.chunk < S else None)


class Context(nn.Module):
  """The stage 'a+b:mac'; called like `Mixers`. `form` 'paper' takes whole rows of one document alone, without states."""
  config: ModelConfig
  names: tuple[str, str]
  attention_lora: Lora = Lora()
  memory_lora: Lora = Lora()
  form: str = 'causal'

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    first, second = self.names
    make = lambda name, lora: make_memory(c.mixers[name], c.width, dtype=dtype, std=c.block.init_std, out_std=c.block.mixer_out_std,
                                          lora=lora, name=name)
    self.attention, self.memory = make(first, self.attention_lora), make(second, self.memory_lora)
    shared = dict(epsilon=c.block.norm_epsilon, std=c.block.init_std, dtype=dtype, lora=self.memory_lora)
    shape = make_memory(c.mixers[second], c.width, parent=None).shape
    self.recall = Recall(c.mixers[second], shape, c.width, c.block.titans.learned, name='recall', **shared)
    self.norm = RMSNorm(c.block.norm_epsilon, dtype, name='norm_attention')
    self.fuse = Fuse(c.block.titans.fuse, norm_first=False, name='fuse', **shared)

  @property
  def size(self) -> int:
    """S, tokens of a segment."""
    return self.config.mixers[self.names[0]].window

  def init_state(self, batch: int) -> dict:
    """Zero states of both parts by name. Raises UserError for form 'paper', which sees the future and cannot stream."""
    if self.form == 'paper': raise UserError("mac='paper' shows a token what comes after it; it has no state and cannot stream")
    memory = make_memory(self.config.mixers[self.names[1]], self.config.width, dtype=jnp.dtype(self.config.dtype), parent=None)
    return {self.names[0]: context_state(self.config, self.names, batch), self.names[1]: memory.init_state(batch)}

  def __call__(self, x_BxLxD: jax.Array, states: dict, flow: Any, *, stream_BxLxD: jax.Array | None = None, key: jax.Array | None = None,
               prepared: dict | None = None, collect: bool = False):
    """(y [B, L, D], states, {name: aux}) of x; arguments as those of `Mixers`."""
    del stream_BxLxD, key, prepared
    if self.form == 'paper' and states: raise UserError("mac='paper' shows a token what comes after it; it takes no state, hence no step")
    first, second = self.names
    x_BxLxD = only_real(x_BxLxD, flow.mask_BxL)
    real_BxL = jnp.ones(x_BxLxD.shape[:2], bool) if flow.mask_BxL is None else flow.mask_BxL
    written_BxL = real_BxL if flow.write_mask_BxL is None else real_BxL & flow.write_mask_BxL
    reset_BxL = real_BxL & (flow.position_BxL == 0 if flow.reset_BxL is None else flow.reset_BxL)
    states = states or self.clone(form='causal', parent=None).init_state(x_BxLxD.shape[0])
    inputs, recall, tail = self.attention.project(x_BxLxD, flow.position_BxL), None, states[first].tail_BxTxE
    if not self.config.block.titans.learned:
      recall, tail = self.recall.queries(x_BxLxD, tail, written_BxL=written_BxL, reset_BxL=reset_BxL)
    tokens = ContextTokens(inputs.q_BxLxHxK, inputs.k_BxLxGxK, inputs.v_BxLxGxK, recall, flow.position_BxL, real_BxL, written_BxL,
                           reset_BxL, second in flow.frozen, second in flow.silent)
    (own, memory), (y_BxLxD, read_BxLxE, gate) = self._run((states[first], states[second]), tokens)
    z_BxLxD = self.norm(y_BxLxD)
    out_BxLxD = self.attention.readout(x_BxLxD, self.fuse(x_BxLxD, z_BxLxD, self.memory.readout(z_BxLxD, read_BxLxE)))
    told = {first: {'confidence': jax.lax.stop_gradient(confidence(y_BxLxD).mean())},
            second: {**self.memory.aux(memory, NeuralInputs(y_BxLxD, gate), read_BxLxE, mask_BxL=flow.mask_BxL),
                     **self.memory.monitors(memory)}}
    if collect:
      given = dict(mask_BxL=flow.mask_BxL, write_mask_BxL=flow.write_mask_BxL, reset_BxL=reset_BxL)
      told[first]['statistics'] = self.attention.statistics(own, inputs, y_BxLxD)
      learned = self.memory.project(z_BxLxD, flow.position_BxL)
      told[second]['statistics'] = self.memory.statistics(states[second], learned, read_BxLxE, **given)
    return out_BxLxD, {first: own.replace(tail_BxTxE=tail), second: memory}, told

  def _run(self, carry, tokens: ContextTokens):
    """(states, outputs of `segment` for all tokens): by segments where all tokens write and have a slot, else token by token."""
    L = tokens.real_BxT.shape[1]
    one = jax.tree.map(lambda a: a[:, :1], tokens)
    if L == 1 and self.form == 'causal': return self.segment(carry, one.replace(fresh_B=one.fresh_B[:, 0]))
    if self.is_initializing():
      carry, out = self.segment(carry, one.replace(fresh_B=one.fresh_B[:, 0]))
      return carry, jax.tree.map(lambda a: jnp.repeat(a, L, 1), out)
    options = self.config.mixers[self.names[1]].exec
    layout = lay_out(tokens.real_BxT, tokens.fresh_B, carry[0].slot_B, chunk=self.size, count=-(-L // self.size) + options.spare)
    module, variables = self.clone(parent=None), self.variables
    noise = self.make_rng(NOISE) if self.has_rng(NOISE) else None
    def body(carry, item):
      number, tokens = item
      rngs = {} if noise is None else {NOISE: jax.random.fold_in(noise, number)}
      return module.apply(variables, carry, tokens, method='segment', rngs=rngs)
    def by_segments(carry): return scan_segments(body, carry, tokens, layout=layout, group=options.group)
    def by_steps(carry): return scan_tokens(body, carry, tokens)
    all_write = tokens.written_BxT is tokens.real_BxT
    if self.form == 'paper' or (all_write and layout.full.shape[1] >= L): return by_segments(carry)
    if options.aligned and all_write:
      carry, out = by_segments(carry)
      return carry, jax.tree.map(lambda a: jnp.where(layout.fits, a, jnp.nan), out)
    can = layout.fits if all_write else layout.fits & jnp.all(tokens.written_BxT == tokens.real_BxT)
    return jax.lax.cond(can, by_segments, by_steps, carry)

  def segment(self, carry: tuple, tokens: ContextTokens) -> tuple:
    """((state of attention, of memory), (y [B, T, E], read, gates)) of the tokens of one segment in their slots, or of one token."""
    carry = where_rows(tokens.fresh_B, jax.tree.map(jnp.zeros_like, carry), carry)
    own, memory = carry
    B, T = tokens.real_BxT.shape
    start = self._start(own, memory)
    learned = self.config.block.titans.learned
    query = self.recall.constants(B) if learned else tokens.recall_BxTxHxK
    h_BxTxD = self.recall.vectors(self.memory.read_anchor(start, query))
    if tokens.silent: h_BxTxD = jnp.zeros_like(h_BxTxD)
    recalled = self.attention.keys(h_BxTxD, jnp.zeros((B, learned), jnp.int32) if learned else tokens.position_BxT)
    S, lookback = self.size, self.config.block.titans.lookback
    before = jnp.split(own.token[0], [S * lookback], 2)[0], jnp.split(own.token[1], [S * lookback], 2)[0]
    place_BxT = own.slot_B[:, None] if T == 1 else jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    given = tokens.key_BxTxGxK, tokens.value_BxTxGxK
    put_all = lambda rings, new: tuple(put(ring, one, place_BxT, tokens.written_BxT) for ring, one in zip(rings, new, strict=True))
    token = put_all((ring[:, :, S * lookback:] for ring in own.token), given)
    recalled = tuple(jnp.swapaxes(a, 1, 2) for a in recalled) if learned else put_all(own.recalled, recalled)
    slot_B = own.slot_B + tokens.written_BxT.sum(1, dtype=own.slot_B.dtype)
    see = self._sees(own, place_BxT, slot_B)
    keys, values = (jnp.concatenate([a.astype(self.memory.state_dtype) for a in parts], 2)
                    for parts in zip(before, recalled, token, strict=True))
    y = attend(tokens.query_BxTxHxK, keys, values, see=lambda at, size: cut_rows(see, at, size), always=self.attention.always)
    y_BxTxE = jnp.where(tokens.real_BxT[..., None], y.reshape(B, T, -1), 0)
    memory, read_BxTxE, gate = self._learn(memory, self.norm(y_BxTxE), tokens, start)
    if tokens.silent: read_BxTxE = jnp.zeros_like(read_BxTxE)
    return (self._moved(own, memory, slot_B, before=before, token=token, recalled=recalled), memory), (y_BxTxE, read_BxTxE, gate)

  def _start(self, own: ContextState, memory: Any) -> Any:
    """The memory as it was at the start of the segment, for `read_anchor`."""
    if own.start is None: return memory
    return memory.replace(anchor=own.start) if memory.anchor is not None else memory.replace(fast={n: (a,) for n, a in own.start.items()})

  def _sees(self, own: ContextState, place_BxT, slot_B):
    """Visibility [B, T, M] of the segment before, of what was recalled and of the tokens."""
    S, titans, (B, T) = self.size, self.config.block.titans, place_BxT.shape
    at = jnp.arange(S).reshape(1, 1, S)
    filled = jnp.broadcast_to(at < slot_B[:, None, None], (B, T, S))
    past = jnp.broadcast_to((own.past_B > 0)[:, None, None], (B, T, S * titans.lookback))
    near = filled & (at <= place_BxT[..., None])
    recalled = jnp.ones((B, T, titans.learned), bool) if titans.learned else filled if self.form == 'paper' else near
    return jnp.concatenate([past, recalled, near], 2)

  def _learn(self, memory, z_BxTxD, tokens: ContextTokens, start):
    """(state of the memory after writing z, what its queries read, gates)."""
    inputs = self.memory.project(z_BxTxD, tokens.position_BxT)
    none = jnp.zeros_like(tokens.real_BxT)
    if tokens.frozen:
      query = self.memory.projections.items(inputs, memory.tail, written_BxL=none)[0].query
      read = self.memory.read_pending(memory, query).reshape(*none.shape, -1)
      return memory, jnp.where(tokens.real_BxT[..., None], read, 0).astype(self.memory.dtype), inputs.gate_BxLxGxH
    if z_BxTxD.shape[1] == 1:
      first = jax.tree.map(lambda a: a[:, 0], inputs)
      new, read = self.memory.step(memory, first, tokens.real_BxT[:, 0], write_mask_B=tokens.written_BxT[:, 0])
      read = read[:, None]
    else:
      chunk = self.memory.config.chunk
      layout = lay_out(tokens.real_BxT, none, memory.slot_B, chunk=chunk, count=self.size // chunk)
      new, read, _ = self.memory.chunks(memory, inputs, layout, (tokens.real_BxT, none))
    other = self.form == 'paper' or self.config.block.titans.read == 'segment'
    if not other: return new, read, inputs.gate_BxLxGxH
    query = self.memory.projections.items(inputs, memory.tail, written_BxL=tokens.written_BxT)[0].query
    y = self.memory.read_pending(new, query) if self.form == 'paper' else self.memory.read_anchor(start, query)
    return new, jnp.where(tokens.real_BxT[..., None], y.reshape(read.shape).astype(read.dtype), 0), inputs.gate_BxLxGxH

  def _moved(self, own: ContextState, memory, slot_B, *, before, token, recalled) -> ContextState:
    """The state after the tokens: a complete segment becomes the one before, and the next starts at the weights now."""
    full_B, empty = slot_B == self.size, lambda tree: jax.tree.map(jnp.zeros_like, tree)
    if self.config.block.titans.lookback: before = where_rows(full_B, token, before)
    token = where_rows(full_B, empty(token), token)
    start = own.start
    if start is not None:
      now = memory.anchor if memory.anchor is not None else {name: levels[0] for name, levels in memory.fast.items()}
      start = where_rows(full_B, now, start)
    joined = tuple(jnp.concatenate(pair, 2) for pair in zip(before, token, strict=True))
    recalled = own.recalled if self.config.block.titans.learned else where_rows(full_B, empty(recalled), recalled)
    return own.replace(token=joined, recalled=recalled, slot_B=jnp.where(full_B, 0, slot_B), start=start,
                       past_B=jnp.where(full_B, 1, own.past_B).astype(own.past_B.dtype))
