"""Memory as context (MAC, titans specification section 12.1): attention over a segment and over what the memory recalls for it.

Per segment, with the weights W at its start: h_j = M(q_j; W) recalls for token j; y_j = softmax over persistent tokens, h_i and x_i
(i <= j); the memory learns from norm(y_j); r_j = M(q'(y_j); W_j) with the writes up to j; o_j = W_O fuse(norm(y_j), r_j). The drawing of
the paper shows all h of the segment to all its tokens and reads the weights after it, which leaks: `form='paper'`, for encoders.
With write='sum' y_j + x_j stands for y_j, so that the memory sees the token itself before attention has learned to look at it. With
'input' the memory learns from x as a layer of its own, and what it reads is both h and r.
A segment has `window` real tokens of a document (that of the attention), so that cuts and padding move nothing.
"""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.layers.lora import NOISE, Lora
from memjax.layers.norm import RMSNorm
from memjax.memory.base import confidence, only_real, where_rows
from memjax.memory.neural_inputs import NeuralInputs
from memjax.memory.registry import make_memory
from memjax.models.fuse import Fuse
from memjax.models.recall import Recall
from memjax.models.segments import ContextTokens, all_segments, cut_rows, put, scan_segments, scan_tokens
from memjax.ops.attention import attend
from memjax.ops.neural_layout import lay_out


@struct.dataclass
class ContextState:
  """Keys and values of the segment's tokens (with lookback those of the segment before it first) and of what was recalled for them,
  slots of the segment; tokens in it; is there a segment before it; tail of the raw recall queries; the memory's weights at its start
  minus the learned ones, where a segment is longer than a chunk; queries to the memory and positions, which the next segment asks."""
  token: tuple[jax.Array, jax.Array]            # [B, G, M, K]
  recalled: tuple[jax.Array, jax.Array]         # [B, G, S, K], empty where learned queries recall
  slot_B: jax.Array
  past_B: jax.Array
  tail_BxTxE: jax.Array
  start: Any = None
  asked: Any = None                             # [B, S, H, K], [B, S]


def context_state(config: ModelConfig, names: tuple[str, str], batch: int) -> ContextState:
  """The empty state of the attention's part of ':mac'."""
  attention, memory = (make_memory(config.mixers[name], config.width, dtype=jnp.dtype(config.dtype), parent=None) for name in names)
  titans, S, (H, K, _), wide = config.block.titans, attention.config.window, memory.shape, memory.state_dtype
  pair = lambda size: (jnp.zeros((batch, attention.groups, size, attention.head_width), wide),) * 2
  start = {name: jnp.zeros((batch, H, *shape), wide) for name, shape in memory.rule.network.fast.items()}
  count = jnp.zeros((batch,), jnp.int32)
  reads_once = titans.write == 'input'
  tail = jnp.zeros((batch, 0 if titans.learned or reads_once else max(memory.config.proj.taps('q') - 1, 0), H * K), wide)
  asked = (jnp.zeros((batch, S, H, memory.parts.key_width), wide), jnp.zeros((batch, S), jnp.int32)) if titans.asked == 'previous' else None
  begins = memory.config.chunk < S and not reads_once and (asked is None or titans.read == 'segment')
  return ContextState(pair(S * (1 + titans.lookback)), pair(0 if titans.learned else S), count, count, tail, start if begins else None,
                      asked)


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
    self.recall = Recall(c.mixers[second], shape, c.width, c.block.titans.learned, self.reads_once, name='recall', **shared)
    self.norm = RMSNorm(c.block.norm_epsilon, dtype, name='norm_attention')
    self.fuse = Fuse(c.block.titans.fuse, norm_first=False, name='fuse', **shared)

  @property
  def size(self) -> int:
    """S, tokens of a segment."""
    return self.config.mixers[self.names[0]].window

  @property
  def reads_once(self) -> bool:
    """Whether the memory learns from the input."""
    return self.config.block.titans.write == 'input'

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
    inputs, position = self.attention.project(x_BxLxD, flow.position_BxL), flow.position_BxL
    given = dict(mask_BxL=flow.mask_BxL, write_mask_BxL=flow.write_mask_BxL, reset_BxL=reset_BxL)
    recall, tail, memory = None, states[first].tail_BxTxE, states[second]
    if self.reads_once:
      read_BxLxE, new, told = self.memory.mix(x_BxLxD, memory, collect=collect, **flow.told(second) | {'reset_BxL': reset_BxL})
      if second in flow.silent: read_BxLxE = jnp.zeros_like(read_BxLxE)
      recall, memory = self.attention.keys(self.recall.vectors(read_BxLxE[:, :, None]), position), None
    elif not self.config.block.titans.learned:
      recall, tail = self.recall.queries(x_BxLxD, tail, position_BxL=position, written_BxL=written_BxL, reset_BxL=reset_BxL)
    own_BxLxD = x_BxLxD if self.config.block.titans.write == 'sum' else None
    tokens = ContextTokens(inputs.q_BxLxHxK, inputs.k_BxLxGxK, inputs.v_BxLxGxK, recall, position, real_BxL, written_BxL,
                           reset_BxL, own_BxLxD, second in flow.frozen, second in flow.silent)
    (own, memory), (y_BxLxD, *found) = self._run((states[first], memory), tokens)
    z_BxLxD = self.norm(y_BxLxD)
    if self.reads_once: memory = new
    else:
      read_BxLxE, gate = found
      told = {**self.memory.aux(memory, NeuralInputs((y_BxLxD,), gate), read_BxLxE, mask_BxL=flow.mask_BxL), **self.memory.monitors(memory)}
      if collect: told['statistics'] = self.memory.statistics(states[second], self.memory.project(z_BxLxD, position), read_BxLxE, **given)
    out_BxLxD = self.attention.readout(x_BxLxD, self.fuse(x_BxLxD, z_BxLxD, self.memory.readout(z_BxLxD, read_BxLxE)))
    seen = {'confidence': jax.lax.stop_gradient(confidence(y_BxLxD).mean())}
    if collect: seen['statistics'] = self.attention.statistics(own, inputs, y_BxLxD)
    return out_BxLxD, {first: own.replace(tail_BxTxE=tail), second: memory}, {first: seen, second: told}

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
    def pass_on(carry, tokens): return module.apply(variables, carry, tokens, method='passed_on')
    def by_segments(carry):
      if self.reads_once: return all_segments(pass_on, body, carry, tokens, layout=layout, group=options.group)
      return scan_segments(body, carry, tokens, layout=layout, group=options.group)
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
    own, memory = where_rows(tokens.fresh_B, jax.tree.map(jnp.zeros_like, carry), carry)
    B, T = tokens.real_BxT.shape
    start = None if self.reads_once else self._start(own, memory)
    rings, place_BxT, slot_B = self._placed(own, start, tokens)
    see = self._sees(own, place_BxT, slot_B)
    keys, values = (jnp.concatenate([a.astype(self.memory.state_dtype) for a in parts], 2)
                    for parts in zip(rings['before'], rings['recalled'], rings['token'], strict=True))
    y = attend(tokens.query_BxTxHxK, keys, values, see=lambda at, size: cut_rows(see, at, size), always=self.attention.always)
    y_BxTxE, found = jnp.where(tokens.real_BxT[..., None], y.reshape(B, T, -1), 0), ()
    if tokens.input_BxTxD is not None: y_BxTxE += tokens.input_BxTxD.astype(y_BxTxE.dtype)
    if not self.reads_once:
      memory, read_BxTxE, gate = self._learn(memory, self.norm(y_BxTxE), tokens, start)
      found = jnp.zeros_like(read_BxTxE) if tokens.silent else read_BxTxE, gate
    if own.asked is not None: own = own.replace(asked=self._asked(own, tokens, place_BxT))
    return (self._moved(own, memory, slot_B, **rings, silent=tokens.silent), memory), (y_BxTxE, *found)

  def passed_on(self, carry: tuple, tokens: ContextTokens) -> tuple:
    """The state after a segment whose memory reads once: what `segment` hands on, without looking."""
    own, memory = where_rows(tokens.fresh_B, jax.tree.map(jnp.zeros_like, carry), carry)
    rings, _, slot_B = self._placed(own, None, tokens)
    return self._moved(own, memory, slot_B, **rings, silent=tokens.silent), memory

  def _placed(self, own: ContextState, start: Any, tokens: ContextTokens) -> tuple:
    """({'before', 'token', 'recalled'}: keys and values with those of the tokens; slots of these, tokens of the segment now)."""
    (B, T), (S, lookback) = tokens.real_BxT.shape, (self.size, self.config.block.titans.lookback)
    before = jnp.split(own.token[0], [S * lookback], 2)[0], jnp.split(own.token[1], [S * lookback], 2)[0]
    place_BxT = own.slot_B[:, None] if T == 1 else jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    given = tokens.key_BxTxGxK, tokens.value_BxTxGxK
    put_all = lambda rings, new: tuple(put(ring, one, place_BxT, tokens.written_BxT) for ring, one in zip(rings, new, strict=True))
    token = put_all((ring[:, :, S * lookback:] for ring in own.token), given)
    rings = {'before': before, 'token': token, 'recalled': self._recalled(own, start, tokens, put_all)}
    return rings, place_BxT, own.slot_B + tokens.written_BxT.sum(1, dtype=own.slot_B.dtype)

  def recalled_by(self, memory: Any, query_BxTxHxK: jax.Array, position_BxT: jax.Array, *, silent: bool = False) -> tuple:
    """Keys and values [B, T, G, K] of the answers of the weights at the memory's anchor."""
    h_BxTxD = self.recall.vectors(self.memory.read_anchor(memory, query_BxTxHxK.astype(self.memory.dtype)))
    return self.attention.keys(jnp.zeros_like(h_BxTxD) if silent else h_BxTxD, position_BxT)

  def _recalled(self, own: ContextState, start, tokens: ContextTokens, put_all) -> tuple:
    """Keys and values [B, G, N, K] of what was recalled for the segment, its new tokens included."""
    B, learned = tokens.real_BxT.shape[0], self.config.block.titans.learned
    if own.asked is not None: return own.recalled
    if self.reads_once: return put_all(own.recalled, tokens.recall)
    if not learned: return put_all(own.recalled, self.recalled_by(start, tokens.recall, tokens.position_BxT, silent=tokens.silent))
    found = self.recalled_by(start, self.recall.constants(B), jnp.zeros((B, learned), jnp.int32), silent=tokens.silent)
    return tuple(jnp.swapaxes(a, 1, 2) for a in found)

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
    if titans.learned: recalled = jnp.ones((B, T, titans.learned), bool)
    elif titans.asked == 'previous': recalled = jnp.broadcast_to((own.past_B > 0)[:, None, None], (B, T, S))
    else: recalled = filled if self.form == 'paper' else near
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

  def _asked(self, own: ContextState, tokens: ContextTokens, place_BxT) -> tuple:
    """Queries and positions of the segment with those of the tokens in their slots."""
    wide = lambda a: a[:, :, None, None]
    query = put(jnp.swapaxes(own.asked[0], 1, 2), tokens.recall, place_BxT, tokens.written_BxT)
    at = put(jnp.swapaxes(wide(own.asked[1]), 1, 2), wide(tokens.position_BxT), place_BxT, tokens.written_BxT)
    return jnp.swapaxes(query, 1, 2), at[:, 0, :, 0]

  def _asks(self, own: ContextState, memory: Any, full_B, *, silent: bool) -> tuple:
    """What the next segment sees of the memory where this one is complete: answers to the queries of this one."""
    module, variables = self.clone(parent=None), self.variables
    def ask(recalled):
      if self.is_initializing(): found = self.recalled_by(memory, *own.asked, silent=silent)
      else: found = module.apply(variables, memory, *own.asked, silent=silent, method='recalled_by')
      return where_rows(full_B, tuple(jnp.swapaxes(a, 1, 2).astype(self.memory.state_dtype) for a in found), recalled)
    if self.is_initializing(): return ask(own.recalled)
    return jax.lax.cond(jnp.any(full_B), ask, lambda recalled: recalled, own.recalled)

  def _moved(self, own: ContextState, memory, slot_B, *, before, token, recalled, silent) -> ContextState:
    """The state after the tokens: a complete segment becomes the one before, and the next starts at the weights now."""
    full_B, empty = slot_B == self.size, lambda tree: jax.tree.map(jnp.zeros_like, tree)
    if self.config.block.titans.lookback: before = where_rows(full_B, token, before)
    token = where_rows(full_B, empty(token), token)
    start = own.start
    if start is not None:
      now = memory.anchor if memory.anchor is not None else {name: levels[0] for name, levels in memory.fast.items()}
      start = where_rows(full_B, now, start)
    joined = tuple(jnp.concatenate(pair, 2) for pair in zip(before, token, strict=True))
    if own.asked is not None:
      recalled = self._asks(own, memory, full_B, silent=silent)
      own = own.replace(asked=where_rows(full_B, empty(own.asked), own.asked))
    else: recalled = own.recalled if self.config.block.titans.learned else where_rows(full_B, empty(recalled), recalled)
    return own.replace(token=joined, recalled=recalled, slot_B=jnp.where(full_B, 0, slot_B), start=start,
                       past_B=jnp.where(full_B, 1, own.past_B).astype(own.past_B.dtype))
