"""One token of a neural memory by kernels, which rewrite in place all that is large in its state."""
import jax
import jax.numpy as jnp

from memjax.memory.base import where_rows
from memjax.memory.neural_held import NeuralState
from memjax.ops.backend import uses_kernels
from memjax.ops.neural_scan import tell
from memjax.ops.neural_steps import advance, steps
from memjax.ops.pallas_step_neural import Token, neural_step, supports

MOST = 128                           # rows x heads up to which kernels took a token faster than XLA


def has_kernels(memory, many: int) -> bool:
  """Whether kernels take a token of `many` rows x heads: what they compute, where asked for or, with exec.backend auto, where they won."""
  c, rule = memory.config, memory.rule
  own = rule.mode == 'token' and c.write.window == 1 and not (c.waits or c.write.per_tensor or c.gates.surprise or c.gates.row_factor)
  chosen = rule.backend == 'pallas' or many <= MOST
  return chosen and uses_kernels(rule.backend, rule.dtype) and own and supports(rule, c.chunk)


def emptied(state: NeuralState, *, in_place: bool) -> NeuralState:
  """An empty state; `in_place`: but for what kernels empty."""
  empty = jax.tree.map(jnp.zeros_like, state)
  if not in_place: return empty
  pending = state.pending.replace(push_BxHxQxC=empty.pending.push_BxHxQxC, turn_BxHxQxQ=empty.pending.turn_BxHxQxQ)
  return empty.replace(fast=state.fast, pending=pending)


def fused_step(memory, state: NeuralState, found: tuple, flags: tuple) -> tuple:
  """(state, y [B, E], told) of one token: `found` are its gates, tokens and items, `flags` (written_B, reset_B or None). The gradient is
  that of the step in XLA."""
  def by_kernels(*given): return _by_kernels(memory, given)
  def plain(start, state, found, flags):
    if flags[1] is not None: state = where_rows(flags[1], emptied(state, in_place=False), state)
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (flags[0].shape[0], *a.shape[1:])), start.fast)
    return memory.token_step(start._replace(fast=rows), state, found, flags[0])
  run = jax.custom_vjp(by_kernels)
  run.defvjp(lambda *given: (by_kernels(*given), given), lambda given, cotangents: jax.vjp(plain, *given)[1](cotangents))
  return run(memory.start(1), state, found, flags)


def _by_kernels(memory, given):
  start, state, (gates, tokens, items), (written_B, reset_B) = given
  old, rule, C = state.pending, memory.rule, memory.config.chunk
  slot_B = jnp.where(written_B, state.slot_B, C)                                     # C: it does not write
  full_B = slot_B + 1 == C
  at = jnp.broadcast_to((jnp.arange(C)[None] == slot_B[:, None])[:, None], (*tokens.weight.shape[:2], C)).astype(memory.state_dtype)
  turn, push = advance(steps(rule.momentum, jax.tree.map(lambda a: a[..., 0], gates)), old.turn, old.push_BxHxQxC, at)
  change = turn - jnp.eye(turn.shape[-1], dtype=turn.dtype)[None, None]
  pending = old.replace(push_BxHxQxC=where_rows(written_B, push, old.push_BxHxQxC),
                        turn_BxHxQxQ=where_rows(written_B, change, old.turn_BxHxQxQ))
  after = pending.reads()
  made = (after if rule.read == 'after' else old.reads())._replace(turn=after.turn, push=after.push)
  marks = jnp.stack([slot_B, jnp.zeros_like(slot_B) if reset_B is None else reset_B.astype(slot_B.dtype), full_B.astype(slot_B.dtype)], -1)
  rings = {**{f'{side}_{n}': ring for side in 'ad' for n, ring in getattr(old, side).items()},
           'key': old.key_BxCxHxK, 'value': old.value_BxCxHxV, 'gate': old.gate_BxCxGxH}
  token = Token(items.query[:, 0], items.key[:, 0], items.value[:, 0], tokens.weight, items.gate[:, 0])
  (fast, rings), y_BxHxV, told = neural_step(rule, start, (state.fast, rings), token, coefficients=made, marks_Bx3=marks)
  gone = lambda a: where_rows(full_B, jnp.zeros_like(a), a)
  pending = pending.replace(
      **{side: {n: rings[f'{side}_{n}'] for n in getattr(old, side)} for side in 'ad'}, key_BxCxHxK=rings['key'],
      value_BxCxHxV=rings['value'], gate_BxCxGxH=rings['gate'], push_BxHxQxC=gone(pending.push_BxHxQxC),
      turn_BxHxQxQ=gone(pending.turn_BxHxQxQ))
  new = state.replace(fast=fast, pending=pending, slot_B=jnp.where(full_B, 0, jnp.where(written_B, state.slot_B + 1, state.slot_B)))
  return new, y_BxHxV.reshape(y_BxHxV.shape[0], -1).astype(memory.dtype), tell(rule, told, 1)
