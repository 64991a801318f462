"""The Pallas kernels that write chunks into a neural memory M(x) = x + (1 + gain) (.) norm(silu(x W_up) W_down), and their gradients.

A program takes one row, one head and a block of hidden channels, and goes through these a tile at a time. Hidden channels meet twice in
a chunk: in the outputs of the network, and in the gradients of the errors. There a kernel ends; what blocks then add up lies in `part`.
So the kernel that writes one chunk also meets the keys of the next one, and backwards likewise, while it holds the tile; the state is
rewritten in place. Refs come as dictionaries:

    up, down by level; init_*: the learned start; key, value, weight, push, turn; hold: 0 where a document starts
    seen_up [Q K + C, F]: levels, then d of w_0; seen_down [F, Q V]: levels side by side; gain [Q, V] before every chunk
    h, slope, bend: silu of the hidden channels, its derivatives; out: before the norm; read: a (.) d of the gain; ct_*: cotangents
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from memjax.ops.pallas_chunk import dot, early, put, wide
from memjax.ops.pallas_neural_rows import held, judge, judge_back, silu


class Plan(NamedTuple):
  """What is fixed while tracing: a program takes `block` hidden channels, `tile` at a time, of `blocks` such, or so many `rows` of
  tokens; loss = scale |error|^2, operands of products in `dtype`."""
  levels: int
  rows: int
  scale: float
  dtype: Any
  is_compiled: bool = True
  blocks: int = 0
  block: int = 0
  tile: int = 0


class Tile(NamedTuple):
  """Hidden channels at work: what a kernel knows, reads, rewrites; which channels."""
  plan: Plan
  refs: dict
  out: dict
  at: Any

  def up(self, name, *lead):
    """A tile of an array whose last axis is hidden channels, wide."""
    return _wide({**self.refs, **self.out}[name][(*lead, self.at)])

  def down(self, name, *lead, columns=slice(None)):
    """A tile of an array whose last axis but one is hidden channels, wide."""
    return _wide({**self.refs, **self.out}[name][(*lead, self.at, columns)])

  def levels(self, side):
    """The levels of a side."""
    return [self.down(f'{side}{q}') if side == 'down' else self.up(f'{side}{q}', slice(None)) for q in range(self.plan.levels)]

  def put(self, side, levels, *, stays=True):
    """Rewrites levels of a side, {level: its tile}, that the second-level cache should keep, or has no room for."""
    at = (self.at, slice(None)) if side == 'down' else (slice(None), self.at)
    for q, x in levels.items():
      if stays: put(self.plan, self.out[f'{side}{q}'], at, x, stays=True)
      else: self.out[f'{side}{q}'][at] = x


def _wide(x): return x.astype(wide(x.dtype))


def _over_tiles(plan, body, sums):
  """`sums` after all tiles of the program's block."""
  def at(number): return pl.ds(pl.multiple_of(number * plan.tile, plan.tile), plan.tile)
  return jax.lax.fori_loop(0, plan.block // plan.tile, lambda number, sums: body(at(number), sums), sums)


def _rounded(x, dtype, scale):
  """x, rounded as the layer that gave it rounds, times `scale`."""
  return (x.astype(dtype).astype(scale.dtype) * scale).astype(dtype)


def _backwards(refs):
  """The chunk at work where `at` counts from the last one."""
  return refs['key'].shape[0] - 1 - refs['at'][0]


def _part(size, number): return pl.ds(number * size, size)


def _sum_of_parts(refs):
  return functools.reduce(jnp.add, (refs['part'][g] for g in range(refs['part'].shape[0])))


def _push(refs, n, x):
  """x [C, ..] by level, each token by what pushes it."""
  return [refs['push'][n, p][:, None] * _wide(x) for p in range(refs['push'].shape[1])]


def _turn(plan, refs, n):
  """Entries of turn that are not zero: weights follow their momentum, not the reverse."""
  return {(p, q): refs['turn'][n, p, q] for p in range(plan.levels) for q in range(p, plan.levels)}


def _turned(turn, row, old):
  """A level after the chunk but for what it pushes."""
  return functools.reduce(jnp.add, (turn[at] * old[at[1]] for at in sorted(turn) if at[0] == row))


def _returned(turn, column, new):
  """The cotangent of a level from those after the chunk."""
  return functools.reduce(jnp.add, (turn[at] * new[at[0]] for at in sorted(turn) if at[1] == column))


def write_kernel(plan, refs, out, *, writes=True, meets=True):
  """Writes chunk n: what reads see of the memory, and the memory after it. Meets the next one (n itself where nothing is written): its
  hidden channels at the anchor, and the share of the outputs that they have."""
  n, C, V = refs['at'][0], refs['key'].shape[1], refs['init_down'].shape[1]
  m = n + 1 if writes else n
  given = {'d': refs['d'][n], 'key': _push(refs, n, refs['key'][n]), 'pull': _push(refs, n, refs['d'][n]),
           'turn': _turn(plan, refs, n)} if writes else {}
  if meets: given['next'] = refs['key'][m]

  def body(at, made):
    tile = Tile(plan, refs, out, at)
    home = tile.up('init_up', slice(None)), tile.down('init_down')
    levels = [[held(refs['hold'][n], x) for x in tile.levels(side)] for side in ('up', 'down')]
    if writes: levels = _write(tile, n, given, home=home, levels=levels)
    if meets: made += _meet(tile, m, given['next'], home=home, levels=[[held(refs['hold'][m], x[0])] for x in levels])
    return made
  made = _over_tiles(plan, body, jnp.zeros((C, V), wide(plan.dtype)) if meets else ())
  if meets: out['part'][pl.program_id(2)] = made


def _meet(tile, n, key, *, home, levels):
  dtype = tile.plan.dtype
  up, down = ((start + x[0]).astype(dtype) for start, x in zip(home, levels, strict=True))
  z = dot(key, up, dtype).astype(dtype).astype(wide(dtype))
  made = dict(zip(('h', 'slope', 'bend'), (x.astype(dtype) for x in silu(z)), strict=True))
  for name, x in made.items(): put(tile.plan, tile.out[name], (n, slice(None), tile.at), x, stays=name != 'bend')
  return dot(made['h'], down, dtype)


def _write(tile, n, given, *, home, levels):
  (plan, refs, out, at), dtype, (up, down) = tile, tile.plan.dtype, levels
  (C, K), V = refs['key'].shape[1:], refs['d'].shape[2]
  d = _rounded(dot(given['d'], (home[1] + down[0]).astype(dtype), dtype, right=1), dtype, tile.up('slope', n, slice(None)))
  h = out['h'][n, :, at]
  put(plan, out['seen_up'], (n, pl.ds(plan.levels * K, C), at), d)
  for q in range(plan.levels):
    put(plan, out['seen_up'], (n, _part(K, q), at), up[q].astype(dtype))
    put(plan, out['seen_down'], (n, at, _part(V, q)), down[q].astype(dtype))
  new = ([_turned(given['turn'], p, up) - dot(given['key'][p], d, dtype, left=0) for p in range(plan.levels)],
         [_turned(given['turn'], p, down) - dot(h, given['pull'][p], dtype, left=0) for p in range(plan.levels)])
  for side, levels in zip(('up', 'down'), new, strict=True): tile.put(side, dict(enumerate(levels)))
  return new


def judge_kernel(plan, refs, out):
  """Errors and their gradients, and the gain after the chunk."""
  n, dtype, Q, gain = refs['at'][0], plan.dtype, plan.levels, out.get('gain')
  made = _sum_of_parts(refs).astype(dtype)
  out['out'][n] = made
  d, read, out['loss'][n] = judge(plan.scale, made.astype(wide(dtype)), _items(refs, gain, n))
  out['d'][n] = d.astype(dtype)
  if gain is None: return
  out['read'][n] = read
  turn = _turn(plan, refs, n)
  old = [held(refs['hold'][n], gain[n, q]) for q in range(Q)]
  for q in range(Q): gain[n, q] = old[q]
  for p, pushed in enumerate(_push(refs, n, read)): gain[n + 1, p] = _turned(turn, p, old) - jnp.sum(pushed, 0)


def _items(refs, gains, n):
  """What `judge` looks at; a gain that is not fast has no `gains`."""
  gain = refs['init_gain'][...]
  if gains is not None: gain += held(refs['hold'][n], gains[n, 0])
  return _wide(refs['key'][n]), _wide(refs['value'][n]), refs['weight'][n], gain


def push_back_kernel(plan, refs, out):
  """Cotangents through what the chunk wrote: of the factors, of the momenta before it, of the coefficients. The first half of all
  programs does w_0, and from its factor d the step back to the error; the other half w_1, which is less work: a card hands out
  programs in turn, so that every multiprocessor gets one of each."""
  n, g = _backwards(refs), pl.program_id(2)
  @pl.when(g < plan.blocks)
  def _(): _push_back(plan, refs, out, place=(n, g), side='up')
  @pl.when(g >= plan.blocks)
  def _(): _push_back(plan, refs, out, place=(n, g), side='down')


def _push_back(plan, refs, out, *, place, side):
  (n, g), (C, K), V, Q, dtype = place, refs['key'].shape[1:], refs['d'].shape[2], plan.levels, plan.dtype
  zeros = lambda *shape: jnp.zeros(shape, wide(dtype))
  given = {'push': [refs['push'][n, p] for p in range(Q)], 'd': refs['d'][n], 'turn': _turn(plan, refs, n)}
  given |= {'key': refs['key'][n]} if side == 'up' else {'pull': _push(refs, n, refs['d'][n])}
  rows = dict.fromkeys(given['turn'], zeros(K if side == 'up' else plan.tile))           # summed to numbers once, at the end
  sums = {'part': zeros(C, V), 'dpush': (zeros(C),) * Q, 'dturn': rows} | ({'da': zeros(C, K)} if side == 'up' else {})
  def body(at, sums):
    tile = Tile(plan, refs, out, at)
    levels, sums = tile.levels(side), dict(sums)
    if side == 'up': seen, ct = _push_back_up(tile, n, given, levels=levels, sums=sums)
    else: seen, ct = _push_back_down(tile, n, given, levels=levels, sums=sums)
    sums['dturn'] = {(p, q): x + jnp.sum(levels[p] * seen[q], 1) for (p, q), x in sums['dturn'].items()}
    momenta = {q: held(refs['flow'][n], _returned(given['turn'], q, levels) + ct[q]) for q in range(1, Q)}
    tile.put(side, momenta, stays=False)
    return sums
  sums = _over_tiles(plan, body, sums)
  out['part'][g] = sums['part']
  if side == 'up': out['dkey_push'][n] = sums['da'].astype(out['dkey_push'].dtype)
  for p in range(Q): out['dpush'][n, g, p] = sums['dpush'][p]
  for (p, q), x in sums['dturn'].items(): out['dturn'][n, g, p, q] = jnp.sum(x)


def _push_back_up(tile, n, given, *, levels, sums):
  (plan, refs, out, at), dtype, key, push = tile, tile.plan.dtype, given['key'], given['push']
  (C, K), Q, dpush = key.shape, plan.levels, list(sums['dpush'])
  d, V = refs['seen_up'][n, pl.ds(Q * K, C), at], given['d'].shape[1]
  dd = tile.up('ct_seen_up', n, pl.ds(Q * K, C))
  for p in range(Q):
    sums['da'] -= dot(push[p][:, None] * _wide(d), levels[p], dtype, right=1)
    across = dot(key, levels[p], dtype)
    dpush[p] -= jnp.sum(_wide(d) * across, 1)
    dd -= push[p][:, None] * across
  anchor = (tile.down('init_down') + tile.down('seen_down', n, columns=_part(V, 0))).astype(dtype)
  raised = (dd * tile.up('slope', n, slice(None))).astype(dtype)
  sums['part'] += dot(raised, anchor, dtype)
  out['raised'][:, at] = raised
  out['bent'][:, at] = _rounded(dot(given['d'], anchor, dtype, right=1), dtype, dd * early(refs['bend'][n, :, at], dtype))
  sums['dpush'] = tuple(dpush)
  return [tile.up('seen_up', n, _part(K, q)) for q in range(Q)], [tile.up('ct_seen_up', n, _part(K, q)) if q else None for q in range(Q)]


def _push_back_down(tile, n, given, *, levels, sums):
  (plan, refs, out, at), dtype, d, push = tile, tile.plan.dtype, given['d'], given['push']
  h, dpush, V, Q = refs['h'][n, :, at], list(sums['dpush']), d.shape[1], plan.levels
  dh = early(refs['ct_h'][n, :, at], dtype)
  for p in range(Q):
    dh -= dot(given['pull'][p], levels[p], dtype, right=1)
    across = dot(h, levels[p], dtype)
    dpush[p] -= jnp.sum(_wide(d) * across, 1)
    sums['part'] -= push[p][:, None] * across
  out['dh'][:, at] = dh.astype(dtype)
  sums['dpush'] = tuple(dpush)
  columns = [_part(V, q) for q in range(Q)]
  return ([tile.down('seen_down', n, columns=one) for one in columns],
          [tile.down('ct_seen_down', n, columns=one) if q else None for q, one in enumerate(columns)])


def find_back_kernel(plan, refs, out):
  """Cotangents through how the chunk's gradients were found: of keys, of the learned start and of the weights before the chunk. The
  first half of all programs does w_0, the other w_1."""
  n, g = _backwards(refs), pl.program_id(2)
  given = refs['dout'][...], refs['turn'][n, 0, 0], refs['flow'][n]
  @pl.when(g < plan.blocks)
  def _():
    key = refs['key'][n]
    body = lambda at, dkey: dkey + _find_back_up(Tile(plan, refs, out, at), n, (*given, key))
    out['dkey_find'][n] = _over_tiles(plan, body, jnp.zeros(key.shape, wide(plan.dtype))).astype(out['dkey_find'].dtype)
  @pl.when(g >= plan.blocks)
  def _():
    d = refs['d'][n]
    _over_tiles(plan, lambda at, nothing: _find_back_down(Tile(plan, refs, out, at), n, (*given, d)), ())


def _find_back_up(tile, n, given):
  (_, refs, out, at), dtype, (dout, turn, flow, key) = tile, tile.plan.dtype, given
  first = _part(key.shape[1], 0)
  down = (tile.down('init_down') + tile.down('seen_down', n, columns=_part(dout.shape[1], 0))).astype(dtype)
  up = (tile.up('init_up', slice(None)) + tile.up('seen_up', n, first)).astype(dtype)
  dh = early(refs['dh'][:, at], dtype) + dot(dout, down, dtype, right=1)
  dz = (tile.up('bent', slice(None)) + dh * tile.up('slope', n, slice(None))).astype(dtype)
  dup = dot(key, dz, dtype, left=0)
  put(tile.plan, out['dup'], (n, slice(None), at), dup.astype(out['dup'].dtype))
  tile.put('up', {0: held(flow, turn * tile.up('up0', slice(None)) + tile.up('ct_seen_up', n, first) + dup)})
  return dot(dz, up, dtype, right=1)


def _find_back_down(tile, n, given):
  (_, refs, out, at), dtype, (dout, turn, flow, d) = tile, tile.plan.dtype, given
  ddown = dot(refs['h'][n, :, at], dout, dtype, left=0) + dot(refs['raised'][:, at], d, dtype, left=0)
  put(tile.plan, out['ddown'], (n, at, slice(None)), ddown.astype(out['ddown'].dtype))
  tile.put('down', {0: held(flow, turn * tile.down('down0') + tile.down('ct_seen_down', n, columns=_part(dout.shape[1], 0)) + ddown)})
  return ()


def judge_back_kernel(plan, refs, out):
  """Cotangents through the errors: of the outputs of the network, of tokens, of the gain before the chunk."""
  n, Q, dread, is_fast = _backwards(refs), plan.levels, None, 'gain' in out
  if is_fast:
    turn = _turn(plan, refs, n)
    new, old = [out['gain'][n + 1, q] for q in range(Q)], [refs['old_gain'][n, q] for q in range(Q)]
    dread = refs['ct_read'][n] - functools.reduce(jnp.add, (refs['push'][n, p][:, None] * new[p][None] for p in range(Q)))
  dd = _sum_of_parts(refs) + _wide(refs['ct_d'][n])
  items = _items(refs, refs.get('old_gain'), n)
  read, dout, derror, dweight, dgain = judge_back(plan.scale, _wide(refs['out'][n]), items, cotangents=(dd, dread, refs['ct_loss'][n]))
  out['dout'][...] = dout.astype(plan.dtype)
  for name, x in (('dkey', derror), ('dvalue', -derror), ('dweight', dweight)): out[name][n] = x.astype(out[name].dtype)
  out['dgain'][n, pl.program_id(2)] = dgain
  if not is_fast: return
  for q in range(Q):
    got = _returned(turn, q, new) + refs['ct_gain'][n, q]
    out['gain'][n, q] = held(refs['flow'][n], got + dgain if q == 0 else got)
    out['gpush'][n, q] = -jnp.sum(read * new[q][None], 1)
  for at in turn: out['gturn'][n, at[0], at[1]] = jnp.sum(new[at[0]] * old[at[1]])
