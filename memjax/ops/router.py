"""What a chapter router looks at, and what it picks: running statistics of real tokens, and the top-k chapters.

Statistics are over the real tokens of a token's own document. mask_BxL: which tokens are real (None: all); segment_BxL, int32
and non-decreasing along L: 0 continues the state that was handed in, k > 0 is the k-th document that starts inside the call (at
a real token; None: all zeros). State that comes out is that of each row's last segment; an empty state is all zeros. Sums and
state are fp32 or wider, counts int32. Outputs at masked tokens are finite and mean nothing; masked tokens contribute nothing.
Every form over L has a `_write` of one token and a `_read` of the state after it, and equals their scan.
"""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.top_k import largest


def _wide(x):
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _filled(x_BxLxD, mask_BxL, segment_BxL):
  """(wide x with zeros where masked, mask, segment), no None among them."""
  if mask_BxL is None: mask_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
  if segment_BxL is None: segment_BxL = jnp.zeros(x_BxLxD.shape[:2], jnp.int32)
  mask_BxL = mask_BxL.astype(bool)
  return jnp.where(mask_BxL[..., None], _wide(x_BxLxD), 0), mask_BxL, segment_BxL


def _running_count(mask_BxL, segment_BxL, count_B):
  """int32 [B, L]: real tokens of the token's document up to and with it."""
  before = jnp.cumsum(mask_BxL, 1, dtype=jnp.int32) - mask_BxL
  starts = jnp.diff(segment_BxL, axis=1, prepend=0) != 0
  base = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
  return before - base + mask_BxL + jnp.where(segment_BxL == 0, count_B[:, None], 0)


def running_count(mask_BxL, segment_BxL, *, count_B, like):
  """int32 [B, L]: real tokens of each token's document up to and with it, as the means count them; `like` [B, L, D]."""
  _, mask_BxL, segment_BxL = _filled(like, mask_BxL, segment_BxL)
  return _running_count(mask_BxL, segment_BxL, count_B)


def _running_sum(x_BxLxD, segment_BxL, total_BxD):
  """[B, L, D]: sum of x over the segment up to and with the token; segment 0 starts from total. No sum runs across segments."""
  def join(left, right):
    return right[0], right[1] + jnp.where(left[0] == right[0], left[1], 0)
  total = jax.lax.associative_scan(join, (segment_BxL[..., None], x_BxLxD), axis=1)[1]
  return total + jnp.where(segment_BxL[..., None] == 0, total_BxD[:, None].astype(total.dtype), 0)


def _mean(total, count):
  return total / jnp.maximum(count, 1).astype(total.dtype)[..., None]


def _at_last(x_BxLxD, mask_BxL):
  """[B, D] at each row's last real token: the same sum, bit for bit, however much padding follows."""
  last = jnp.max(jnp.where(mask_BxL, jnp.arange(mask_BxL.shape[1])[None], 0), 1)
  return jnp.take_along_axis(x_BxLxD, last[:, None, None], 1)[:, 0]


# Prefix mean ------------------------------------------------------------------------------------------------------------------

def prefix_mean(x_BxLxD, mask_BxL=None, segment_BxL=None, *, total_BxD, count_B):
  """(mean_BxLxD, total_BxD, count_B): the mean of the document's real tokens up to and with each token, and the state after."""
  x_BxLxD, mask_BxL, segment_BxL = _filled(x_BxLxD, mask_BxL, segment_BxL)
  total = _running_sum(x_BxLxD, segment_BxL, total_BxD)
  count = _running_count(mask_BxL, segment_BxL, count_B)
  return _mean(total, count), _at_last(total, mask_BxL), count[:, -1]


def prefix_mean_write(x_BxD, *, total_BxD, count_B):
  """(total_BxD, count_B) with one more token."""
  return total_BxD + x_BxD.astype(total_BxD.dtype), count_B + 1


def prefix_mean_read(*, total_BxD, count_B):
  """The mean [B, D] of the tokens written so far; zeros where there are none."""
  return _mean(total_BxD, count_B)


# Rolling mean -----------------------------------------------------------------------------------------------------------------

def _windowed_sum(x_BxLxD, segment_BxL, window: int):
  """Sums [B, L, D] over the last `window` positions of the same segment: one doubling and at most one addition a bit of window."""
  def shifted(x, by): return jnp.pad(x[:, :max(x.shape[1] - by, 0)], [(0, 0), (min(by, x.shape[1]), 0), (0, 0)])
  segment = segment_BxL[..., None] + 1                   # 0 is left of the row
  def earlier(x, by): return jnp.where(shifted(segment, by) == segment, shifted(x, by), 0)
  total, power, offset, size = jnp.zeros_like(x_BxLxD), x_BxLxD, 0, 1
  while True:                                            # power: the last `size` positions; total: the last `offset`
    if window & size: total, offset = total + earlier(power, offset), offset + size
    if offset == window: return total
    power, size = power + earlier(power, size), 2 * size


def _recent(ring_BxWxD, count_B):
  """The ring in order of time, the latest token last."""
  index = (count_B[:, None] + jnp.arange(ring_BxWxD.shape[1])[None]) % ring_BxWxD.shape[1]
  return jnp.take_along_axis(ring_BxWxD, index[..., None], 1)


def rolling_mean(x_BxLxD, mask_BxL=None, segment_BxL=None, *, ring_BxWxD, count_B, window: int):
  """(mean_BxLxD, ring_BxWxD, count_B): the mean of the last `window` real tokens with each token, and the state after.

  The n-th token of a document (from 1) is in slot (n - 1) % window of the ring, zeros where nothing was written. Sums add the
  tokens of the window; none is subtracted from a running sum, so nothing drifts. Raises UserError for a ring of another size.
  """
  if ring_BxWxD.shape[1] != window: raise UserError(f'the ring holds {ring_BxWxD.shape[1]} tokens, the window is {window}')
  x, mask, segment = _filled(x_BxLxD, mask_BxL, segment_BxL)
  order = jnp.argsort(~mask, axis=1, stable=True)        # real tokens first: a window is then a stretch of positions
  x, packed = jnp.take_along_axis(x, order[..., None], 1), jnp.take_along_axis(segment, order, 1)
  x = jnp.concatenate([_recent(ring_BxWxD, count_B).astype(x.dtype), x], 1)
  total = _windowed_sum(x, jnp.pad(packed, [(0, 0), (window, 0)]), window)
  place = window - 1 + jnp.cumsum(mask, 1, dtype=jnp.int32)
  count = _running_count(mask, segment, count_B)
  mean = _mean(jnp.take_along_axis(total, place[..., None], 1), jnp.minimum(count, window))
  age = (count[:, -1:] - 1 - jnp.arange(window)[None]) % window    # of the latest token of each slot
  ring = jnp.where((age < count[:, -1:])[..., None], jnp.take_along_axis(x, (place[:, -1:] - age)[..., None], 1), 0)
  return mean, ring, count[:, -1]


def rolling_mean_write(x_BxD, *, ring_BxWxD, count_B):
  """(ring_BxWxD, count_B) with one more token in the place of the oldest."""
  slot = jnp.arange(ring_BxWxD.shape[1])[None] == count_B[:, None] % ring_BxWxD.shape[1]
  return jnp.where(slot[..., None], x_BxD[:, None].astype(ring_BxWxD.dtype), ring_BxWxD), count_B + 1


def rolling_mean_read(*, ring_BxWxD, count_B):
  """The mean [B, D] of the tokens in the ring; zeros where there are none."""
  return _mean(jnp.sum(ring_BxWxD, 1), jnp.minimum(count_B, ring_BxWxD.shape[1]))


# Mean of the block before -----------------------------------------------------------------------------------------------------

def previous_chunk_mean(x_BxLxD, mask_BxL=None, segment_BxL=None, *, previous_BxD, total_BxD, count_B, block: int, first_D):
  """(u_BxLxD, previous_BxD, total_BxD, count_B): the mean of the `block` real tokens before each token's block, and the state.

  Real token n of a document (from 0) is in block n // block; block 0 gets first_D. The state is the mean of the block before that
  of the latest token, the sum over the latest token's block so far, and the count of the document's real tokens.
  """
  x, mask, segment = _filled(x_BxLxD, mask_BxL, segment_BxL)
  count = _running_count(mask, segment, count_B)
  starts = mask & ((count - 1) % block == 0)
  total = _running_sum(x, jnp.cumsum(starts, 1, dtype=jnp.int32), total_BxD)
  start = jax.lax.cummax(jnp.where(starts, jnp.arange(x.shape[1])[None], -1), axis=1)
  # the sum just before a block starts is that of the whole block before it
  before = jnp.concatenate([total_BxD[:, None].astype(total.dtype), total[:, :-1]], 1)
  full = jnp.take_along_axis(before, jnp.maximum(start, 0)[..., None], 1) / block
  is_first = (count <= block)[..., None]
  previous = jnp.where(start[..., None] < 0, previous_BxD[:, None].astype(total.dtype), jnp.where(is_first, 0, full))
  return _first_or(previous, is_first, first_D), _at_last(previous, mask), _at_last(total, mask), count[:, -1]


def _first_or(previous, is_first, first_D):
  return jnp.where(is_first, first_D.astype(previous.dtype).reshape((1,) * (previous.ndim - 1) + (-1,)), previous)


def previous_chunk_mean_write(x_BxD, *, previous_BxD, total_BxD, count_B, block: int):
  """(previous_BxD, total_BxD, count_B) with one more token; one that starts a block first makes a mean of the block before."""
  starts = (count_B % block == 0)[:, None]
  previous = jnp.where(starts, total_BxD / block, previous_BxD)      # an empty state has a total of zero
  return previous, jnp.where(starts, 0, total_BxD) + x_BxD.astype(total_BxD.dtype), count_B + 1


def previous_chunk_mean_read(*, previous_BxD, count_B, block: int, first_D):
  """u [B, D] of the latest token, from the state after it was written: the mean of the block before its own, or first_D."""
  return _first_or(previous_BxD, (count_B <= block)[:, None], first_D)


# Statistics that look ahead ---------------------------------------------------------------------------------------------------

def sequence_mean(x_BxLxD, mask_BxL=None, segment_BxL=None):
  """[B, L, D]: the mean of all real tokens of the document in the row, the same at each of its tokens. NOT causal."""
  x, mask, segment = _filled(x_BxLxD, mask_BxL, segment_BxL)
  rows, _, width = x.shape
  mean, _, _ = prefix_mean(x, mask, segment, total_BxD=jnp.zeros((rows, width), x.dtype), count_B=jnp.zeros(rows, jnp.int32))
  ends = jnp.diff(segment, axis=1, append=segment[:, -1:] + 1) != 0
  end = jax.lax.cummin(jnp.where(ends, jnp.arange(x.shape[1])[None], x.shape[1]), axis=1, reverse=True)
  return jnp.take_along_axis(mean, end[..., None], 1)


def sequence_rolling_mean(x_BxLxD, mask_BxL=None, segment_BxL=None, *, window: int):
  """[B, L, D]: the mean over a document's real tokens of their rolling means. NOT causal."""
  x, mask, segment = _filled(x_BxLxD, mask_BxL, segment_BxL)
  rows, _, width = x.shape
  mean, _, _ = rolling_mean(x, mask, segment, ring_BxWxD=jnp.zeros((rows, window, width), x.dtype),
                            count_B=jnp.zeros(rows, jnp.int32), window=window)
  return sequence_mean(mean, mask, segment)


# Selection --------------------------------------------------------------------------------------------------------------------

def select(logit_ZxP, *, top_k: int, shared: int = 0, bias_P=None, weight_norm: str = 'topk'):
  """(ids_ZxJ int32, log_weight_ZxJ): the top_k likeliest of the chapters from `shared` on, likeliest first; any leading axes.

  p = softmax over the routed chapters; bias_P [P - shared] is added to p for the selection alone. topk: weights p / (sum of the
  selected p), as log_softmax of the selected logits; full: p itself. Both carry gradients of the logits, in fp32 or wider.
  Raises UserError where top_k exceeds the routed chapters, or for another weight_norm.
  """
  routed = _wide(logit_ZxP)[..., shared:]
  if not 1 <= top_k <= routed.shape[-1]:
    raise UserError(f'top_k={top_k} must lie between 1 and the {routed.shape[-1]} routed chapters ({shared} are shared)')
  if weight_norm not in ('topk', 'full'): raise UserError(f'unknown weight norm {weight_norm!r}; topk or full')
  score = jax.lax.stop_gradient(routed)
  if bias_P is not None: score = jax.nn.softmax(score, -1) + bias_P.astype(score.dtype).reshape((1,) * (score.ndim - 1) + (-1,))
  ids = largest(score, top_k)[1]
  if weight_norm == 'full': return ids + shared, jnp.take_along_axis(jax.nn.log_softmax(routed, -1), ids, -1)
  return ids + shared, jax.nn.log_softmax(jnp.take_along_axis(routed, ids, -1), -1)
