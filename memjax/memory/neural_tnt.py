"""A neural memory of large chunks and local ones of small chunks that start anew at every shard of a document (TNT, arXiv 2511.07343)."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from memjax.memory.base import Memory, both, real_resets, where_rows
from memjax.memory.neural import Neural
from memjax.memory.neural_held import NeuralState
from memjax.memory.neural_inputs import NeuralInputs
from memjax.ops.counts import cumulate
from memjax.ops.nested_scan import nested_scan
from memjax.ops.neural_layout import lay_out, rearrange
from memjax.ops.neural_tnt import project_pending, project_query


@struct.dataclass
class TntInputs:
  """What the large memory is given, and the gates [B, L, G, H] of each local one."""
  whole: NeuralInputs
  gates: tuple


@struct.dataclass
class TntState:
  """The states of all memories, and how many tokens of its shard each row has written."""
  whole: NeuralState
  local: tuple
  place_B: jax.Array


class NeuralLocal(Neural):
  """`Neural` behind the projections of another: it has gates of its own, and its queries may be seen through the keys of their chunk."""
  project_queries: bool = True

  def _in_slots(self, state, items, layout):
    slots = super()._in_slots(state, items, layout)
    if not self.project_queries: return slots
    rows = lambda a: jnp.swapaxes(a.reshape(a.shape[0], -1, *a.shape[3:]), 1, 2).astype(self.state_dtype)
    query = project_query(rows(slots.query), rows(slots.key), rows(slots.gate[..., -1, :]), self.config.chunk)
    return slots.replace(query=jnp.swapaxes(query, 1, 2).reshape(slots.query.shape).astype(slots.query.dtype))

  def read_pending(self, state, query_BxLxHxK, start=None):
    """As in `Neural`, with queries seen through the pending keys."""
    if self.project_queries:
      held = state.pending
      query_BxLxHxK = project_pending(query_BxLxHxK.astype(self.state_dtype), held.key_BxCxHxK, held.gate_BxCxGxH[:, :, -1]).astype(
          query_BxLxHxK.dtype)
    return super().read_pending(state, query_BxLxHxK, start)


class NeuralTnt(Memory):
  """The kind `neural` in mode 'tnt': reads of all memories are summed."""

  def setup(self):
    c, shared = self.config, dict(dtype=self.dtype, std=self.std, lora=self.lora)
    self.whole = Neural(c.whole, self.width, grafted=self.grafted, out_std=self.out_std, name='whole', **shared)
    self.locals = [NeuralLocal(c.local(n), self.width, name=f'local_{n}', project_queries=c.locals.project, **shared)
                   for n in range(len(c.locals.chunks))]

  @property
  def inert(self) -> tuple[str, ...]:
    """The learned starts, where they are not to be learned."""
    return Neural(self.config.whole, self.width, parent=None).inert

  def init_state(self, batch: int, max_len: int = 0) -> TntState:
    """The learned starts and nothing pending."""
    c, make = self.config, lambda config: Neural(config, self.width, dtype=self.dtype, parent=None).init_state(batch, max_len)
    return TntState(make(c.whole), tuple(make(c.local(n)) for n in range(len(c.locals.chunks))), jnp.zeros((batch,), jnp.int32))

  @property
  def wants_stream(self) -> bool:
    """Whether keys and values are made of the residual stream."""
    return self.config.proj.source == 'stream'

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array, *, stream_BxLxD: jax.Array | None = None) -> TntInputs:
    """Raw queries, keys and values, and the gates of every memory."""
    stored_BxLxD = self.whole.projections.stored(x_BxLxD, stream_BxLxD)
    return TntInputs(self.whole.projections(x_BxLxD, position_BxL, stored_BxLxD),
                     tuple(local.projections.gates(stored_BxLxD) for local in self.locals))

  def _given(self, inputs: TntInputs, tail: dict, **flow) -> list:
    """What each local memory is given: queries, keys and values after the convolution, and its own gates."""
    items, _ = self.whole.projections.items(inputs.whole, tail, **flow)
    streams = tuple(a.reshape(*a.shape[:2], -1) for a in (items.query, items.key, items.value))
    return [NeuralInputs(streams, gate.at[:, :, -1].set(items.gate[:, :, -1])) for gate in inputs.gates]

  def step(self, state, inputs, mask_B=None, *, write_mask_B=None, reset_B=None):
    """One token in every memory; local ones are empty again after the last token of a shard."""
    reset_B = real_resets(reset_B, mask_B)
    if reset_B is not None: state = where_rows(reset_B, jax.tree.map(jnp.zeros_like, state), state)
    written_B, flow = both(mask_B, write_mask_B), dict(write_mask_B=write_mask_B)
    given = self._given(jax.tree.map(lambda a: a[:, None], inputs), state.whole.tail)
    whole, y_BxE = self.whole.step(state.whole, inputs.whole, mask_B, **flow)
    place_B = (state.place_B + (1 if written_B is None else written_B.astype(jnp.int32))) % self.config.locals.shard
    new = []
    for local, own, inputs in zip(self.locals, state.local, given, strict=True):
      own, more_BxE = local.step(own, jax.tree.map(lambda a: a[:, 0], inputs), mask_B, **flow)
      new, y_BxE = [*new, where_rows(place_B == 0, jax.tree.map(jnp.zeros_like, own), own)], y_BxE + more_BxE
    return TntState(whole, tuple(new), place_B), y_BxE

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """All tokens: as `Neural.parallel`; token by token where some may not write. Of calls longer than a shard the local memories take all
    shards at once, as rows, if each has room."""
    B, L = inputs.whole.gate_BxLxGxH.shape[:2]
    real_BxL = jnp.ones((B, L), bool) if mask_BxL is None else mask_BxL
    reset_BxL = jnp.zeros((B, L), bool) if reset_BxL is None else reset_BxL & real_BxL
    def by_steps(state):
      first = lambda a: jnp.swapaxes(a, 0, 1)
      def token(state, token):
        inputs, mask_B, write_mask_B, reset_B = token
        return self.step(state, inputs, mask_B, write_mask_B=write_mask_B, reset_B=reset_B)
      state, y = nested_scan(token, state, jax.tree.map(first, (inputs, real_BxL, write_mask_BxL, reset_BxL)))
      return state, first(y)
    def at_once(state): return self._at_once(state, inputs, real_BxL, reset_BxL)
    if write_mask_BxL is None: return at_once(state)
    return jax.lax.cond(jnp.any(real_BxL & ~write_mask_BxL), by_steps, at_once, state)

  def _at_once(self, state, inputs, real_BxL, reset_BxL):
    S, L = self.config.locals.shard, real_BxL.shape[1]
    given = self._given(inputs, state.whole.tail, written_BxL=real_BxL, reset_BxL=reset_BxL)
    whole, y_BxLxE = self.whole.parallel(state.whole, inputs.whole, real_BxL, reset_BxL=reset_BxL)
    order_BxL = cumulate(real_BxL) - 1
    base_BxL = cumulate(jnp.where(reset_BxL, order_BxL, -state.place_B[:, None]), jnp.maximum)
    spot_BxL = (order_BxL - base_BxL) % S
    count_B = order_BxL[:, -1] + 1 - base_BxL[:, -1]           # tokens of the last document, from the start of a shard
    def in_turn(local):
      runs = [m.parallel(own, one, real_BxL, reset_BxL=reset_BxL | real_BxL & (spot_BxL == 0))
              for m, own, one in zip(self.locals, local, given, strict=True)]
      return tuple(own for own, _ in runs), sum(y for _, y in runs)
    def in_rows(local):
      runs = [self._shards(m, own, one, layout=layout) for m, own, one in zip(self.locals, local, given, strict=True)]
      return tuple(own for own, _ in runs), sum(y for _, y in runs)
    layout = lay_out(real_BxL, reset_BxL, state.place_B, chunk=S, count=-(-L // S) + self.config.exec.spare)
    local, more_BxLxE = jax.lax.cond(layout.fits, in_rows, in_turn, state.local) if L > S else in_turn(state.local)
    place_B = jnp.where(real_BxL.any(1), count_B % S, state.place_B)
    local = where_rows(place_B == 0, jax.tree.map(jnp.zeros_like, local), local)
    return TntState(whole, local, place_B), y_BxLxE + more_BxLxE

  def _shards(self, memory: NeuralLocal, state: NeuralState, inputs: NeuralInputs, *, layout: Any) -> tuple:
    """(state after the last shard, y [B, L, E]) of one local memory, shards as rows."""
    B, N, S = *layout.full.shape, self.config.locals.shard
    def fold(a):
      a = rearrange(jnp.concatenate([jnp.zeros((B, S, *a.shape[2:]), a.dtype), a], 1), layout.source, layout.place)
      return a.reshape(B * N, S, *a.shape[2:])
    real = fold(jnp.ones(inputs.gate_BxLxGxH.shape[:2], self.state_dtype)) > 0
    first_BxN = (jnp.arange(N) == 0)[None] & ~layout.begins[:, None]
    rows = jax.tree.map(lambda a: jnp.repeat(a, N, 0), state)
    rows = where_rows(first_BxN.reshape(-1), rows, jax.tree.map(jnp.zeros_like, rows))
    rows, y = memory.parallel(rows, jax.tree.map(fold, inputs), real)
    last = lambda a: jnp.take_along_axis(a.reshape(B, N, *a.shape[1:]), layout.last.reshape(-1, *(1,) * a.ndim), 1)[:, 0]
    some_B = (layout.place[:, S:] < N * S).any(1)
    y_BxLxE = rearrange(y.reshape(B, N * S, -1), layout.place, layout.source)[:, S:]
    return where_rows(some_B, jax.tree.map(last, rows), state), y_BxLxE

  def flush(self, state: TntState) -> TntState:
    """As in `Neural`, of each memory; shards go on. Reads change: the large memory reads as in mode block, queries see keys of chunks."""
    local = tuple(memory.flush(own) for memory, own in zip(self.locals, state.local, strict=True))
    return state.replace(whole=self.whole.flush(state.whole), local=local)

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """That of the large memory."""
    return self.whole.readout(x_BxLxD, y_BxLxE)

  def mix(self, x_BxLxD, state, **context):
    """(y [B, L, E] before the readout, state, aux), as in the base class; aux tells of the large memory."""
    y_BxLxE, new, aux = super().mix(x_BxLxD, state, **context)
    return y_BxLxE, new, {**aux, **self.whole.monitors(new.whole)}

  def statistics(self, state, inputs, y_BxLxE, **context):
    """Those of the large memory."""
    return self.whole.statistics(state.whole, inputs.whole, y_BxLxE, **context)
