"""Coefficients of a neural memory over chunks, row by row in a Pallas kernel through the Triton lowering, and their gradient in another.

    X_t = turn_t X_{t-1} + push_t e_t^T        X = [pushes Q x C | turns Q x Q], whose row 0 after token t is weigh[t], reach[:, t]

Equal to `neural_steps.unroll`, which doubles pieces: C rows need C^2 operations instead of many arrays of C x C. A program takes one
chunk in one warp, so that all chunks are at work at once. On a CPU the kernels run by interpretation.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Plan(NamedTuple):
  """What is fixed while tracing: entries of a turn, in the order of `steps`, after which the pushes come; levels."""
  turns: tuple[tuple[int, int], ...]
  levels: int
  dtype: Any
  is_compiled: bool = True


def _step(plan, refs, t):
  """({entry of the turn}, pushes) of token t, scalars."""
  return ({at: refs['steps'][n, t] for n, at in enumerate(plan.turns)},
          [refs['steps'][len(plan.turns) + q, t] for q in range(plan.levels)])


def _times(plan, turn, rows, *, transposed=False):
  """turn . rows, or its transpose; rows by level."""
  out = [None] * plan.levels
  for (row, column), x in turn.items():
    into, of = (column, row) if transposed else (row, column)
    made = x * rows[of]
    out[into] = made if out[into] is None else out[into] + made
  return [jnp.zeros_like(rows[0]) if x is None else x for x in out]


def _start(plan, C):
  """X before the first token: (pushes, turns by column)."""
  one = lambda value: jnp.full((), value, plan.dtype)
  return [jnp.zeros((C,), plan.dtype)] * plan.levels, [[one(float(p == q)) for p in range(plan.levels)] for q in range(plan.levels)]


def _forward(plan, refs, tell):
  """X after the last token; `tell(t, pushes, turns)` after each."""
  C = refs['steps'].shape[1]
  lanes = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
  def body(t, carry):
    (pushes, turns), (turn, push) = carry, _step(plan, refs, t)
    pushes = [x + jnp.where(lanes == t, push[q], 0) for q, x in enumerate(_times(plan, turn, pushes))]
    turns = [_times(plan, turn, column) for column in turns]
    tell(t, pushes, turns)
    return pushes, turns
  return jax.lax.fori_loop(0, C, body, _start(plan, C))


def unroll_kernel(plan, refs, out):
  """weigh [C, C], reach [Q, C], turn [Q, Q], push [Q, C] of a chunk."""
  def tell(t, pushes, turns):
    out['weigh'][t] = pushes[0]
    for q, column in enumerate(turns): out['reach'][q, t] = column[0]
  pushes, turns = _forward(plan, refs, tell)
  for p, x in enumerate(pushes): out['push'][p] = x
  for q, column in enumerate(turns):
    for p, x in enumerate(column): out['turn'][p, q] = x


def unroll_back_kernel(plan, refs, out):
  """The cotangents of the steps; `pushes` and `turns` hold X after each token."""
  C, Q = refs['steps'].shape[1], plan.levels
  lanes = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
  def tell(t, pushes, turns):
    for p in range(Q): out['pushes'][t, p] = pushes[p]
    for p in range(Q):
      for q in range(Q): out['turns'][t, p, q] = turns[q][p]
  _forward(plan, refs, tell)
  if plan.is_compiled: plgpu.debug_barrier()
  none, unit = _start(plan, C)
  def body(number, carry):
    t, (dpushes, dturns) = C - 1 - number, carry
    turn, _ = _step(plan, refs, t)
    dpushes = [x + refs['weigh'][t] if p == 0 else x for p, x in enumerate(dpushes)]
    dturns = [[x + refs['reach'][q, t] if p == 0 else x for p, x in enumerate(column)] for q, column in enumerate(dturns)]
    before, is_first = jnp.maximum(t - 1, 0), t == 0
    old = [jnp.where(is_first, none[q], out['pushes'][before, q]) for q in range(Q)]
    held = [[jnp.where(is_first, unit[q][p], out['turns'][before, p, q]) for p in range(Q)] for q in range(Q)]
    for n, (p, r) in enumerate(plan.turns):
      out['dsteps'][n, t] = jnp.sum(dpushes[p] * old[r]) + sum(dturns[q][p] * held[q][r] for q in range(Q))
    for p in range(Q): out['dsteps'][len(plan.turns) + p, t] = jnp.sum(jnp.where(lanes == t, dpushes[p], 0))
    return _times(plan, turn, dpushes, transposed=True), [_times(plan, turn, column, transposed=True) for column in dturns]
  last = [refs['push'][p] for p in range(Q)], [[refs['turn'][p, q] for p in range(Q)] for q in range(Q)]
  jax.lax.fori_loop(0, C, body, last)


def _call(kernel, plan, arrays, outputs):
  """Runs a kernel over chunks, the first axis of all arrays."""
  spec = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda n: (n, *(0,) * (len(x.shape) - 1)))
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=arrays['steps'].shape[:1], name=kernel.__name__,
      in_specs=[jax.tree.map(spec, arrays)], out_specs=jax.tree.map(spec, outputs), interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1))(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(plan, steps):
  (N, _, C), Q = steps.shape, plan.levels
  shapes = {'weigh': (C, C), 'reach': (Q, C), 'turn': (Q, Q), 'push': (Q, C)}
  return _call(unroll_kernel, plan, {'steps': steps}, {name: jax.ShapeDtypeStruct((N, *x), plan.dtype) for name, x in shapes.items()})


def _unroll_back(plan, steps, cotangents):
  (N, E, C), Q = steps.shape, plan.levels
  shapes = {'dsteps': (E, C), 'pushes': (C, Q, C), 'turns': (C, Q, Q)}
  shapes = {name: jax.ShapeDtypeStruct((N, *x), plan.dtype) for name, x in shapes.items()}
  return (_call(unroll_back_kernel, plan, {**cotangents, 'steps': steps}, shapes)['dsteps'],)


_unroll.defvjp(lambda plan, steps: (_unroll(plan, steps), steps), _unroll_back)


def unroll_fused(turn: dict, push: list) -> dict:
  """{weigh [..., C, C], reach [..., Q, C], turn [..., Q, Q], push [..., Q, C]} of chunks on the last axis: entries of the turn and pushes
  of each token, arrays [..., C] of one shape and dtype; C a power of two."""
  plan = Plan(tuple(turn), len(push), push[0].dtype, jax.default_backend() != 'cpu')
  lead, C = push[0].shape[:-1], push[0].shape[-1]
  steps = jnp.stack([*turn.values(), *push], -2)
  return {name: a.reshape(*lead, *a.shape[1:]) for name, a in _unroll(plan, steps.reshape(-1, len(turn) + len(push), C)).items()}
