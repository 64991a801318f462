"""Coefficients of a neural memory over chunks, row by row in a Pallas kernel through the Triton lowering, and their gradient in another.

    X_t = turn_t X_{t-1} + push_t e_t^T        X = [pushes Q x C | turns Q x Q], whose row 0 after token t is weigh[t], reach[:, t]

Equal to `neural_steps.unroll`, which doubles pieces: C rows need C^2 operations instead of many arrays of C x C. A program takes one
chunk in one warp, so that all chunks are at work at once. On a CPU the kernels run by interpretation.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.pallas_chunk import KEPT


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


def _times(turn, rows, *, transposed=False):
  """turn . rows, or its transpose, as far as there are rows: {level: (what of each token was pushed [C], its turn by column)}."""
  out = {}
  for (row, column), x in turn.items():
    into, of = (column, row) if transposed else (row, column)
    if into not in rows: continue
    made = jax.tree.map(lambda a, x=x: x * a, rows[of])
    out[into] = jax.tree.map(jnp.add, out[into], made) if into in out else made
  return {level: out.get(level, jax.tree.map(jnp.zeros_like, row)) for level, row in rows.items()}


def _start(plan, C, first=0):
  """X before the first token, from level `first` on."""
  one = lambda value: jnp.full((), value, plan.dtype)
  return {p: (jnp.zeros((C,), plan.dtype), [one(float(p == q)) for q in range(plan.levels)]) for p in range(first, plan.levels)}


def _forward(plan, refs, tell, first=0):
  """X after the last token, from level `first` on: weights, level 0, move no momentum; `tell(t, X)` after each."""
  C = refs['steps'].shape[1]
  lanes = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
  def body(t, rows):
    turn, push = _step(plan, refs, t)
    rows = {p: (x + jnp.where(lanes == t, push[p], 0), turns) for p, (x, turns) in _times(turn, rows).items()}
    tell(t, rows)
    return rows
  return jax.lax.fori_loop(0, C, body, _start(plan, C, first))


def unroll_kernel(plan, refs, out):
  """weigh [C, C], reach [Q, C], turn [Q, Q], push [Q, C] of a chunk."""
  def tell(t, rows):
    out['weigh'][t] = rows[0][0]
    for q, x in enumerate(rows[0][1]): out['reach'][q, t] = x
  for p, (pushes, turns) in _forward(plan, refs, tell).items():
    out['push'][p] = pushes
    for q, x in enumerate(turns): out['turn'][p, q] = x


def unroll_back_kernel(plan, refs, out):
  """The cotangents of the steps. X after each token: `weigh` and `reach` are its row 0, `pushes` and `turns` hold the others."""
  C, Q = refs['steps'].shape[1], plan.levels
  lanes = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
  def tell(t, rows):
    for p, (pushes, turns) in rows.items():
      out['pushes'][t, p - 1] = pushes
      for q, x in enumerate(turns): out['turns'][t, p - 1, q] = x
  if Q > 1:
    _forward(plan, refs, tell, first=1)
    if plan.is_compiled: plgpu.debug_barrier()
  def held(t):
    later = {p: (out['pushes'][t, p - 1], [out['turns'][t, p - 1, q] for q in range(Q)]) for p in range(1, Q)}
    return {0: (refs['weigh'][t], [refs['reach'][q, t] for q in range(Q)]), **later}
  def step(t, carry, old):
    (rows, dpush), turn = carry, _step(plan, refs, t)[0]
    (pushed, reach), later = rows[0], {p: rows[p] for p in range(1, Q)}
    rows = {0: (pushed + refs['dweigh'][t], [x + refs['dreach'][q, t] for q, x in enumerate(reach)]), **later}
    for n, (p, r) in enumerate(plan.turns):
      out['dsteps'][n, t] = jnp.sum(rows[p][0] * old[r][0]) + sum(x * y for x, y in zip(rows[p][1], old[r][1], strict=True))
    dpush = [jnp.where(lanes == t, rows[p][0], x) for p, x in enumerate(dpush)]
    return _times(turn, rows, transposed=True), dpush
  last = {p: (refs['dpush'][p], [refs['dturn'][p, q] for q in range(Q)]) for p in range(Q)}
  carry = last, [jnp.zeros((C,), plan.dtype)] * Q
  carry = jax.lax.fori_loop(0, C - 1, lambda number, carry: step(C - 1 - number, carry, held(C - 2 - number)), carry)
  for p, x in enumerate(step(0, carry, _start(plan, C))[1]): out['dsteps'][len(plan.turns) + p] = x


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


def _unroll_forward(plan, steps):
  made = _unroll(plan, steps)
  return made, (steps, checkpoint_name({name: made[name] for name in ('weigh', 'reach')}, KEPT))


def _unroll_back(plan, saved, cotangents):
  (steps, kept), Q = saved, plan.levels
  N, E, C = steps.shape
  shapes = {'dsteps': (E, C)} | ({'pushes': (C, Q - 1, C), 'turns': (C, Q - 1, Q)} if Q > 1 else {})
  shapes = {name: jax.ShapeDtypeStruct((N, *x), plan.dtype) for name, x in shapes.items()}
  given = {'steps': steps, **kept, **{f'd{name}': x for name, x in cotangents.items()}}
  return (_call(unroll_back_kernel, plan, given, shapes)['dsteps'],)


_unroll.defvjp(_unroll_forward, _unroll_back)


def unroll_fused(turn: dict, push: list) -> dict:
  """{weigh [..., C, C], reach [..., Q, C], turn [..., Q, Q], push [..., Q, C]} of chunks on the last axis: entries of the turn and pushes
  of each token, arrays [..., C] of one shape and dtype; C a power of two."""
  plan = Plan(tuple(turn), len(push), push[0].dtype, jax.default_backend() != 'cpu')
  lead, C = push[0].shape[:-1], push[0].shape[-1]
  steps = jnp.stack([*turn.values(), *push], -2)
  return {name: a.reshape(*lead, *a.shape[1:]) for name, a in _unroll(plan, steps.reshape(-1, len(turn) + len(push), C)).items()}
