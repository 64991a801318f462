"""The Pallas kernels that write chunks into a neural memory M(x) = x + (1 + gain) (.) norm(silu(x W_up) W_down), and their gradients.

A program takes one row, one head and one block of hidden channels, so that the tiles that it holds are small and the card is full.
Hidden channels meet twice in a chunk: in the outputs of the network, and in the gradients of the errors. There a pass ends; what blocks
then add up lies in `part`. All passes of a chunk rewrite the state in place, level by level. Refs come as dictionaries:

    up, down by level; init_*: the learned start; key, value, weight, push, turn; hold: 0 where a document starts
    seen_up [Q K + C, F]: levels, then d of w_0; seen_down [F, Q V]: levels side by side; gain [Q, V] before every chunk
    h, slope, bend: silu of the hidden channels, its derivatives; out: before the norm; read: a (.) d of the gain; ct_*: cotangents
"""
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.pallas_chunk import dot, wide
from memjax.ops.pallas_neural_rows import judge, judge_back, silu


class Plan(NamedTuple):
  """What is fixed while tracing: hidden channels come in `blocks` of `block`; loss = scale |error|^2, operands of products in `dtype`."""
  levels: int
  blocks: int
  block: int
  scale: float
  dtype: Any
  is_compiled: bool = True


class Pass(NamedTuple):
  """A kernel at work: its plan, what it reads, what it rewrites or makes."""
  plan: Plan
  refs: dict
  out: dict


def _fence(plan):
  """Keeps the loads of what follows behind what came before: fewer registers."""
  if plan.is_compiled: plgpu.debug_barrier()


def _rounded(x, dtype, scale):
  """x, rounded as the layer that gave it rounds, times `scale`."""
  return (x.astype(dtype).astype(scale.dtype) * scale).astype(dtype)


def _held(hold, tile):
  return jnp.where(hold > 0, tile, jnp.zeros_like(tile))


def _tile(refs, name, at):
  """A stacked array's tile, wide."""
  x = refs[name][at]
  return x.astype(wide(x.dtype))


def _part(size, number):
  return pl.ds(number * size, size)


def _sum_of_parts(refs):
  return functools.reduce(jnp.add, (refs['part'][g] for g in range(refs['part'].shape[0])))


def _coefficients(plan, refs, n):
  """(push by level, entries of turn that are not zero): weights follow their momentum, not the reverse."""
  Q = plan.levels
  return [refs['push'][n, p] for p in range(Q)], {(p, q): refs['turn'][n, p, q] for p in range(Q) for q in range(p, Q)}


def _items(refs, gains, n):
  """What `judge` looks at; a gain that is not fast has no `gains`."""
  gain = refs['init_gain'][...]
  if gains is not None: gain += _held(refs['hold'][n], gains[n, 0])
  return _tile(refs, 'key', n), _tile(refs, 'value', n), refs['weight'][n], gain


def meet_kernel(plan, refs, out):
  """Hidden channels of a block at the anchor, and their share of the outputs."""
  n, dtype = refs['at'][0], plan.dtype
  hold, key = refs['hold'][n], refs['key'][n].astype(dtype)
  weights = lambda side: (refs[f'init_{side}'][...] + _held(hold, refs[f'{side}0'][...])).astype(dtype)
  out['anchor'][...] = weights('down')
  z = dot(key, weights('up'), dtype).astype(dtype).astype(wide(dtype))
  for name, x in zip(('h', 'slope', 'bend'), silu(z), strict=True): out[name][n] = x.astype(dtype)
  _fence(plan)
  out['part'][pl.program_id(0)] = dot(out['h'][n], out['anchor'][...], dtype)


def judge_kernel(plan, refs, out):
  """Errors and their gradients, and the gain after the chunk."""
  n, dtype, Q, gain = refs['at'][0], plan.dtype, plan.levels, out.get('gain')
  made = _sum_of_parts(refs).astype(dtype)
  out['out'][n] = made
  d, read, out['loss'][n] = judge(plan.scale, made.astype(wide(dtype)), _items(refs, gain, n))
  out['d'][n] = d.astype(dtype)
  if gain is None: return
  out['read'][n] = read
  push, turn = _coefficients(plan, refs, n)
  old = [_held(refs['hold'][n], gain[n, q]) for q in range(Q)]
  for q in range(Q): gain[n, q] = old[q]
  for p in range(Q): gain[n + 1, p] = _turned(turn, p, old) - jnp.sum(push[p][:, None] * read, 0)


def write_kernel(plan, refs, out):
  """What reads see of the memory, and the memory after the chunk; programs of even number do w_0, the others w_1."""
  n, dtype, Q = refs['at'][0], plan.dtype, plan.levels
  (C, K), is_down, work = refs['key'].shape[1:], pl.program_id(0) % 2, Pass(plan, refs, out)

  @pl.when(is_down == 0)
  def _():
    rows = (n, pl.ds(Q * K, C))
    out['seen_up'][rows] = _rounded(dot(refs['d'][n], refs['anchor'][...], dtype, right=1), dtype, _tile(refs, 'slope', n))
    _commit(work, 'up', factors=(('key', n), ('seen_up', rows)), parts=[(n, _part(K, q)) for q in range(Q)])

  @pl.when(is_down == 1)
  def _(): _commit(work, 'down', factors=(('h', n), ('d', n)), parts=[(n, slice(None), _part(refs['d'].shape[2], q)) for q in range(Q)])


def _commit(work, side, *, factors, parts):
  """Shows reads the levels of a side, each in its part, and turns them and pushes a^T d into them; the narrower factor is scaled."""
  (plan, refs, out), high = work, wide(work.plan.dtype)
  n, arrays = refs['at'][0], {**refs, **out}
  push, turn = _coefficients(plan, refs, n)
  for p in range(plan.levels):
    _fence(plan)
    a, d = (arrays[name][at].astype(high) for name, at in factors)
    new = -dot(a, push[p][:, None] * d, plan.dtype, left=0) if side == 'down' else -dot(push[p][:, None] * a, d, plan.dtype, left=0)
    for q in range(p, plan.levels):
      _fence(plan)
      old = _held(refs['hold'][n], out[f'{side}{q}'][...])
      if p == 0: out[f'seen_{side}'][parts[q]] = old.astype(plan.dtype)
      new += turn[p, q] * old
    _fence(plan)
    out[f'{side}{p}'][...] = new


def _turned(turn, row, old):
  """A level after the chunk but for what it pushes."""
  return functools.reduce(jnp.add, (turn[at] * old[at[1]] for at in sorted(turn) if at[0] == row))


def _returned(turn, column, new):
  """The cotangent of a level from those after the chunk."""
  return functools.reduce(jnp.add, (turn[at] * new[at[0]] for at in sorted(turn) if at[1] == column))


def push_back_kernel(plan, refs, out):
  """Cotangents through what the chunk wrote: of the factors, of the momenta before it, of the coefficients. Programs of even number
  do w_0, and from its factor d the step back to the error; the others w_1."""
  n, g, dtype, Q = refs['at'][0], pl.program_id(0), plan.dtype, plan.levels
  (C, K), V = refs['key'].shape[1:], refs['d'].shape[2]
  d_up, work = (n, pl.ds(Q * K, C)), Pass(plan, refs, out)

  @pl.when(g % 2 == 0)
  def _():
    out['dkey_push'][n] = _back_to_a(work, 'up', ('seen_up', d_up)).astype(out['dkey_push'].dtype)
    dup = _back_to_d(work, 'up', (('key', n), ('seen_up', d_up)), number=g) + _tile(refs, 'ct_seen_up', d_up)
    _fence(plan)
    raised = (dup * _tile(refs, 'slope', n)).astype(dtype)
    out['raised'][...] = raised
    anchor = (refs['init_down'][...] + _tile(refs, 'seen_down', (n, slice(None), _part(V, 0)))).astype(dtype)
    out['part'][g] = dot(raised, anchor, dtype)
    dup *= _tile(refs, 'bend', n)
    out['bent'][...] = _rounded(dot(refs['d'][n], anchor, dtype, right=1), dtype, dup)
    _back_through_turn(work, 'up', parts=[(n, _part(K, q)) for q in range(Q)], number=g)

  @pl.when(g % 2 == 1)
  def _():
    out['part'][g] = _back_to_d(work, 'down', (('h', n), ('d', n)), number=g)
    out['dh'][...] = (_back_to_a(work, 'down', ('d', n)) + _tile(refs, 'ct_h', n)).astype(dtype)
    _back_through_turn(work, 'down', parts=[(n, slice(None), _part(V, q)) for q in range(Q)], number=g)


def _back_to_a(work, side, factor):
  """The cotangent of the factor a through what was pushed into a side, from where the factor d is."""
  (plan, refs, out), da = work, 0
  push, _ = _coefficients(plan, refs, refs['at'][0])
  for p in range(plan.levels):
    _fence(plan)
    da -= dot(push[p][:, None] * _tile(refs, *factor), out[f'{side}{p}'][...], plan.dtype, right=1)
  return da


def _back_to_d(work, side, factors, *, number):
  """The cotangent of the factor d; writes those of what factors (where they are) are pushed by."""
  (plan, refs, out), (a, d), dd = work, factors, 0
  n = refs['at'][0]
  push, _ = _coefficients(plan, refs, n)
  for p in range(plan.levels):
    _fence(plan)
    across = dot(_tile(refs, *a), out[f'{side}{p}'][...], plan.dtype)
    _fence(plan)
    out['dpush'][n, number, p] = -jnp.sum(_tile(refs, *d) * across, 1)
    dd -= push[p][:, None] * across
  return dd


def _back_through_turn(work, side, *, parts, number):
  """Writes the cotangents of the coefficients, and of the momenta before the chunk."""
  plan, refs, out = work
  _fence(plan)
  n, g, new = refs['at'][0], number, [out[f'{side}{q}'][...] for q in range(plan.levels)]
  _, turn = _coefficients(plan, refs, n)
  for p, q in turn: out['dturn'][n, g, p, q] = jnp.sum(new[p] * _tile(refs, f'seen_{side}', parts[q]))
  for q in range(1, plan.levels):
    got = _returned(turn, q, new) + _tile(refs, f'ct_seen_{side}', parts[q])
    _fence(plan)
    out[f'{side}{q}'][...] = _held(refs['flow'][n], got)


def judge_back_kernel(plan, refs, out):
  """Cotangents through the errors: of the outputs of the network, of tokens, of the gain before the chunk."""
  n, Q, dread, is_fast = refs['at'][0], plan.levels, None, 'gain' in out
  push, turn = _coefficients(plan, refs, n)
  if is_fast:
    new, old = [out['gain'][n + 1, q] for q in range(Q)], [refs['old_gain'][n, q] for q in range(Q)]
    dread = refs['ct_read'][n] - functools.reduce(jnp.add, (push[p][:, None] * new[p][None] for p in range(Q)))
  dd = _sum_of_parts(refs) + _tile(refs, 'ct_d', n)
  items = _items(refs, refs.get('old_gain'), n)
  read, dout, derror, dweight, dgain = judge_back(plan.scale, _tile(refs, 'out', n), items, cotangents=(dd, dread, refs['ct_loss'][n]))
  out['dout'][...] = dout.astype(plan.dtype)
  for name, x in (('dkey', derror), ('dvalue', -derror), ('dweight', dweight), ('dgain', dgain)): out[name][n] = x.astype(out[name].dtype)
  if not is_fast: return
  for q in range(Q):
    got = _returned(turn, q, new) + refs['ct_gain'][n, q]
    out['gain'][n, q] = _held(refs['flow'][n], got + dgain if q == 0 else got)
    out['gpush'][n, q] = -jnp.sum(read * new[q][None], 1)
  for at in turn: out['gturn'][n, at[0], at[1]] = jnp.sum(new[at[0]] * old[at[1]])


def find_back_kernel(plan, refs, out):
  """Cotangents through how the chunk's gradients were found: of keys, of the learned start and of the weights before the chunk. Programs
  of even number do w_0, the others w_1."""
  n, dtype, high = refs['at'][0], plan.dtype, wide(plan.dtype)
  dout, K, is_down = refs['dout'][...], refs['key'].shape[2], pl.program_id(0) % 2
  up, down = (n, _part(K, 0)), (n, slice(None), _part(dout.shape[1], 0))
  anchor = lambda side, at: (refs[f'init_{side}'][...] + refs[f'seen_{side}'][at].astype(high)).astype(dtype)
  work = Pass(plan, refs, out)

  @pl.when(is_down == 0)
  def _():
    dh = refs['dh'][...].astype(high) + dot(dout, anchor('down', down), dtype, right=1)
    dhidden = (refs['bent'][...].astype(high) + dh * _tile(refs, 'slope', n)).astype(dtype)
    out['dkey_find'][n] = dot(dhidden, anchor('up', up), dtype, right=1).astype(out['dkey_find'].dtype)
    _fence(plan)
    _back_to_anchor(work, 'up', up, dot(refs['key'][n], dhidden, dtype, left=0))

  @pl.when(is_down == 1)
  def _():
    cotangent = dot(refs['h'][n], dout, dtype, left=0) + dot(refs['raised'][...], refs['d'][n], dtype, left=0)
    _back_to_anchor(work, 'down', down, cotangent)


def _back_to_anchor(work, side, at, cotangent):
  """Writes the cotangents of the learned start, and of the weights before the chunk."""
  (_, refs, out), n, name = work, at[0], f'{side}0'
  out[f'd{side}'][n] = cotangent.astype(out[f'd{side}'].dtype)
  got = refs['turn'][n, 0, 0] * out[name][...] + _tile(refs, f'ct_seen_{side}', at) + cotangent
  out[name][...] = _held(refs['flow'][n], got)
