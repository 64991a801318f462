"""Routed attention as tiles: (token, slot) pairs sorted by chapter and padded to blocks, each one dense attention to one chapter."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.ops.quantize import dequantize

STEP_BYTES = {'cpu': 1 << 20, 'gpu': 1 << 29, 'tpu': 1 << 27}     # scores that one step of the loop over tiles holds, at most


class Sorted(NamedTuple):
  """Pairs by chapter: pair numbers in that order, each pair's place inside its chapter, pairs of a chapter, its first place."""
  order_X: jax.Array
  rank_X: jax.Array
  count_P: jax.Array
  start_P: jax.Array


class Tiles(NamedTuple):
  """The chapter of each tile, the pairs in its rows (X = padding), the row of each pair (out of range: none), tiles in use."""
  chapter_U: jax.Array
  pair_UxC: jax.Array
  row_X: jax.Array
  used: jax.Array


class Form(NamedTuple):
  """What the loops over tiles need to know at trace time. scale 0 = 1 / sqrt(K)."""
  scale: float
  block: int


def wide_dtype(dtype):
  """The dtype of scores, softmax and reductions: fp32, or fp64 for fp64 inputs."""
  return jnp.promote_types(jnp.float32, dtype)


def is_array(kv) -> bool:
  """Whether keys or values are plain arrays: a quantised bank is a pytree of codes and scales, and gets no gradient."""
  return isinstance(kv, jax.Array | np.ndarray)


def restore(kv, dtype):
  """All entries in `dtype`, without gradient where they were quantised."""
  return kv.astype(dtype) if is_array(kv) else jax.lax.stop_gradient(dequantize(kv, dtype))


def take_chapters(kv, chapter_U, dtype):
  """The entries [U, T, G, K] of some chapters in `dtype`; quantised ones are restored here, a few at a time."""
  if is_array(kv): return kv[chapter_U].astype(dtype)
  return dequantize(jax.tree.map(lambda a: a[chapter_U], kv), dtype)


def sort_pairs(ids_ZxJ, chapters: int) -> Sorted:
  """The pairs (token * J + slot) sorted by chapter, stable; empty slots (id < 0) come last and belong to none."""
  flat_X = jnp.where(ids_ZxJ < 0, chapters, ids_ZxJ).reshape(-1).astype(jnp.int32)
  X = flat_X.shape[0]
  order_X = jnp.argsort(flat_X, stable=True).astype(jnp.int32)
  count = jnp.zeros((chapters + 1,), jnp.int32).at[flat_X].add(1)
  start = jnp.cumsum(count).astype(jnp.int32) - count
  place_X = jnp.zeros((X,), jnp.int32).at[order_X].set(jnp.arange(X, dtype=jnp.int32), unique_indices=True)
  return Sorted(order_X, place_X - start[flat_X], count[:-1], start[:-1])


def tile_limit(pairs: int, chapters: int, block: int) -> int:
  """Tiles that suffice for any ids: the sum over chapters of ceil(n_c / block), at most min(chapters, pairs) of them not full."""
  return (pairs + min(chapters, pairs) * (block - 1)) // block


def make_tiles(ids_ZxJ, chapters: int, *, block: int, step: int = 1) -> Tiles:
  """The tile tables of ids [Z, J] (< 0 = empty slot), their number rounded up to a multiple of `step` (specification 5.3)."""
  order_X, rank_X, count_P, start_P = sort_pairs(ids_ZxJ, chapters)
  X = order_X.shape[0]
  tiles = -(-tile_limit(X, chapters, block) // step) * step
  end_P = jnp.cumsum(-(-count_P // block)).astype(jnp.int32)
  first_P = jnp.concatenate([jnp.zeros((1,), jnp.int32), end_P[:-1]])
  tile_U = jnp.arange(tiles, dtype=jnp.int32)
  chapter_U = jnp.minimum(jnp.searchsorted(end_P, tile_U, side='right', method='compare_all').astype(jnp.int32), chapters - 1)
  rank_UxC = ((tile_U - first_P[chapter_U]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
  is_real = rank_UxC < count_P[chapter_U][:, None]                 # trailing tiles lie past the last chapter's count: all padding
  pair_UxC = jnp.where(is_real, order_X[jnp.minimum(start_P[chapter_U][:, None] + rank_UxC, X - 1)], X)
  id_X = ids_ZxJ.reshape(-1)
  row_X = jnp.where(id_X < 0, tiles * block, first_P[jnp.maximum(id_X, 0)] * block + rank_X)
  return Tiles(chapter_U, pair_UxC, row_X, end_P[-1])


def sum_slots(x_ZxJ, weight_ZxJ=None):
  """The sum over slots [Z, ..] of x [Z, J, ..] times a weight of the same rank, in the wide dtype.

  Few slots are added one by one: compilers then fuse the gather that made x with the sum, and CPUs vectorise it.
  """
  wide = wide_dtype(x_ZxJ.dtype)
  slot = lambda x: x.astype(wide) if weight_ZxJ is None else x.astype(wide) * weight_ZxJ[:, j]
  if x_ZxJ.shape[1] > 32: return jnp.sum(x_ZxJ.astype(wide) * (1 if weight_ZxJ is None else weight_ZxJ), 1)
  total = 0
  for j in range(x_ZxJ.shape[1]): total = total + slot(x_ZxJ[:, j])
  return total


# Dense attention of U tiles: used by every implementation ----------------------------------------------------------------------

def _scores(q_UxCxHxK, k_UxTxGxK, mask_UxT, scale: float):
  """Scaled scores [U, G, R, C, T] of H = G R query heads, -inf where masked."""
  U, C, H, K = q_UxCxHxK.shape
  G = k_UxTxGxK.shape[2]
  q = q_UxCxHxK.reshape(U, C, G, H // G, K)
  s = jnp.einsum('ucgrk,utgk->ugrct', q, k_UxTxGxK, preferred_element_type=wide_dtype(q.dtype)) * (scale or K ** -0.5)
  return s if mask_UxT is None else jnp.where(mask_UxT[:, None, None, None], s, -jnp.inf)


def _by_head(x_UxGxRxC):
  """[U, C, H] from [U, G, R, C]."""
  return jnp.moveaxis(x_UxGxRxC, 3, 1).reshape(x_UxGxRxC.shape[0], x_UxGxRxC.shape[3], -1)


def attend_tiles(q_UxCxHxK, k_UxTxGxK, v_UxTxGxV, mask_UxT=None, *, scale: float = 0.0):
  """(o [U, C, H, V] in the dtype of q, lse [U, C, H] in the wide dtype): softmax attention of C rows to T entries, U times.

  A row that sees nothing has o = 0 and lse = -inf, with zero gradients.
  """
  U, C, H, _ = q_UxCxHxK.shape
  s = _scores(q_UxCxHxK, k_UxTxGxK, mask_UxT, scale)
  top = jax.lax.stop_gradient(s.max(-1))
  top = jnp.where(jnp.isfinite(top), top, 0)
  p = jnp.exp(s - top[..., None])
  total = p.sum(-1)
  safe = jnp.where(total > 0, total, 1)
  o = jnp.einsum('ugrct,utgv->ucgrv', p.astype(v_UxTxGxV.dtype), v_UxTxGxV, preferred_element_type=s.dtype)
  o = o.reshape(U, C, H, -1) / _by_head(safe)[..., None]
  return o.astype(q_UxCxHxK.dtype), _by_head(jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf))


def attend_all(q_ZxHxK, kv_MxG, *, scale: float = 0.0):
  """(o [Z, H, V], lse [Z, H]): every token attends to the same M entries (k [M, G, K], v [M, G, V]), a block of tokens at a time."""
  (Z, H, K), dtype, wide = q_ZxHxK.shape, q_ZxHxK.dtype, wide_dtype(q_ZxHxK.dtype)
  block = max(1, min(Z, (1 << 28) // (H * kv_MxG[0].shape[0] * wide.itemsize)))
  blocks = -(-Z // block)
  q = jnp.pad(q_ZxHxK, ((0, blocks * block - Z), (0, 0), (0, 0))).reshape(blocks, 1, block, H, K)
  kv = [x.astype(wide)[None] for x in kv_MxG]                       # so that dk and dv are summed over the blocks in the wide dtype
  def one(q): return tuple(x[0] for x in attend_tiles(q, *(x.astype(dtype) for x in kv), scale=scale))
  o, lse = jax.lax.map(jax.checkpoint(one), q) if blocks > 1 else jax.tree.map(lambda x: x[None], one(q[0]))
  return o.reshape(-1, *o.shape[2:])[:Z], lse.reshape(-1, H)[:Z]


def attend_tiles_back(rows, kv, cotangents, *, scale: float = 0.0):
  """(dq [U, C, H, K], dk [U, T, G, K], dv [U, T, G, V]), wide: with p = exp(s - lse) and g = p (do v - delta) * scale,
  dq = g k, dk = g^T q, dv = p^T do, summed over the query heads of a key head (specification 5.4).

  rows = (q, lse), kv = (k, v, mask), cotangents = (do, delta). delta = do . o - dlse for a softmax of these entries alone; a
  larger softmax passes its own lse and delta. lse = -inf: the row counts for nothing.
  """
  (q_UxCxHxK, lse_UxCxH), (k, v, mask_UxT), (do_UxCxHxV, delta_UxCxH) = rows, kv, cotangents
  U, C, H, K = q_UxCxHxK.shape
  G, dtype = k.shape[2], q_UxCxHxK.dtype
  split = lambda x: x.reshape(U, C, G, H // G, *x.shape[3:])
  product = functools.partial(jnp.einsum, preferred_element_type=wide_dtype(dtype))
  column = lambda x: jnp.moveaxis(split(x), 1, 3)[..., None]
  lse = jnp.where(lse_UxCxH == -jnp.inf, jnp.inf, lse_UxCxH)
  p = jnp.exp(_scores(q_UxCxHxK, k, mask_UxT, scale) - column(lse))
  do = split(do_UxCxHxV)
  g = (p * (product('ucgrv,utgv->ugrct', do, v) - column(delta_UxCxH)) * (scale or K ** -0.5)).astype(dtype)
  dq = product('ugrct,utgk->ucgrk', g, k).reshape(U, C, H, K)
  return dq, product('ugrct,ucgrk->utgk', g, split(q_UxCxHxK)), product('ugrct,ucgrv->utgv', p.astype(dtype), do)


# The loops over tiles -----------------------------------------------------------------------------------------------------------

def _step_tiles(q_ZxHxK, entries: int, block: int) -> int:
  """Tiles a step of the loop: as many as keep its scores within STEP_BYTES."""
  limit = STEP_BYTES.get(jax.default_backend(), STEP_BYTES['gpu'])
  return max(1, min(64, limit // (q_ZxHxK.shape[1] * block * entries * wide_dtype(q_ZxHxK.dtype).itemsize)))


def _loop(tables: Tiles, step: int, body, carry):
  """`body(i, chapter, pair, carry)` over the steps whose tiles are in use; the number of steps is known at run time only."""
  def run(i, carry):
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * step, step)
    return body(i * step, cut(tables.chapter_U), cut(tables.pair_UxC), carry)
  return jax.lax.fori_loop(0, -(-tables.used // step), run, carry)


def _rows(x_XxHxK, pair_UxC, per: int = 1):
  """Rows [U, C, ..] of tokens (per = J) or pairs (per = 1); padding reads the last one, and its result is dropped."""
  return x_XxHxK[jnp.minimum(pair_UxC // per, x_XxHxK.shape[0] - 1)]


def _unsort(buffer_UxC, row_X, fill):
  """The rows of a buffer [U, C, ..] in the order of the pairs; `fill` for empty slots."""
  flat = buffer_UxC.reshape(-1, *buffer_UxC.shape[2:])
  return jnp.take(flat, row_X, axis=0, mode='fill', fill_value=fill)


def forward(form: Form, q_ZxHxK, bank, ids_ZxJ):
  """((o, lse), tables) of `tile_partials`."""
  (k, v, mask_PxT), (P, T), J, H = bank, bank[0].shape[:2], ids_ZxJ.shape[1], q_ZxHxK.shape[1]
  step = _step_tiles(q_ZxHxK, T, form.block)
  tables = make_tiles(ids_ZxJ, P, block=form.block, step=step)
  shape, dtype = (*tables.pair_UxC.shape, H), q_ZxHxK.dtype
  def body(first, chapter_U, pair_UxC, carry):
    entries = take_chapters(k, chapter_U, dtype), take_chapters(v, chapter_U, dtype)
    results = attend_tiles(_rows(q_ZxHxK, pair_UxC, J), *entries, None if mask_PxT is None else mask_PxT[chapter_U], scale=form.scale)
    return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, first, 0) for a, b in zip(carry, results, strict=True))
  start = jnp.zeros((*shape, v.shape[3]), dtype), jnp.full(shape, -jnp.inf, wide_dtype(dtype))
  o, lse = _loop(tables, step, body, start)
  o_X, lse_X = _unsort(o, tables.row_X, 0), _unsort(lse, tables.row_X, -jnp.inf)
  return (o_X.reshape(*ids_ZxJ.shape, *o_X.shape[1:]), lse_X.reshape(*ids_ZxJ.shape, H)), tables


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tile_partials(form: Form, q_ZxHxK, bank, ids_ZxJ):
  """(o [Z, J, H, V], lse [Z, J, H]) of bank = (k [P, T, G, K], v [P, T, G, V], mask [P, T] or None), by tiles.

  The gradient of section 5.4 of the specification: probabilities are computed again from lse, each tile's dk and dv are added
  to its chapter in order (deterministic), dq is written per pair and summed over the slots. A quantised k or v gets none.
  """
  return forward(form, q_ZxHxK, bank, ids_ZxJ)[0]


def _tile_partials_forward(form, q_ZxHxK, bank, ids_ZxJ):
  results, tables = forward(form, q_ZxHxK, bank, ids_ZxJ)
  return results, (q_ZxHxK, bank, ids_ZxJ, results, tables)


def _tile_partials_backward(form, saved, cotangents):
  kv = saved[1][:2]
  totals = tuple(jnp.zeros(x.shape, wide_dtype(x.dtype)) if is_array(x) else None for x in kv)
  dq_ZxHxK, totals = backward(form, saved, cotangents, totals)
  return dq_ZxHxK, (*(None if a is None else a.astype(x.dtype) for a, x in zip(totals, kv, strict=True)), None), None


def backward(form: Form, saved, cotangents, totals):
  """(dq, totals) with dk and dv added to the wide `totals` = (dk, dv), None where not wanted.

  saved = (q, bank, ids, (o, lse), tables), cotangents = (do, dlse).
  """
  q_ZxHxK, (k, v, mask_PxT), ids_ZxJ, (o, lse), tables = saved
  do, dlse = cotangents
  (Z, H, K), J, dtype, wide = q_ZxHxK.shape, ids_ZxJ.shape[1], q_ZxHxK.dtype, lse.dtype
  delta = jnp.einsum('zjhv,zjhv->zjh', do, o, preferred_element_type=wide) - jnp.where(lse > -jnp.inf, dlse, 0)
  do_X, delta_X, lse_X = (x.reshape(Z * J, *x.shape[2:]) for x in (do, delta, lse))
  step = _step_tiles(q_ZxHxK, k.shape[1], form.block)
  def body(first, chapter_U, pair_UxC, carry):
    dq, *dkv = carry
    kv = take_chapters(k, chapter_U, dtype), take_chapters(v, chapter_U, dtype), None if mask_PxT is None else mask_PxT[chapter_U]
    lse_UxCxH = jnp.where((pair_UxC < Z * J)[..., None], _rows(lse_X, pair_UxC), -jnp.inf)
    part, *parts = attend_tiles_back((_rows(q_ZxHxK, pair_UxC, J), lse_UxCxH), kv, (_rows(do_X, pair_UxC), _rows(delta_X, pair_UxC)),
                                     scale=form.scale)
    dkv = [add_by_chapter(a, b, chapter_U) if a is not None else None for a, b in zip(dkv, parts, strict=True)]
    return jax.lax.dynamic_update_slice_in_dim(dq, part.astype(dtype), first, 0), *dkv
  dq, *totals = _loop(tables, step, body, (jnp.zeros((*tables.pair_UxC.shape, H, K), dtype), *totals))
  dq_ZxHxK = sum_slots(_unsort(dq, tables.row_X, 0).reshape(Z, J, H, K)).astype(dtype)
  return dq_ZxHxK, tuple(totals)


def add_by_chapter(total_PxTxGxK, part_UxTxGxK, chapter_U):
  """`total` plus each tile's part at its chapter, one after the other: the order of the sums never depends on the device."""
  if part_UxTxGxK.shape[0] == 1: return total_PxTxGxK.at[chapter_U[0]].add(part_UxTxGxK[0])
  return jax.lax.fori_loop(0, part_UxTxGxK.shape[0], lambda i, total: total.at[chapter_U[i]].add(part_UxTxGxK[i]), total_PxTxGxK)


tile_partials.defvjp(_tile_partials_forward, _tile_partials_backward)
