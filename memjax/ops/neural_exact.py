"""The triangular solve behind the online rule of a linear memory: (I + N) X = R with N strictly lower triangular."""
import functools

import jax
import jax.numpy as jnp

BASE = 16


def _multiply(a, b):
  return jnp.matmul(a, b, precision='highest')


def inverse(lower: jax.Array) -> jax.Array:
  """(I + N)^-1 [..., C, C]: forward substitution in blocks of 16, then [[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]."""
  C = lower.shape[-1]
  size = min(BASE, C)
  padded = size
  while padded < C: padded *= 2
  full = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, padded - C)] * 2)
  found = _substitute(_diagonal(full, size))
  while size < padded:
    first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
    below = _diagonal(full, 2 * size)[..., size:, :size]
    corner = -_multiply(_multiply(second, below), first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    found = jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)
    size *= 2
  return found[..., 0, :C, :C]


def _diagonal(full, size):
  """The blocks on the diagonal, [..., blocks, size, size]."""
  count = full.shape[-1] // size
  cut = full.reshape(*full.shape[:-2], count, size, count, size)
  return jnp.stack([cut[..., n, :, n, :] for n in range(count)], -3)


def _substitute(blocks):
  size = blocks.shape[-1]
  eye = jnp.eye(size, dtype=blocks.dtype)
  out = jnp.broadcast_to(eye, blocks.shape)
  for row in range(1, size):
    new = jnp.sum(blocks[..., row, :row, None] * out[..., :row, :], -2)
    out = out.at[..., row, :].add(-new)
  return out


@jax.custom_vjp
def _blocked(lower, right):
  return _blocked_forward(lower, right)[0]


def _blocked_forward(lower, right):
  found = inverse(jnp.tril(lower, -1))
  x = _multiply(found, right)
  return x, (found, x)


def _blocked_backward(kept, g):
  found, x = kept
  back = _multiply(jnp.swapaxes(found, -1, -2), g)
  return -jnp.tril(_multiply(back, jnp.swapaxes(x, -1, -2)), -1), back


_blocked.defvjp(_blocked_forward, _blocked_backward)


def solve(lower: jax.Array, right: jax.Array, *, how: str = 'blocked') -> jax.Array:
  """X [..., C, V] of (I + N) X = right; only the strictly lower part of `lower` counts. how: blocked (batched matmuls) | lax."""
  if how == 'blocked': return _blocked(lower, right)
  with_ones = jnp.tril(lower, -1) + jnp.eye(lower.shape[-1], dtype=lower.dtype).reshape((1,) * (lower.ndim - 2) + lower.shape[-2:])
  triangular = functools.partial(jax.scipy.linalg.solve_triangular, lower=True, unit_diagonal=True)
  return triangular(with_ones, right)
