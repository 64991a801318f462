"""Holographic associative memory: S slots of superposed bound pairs a head (HRR, Plate 1995), read and written by address.

    m_s <- keep_s m_s + gate address_s bind(key, value)          y = unbind(query, sum_s pick_s m_s)

Streams are projected for all tokens at once, pass a causal short convolution, and become items: bound pairs, addresses,
picks and queries. Everything after that is linear in the state, which is why a chunked form exists.
"""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.layers.linear import Linear, partitioned
from memjax.memory.base import Memory, both, real_resets, where_rows
from memjax.memory.items import Items, Projections
from memjax.memory.monitors import auxiliary_losses, monitors, slot_statistics
from memjax.memory.tiers import Tiers
from memjax.ops.binding import from_spectrum, resolve_transform, unbind
from memjax.ops.delta import delta_write, slot_delta
from memjax.ops.head_norm import head_norm
from memjax.ops.mixing import holographic_mix, is_fused
from memjax.ops.recurrence import slot_copies, slot_mix, slot_read, slot_scores, slot_write

FLOW = ('mask_BxL', 'write_mask_BxL', 'reset_BxL')


@struct.dataclass
class HolographicState:
  """Slots (in the packed spectrum for hrr and unitary), the tail of the short convolution, and the slow tier if there is one."""
  m_BxHxSxK: jax.Array
  tail_BxTxE: jax.Array
  slow_BxHxSxK: jax.Array | None = None
  count_B: jax.Array | None = None


class Holographic(Memory):
  """The kind `holographic`; every option of `HolographicConfig`."""

  def setup(self):
    c, shared = self.config, dict(std=self.std, dtype=self.dtype, lora=self.lora)
    self.projections = Projections(c, self.width, self.dtype, self.std, self.lora, name='projections')
    if c.tiers.kind: self.tiers = Tiers(c, self.width, self.dtype, name='tiers')
    if c.read.norm: self.scale = self.param('scale', partitioned(nn.initializers.ones_init(), ('heads',)), (self.read_width,))
    if c.read.out_gate: self.out_gate = Linear(self.read_width, ('embed', 'heads'), name='out_gate', **shared)
    self.out = Linear(self.width, ('heads', 'embed'), zero=self.grafted, name='out', **shared)

  @property
  def order(self) -> str:
    """'after' or 'before'."""
    return self.config.read.order

  @property
  def parts(self) -> Projections:
    """The projections, unbound: shapes only, for use before parameters exist."""
    return Projections(self.config, self.width, parent=None)

  @property
  def read_width(self) -> int:
    """E = G H K."""
    G, H, _, K = self.parts.shape
    return G * H * K

  def init_state(self, batch: int, max_len: int = 0) -> HolographicState:
    """Empty slots and tail; constant in the length of the text."""
    c, dtype, (_, H, S, K) = self.config, self.state_dtype, self.parts.shape
    m = jnp.zeros((batch, H, S, K), dtype)
    tail = jnp.zeros((batch, max(c.conv_width - 1, 0), sum(self.parts.tails.values())), dtype)
    if not c.tiers.kind: return HolographicState(m, tail)
    return HolographicState(m, tail, jnp.zeros_like(m), jnp.zeros((batch,), jnp.int32))

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> dict[str, Any]:
    """Raw streams, gate and keep logits, positions (and the input itself where a controller reads it)."""
    inputs = self.projections(x_BxLxD, position_BxL)
    if self.config.tiers.kind: self.tiers.share()                # parameters must exist before a scan is entered
    return {**inputs, 'x': x_BxLxD} if self.config.tiers.controller else inputs

  def write(self, state: HolographicState, item: Items) -> HolographicState:
    """keep m + address (x) bound; with erase='slot' the gated delta rule over slots; copies bind a pair of their own per slot."""
    c, m = self.config, state.m_BxHxSxK
    if c.keep.erase == 'slot': m = delta_write(m, item.bound, item.address, beta_BxH=item.gate, log_keep=item.log_keep)
    elif c.address.kind == 'copies':
      kept = m if item.log_keep is None else jnp.exp(item.log_keep)[..., None] * m
      m = kept + item.bound.astype(m.dtype)
    else: m = slot_write(m, item.bound, item.address, item.log_keep)
    return state.replace(m_BxHxSxK=m)

  def read(self, state: HolographicState, item: Items) -> jax.Array:
    """unbind(query, sum of picked slots), [B, E]."""
    c, m = self.config, state.m_BxHxSxK
    if c.address.kind == 'copies': return self._reads(jnp.broadcast_to(m[:, None], item.query.shape), item)
    pick = item.pick
    if c.address.kind == 'scored': pick = self._picks(jnp.einsum('bghk,bhsk->bghs', self.projections.probe(item.query).astype(m.dtype), m))
    mixed = slot_read(m, pick)
    if c.tiers.kind: mixed = self.tiers.blend(mixed, slot_read(state.slow_BxHxSxK, pick))
    return self._reads(mixed, item)

  def _picks(self, score):
    """Picks of address kind 'scored': softmax over slots of w . unbind(query, m_s)."""
    wide = score.astype(self.state_dtype) / self.config.address.temperature
    return jax.nn.softmax(wide, -1).astype(self.dtype)

  def untied(self, mixed, query):
    """unbind(query, mixed), copies averaged, still in the space of the state, [..., G, H, K]."""
    y = unbind(self.config.binding.kind, query, mixed.astype(query.dtype))
    return y.mean(-2) if self.config.address.kind == 'copies' else y

  def _reads(self, mixed, item: Items):
    """Mixed slots [..., G, H, K] (copies: [..., G, H, S, K]) to reads [..., E] in the compute dtype."""
    return self._signal(self.untied(mixed, item.query))

  def _signal(self, y):
    """Reads [..., G, H, K] out of the space of the state, [..., E]."""
    b = self.config.binding
    y = from_spectrum(y, resolve_transform(b.kind, b.transform))
    return y.reshape(*y.shape[:-3], -1)

  def step(self, state, inputs, mask_B=None, *, write_mask_B=None, reset_B=None):
    """One token: convolve, write, read (in the declared order), consolidate."""
    reset_B = real_resets(reset_B, mask_B)
    if reset_B is not None: state = where_rows(reset_B, jax.tree.map(jnp.zeros_like, state), state)
    inputs = jax.tree.map(lambda a: a[:, None], inputs)
    streams, tail = self.projections.convolve(state.tail_BxTxE, inputs)
    item = jax.tree.map(lambda a: a[:, 0], self.projections.items(streams, inputs))
    gates = self.tiers.control(inputs['x'][:, 0], state.m_BxHxSxK) if self.config.tiers.controller else None
    if gates: item = item.replace(address=item.address * gates[0][..., None].astype(item.address.dtype))
    new = where_rows(write_mask_B, self.write(state.replace(tail_BxTxE=tail), item), state)
    y_BxE = self.read(new if self.order == 'after' else state, item)
    if gates: y_BxE = y_BxE * self._per_channel(gates[1]).astype(y_BxE.dtype)
    if self.config.tiers.kind: new = where_rows(write_mask_B, self._consolidate(new, item, gates), state)
    new = where_rows(mask_B, new, state)
    return new, y_BxE if mask_B is None else jnp.where(mask_B[:, None], y_BxE, 0)

  def _per_channel(self, gate_BxH):
    G, _, _, K = self.parts.shape
    return jnp.tile(jnp.repeat(gate_BxH, K, -1), (1, G))

  def _consolidate(self, state, item: Items, gates=None):
    """Counts the token; every `interval` tokens a share of the fast slots enters the slow ones."""
    count_B = state.count_B + 1
    slow = self.tiers.consolidate(state.slow_BxHxSxK, state.m_BxHxSxK, item.bound, item.address, gate_BxH=gates and gates[2])
    slow = where_rows(count_B % self.config.tiers.interval == 0, slow, state.slow_BxHxSxK)
    return state.replace(slow_BxHxSxK=slow, count_B=count_B)

  @property
  def form(self) -> str:
    """The form in force: chunk, unless a keep per channel (associative) or a controller (scan) rules it out."""
    kind = self.config.form.kind
    if kind != 'auto': return kind
    if self.config.tiers.controller: return 'scan'
    return 'associative' if self.config.keep.kind == 'channel' else 'chunk'

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """All tokens in the configured form; equals the scan of `step`."""
    flow = dict(write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    if self.form == 'scan': return self.scan(state, inputs, mask_BxL, **flow)
    if not self.config.tiers.kind: return self._mix_items(state, inputs, mask_BxL, **flow)
    return self._mix_tiers(state, inputs, mask_BxL, **flow)

  def hands_over(self, length, *, mask_BxL=None, write_mask_BxL=None, **flow):
    """Where the slots are a sum over pieces (no delta rule, no tiers, not token by token), and all tokens are written."""
    c = self.config
    is_sum = self.form != 'scan' and not c.tiers.kind and c.keep.erase != 'slot'
    return is_sum and length >= c.conv_width and mask_BxL is None and write_mask_BxL is None

  def piece(self, state, inputs, *, axis, reset_BxL=None, **flow):
    """Each piece sums up its own tokens and takes what those before it left."""
    return self._mix_items(state, inputs, None, write_mask_BxL=None, reset_BxL=reset_BxL, axis=axis)

  def _items(self, state, inputs, mask_BxL, *, write_mask_BxL=None, reset_BxL=None, axis='') -> tuple[Items, jax.Array, Any]:
    reset_BxL = real_resets(reset_BxL, mask_BxL)
    written_BxL = both(mask_BxL, write_mask_BxL)
    streams, tail = self.projections.convolve(state.tail_BxTxE, inputs, written_BxL=written_BxL, reset_BxL=reset_BxL, axis=axis)
    return self.projections.items(streams, inputs, write_mask_BxL), tail, reset_BxL

  def _mix_items(self, state, inputs, mask_BxL, *, write_mask_BxL, reset_BxL, axis=''):
    items, tail, reset_BxL = self._items(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL, axis=axis)
    pieces = {'axis': axis} if axis else {}
    flow = dict(mask_BxL=mask_BxL, reset_BxL=reset_BxL, **pieces)
    def run(m, items):
      m, mixed = self.mixing(m, items, **flow)
      return m, self._reads(mixed, items)
    if self._is_fused(items, axis): m, y_BxLxE = self._fused(state.m_BxHxSxK, items, **flow)
    else: m, y_BxLxE = (jax.checkpoint(run) if self.config.form.remat else run)(state.m_BxHxSxK, items)
    if mask_BxL is not None: y_BxLxE = jnp.where(mask_BxL[..., None], y_BxLxE, 0)
    return state.replace(m_BxHxSxK=m, tail_BxTxE=tail), y_BxLxE

  def mixing(self, m, items: Items, pick=None, **flow):
    """(state, mixed slots) by the op of the configured address kind and erase rule; `pick` replaces that of the items."""
    c = self.config
    flow = {**flow, **self._options(items)}
    if c.address.kind == 'copies':
      m, seen = slot_copies(m, items.bound, **flow)
      return m, jnp.broadcast_to(seen[:, :, None], items.query.shape)
    pick = items.pick if pick is None else pick
    if c.keep.erase == 'slot': return slot_delta(m, items.bound, items.address, pick, beta_BxLxH=items.gate, **flow)
    if pick is None: pick = self._picks(slot_scores(m, items.bound, items.address, self.projections.probe(items.query), **flow))
    return slot_mix(m, items.bound, items.address, pick, **flow)

  def _options(self, items: Items):
    c = self.config
    return dict(order=self.order, form=self.form, chunk=c.form.chunk, log_keep=items.log_keep, decay=c.keep.form, floor=c.keep.log_floor)

  def _is_fused(self, items: Items, axis: str) -> bool:
    c = self.config
    if c.keep.erase or items.pick is None: return False
    return is_fused(c.form.backend, items.query, items.address, binding=c.binding.kind, axis=axis, **self._options(items))

  def _fused(self, m, items: Items, **flow):
    """(state, reads [B, L, E]) by the kernels, which bind and unbind themselves and compute again in the backward pass."""
    b = self.config.binding
    value = self.projections.gated_value(items.value, items.gate)
    m, y = holographic_mix(m, (items.key, value, items.query), items.address, items.pick, binding=b.kind, backend='pallas', **flow,
                           **self._options(items))
    return m, self._signal(y)

  def _mix_tiers(self, state, inputs, mask_BxL, *, write_mask_BxL, reset_BxL):
    """By intervals where every row stands at one (no holes, no document starting inside); token by token otherwise."""
    def slow(state): return self.scan(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    if write_mask_BxL is not None: return slow(state)
    resets, start = real_resets(reset_BxL, mask_BxL), state
    if resets is not None: start = where_rows(resets[:, 0], jax.tree.map(jnp.zeros_like, state), state)
    aligned = jnp.all(start.count_B % self.config.tiers.interval == 0)
    if resets is not None: aligned &= ~jnp.any(resets[:, 1:])
    if mask_BxL is not None: aligned &= ~jnp.any(mask_BxL[:, 1:] & ~mask_BxL[:, :-1])
    def fast(state): return self._intervals(start, inputs, mask_BxL)
    return jax.lax.cond(aligned, fast, slow, state)

  def _intervals(self, state, inputs, mask_BxL):
    """The fast form of two tiers: chunks inside an interval, one consolidation after it."""
    size, L = self.config.tiers.interval, inputs['position_BxL'].shape[1]
    items, tail, _ = self._items(state, inputs, mask_BxL)
    B, N = state.count_B.shape[0], -(-L // size)
    valid_BxL = jnp.ones((B, L), bool) if mask_BxL is None else mask_BxL
    cut = lambda a: jnp.moveaxis(jnp.pad(a, [(0, 0), (0, N * size - L)] + [(0, 0)] * (a.ndim - 2)).reshape(
        a.shape[0], N, size, *a.shape[2:]), 1, 0)
    static = items.log_keep if items.log_keep.shape[1] == 1 < L else None
    chunks = jax.tree.map(cut, (items.replace(log_keep=None) if static is not None else items, valid_BxL))
    def interval(state, chunk):
      item, valid_BxC = chunk
      if static is not None: item = item.replace(log_keep=static)
      m, mixed = self.mixing(state.m_BxHxSxK, item, mask_BxL=valid_BxC, reset_BxL=None)
      slow = jnp.einsum('blghs,bhsk->blghk', item.pick.astype(m.dtype), state.slow_BxHxSxK)
      y_BxCxE = self._reads(self.tiers.blend(mixed, slow), item)
      merged = self.tiers.consolidate(state.slow_BxHxSxK, m, item.bound[:, -1], item.address[:, -1])
      slow = where_rows(valid_BxC[:, -1], merged, state.slow_BxHxSxK)
      count_B = state.count_B + valid_BxC.astype(jnp.int32).sum(1)
      return state.replace(m_BxHxSxK=m, slow_BxHxSxK=slow, count_B=count_B), jnp.where(valid_BxC[..., None], y_BxCxE, 0)
    body = jax.checkpoint(interval) if self.config.form.remat else interval
    state, y = jax.lax.scan(body, state.replace(tail_BxTxE=tail), chunks)
    return state, jnp.moveaxis(y, 0, 1).reshape(B, N * size, -1)[:, :L]

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """RMS norm of the read (only here: a normalised trace would forget), optional gate, output projection."""
    c = self.config.read
    gate_BxLxE = self.out_gate(x_BxLxD) if c.out_gate else None
    if c.norm:
      width = self.parts.shape[-1] if c.norm == 'head' else y_BxLxE.shape[-1]
      y_BxLxE = head_norm(y_BxLxE, self.scale, gate_BxLxE, width=width, dtype=self.dtype, backend=self.config.form.backend)
    elif c.out_gate: y_BxLxE = y_BxLxE * jax.nn.silu(gate_BxLxE)
    return self.out(y_BxLxE)

  def aux(self, state, inputs, y_BxLxE, **context):
    """Auxiliary losses (specification section 6) and monitors."""
    items, _, resets = self._items(state, inputs, **{n: context[n] for n in FLOW})
    written_BxL = both(context['mask_BxL'], context['write_mask_BxL'])
    losses = auxiliary_losses(self, state.m_BxHxSxK, items, written_BxL=written_BxL, reset_BxL=resets,
                              key=context['key'], token_BxL=context['token_BxL'])
    return {**super().aux(state, inputs, y_BxLxE), **monitors(items), **losses}

  def statistics(self, state, inputs, y_BxLxE, **context):
    """Slot use, horizons and norms for the figures."""
    items, _, _ = self._items(state, inputs, **{n: context[n] for n in FLOW})
    return {**super().statistics(state, inputs, y_BxLxE), **slot_statistics(self, items, state)}
