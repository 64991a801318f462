"""Neural long-term memory (Titans, Behrouz et al. 2024): a network that learns the text by gradient descent while it reads.

The state is the change of its weights since the learned start, their momenta, and the pending tokens of the current chunk as rank-1
factors: weights are rewritten once a chunk, and every token still reads the weights after its own write.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax.memory.base import both, real_resets, where_rows
from memjax.memory.neural_held import RECENT, NeuralState, Pending, watched
from memjax.memory.neural_inputs import NeuralItems
from memjax.memory.neural_state import NeuralStep
from memjax.ops import neural as ops
from memjax.ops.backend import uses_kernels
from memjax.ops.counts import cumulate
from memjax.ops.nested_scan import nested_scan
from memjax.ops.neural_backend import is_fused
from memjax.ops.neural_layout import Layout, lay_out, rearrange
from memjax.ops.neural_reads import find_factors
from memjax.ops.neural_scan import Chunk, Told, scan_chunks
from memjax.ops.neural_steps import Coefficients, Gates, coefficients, for_pairs
from memjax.ops.pallas_chunk import KEPT


class Neural(NeuralStep):
  """The kind `neural`; every option of `NeuralConfig`."""

  def start(self, rows: int) -> ops.Weights:
    """The learned start for some rows, after the write of persistent tokens: a chunk of their own, from W_init and no momentum."""
    if not self.config.write.persistent: return super().start(rows)
    count, wide, before = self.config.write.persistent, self.state_dtype, self.reach[1]
    home, rule = super().start(1), dataclasses.replace(self.rule, dtype=wide)          # once a call: rounded less
    tail = {name: jnp.zeros((1, *shape), wide) for name, shape in self.parts.tails.items()}
    items, _ = self.projections.items(self.project(self.prefix[None].astype(self.dtype), jnp.arange(count)[None]), tail)
    spread = lambda front, back: jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (front, back), *((0, 0),) * (a.ndim - 2))), items)
    gates, tokens = self.tokens(spread(before, self.config.chunk - count))
    made = self.coefficients(jax.tree.map(lambda a: a[..., before:], gates))
    nothing = {name: (jnp.zeros_like(a),) * rule.levels for name, a in home.fast.items()}
    found = find_factors(rule, home, nothing, tokens, coefficients=made)
    new = ops.finish(rule, home, ops.commit(rule, home, nothing, found=found, coefficients=made))
    return home._replace(fast={name: jnp.repeat(a + new[name][0], rows, 0) for name, a in home.fast.items()})

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """All tokens: in chunks where all may write and every row has room for its chunks; at once where none may write; else by steps."""
    flow = dict(write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    B, L = inputs.gate_BxLxGxH.shape[:2]
    real_BxL = jnp.ones((B, L), bool) if mask_BxL is None else mask_BxL
    reset_BxL = jnp.zeros((B, L), bool) if reset_BxL is None else reset_BxL & real_BxL
    def by_steps(state): return self._by_steps(state, inputs, mask_BxL, **flow)
    def in_chunks(state):
      layout = self._layout(state, real_BxL, reset_BxL)
      fast = lambda state: self.chunks(state, inputs, layout, (real_BxL, reset_BxL), whole=mask_BxL is None)[:2]
      if layout.full.shape[1] >= L: return fast(state)                                                       # a chunk for each token
      if not self.config.exec.aligned: return jax.lax.cond(layout.fits, fast, by_steps, state)
      state, y_BxLxE = fast(state)
      return state, jnp.where(layout.fits, y_BxLxE, jnp.nan)
    if write_mask_BxL is None: return in_chunks(state)
    some = jnp.any(real_BxL & write_mask_BxL)
    later = jnp.any(reset_BxL & (cumulate(real_BxL) > 1))
    def frozen(state): return by_steps(state) if self.rule.network.mixes else self._frozen(state, inputs, real_BxL, reset_BxL)
    partly = lambda state: jax.lax.cond(some | later, by_steps, frozen, state)
    return jax.lax.cond(jnp.any(real_BxL & ~write_mask_BxL), partly, in_chunks, state)

  def _by_steps(self, state, inputs, mask_BxL, *, write_mask_BxL, reset_BxL):
    """The scan of `step`."""
    B, L = inputs.gate_BxLxGxH.shape[:2]
    real_BxL = jnp.ones((B, L), bool) if mask_BxL is None else mask_BxL
    def token(state, token):
      inputs, mask_B, write_mask_B, reset_B = token
      return self.step(state, inputs, mask_B, write_mask_B=write_mask_B, reset_B=reset_B)
    first = lambda a: jnp.swapaxes(a, 0, 1)
    state, y_LxBxE = nested_scan(token, state, jax.tree.map(first, (inputs, real_BxL, write_mask_BxL, reset_BxL)))
    return state, first(y_LxBxE)

  def _layout(self, state, real_BxL, reset_BxL) -> Layout:
    C = self.config.chunk
    return lay_out(real_BxL, reset_BxL, state.slot_B, chunk=C, count=-(-real_BxL.shape[1] // C) + self.config.exec.spare)

  def _frozen(self, state, inputs, real_BxL, reset_BxL):
    """No token writes: all read one memory."""
    state = where_rows(reset_BxL.any(1), jax.tree.map(jnp.zeros_like, state), state)
    items, _ = self.projections.items(inputs, state.tail, written_BxL=jnp.zeros_like(real_BxL))
    y_BxLxE = self._flat(self.read_pending(state, items.query))
    return state, jnp.where(real_BxL[..., None], y_BxLxE, 0)

  def chunks(self, state, inputs, layout: Layout, flow: tuple, *, whole: bool = False) -> tuple[NeuralState, jax.Array, Told]:
    """(state, y [B, L, E], what was told of each token [B, L, H]) by the scan over chunks; `whole`: no token is masked, which spares
    convolutions a gather and its scatter. If then slots are no more than tokens, tokens that fit lie in their slots as they are."""
    real_BxL, reset_BxL = flow
    layout = layout._replace(plain=whole and layout.source.shape[1] == real_BxL.shape[1])
    old, state = state, where_rows(layout.begins, jax.tree.map(jnp.zeros_like, state), state)
    start, before = self.start(real_BxL.shape[0]), self.reach[1]
    def prepare(state, inputs, tail):
      items, tail = self.projections.items(inputs, tail, written_BxL=None if whole else real_BxL, reset_BxL=reset_BxL)
      slots = self._in_slots(state, items, layout)
      rows = jax.lax.optimization_barrier(jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), slots))
      halo = self._halo(state, rows, jnp.swapaxes(layout.fresh, 0, 1)) if before else None
      gates, tokens = jax.lax.optimization_barrier(self.tokens(rows, halo))      # else small transposes are fused with large sums
      return slots, halo, tokens, self.plan(gates), jnp.swapaxes(rows.query, 2, 3), tail
    kept = jax.checkpoint_policies.save_only_these_names(KEPT)
    prepare = jax.checkpoint(prepare, policy=kept)                                                   # elementwise, cheap to do again
    slots, halo, tokens, found, query, tail = prepare(state, inputs, old.tail)
    chunks = Chunk(query, tokens, found, jnp.swapaxes(layout.full, 0, 1), jnp.swapaxes(layout.fresh, 0, 1))
    memory, (y, told) = self.scan_all(start, state, chunks, layout)
    slots = self.decided(slots, told)
    y_BxLxE = self._flat(self._back(y, layout))
    told = Told(*(self._back(a[..., None], layout)[..., 0] for a in told))
    new = state.replace(slot_B=layout.slot, tail=tail, running_BxHxY=self._running(state, told, real_BxL, reset_BxL))
    new = self.moved(new, memory)
    if before: new = new.replace(halo=self._last_halo(halo, slots, layout))
    if new.pending is not None: new = new.replace(pending=self._pending(new, start, slots, layout))
    return where_rows(real_BxL.any(1), new, old), jnp.where(real_BxL[..., None], y_BxLxE, 0), told

  def scan_all(self, start: ops.Weights, state: NeuralState, chunks: Chunk, layout: Layout) -> tuple[Any, tuple]:
    """(memory, (y [N, B, H, C, V], told)) of all chunks."""
    del layout
    e, rule = self.config.exec, self.rule
    if rule.mode == 'token' and is_fused(rule, chunks.tokens, chunks.query.shape[3]): start = self.start(1)   # one row, read by all
    return scan_chunks(rule, start, self.carried(state), chunks, group=e.group, unroll=e.unroll, detach=self.config.write.detach)

  def decided(self, slots: NeuralItems, told: Told) -> NeuralItems:
    """Slots that say which of their tokens wrote."""
    del told
    return slots

  def plan(self, gates: Gates) -> Any:
    """What chunks are known to do by their gates."""
    return self.coefficients(gates)

  def coefficients(self, gates: Gates) -> Coefficients:
    """The coefficients of chunks."""
    made = coefficients(self.rule.momentum, gates, inside=not self.is_block, window=self.reach[1] + 1, pairs=self.rule.pairs,
                        gamma=self.gamma, fused=uses_kernels(self.config.exec.backend, self.dtype))
    if not self.config.gates.row_factor: return made
    share_HxC = self.row_factor()
    return made._replace(weigh=made.weigh * share_HxC[None, None, :, :, None], push=made.push * share_HxC[None, None, :, None, -1:])

  def carried(self, state: NeuralState) -> Any:
    """What the scan over chunks hands on."""
    return (state.anchor, state.fast) if self.is_block else state.fast

  def moved(self, state: NeuralState, memory: Any) -> NeuralState:
    """The state with what the scan left."""
    return state.replace(anchor=memory[0], fast=memory[1]) if self.is_block else state.replace(fast=memory)

  def _in_slots(self, state, items: NeuralItems, layout: Layout) -> NeuralItems:
    """Pending tokens and those of the call in their slots, [B, N, C, ...]; zeros where there is none."""
    C, pending = self.config.chunk, state.pending
    before = {} if pending is None else dict(key=pending.key_BxCxHxK, value=pending.value_BxCxHxV, gate=pending.gate_BxCxGxH,
                                                 query=pending.query_BxCxHxK)
    def cut(name):
      a = getattr(items, name)
      if layout.plain: return a.reshape(a.shape[0], -1, C, *a.shape[2:])
      first = before.get(name)
      first = jnp.zeros((a.shape[0], C, *a.shape[2:]), a.dtype) if first is None else first.astype(a.dtype)
      a = rearrange(jnp.concatenate([first, a], 1), layout.source, layout.place)
      return a.reshape(a.shape[0], -1, C, *a.shape[2:])
    return NeuralItems(*(cut(name) for name in ('query', 'key', 'value', 'gate')))

  def _halo(self, state, rows: NeuralItems, fresh_NxB) -> NeuralItems:
    """The tokens [N, B, window - 1, ...] before each chunk of items [N, B, C, ...] in slots; zeros where a document starts."""
    def before(old, a):
      a = jnp.concatenate([old[None].astype(a.dtype), a[:-1, :, -old.shape[1]:]])
      return jnp.where(fresh_NxB.reshape(*fresh_NxB.shape, *(1,) * (a.ndim - 2)), 0, a)
    return jax.tree.map(before, state.halo, rows.replace(query=None))

  def _last_halo(self, halo: NeuralItems, slots: NeuralItems, layout: Layout) -> NeuralItems:
    """The tokens of the window before the chunk that the next token belongs to."""
    def one(halo, a):
      take = lambda a: jnp.take_along_axis(a, layout.last.reshape(-1, *(1,) * (a.ndim - 1)), 1)[:, 0]
      return where_rows(layout.slot > 0, take(jnp.swapaxes(halo, 0, 1)), take(a)[:, -halo.shape[2]:]).astype(self.state_dtype)
    return jax.tree.map(one, halo, slots.replace(query=None))

  def _back(self, a, layout: Layout):
    """Outputs [N, B, H, C, width] at the tokens of the call, [B, L, H, width]."""
    N, B, H, C, width = a.shape
    a = jnp.moveaxis(a, (0, 2), (1, 3)).reshape(B, N * C, H, width)
    if layout.plain: return a
    return rearrange(a, layout.place, layout.source)[:, C:]

  def _running(self, state, told: Told, real_BxL, reset_BxL):
    """The running means after the call."""
    later_BxL = real_BxL.sum(1, keepdims=True) - cumulate(real_BxL)
    after_BxL = cumulate(reset_BxL) == reset_BxL.sum(1, keepdims=True)
    weight_BxL = jnp.where(real_BxL & after_BxL, (1 - RECENT) * RECENT ** later_BxL.astype(self.state_dtype), 0)
    carried_B = jnp.where(reset_BxL.any(1), 0, RECENT ** real_BxL.sum(1).astype(self.state_dtype))
    return jnp.einsum('bl,blhy->bhy', weight_BxL, watched(told, len(self.running))) + carried_B[:, None, None] * state.running_BxHxY

  def _kept(self, slots: NeuralItems, layout: Layout) -> NeuralItems:
    """The tokens [B, C, ...] of each row's last chunk where it is not complete; zeros elsewhere."""
    valid = jnp.arange(self.config.chunk)[None] < layout.slot[:, None]
    def last(a):
      a = jnp.take_along_axis(a, layout.last.reshape(-1, *(1,) * (a.ndim - 1)), 1)[:, 0]
      return jnp.where(valid.reshape(*valid.shape, *(1,) * (a.ndim - 2)), a, 0)
    return jax.tree.map(last, slots)

  def _pending(self, state, start, slots: NeuralItems, layout: Layout) -> Pending:
    """The tokens of each row's last chunk where it is not complete, with their factors at its start, the weights of the state."""
    memory, (pairs, before), kept = state.fast, self.reach, self._kept(slots, layout)
    valid = jnp.arange(self.config.chunk)[None] < layout.slot[:, None]
    gates, tokens = self.tokens(kept)
    whole = coefficients(self.rule.momentum, gates, window=before + 1, gamma=self.gamma)
    found = find_factors(self.rule, start, memory, tokens, coefficients=for_pairs(whole, pairs))
    wide, past = self.state_dtype, self.past_factors(start, memory, state.halo) if before else None
    def only(a, first=None):
      a = jnp.where(jnp.repeat(valid, pairs, 1)[:, None, :, None], a.astype(wide), 0)
      return a if first is None else jnp.concatenate([first.astype(wide), a], 2)
    eye = jnp.eye(self.rule.levels, dtype=wide)[None, None]
    sides = ((found.a, past.a), (found.d, past.d)) if before else ((found.a,), (found.d,))
    a, d = (jax.tree.map(only, *side) for side in sides)
    return Pending(a, d, kept.key.astype(wide), kept.value.astype(wide), kept.gate.astype(wide), whole.push, whole.turn - eye)

  def mix(self, x_BxLxD, state, **context):
    """(y [B, L, E] before the readout, state, aux), as in the base class; aux tells of the state after the call."""
    y_BxLxE, new, aux = super().mix(x_BxLxD, state, **context)
    return y_BxLxE, new, {**aux, **self.monitors(new)}

  def monitors(self, state):
    """Running means of inner loss, gradient norm and shares clipped and written; |W - W_init| and |S| over |W_init|; without gradient."""
    mean = {name: state.running_BxHxY[..., n].mean() for n, name in enumerate(self.running)}
    total = jnp.maximum(mean['weight'], 1e-9)
    size = lambda parts: jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in parts) + 1e-12)
    home = size(self.fast.values()) * state.slot_B.shape[0] ** 0.5
    told = {'inner_loss': mean['loss'] / total, 'surprise': mean['surprise'] / total,
            'weight_change': size(levels[0] for levels in state.fast.values()) / home}
    if self.rule.levels > 1: told['momentum'] = size(a for levels in state.fast.values() for a in levels[1:]) / home
    if self.config.rule.clip: told['clipped'] = mean['clipped'] / total
    if self.config.gates.surprise: told['written'] = mean['written'] / total
    return {name: jax.lax.stop_gradient(a.astype(jnp.float32)) for name, a in told.items()}

  def aux(self, state, inputs, y_BxLxE, *, mask_BxL=None, **context):
    """The means of the gates over the tokens of the call, without gradient."""
    gate = jax.lax.stop_gradient(inputs.gate_BxLxGxH.astype(jnp.float32))
    weight_BxL = jnp.ones(gate.shape[:2]) if mask_BxL is None else mask_BxL.astype(jnp.float32)
    mean_G = jnp.einsum('bl,blgh->g', weight_BxL, gate) / jnp.maximum(weight_BxL.sum() * gate.shape[-1], 1)
    return {**super().aux(state, inputs, y_BxLxE), **{name: mean_G[n] for n, name in enumerate(self.parts.names[:-1])}}

  def statistics(self, state, inputs, y_BxLxE, *, mask_BxL=None, write_mask_BxL=None, reset_BxL=None, **context):
    """Gates, inner loss and surprise of each token; cosine of its value, and of that of a token half the text away, with what its key
    recalls after the call, for the figures."""
    B, L = y_BxLxE.shape[:2]
    real_BxL = both(mask_BxL, write_mask_BxL)
    real_BxL = jnp.ones((B, L), bool) if real_BxL is None else real_BxL
    resets = real_resets(reset_BxL, real_BxL)
    resets = jnp.zeros((B, L), bool) if resets is None else resets
    new, _, told = self.chunks(state, inputs, self._layout(state, real_BxL, resets), (real_BxL, resets))
    items, _ = self.projections.items(inputs, state.tail, written_BxL=real_BxL, reset_BxL=resets)
    unit = lambda a: a.astype(jnp.float32) / jnp.maximum(jnp.linalg.norm(a.astype(jnp.float32), axis=-1, keepdims=True), 1e-12)
    V, K, first = self.shape[2], self.parts.key_width, lambda a, width: a[..., :width]                    # of several pairs the first
    value, recalled = unit(first(items.value, V)), unit(self.read_pending(new, first(items.key, K)))
    cosine = lambda value: jnp.sum(recalled * value, -1).mean(-1)
    gate = {f'{name}_BxLxH': inputs.gate_BxLxGxH[:, :, n] for n, name in enumerate(self.parts.names[:-1])}
    return {**super().statistics(state, inputs, y_BxLxE), **gate, 'inner_loss_BxLxH': told.loss, 'surprise_BxLxH': told.norm,
            'kept_BxLxH': told.kept, 'recall_BxL': cosine(value), 'control_BxL': cosine(jnp.roll(value, L // 2, 1))}
