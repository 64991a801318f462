"""Product keys: the exact best of N * N slots from two searches over N halves (Lample et al. 2019, Large Memory Layers with
Product Keys), and the weighted sum of their value rows."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.ops.top_k import largest


def _wide(x):
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def product_key_scores(q_ZxHxK, first_keys, second_keys):
  """(first_ZxHxN, second_ZxHxN): products of the halves of the queries with their keys [N, K / 2] or [H, N, K / 2], fp32 or wider.

  Raises UserError for an odd K, or keys of another width.
  """
  half, odd = divmod(q_ZxHxK.shape[-1], 2)
  if odd or {first_keys.shape[-1], second_keys.shape[-1]} != {half}:
    raise UserError(f'queries of width {q_ZxHxK.shape[-1]} do not split over keys of {first_keys.shape[-1]} and {second_keys.shape[-1]}')
  def score(q, keys):
    wide = jnp.promote_types(jnp.float32, q.dtype)
    return jnp.einsum('zhk,nk->zhn' if keys.ndim == 2 else 'zhk,hnk->zhn', q, keys, preferred_element_type=wide)
  return score(q_ZxHxK[..., :half], first_keys), score(q_ZxHxK[..., half:], second_keys)


def _pairs(count: int, first: int, second: int):
  """Places (a, b) in two descending lists whose sum can be among the `count` largest: (a + 1)(b + 1) - 1 others beat the pair."""
  a, b = (x.ravel() for x in np.indices((min(count, first), min(count, second))))
  keep = (a + 1) * (b + 1) <= count
  return a[keep], b[keep]


def top_pairs(first_ZxN, second_ZxN, *, top_k: int):
  """(slots_ZxJ int32, scores_ZxJ): the top_k of the sums first[i] + second[j], slot i * N + j, best first; any leading axes.

  Exact, ties aside: the best of each half are enough, and of their sums those on a hyperbola, about k log k in place of k^2.
  Scores carry gradients. Raises UserError where top_k exceeds the slots.
  """
  sizes = first_ZxN.shape[-1], second_ZxN.shape[-1]
  if not 1 <= top_k <= sizes[0] * sizes[1]: raise UserError(f'top_k={top_k} must lie between 1 and the {sizes[0] * sizes[1]} slots')
  (first, i), (second, j) = (largest(x, min(top_k, size)) for x, size in zip((first_ZxN, second_ZxN), sizes, strict=True))
  a, b = _pairs(top_k, *sizes)
  score, place = largest(first[..., a] + second[..., b], top_k)
  return jnp.take_along_axis(i[..., a] * sizes[1] + j[..., b], place, -1), score


def product_key_search(q_ZxHxK, first_keys, second_keys, *, top_k: int):
  """(ids_ZxHxJ int32, scores_ZxHxJ): the top_k slots i * N + j by q1 . first_i + q2 . second_j; see `top_pairs`."""
  return top_pairs(*product_key_scores(q_ZxHxK, first_keys, second_keys), top_k=top_k)


def joined_logits(first_ZxN, second_ZxN):
  """[Z, N * N] sums of all pairs, slot i * N + j: a router over N * N chapters from two of N outputs; any leading axes."""
  return (first_ZxN[..., :, None] + second_ZxN[..., None, :]).reshape(*first_ZxN.shape[:-1], -1)


# Values -----------------------------------------------------------------------------------------------------------------------

def _chunked(body, carry, arrays, *, row_bytes: int, limit: int):
  """lax.scan of body over stretches of axis 0 that gather `limit` bytes at most; the outputs joined again, padding cut off."""
  rows = arrays[0].shape[0]
  size = min(rows, max(1, limit // max(row_bytes, 1)))
  if size == rows: return body(carry, arrays)
  count = -(-rows // size)
  def split(x): return jnp.pad(x, [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])
  carry, out = jax.lax.scan(body, carry, tuple(split(x) for x in arrays))
  return carry, out.reshape(-1, *out.shape[2:])[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_rows(values_MxV, ids_ZxX, weight_ZxX, limit):
  def body(carry, chunk):
    return carry, jnp.einsum('zx,zxv->zv', chunk[1], values_MxV[chunk[0]].astype(weight_ZxX.dtype))
  return _chunked(body, None, (ids_ZxX, weight_ZxX), row_bytes=_row_bytes(values_MxV, weight_ZxX), limit=limit)[1]


def _row_bytes(values_MxV, weight_ZxX):
  return weight_ZxX.shape[1] * values_MxV.shape[1] * weight_ZxX.dtype.itemsize


def _weighted_rows_forward(values_MxV, ids_ZxX, weight_ZxX, limit):
  return _weighted_rows(values_MxV, ids_ZxX, weight_ZxX, limit), (values_MxV, ids_ZxX, weight_ZxX)


def _weighted_rows_backward(limit, kept, dy_ZxV):
  values_MxV, ids_ZxX, weight_ZxX = kept
  def body(total_MxV, chunk):
    ids, weight, dy = chunk
    rows = (weight[..., None] * dy[:, None]).reshape(-1, dy.shape[1])
    # rows of the padding carry a weight of zero, so they add nothing to row 0
    return total_MxV.at[ids.ravel()].add(rows), jnp.einsum('zv,zxv->zx', dy, values_MxV[ids].astype(dy.dtype))
  total, slope = _chunked(body, jnp.zeros(values_MxV.shape, dy_ZxV.dtype), (ids_ZxX, weight_ZxX, dy_ZxV),
                          row_bytes=_row_bytes(values_MxV, weight_ZxX), limit=limit)
  return total.astype(values_MxV.dtype), None, slope


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def read_values(values_MxV, ids_ZxHxJ, score_ZxHxJ, *, limit: int = 1 << 28):
  """y_ZxV: softmax over the J scores of each head (fp32 or wider), the weighted sum of their value rows, summed over heads.

  ids of -1 read nothing. Rows are gathered `limit` bytes at a time, forward and backward; the gradient of the values adds up the
  rows that were read and is exactly zero elsewhere.
  """
  is_slot, flat = ids_ZxHxJ >= 0, (len(ids_ZxHxJ), -1)
  weight = jax.nn.softmax(jnp.where(is_slot, _wide(score_ZxHxJ), -1e30), -1) * is_slot
  return _weighted_rows(values_MxV, jnp.maximum(ids_ZxHxJ, 0).reshape(flat), weight.reshape(flat), limit).astype(values_MxV.dtype)
