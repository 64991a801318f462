"""The neural memory whose writes wait for the end of their chunk: networks that mix tokens, and gates of whole chunks."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.memory.base import where_rows
from memjax.memory.neural import Neural
from memjax.memory.neural_held import Pending
from memjax.memory.neural_inputs import NeuralItems
from memjax.ops.neural_scan import tell
from memjax.ops.neural_whole import Whole, tell_whole, whole_coefficients, write_whole


class NeuralWaiting(Neural):
  """`Neural` with a network of attention, or in mode 'chunk_gates': the state keeps the tokens of a chunk, not their factors."""
  is_block = False

  def init_state(self, batch, max_len=0):
    """The learned start and no tokens."""
    state, H, K, rule = super().init_state(batch, max_len), self.shape[0], self.parts.key_width, self.rule
    held = state.pending
    query = jnp.zeros((batch, self.config.chunk, H, K), self.state_dtype) if rule.network.mixes else None
    state = state.replace(pending=Pending({}, {}, held.key_BxCxHxK, held.value_BxCxHxV, held.gate_BxCxGxH, None, None, query))
    if not rule.refresh: return state
    return state.replace(anchor=jax.tree.map(jnp.zeros_like, {name: levels[0] for name, levels in state.fast.items()}),
                         count_B=jnp.zeros((batch,), self.state_dtype))

  def coefficients(self, gates):
    """What whole chunks do."""
    return whole_coefficients(self.rule, gates)

  def carried(self, state):
    """What the scan over chunks hands on."""
    return Whole(state.fast, state.anchor, state.count_B)

  def moved(self, state, memory):
    """The state with what the scan left."""
    return state.replace(fast=memory.fast, anchor=memory.fixed, count_B=memory.count_B)

  def _pending(self, state, start, slots, layout):
    kept, wide = self._kept(slots, layout), self.state_dtype
    query = kept.query.astype(wide) if self.rule.network.mixes else None
    return Pending({}, {}, kept.key.astype(wide), kept.value.astype(wide), kept.gate.astype(wide), None, None, query)

  def _token_step(self, state, items, written_B):
    rule, start, C, rows = self.rule, self.start(written_B.shape[0]), self.config.chunk, jnp.arange(written_B.shape[0])
    def put(ring, one, slot_B): return ring.at[rows, slot_B].set(one[:, 0].astype(ring.dtype), mode='drop')
    slot_B, old = jnp.where(written_B, state.slot_B, C), state.pending                  # C: dropped
    held = NeuralItems(None, *(put(ring, one, slot_B) for ring, one in (
        (old.key_BxCxHxK, items.key), (old.value_BxCxHxV, items.value), (old.gate_BxCxGxH, items.gate))))
    query = put(old.query_BxCxHxK, items.query, slot_B) if rule.network.mixes else None
    pending, memory = Pending({}, {}, held.key, held.value, held.gate, None, None, query), self.carried(state)
    full_B = written_B & (state.slot_B + 1 == C)
    def complete(memory):
      gates, tokens = self.tokens(held)
      return where_rows(full_B, write_whole(rule, start, memory, tokens, made=self.coefficients(gates))[0], memory)
    new = self.moved(state, jax.lax.cond(jnp.any(full_B), complete, lambda memory: memory, memory))
    new = new.replace(pending=where_rows(full_B, jax.tree.map(jnp.zeros_like, pending), pending),
                      slot_B=jnp.where(full_B, 0, jnp.where(written_B, state.slot_B + 1, state.slot_B)))
    now = lambda a: jnp.take_along_axis(a, state.slot_B.reshape(-1, *(1,) * (a.ndim - 1)), 1)
    if not rule.network.mixes:
      told = tell(rule, tell_whole(rule, start, memory, self.tokens(items)[1]), 1)
      return new, self._flat(self.read_anchor(new, items.query))[:, 0], told
    told = tell(rule, tell_whole(rule, start, memory, self.tokens(held)[1]), C)
    told = jax.tree.map(lambda a: jnp.swapaxes(now(jnp.swapaxes(a, 1, 2)), 1, 2), told)
    y_BxCxHxV = self.read_anchor(state, put(old.query_BxCxHxK, items.query, state.slot_B).astype(items.query.dtype))
    return new, self._flat(now(y_BxCxHxV))[:, 0], told

  def flush(self, state):
    """Raises UserError: a part of a chunk has no gates of its own."""
    raise UserError('net attention and mode chunk_gates write whole chunks; read tokens up to the end of one')

  def read_pending(self, state, query_BxLxHxK):
    """y [B, L, H, V]: queries read the weights after the last complete chunk; those of attention as one text of their own."""
    return self.read_anchor(state, query_BxLxHxK)
