"""Causal depthwise short convolution over the valid tokens of a segment, with the tail carried in the memory's state."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.counts import cumulate


class Taps(NamedTuple):
  """Where each tap of each token looks: indices into [tail, tokens], and whether that source may be used.

  The entry at index L describes the token after the call, that is, the next tail. `source` None means plain shifts.
  """
  source_BxNxW: jax.Array | None
  valid_BxNxW: jax.Array | None


def find_taps(width: int, length: int, *, written_BxL: jax.Array | None, reset_BxL: jax.Array | None) -> Taps:
  """The sources of taps 1 .. width-1: the last written tokens of the same segment, found by rank where tokens are masked."""
  W, L = width - 1, length
  some = written_BxL if written_BxL is not None else reset_BxL
  if some is None: return Taps(None, None)
  B = some.shape[0]
  segment_BxL = jnp.zeros((B, L), jnp.int32) if reset_BxL is None else jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
  segment_BxN = jnp.concatenate([segment_BxL, segment_BxL[:, -1:]], 1)                # N = L + 1
  segment_BxM = jnp.pad(segment_BxL, ((0, 0), (W, 0)))                                # M = W + L
  if written_BxL is None:
    source_NxW = W + jnp.arange(L + 1)[:, None] - 1 - jnp.arange(W)[None]
    return Taps(None, jnp.take(segment_BxM, source_NxW, axis=1) == segment_BxN[..., None])
  count_BxL = cumulate(written_BxL)
  before_BxN = jnp.concatenate([count_BxL - written_BxL, count_BxL[:, -1:]], 1)
  place = jnp.where(written_BxL, count_BxL - 1, L)
  where_BxL = jnp.zeros((B, L), jnp.int32).at[jnp.arange(B)[:, None], place].set(jnp.arange(L, dtype=jnp.int32)[None] + W, mode='drop')
  rank_BxNxW = before_BxN[..., None] - jnp.arange(W).reshape(1, 1, -1)                # 1-based; <= 0 lies in the tail
  at = jnp.take_along_axis(where_BxL, jnp.clip(rank_BxNxW - 1, 0).reshape(B, -1), 1).reshape(rank_BxNxW.shape)
  source = jnp.where(rank_BxNxW > 0, at, W - 1 + rank_BxNxW)
  same = jnp.take_along_axis(segment_BxM, source.reshape(B, -1), 1).reshape(source.shape) == segment_BxN[..., None]
  return Taps(source, same)


def _tap(joined_BxMxE: jax.Array, taps: Taps, w: int, span: tuple[int, int]) -> jax.Array:
  """Tap w (1 = the token before); `span` holds the first token (tail included) and the number of tokens."""
  start, size = span
  width = 0 if taps.valid_BxNxW is None else taps.valid_BxNxW.shape[2]
  if taps.source_BxNxW is not None:
    x = jnp.take_along_axis(joined_BxMxE, taps.source_BxNxW[:, start - width:start - width + size, w - 1, None], 1)
  else:
    x = jax.lax.slice_in_dim(joined_BxMxE, start - w, start - w + size, axis=1)
  return _valid(x, taps, w, span)


def _valid(x, taps, w, span):
  """Tap w of the tokens of `span` where its source may be used, 0 elsewhere."""
  if taps.valid_BxNxW is None: return x
  first = span[0] - taps.valid_BxNxW.shape[2]
  return jnp.where(taps.valid_BxNxW[:, first:first + span[1], w - 1, None], x, 0)


def short_conv(x_BxLxE: jax.Array, taps_WxE: jax.Array, tail_BxTxE: jax.Array, taps: Taps, *, dtype=None) -> jax.Array:
  """y_t = sum_w taps_w x_{t-w}, where t-w counts written tokens of t's segment and reaches into the tail [B, W-1, E].

  The sum and y have `dtype`, that of x by default; what is shifted keeps that of x, whose values the tail holds.
  """
  T, L, wide = tail_BxTxE.shape[1], x_BxLxE.shape[1], dtype or x_BxLxE.dtype
  row = lambda w: taps_WxE[w].astype(wide).reshape(1, 1, -1)
  shift = lambda a, before, after: jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), (before, after, 0), (0, 0, 0)])
  def older(x):                                                                # what the tokens before, those of the tail too, give to x
    joined = jnp.concatenate([tail_BxTxE.astype(x.dtype), x], 1)
    return sum((row(w) * _tap(joined, taps, w, (T, x.shape[1])).astype(wide) for w in range(1, T + 1)), jnp.zeros((), wide))
  own = row(0) * x_BxLxE.astype(wide)
  if taps.source_BxNxW is not None or L <= T: return own + older(x_BxLxE)
  # XLA stores what is concatenated, but not what is padded: the tail on its own
  near = (row(w) * _valid(shift(x_BxLxE, w, -w), taps, w, (T, L)).astype(wide) for w in range(1, T + 1))
  return sum(near, own) + shift(older(jnp.zeros_like(x_BxLxE[:, :T])), 0, L - T)


def next_tail(x_BxLxE: jax.Array, tail_BxTxE: jax.Array, taps: Taps) -> jax.Array:
  """The last W-1 written tokens of the last segment, oldest first, in the dtype of the tail."""
  T, L = tail_BxTxE.shape[1], x_BxLxE.shape[1]
  joined = jnp.concatenate([tail_BxTxE, x_BxLxE.astype(tail_BxTxE.dtype)], 1)
  return jnp.concatenate([_tap(joined, taps, w, (T + L, 1)) for w in range(T, 0, -1)], 1)


def taps_init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
  """Current token 1 + N(0, .1^2), older taps N(0, .1^2): almost the identity (specification section 5)."""
  return (0.1 * jax.random.normal(key, shape, dtype)).at[0].add(1)
