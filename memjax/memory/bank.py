"""A bank of learned entries read by cross-attention, in chapters that a router chooses; the state is the router's statistic."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from memjax.config.banks import NONCAUSAL
from memjax.config.errors import UserError
from memjax.layers.linear import Projection
from memjax.memory.base import Memory, both, real_resets, where_rows
from memjax.memory.reads import read_chapters
from memjax.memory.router import Router
from memjax.memory.table import EntryTable, Table
from memjax.ops import router as ops
from memjax.ops.entry_mass import entry_mass
from memjax.ops.quantize import Quantized, quantize
from memjax.ops.router_losses import chapter_counts, router_losses, router_monitors


@struct.dataclass
class RouterState:
  """What a strategy remembers of a document; None where it does not need it."""
  total_BxD: Any = None                # sum of the router inputs: of the document (prefix-mean, hybrid) or of the block (chunk)
  previous_BxD: Any = None             # mean of the block before (chunk)
  ring_BxWxD: Any = None               # the last W router inputs (rolling, hybrid)
  count_B: Any = None                  # tokens of the document
  prompt_length_B: Any = None          # set by who generates; 0 = no prompt (hybrid)


@struct.dataclass
class BankInputs:
  """Queries and router inputs of some tokens."""
  q_BxLxHxK: jax.Array
  v_BxLxD: jax.Array


@struct.dataclass
class Prepared:
  """Keys and values of all chapters: functions of the parameters alone."""
  k_PxTxGxK: Any
  v_PxTxGxK: Any


class Bank(Memory):
  """Cross-attention to M learned entries; without chapters to all of them, else to the shared and the `top_k` routed chapters.

  With zero_out the output projection starts at zero: the model starts as its host, and at the first step only that
  projection (and the router, by its losses) gets a gradient; from the second step on everything does.
  """

  has_pieces = False

  def setup(self):
    c = self.config
    if not c.shape.share: self.bank = EntryTable(c, self.width, name='bank')
    project = functools.partial(Projection, rank=c.projection_rank, std=self.std, dtype=self.dtype, lora=self.lora)
    heads, groups = c.heads * self.head_width, self.groups * self.head_width
    self.query = project(self.width, heads, ('embed', 'heads'), name='query')
    self.key = project(self.entry_width, groups, ('embed', 'heads'), name='key')
    self.value = project(self.entry_width, groups, ('embed', 'heads'), name='value')
    self.out = project(heads, self.width, ('heads', 'embed'), zero=self.grafted or c.zero_out, name='out')
    if c.shape.chapters: self.router = Router(c, self.width, name='router')

  @property
  def strategy(self) -> str:
    """What the router looks at; without chapters there is nothing to choose, and a token's own channels stand for it."""
    return self.config.router.strategy if self.config.shape.chapters else 'token'

  @property
  def reaches_back(self) -> bool:
    """Whether an earlier token can change the chapters of a later one (in a gradient: through their weights)."""
    return self.strategy != 'token' and self.config.mixing.combine != 'joint'

  @property
  def wants_stream(self) -> bool:
    """Whether the router looks at the residual stream."""
    return self.config.router.input == 'stream'

  @property
  def inert(self) -> tuple[str, ...]:
    """Parameters that no gradient reaches: the selection bias, moved by the trainer from the use of the chapters."""
    return ('selection_bias',)

  @property
  def entry_width(self) -> int:
    """Channels of an entry as keys and values are made of it."""
    shape = self.config.shape
    return shape.rank if shape.low_rank == 'reduced' else shape.width or self.width

  @property
  def head_width(self) -> int:
    """K, channels per head."""
    shape = self.config.shape
    return self.config.head_width or (shape.rank if shape.low_rank == 'reduced' else self.width) // self.config.heads

  @property
  def groups(self) -> int:
    """G, key and value heads."""
    return self.config.kv_heads or self.config.heads

  def init_state(self, batch: int, max_len: int = 0) -> RouterState:
    """The statistic of no tokens. UserError for a strategy that sees the future where a state is to be carried."""
    c, zeros = self.config, lambda *shape: jnp.zeros((batch, *shape), self.state_dtype)
    number, strategy = lambda: jnp.zeros((batch,), jnp.int32), self.strategy
    if strategy in NONCAUSAL:
      if max_len: raise UserError(f'router.strategy={strategy!r} sees the future: it cannot stream, generate or carry a state')
      return RouterState()
    if strategy == 'prefix-mean': return RouterState(total_BxD=zeros(self.width), count_B=number())
    if strategy == 'rolling': return RouterState(ring_BxWxD=zeros(c.router.window, self.width), count_B=number())
    if strategy == 'chunk': return RouterState(total_BxD=zeros(self.width), previous_BxD=zeros(self.width), count_B=number())
    if strategy == 'hybrid':
      return RouterState(zeros(self.width), None, zeros(c.router.window, self.width), number(), number())      # two arrays, to be donated
    return RouterState()

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array, *, stream_BxLxD: jax.Array | None = None) -> BankInputs:
    """Queries, and what the router looks at: x, or the residual stream where the config asks for it and it is given."""
    del position_BxL
    q = self.query(x_BxLxD).reshape(*x_BxLxD.shape[:2], self.config.heads, self.head_width)
    return BankInputs(q, x_BxLxD if stream_BxLxD is None else stream_BxLxD)

  def prepare(self, banks: dict | None = None) -> Prepared:
    """Keys and values of all chapters. Factorised tables fold B into the projections; stored integers become numbers one
    chapter at a time."""
    c = self.config
    table: Table = banks[c.shape.share] if c.shape.share else self.bank()
    chapters, kernels = max(c.shape.chapters, 1), (self.key.matrix(), self.value.matrix())
    split = lambda a: a.reshape(chapters, -1, self.groups, self.head_width)
    if isinstance(table.rows_MxD, Quantized):
      made = jax.lax.map(lambda number: self._tokens(table, number) @ jnp.concatenate(kernels, 1), jnp.arange(chapters))
      k, v = map(split, jnp.split(made, 2, -1))
    else:
      fold = table.mix_DxR is not None and not c.mixing.norm
      if fold: kernels = tuple(table.mix_DxR.astype(self.dtype).T @ kernel for kernel in kernels)
      rows = table.rows_MxD.astype(self.dtype) if fold else self._tokens(table)
      k, v = (split(rows @ kernel) for kernel in kernels)
    if c.quant.target == 'kv': k, v = (quantize(a, bits=c.quant.bits, scheme=c.quant.scheme, group=c.quant.group) for a in (k, v))
    return Prepared(k, v)

  def _tokens(self, table: Table, chapter: jax.Array | None = None) -> jax.Array:
    """The entries [M, D] (of one chapter: [T, D]) as keys and values are made of them, normed where the config says so."""
    c = self.config
    tokens = table.tokens(chapter, chapters=max(c.shape.chapters, 1), dtype=self.dtype)
    return scale_free_norm(tokens, c.mixing.norm, c.mixing.norm_epsilon)

  def write(self, state: RouterState, inputs: BankInputs) -> RouterState:
    """The statistic after one more token."""
    return self._statistic(state, jax.tree.map(lambda a: a[:, None], inputs), None, None)[1]

  def read(self, state: RouterState, inputs: BankInputs, prepared: Prepared | None = None) -> jax.Array:
    """Cross-attention of one token; `state` is that after its write."""
    u_BxD = self._read_statistic(state, inputs)
    return self._attend(inputs.q_BxLxHxK, *self._choose(u_BxD, None), prepared or self.prepare())

  def step(self, state, inputs, mask_B=None, **flow):
    """One token, as in the base class. UserError for a strategy that sees the future."""
    if self.config.router.strategy in NONCAUSAL:
      raise UserError(f'router.strategy={self.config.router.strategy!r} sees the future: it has no step of one token')
    return super().step(state, inputs, mask_B, **flow)

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None, prepared=None):
    """All tokens at once: running statistics, one router product, one routed attention."""
    B, L, H, K = inputs.q_BxLxHxK.shape
    u_BxLxD, state = self._run(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    flat = lambda a: None if a is None else a.reshape(B * L, *a.shape[2:])
    y_ZxE = self._attend(inputs.q_BxLxHxK.reshape(B * L, H, K), *self._choose(flat(u_BxLxD), flat(mask_BxL)), prepared or self.prepare())
    y_BxLxE = y_ZxE.reshape(B, L, -1)
    return state, y_BxLxE if mask_BxL is None else jnp.where(mask_BxL[..., None], y_BxLxE, 0)

  def _run(self, state, inputs, mask_BxL, *, write_mask_BxL, reset_BxL):
    """(u [B, L, D], state): the router's statistic at every token, and after the last."""
    reset_BxL = real_resets(reset_BxL, mask_BxL)
    segment_BxL = None if reset_BxL is None else jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
    return self._statistic(state, inputs, both(mask_BxL, write_mask_BxL), segment_BxL)

  def _statistic(self, state, inputs, written_BxL, segment_BxL):
    c, given, strategy = self.config, (inputs.v_BxLxD, written_BxL, segment_BxL), self.strategy
    if strategy == 'token': return inputs.v_BxLxD, state
    if strategy == 'sequence': return ops.sequence_mean(*given), state
    if strategy == 'sequence-rolling': return ops.sequence_rolling_mean(*given, window=c.router.window), state
    if strategy == 'prefix-mean':
      u, total, count = ops.prefix_mean(*given, total_BxD=state.total_BxD, count_B=state.count_B)
      return u, state.replace(total_BxD=total, count_B=count)
    if strategy == 'rolling':
      u, ring, count = ops.rolling_mean(*given, ring_BxWxD=state.ring_BxWxD, count_B=state.count_B, window=c.router.window)
      return u, state.replace(ring_BxWxD=ring, count_B=count)
    if strategy == 'chunk':
      u, previous, total, count = ops.previous_chunk_mean(
          *given, previous_BxD=state.previous_BxD, total_BxD=state.total_BxD, count_B=state.count_B, block=c.router.block,
          first_D=self.router.start)
      new = state.replace(previous_BxD=previous, total_BxD=total, count_B=count)
      return u, where_rows(count > 0, new, jax.tree.map(jnp.zeros_like, new))        # a document that no token wrote to is empty
    return self._hybrid(state, *given)

  def _hybrid(self, state, v_BxLxD, written_BxL, segment_BxL):
    """The prefix mean inside the prompt, the rolling mean after it."""
    mean, total, count = ops.prefix_mean(v_BxLxD, written_BxL, segment_BxL, total_BxD=state.total_BxD, count_B=state.count_B)
    rolling, ring, _ = ops.rolling_mean(v_BxLxD, written_BxL, segment_BxL, ring_BxWxD=state.ring_BxWxD, count_B=state.count_B,
                                        window=self.config.router.window)
    number_BxL = ops.running_count(written_BxL, segment_BxL, count_B=state.count_B, like=v_BxLxD)
    prompt_BxL = state.prompt_length_B[:, None] if segment_BxL is None else jnp.where(segment_BxL == 0, state.prompt_length_B[:, None], 0)
    last = state.prompt_length_B if segment_BxL is None else jnp.where(segment_BxL[:, -1] == 0, state.prompt_length_B, 0)
    return (jnp.where((number_BxL <= prompt_BxL)[..., None], mean, rolling),
            state.replace(total_BxD=total, ring_BxWxD=ring, count_B=count, prompt_length_B=last))

  def _read_statistic(self, state, inputs):
    """u [B, D] of the token that was written last."""
    c, strategy = self.config, self.strategy
    if strategy == 'token': return inputs.v_BxLxD
    if strategy == 'prefix-mean': return ops.prefix_mean_read(total_BxD=state.total_BxD, count_B=state.count_B)
    if strategy == 'rolling': return ops.rolling_mean_read(ring_BxWxD=state.ring_BxWxD, count_B=state.count_B)
    if strategy == 'chunk':
      return ops.previous_chunk_mean_read(previous_BxD=state.previous_BxD, count_B=state.count_B, block=c.router.block,
                                          first_D=self.router.start)
    inside = (state.count_B <= state.prompt_length_B)[:, None]
    return jnp.where(inside, ops.prefix_mean_read(total_BxD=state.total_BxD, count_B=state.count_B),
                     ops.rolling_mean_read(ring_BxWxD=state.ring_BxWxD, count_B=state.count_B))

  def _choose(self, u_ZxD, real_Z):
    """(ids, log weights) [Z, J]; tokens that do not exist choose nothing (-1). Without chapters everybody reads the one there is."""
    c = self.config
    if not c.shape.chapters:
      none = jnp.zeros((u_ZxD.shape[0], 1), jnp.int32)
      return none, none.astype(self.state_dtype)
    return self._select(self.router(u_ZxD), real_Z)

  def _select(self, logit_ZxP, real_Z):
    c = self.config
    bias = jax.lax.stop_gradient(self.router.selection_bias) if c.loss.bias_rate else None
    ids_ZxJ, log_weight_ZxJ = ops.select(logit_ZxP, top_k=c.router.top_k, shared=c.mixing.shared, bias_P=bias,
                                         weight_norm=c.router.weight_norm)
    return ids_ZxJ if real_Z is None else jnp.where(real_Z[:, None], ids_ZxJ, -1), log_weight_ZxJ

  def _attend(self, q_ZxHxK, ids_ZxJ, log_weight_ZxJ, prepared: Prepared):
    """y [Z, E]: the chosen (and shared) chapters' reads, combined."""
    return read_chapters(self.config, q_ZxHxK, (ids_ZxJ, log_weight_ZxJ), (prepared.k_PxTxGxK, prepared.v_PxTxGxK))

  def aux(self, state, inputs, y_BxLxE, *, mask_BxL=None, write_mask_BxL=None, reset_BxL=None, **context):
    """The router losses (specification section 6), their monitors, and the use of chapters for the selection bias."""
    found, c = super().aux(state, inputs, y_BxLxE), self.config
    if not c.shape.chapters: return found
    logit_ZxP, (ids_ZxJ, _), real_Z = self._routes(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    losses = router_losses(logit_ZxP, ids_ZxJ, real_Z, shared=c.mixing.shared, balance_form=c.loss.balance_form,
                           auxiliary_form=c.loss.auxiliary_form)
    weights = {'balance': c.loss.balance, 'auxiliary': c.loss.auxiliary, 'z': c.loss.z}
    found |= {f'router_{name}': jax.lax.stop_gradient(losses[name]) for name, weight in weights.items() if weight}
    found['penalty'] = sum((weight * losses[name] for name, weight in weights.items() if weight), jnp.zeros((), jnp.float32))
    if c.loss.bias_rate: found['load'] = chapter_counts(ids_ZxJ, real_Z, c.shape.chapters)[c.mixing.shared:]
    return found | router_monitors(logit_ZxP, ids_ZxJ, real_Z, shared=c.mixing.shared)

  def _routes(self, state, inputs, mask_BxL, **flow):
    """(logits [Z, P], (ids, log weights) [Z, J], which tokens are real [Z]) of a call: the compiler shares this with the read."""
    B, L = inputs.v_BxLxD.shape[:2]
    u_BxLxD, _ = self._run(state, inputs, mask_BxL, **flow)
    real_Z = jnp.ones((B * L,), bool) if mask_BxL is None else mask_BxL.reshape(-1)
    logit_ZxP = self.router(u_BxLxD.reshape(B * L, -1))
    return logit_ZxP, self._select(logit_ZxP, real_Z), real_Z

  def statistics(self, state, inputs, y_BxLxE, *, mask_BxL=None, write_mask_BxL=None, reset_BxL=None, prepared=None, **context):
    """Attention by entry, use of the chapters and the router's monitors of this layer, for the figures."""
    c, found, q_BxLxHxK = self.config, super().statistics(state, inputs, y_BxLxE), inputs.q_BxLxHxK
    if c.shape.chapters:
      logit_ZxP, (ids_ZxJ, log_weight_ZxJ), real_Z = self._routes(
          state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
      found |= {'chapter_use_P': chapter_counts(ids_ZxJ, real_Z, c.shape.chapters)}
      found |= router_monitors(logit_ZxP, ids_ZxJ, real_Z, shared=c.mixing.shared)
    else:
      ids_ZxJ, log_weight_ZxJ = self._choose(y_BxLxE.reshape(-1, y_BxLxE.shape[-1]), None)
      if mask_BxL is not None: ids_ZxJ = jnp.where(mask_BxL.reshape(-1, 1), ids_ZxJ, -1)
    mass_PxT = entry_mass(q_BxLxHxK.reshape(-1, *q_BxLxHxK.shape[2:]), (prepared or self.prepare()).k_PxTxGxK, ids_ZxJ,
                          log_weight_ZxJ=log_weight_ZxJ, mode=c.mixing.combine, shared=c.mixing.shared, routed_scale=c.mixing.scale)
    return found | {'entry_mass_M': mass_PxT.reshape(-1)}

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """Output projection."""
    return self.out(y_BxLxE)


def scale_free_norm(x_TxD: jax.Array, kind: str, epsilon: float) -> jax.Array:
  """x over its root mean square ('rms'), after removing its mean ('layernorm'), or x itself ('')."""
  if not kind: return x_TxD
  wide = x_TxD.astype(jnp.promote_types(jnp.float32, x_TxD.dtype))
  if kind == 'layernorm': wide -= wide.mean(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x_TxD.dtype)
