"""Where to write and where to read: address maps from router outputs, their rotation by position, and the forms of keep."""
import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.ops.keys import turn
from memjax.ops.top_k import largest

ADDRESS_KINDS = ('content', 'signed', 'softmax', 'sigmoid', 'top1', 'topk', 'scored')


def _wide(x):
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def unit(z):
  """z / sqrt(|z|^2 + 1e-6) over the last axis, computed in fp32, in the dtype of z; finite gradients at zero."""
  wide = _wide(z)
  return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-6)).astype(z.dtype)


def top(z, count: int):
  """Sigmoid scores of the `count` largest logits, summing to one, zero elsewhere; straight-through gradient of all scores.

  count = 1 is one-hot. The backward pass sees sigmoid(z) / sum sigmoid(z), so that slots that were not chosen can come back.
  Raises UserError where count exceeds the slots.
  """
  if not 1 <= count <= z.shape[-1]: raise UserError(f'top_k={count} must lie between 1 and the {z.shape[-1]} slots')
  score = jax.nn.sigmoid(_wide(z))
  index = largest(z, count)[1]
  chosen = jnp.sum(jax.nn.one_hot(index, z.shape[-1], dtype=score.dtype), -2) * score
  hard, soft = (x / jnp.sum(x, -1, keepdims=True) for x in (chosen, score))
  return (soft + jax.lax.stop_gradient(hard - soft)).astype(z.dtype)


def address_map(kind: str, z, *, temperature: float = 1.0, top_k: int = 2):
  """Write addresses over slots from router outputs z [.., S], computed in fp32, in the dtype of z.

  content, signed: unit vectors (signed shares one router among heads, which is the caller's business); softmax: softmax(z /
  temperature); sigmoid, scored: sigmoid(z); top1, topk: see `top`. Raises UserError for another kind.
  """
  if kind in ('sigmoid', 'scored'): return jax.nn.sigmoid(_wide(z)).astype(z.dtype)
  return pick_map(kind, z, temperature=temperature, top_k=top_k)


def pick_map(kind: str, z, *, temperature: float = 1.0, top_k: int = 2):
  """Read picks over slots from router outputs (or, for `scored`, from `slot_scores`) z [.., S]; as `address_map`.

  sigmoid and scored pick by softmax, as the original HAMT does.
  """
  if kind not in ADDRESS_KINDS: raise UserError(f'unknown address kind {kind!r}; one of {", ".join(ADDRESS_KINDS)}')
  if kind in ('content', 'signed'): return unit(z)
  if kind in ('top1', 'topk'): return top(z, 1 if kind == 'top1' else top_k)
  return jax.nn.softmax(_wide(z) / temperature, -1).astype(z.dtype)


def rotate_slots(x, position_BxL, *, base: float = 10_000.0):
  """x [B, L, .., S] with its halves rotated as pairs by position * base^(-2i/S) (rotary embedding, Su et al. 2021).

  Applied to addresses and picks: their product then depends on the distance alone, and values stay untouched. Norms are
  kept. Raises UserError for an odd S.
  """
  if x.shape[-1] % 2: raise UserError(f'rotary addresses need an even number of slots, not {x.shape[-1]}')
  angle = turn(position_BxL, base ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1]))
  angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), -1)
  a, b = jnp.split(_wide(x), 2, -1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


# Keep -------------------------------------------------------------------------------------------------------------------------

def spaced_decay(count: int, fast: float, slow: float):
  """1 - keep of `count` heads or slots, float64 numpy, log-spaced from `fast` to `slow`; one alone takes their geometric mean.

  fast 2^-5, slow 2^-12 over 8 slots is RetNet's 1 - keep = 2^-(5 + s) (Sun et al. 2023).
  """
  if count == 1: return np.sqrt([fast * slow])
  return np.exp(np.linspace(np.log(fast), np.log(slow), count))


def log_keep_map(z, *, floor: float):
  """log sigmoid(z), fp32, not below `floor`: never the logarithm of a rounded keep."""
  return jnp.maximum(jax.nn.log_sigmoid(_wide(z)), floor)


def tied_log_keep(log_keep, write, *, strength: float, floor: float):
  """log keep + log(1 - strength * write), fp32, not below `floor`: only what is written to forgets.

  `write` in [0, 1] is gate * address^2 of signed unit addresses, gate * address of positive ones.
  """
  forget = jnp.minimum(strength * _wide(write), 1 - 1e-6)
  return jnp.maximum(log_keep + jnp.log1p(-forget), floor)
