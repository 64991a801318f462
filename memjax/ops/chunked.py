"""The slot recurrence by chunks: three small matmuls for C tokens at a time, exact, with one state a chunk and none a token.

Over one chunk of one head, with picks P and addresses A [C, S], bound values b [C, K], the state m0 [S, K] before the
chunk and L_t the sum of log keeps up to token t (inclusive):

  y  = W b + (P * e^L) m0,   W_ti = sum_s P_ts A_is e^(L_ts - L_is) for i <= t
  m1 = e^(L_C) * m0 + (A * e^(L_C - L))^T b

which is chunked gated linear attention (Sun et al. 2023, Yang et al. 2024) with addresses as its keys. Reading before
the write of the same token takes L_{t-1} for t, and i < t. A document's start opens a new segment: W joins equal
segments only, the carried state enters its own segment only, and the last segment alone leaves the chunk. Arrays have
heads first, [B, H, N, C, ..], so that every product is a batched matmul of contiguous matrices; what is constant over
rows or chunks keeps an axis of one.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError

EXPONENT = 160.0      # factored decay splits e^x into two factors of fp32: x / 2 stays below 80 while C |floor| <= 160


class Chunks(NamedTuple):
  """Decay of N chunks of C tokens. `log` and `total` (its running sum) are fp32 [b, H, n, C, s] or None; segments [B, 1, N, C]."""
  log: jax.Array | None
  total: jax.Array | None
  segment: jax.Array | None
  entering: jax.Array | None           # the segment of the state before the chunk, [B, 1, N, 1]
  is_factored: bool
  is_before: bool


def choose_chunk(length: int, chunk: int, *, is_slot: bool, floor: float) -> int:
  """Tokens a chunk: `chunk` if set; else 32 on CPU, on accelerators the power of two from 64 to 256 at or above sqrt(length).

  Keeps of their own per slot shorten an automatic chunk (down to 16) until decay can be factored above `floor`.
  """
  if chunk: return min(chunk, length)
  size = 32 if jax.default_backend() == 'cpu' else 64
  while size > 32 and size < 256 and size * size < length: size *= 2
  while is_slot and size > 16 and size * -floor > EXPONENT: size //= 2
  return min(size, length)


def cut(x, chunk: int):
  """x [B, L, .., H, Z] as [B, H, N, .., C, Z], with zeros behind the last token up to a multiple of the chunk."""
  B, L, rest, size = x.shape[0], x.shape[1], x.shape[2:], -(-x.shape[1] // chunk) * chunk
  if size != L: x = jnp.pad(x, ((0, 0), (0, size - L)) + ((0, 0),) * len(rest))
  x = x.reshape(B, size // chunk, chunk, *rest)
  middle = tuple(range(3, x.ndim - 2))
  return x.transpose(0, x.ndim - 2, 1, *middle, 2, x.ndim - 1)


def join(x, length: int):
  """The inverse of `cut`: [B, H, N, .., C, Z] as [B, L, .., H, Z]."""
  middle = tuple(range(3, x.ndim - 2))
  x = x.transpose(0, 2, x.ndim - 2, *middle, 1, x.ndim - 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def prepare(log_keep, reset_BxL, length: int, *, chunk: int, decay: str, floor: float, order: str) -> Chunks:
  """The decay and segments of all chunks. Log keep is fp32 [B or 1, L, H, S or 1], constant [1, 1, H, S or 1], or None.

  Raises UserError where factored decay is asked for beyond chunk * |floor| = 160.
  """
  is_slot = log_keep is not None and log_keep.shape[-1] > 1
  fits = chunk * -floor <= EXPONENT
  if decay == 'factored' and is_slot and not fits:
    raise UserError(f'factored decay needs chunk x |floor| <= {EXPONENT:g}, not {chunk} x {-floor:g}; use exact or a shorter chunk')
  log = total = segment = entering = None
  if log_keep is not None:
    if log_keep.shape[1] == 1 < length:      # constant: one table for all chunks, unless padding behind the last token must not decay
      log_keep = jnp.broadcast_to(log_keep, (log_keep.shape[0], length if length % chunk else chunk, *log_keep.shape[2:]))
    log = cut(log_keep, chunk)
    total = jnp.cumsum(log, 3)
  if reset_BxL is not None:
    ids = jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
    ids = jnp.pad(ids, ((0, 0), (0, -length % chunk)), mode='edge')
    segment = ids.reshape(ids.shape[0], 1, -1, chunk)
    entering = jnp.pad(segment[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
  return Chunks(log, total, segment, entering, is_slot and decay != 'exact' and fits, order == 'before')


def _read_total(c):
  return c.total - c.log if c.is_before else c.total


def _masked(scale, allowed, dtype):
  """exp(scale) where allowed, else 0; None where both are None."""
  if scale is None: return None if allowed is None else allowed.astype(dtype)
  scale = jnp.exp(scale)
  return scale if allowed is None else jnp.where(allowed, scale, 0)


def enter(c: Chunks, dtype):
  """Decay from the state before the chunk to the read of each token, [b, H, n, C, s], zero in later segments; None = 1."""
  allowed = None if c.segment is None else (c.segment == c.entering)[..., None]
  return _masked(None if c.total is None else _read_total(c), allowed, dtype)


def stay(c: Chunks, dtype):
  """Decay from the write of each token to the end of the chunk, [b, H, n, C, s], zero in earlier segments; None = 1."""
  allowed = None if c.segment is None else (c.segment == c.segment[..., -1:])[..., None]
  return _masked(None if c.total is None else c.total[..., -1:, :] - c.total, allowed, dtype)


def _scaled(x, scale):
  """x * scale in the dtype of x, multiplied in the wider one."""
  return x if scale is None else (x * scale).astype(x.dtype)


def _causal(c, size):
  """bool [B or 1, 1, N or 1, C, C]: may token t read what token i wrote."""
  t, i = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
  allowed = (i < t if c.is_before else i <= t)[None, None, None]
  return allowed if c.segment is None else allowed & (c.segment[..., :, None] == c.segment[..., None, :])


def _head_decay(reading, writing, allowed):
  """One decay per head, [b, H, n, 1, C, C], exact at any keep: differences are masked before exp."""
  return jnp.exp(jnp.where(allowed, reading[..., :, None] - writing[..., None, :], -jnp.inf))[:, :, :, None]


@jax.custom_vjp
def _head_weights(p, a, totals, allowed):
  """W = (P A^T) * decay for one keep per head; `totals` are the sums of log keeps at the read of t and the write of i."""
  product = jnp.einsum('bhngts,bhnis->bhngti', p, a, preferred_element_type=p.dtype)
  return _scaled(product, _head_decay(*totals, allowed))


def _head_weights_forward(*inputs):
  return _head_weights(*inputs), inputs


def _head_weights_backward(inputs, dw):
  """Gradients without the C x C decay or the product as residuals: d log keep is P dP at t and -A dA at i (section 4.6)."""
  p, a, (reading, writing), allowed = inputs
  dw = _scaled(dw, _head_decay(reading, writing, allowed))
  wide = reading.dtype
  dp = jnp.einsum('bhngti,bhnis->bhngts', dw, a, preferred_element_type=wide)
  da = jnp.einsum('bhngti,bhngts->bhnis', dw, p, preferred_element_type=wide)
  shrink = lambda x, like: jnp.sum(x, tuple(n for n in range(3) if like.shape[n] == 1), keepdims=True)
  dreading, dwriting = shrink(jnp.sum(p * dp, (3, 5)), reading), -shrink(jnp.sum(a * da, 4), writing)
  return dp.astype(p.dtype), da.astype(a.dtype), (dreading, dwriting), None


_head_weights.defvjp(_head_weights_forward, _head_weights_backward)


def _slot_decay(c, allowed):
  """One decay per slot, [b, H, n, C, C, S]: exact at any keep, C times the memory of the factored form."""
  difference = _read_total(c)[..., :, None, :] - c.total[..., None, :, :]
  return jnp.exp(jnp.where(allowed[..., None], difference, -jnp.inf))


def _halves(c):
  """The two factors of decay around the middle of the chunk's total: reading [b, H, n, C, s] and writing.

  The middle cancels, so it has no gradient: rounding would let later keeps leak into it.
  """
  middle = jax.lax.stop_gradient(c.total[..., -1:, :] / 2)
  return jnp.exp(_read_total(c) - middle), jnp.exp(middle - c.total)


def entered(c: Chunks, x_BxHxNxGxCxS):
  """What meets the state before the chunk (picks, or scores of it), with the decay of that state, in its own dtype."""
  scale = enter(c, jnp.promote_types(jnp.float32, x_BxHxNxGxCxS.dtype))
  return x_BxHxNxGxCxS if scale is None else _scaled(x_BxHxNxGxCxS, scale[:, :, :, None])


def weights(c: Chunks, pick_BxHxNxGxCxS, address_BxHxNxCxS):
  """W [B, H, N, G, C, C]: how much of the value that token i bound reaches the read of token t."""
  p, a = pick_BxHxNxGxCxS, address_BxHxNxCxS
  allowed = _causal(c, a.shape[3])
  product = lambda p, a: jnp.einsum('bhngts,bhnis->bhngti', p, a, preferred_element_type=p.dtype)
  if c.total is None: return jnp.where(allowed[:, :, :, None], product(p, a), 0)
  if c.total.shape[-1] == 1: return _head_weights(p, a, (_read_total(c)[..., 0], c.total[..., 0]), allowed)
  if not c.is_factored:
    return jnp.einsum('bhngts,bhntis->bhngti', p, _slot_decay(c, allowed).astype(p.dtype) * a[:, :, :, None])
  reading, writing = _halves(c)              # masked products may overflow: they are dropped by `where`, never multiplied by zero
  return jnp.where(allowed[:, :, :, None], product(_scaled(p, reading[:, :, :, None]), _scaled(a, writing)), 0)


def scores(c: Chunks, probe_BxHxNxGxCxK, bound_BxHxNxCxK, address_BxHxNxCxS):
  """sum_i <probe_t, bound_i> decay address_is within each chunk, [B, H, N, G, C, S]: the dual of `weights`, keys and slots swapped."""
  a, allowed = address_BxHxNxCxS, _causal(c, address_BxHxNxCxS.shape[3])
  product = jnp.einsum('bhngtk,bhnik->bhngti', probe_BxHxNxGxCxK, bound_BxHxNxCxK, preferred_element_type=a.dtype)
  sum_up = lambda w, a: jnp.einsum('bhngti,bhnis->bhngts', w, a, preferred_element_type=a.dtype)
  if c.total is not None and c.total.shape[-1] == 1:
    return sum_up(_scaled(product, _head_decay(_read_total(c)[..., 0], c.total[..., 0], allowed)), a)
  product = jnp.where(allowed[:, :, :, None], product, 0)
  if c.total is None: return sum_up(product, a)
  if not c.is_factored:
    return jnp.einsum('bhngti,bhntis->bhngts', product, _slot_decay(c, allowed).astype(a.dtype) * a[:, :, :, None])
  reading, writing = _halves(c)
  return _scaled(sum_up(product, _scaled(a, writing)), reading[:, :, :, None])


def left(c: Chunks, address_BxHxNxCxS):
  """Addresses with the decay from their token to the end of the chunk, in their dtype; zero in earlier segments."""
  return _scaled(address_BxHxNxCxS, stay(c, jnp.promote_types(jnp.float32, address_BxHxNxCxS.dtype)))


def writes(c: Chunks, bound_BxHxNxCxK, address_BxHxNxCxS):
  """What each chunk alone leaves in the slots, in the accumulation dtype, [B, H, N, S, K]."""
  wide = jnp.promote_types(jnp.float32, bound_BxHxNxCxK.dtype)
  return jnp.einsum('bhnis,bhnik->bhnsk', left(c, address_BxHxNxCxS), bound_BxHxNxCxK, preferred_element_type=wide)


def keeps(c: Chunks, count: int, dtype):
  """Decay of the state over each of `count` whole chunks, [b, H, N, s, 1], zero where a segment starts inside."""
  decay = jnp.ones((1, 1, count, 1), dtype) if c.total is None else jnp.exp(c.total[..., -1, :])
  if c.segment is not None: decay = jnp.where(c.segment[..., -1:] == c.entering, decay, 0)
  return jnp.broadcast_to(decay, (*decay.shape[:2], count, decay.shape[3]))[..., None]
