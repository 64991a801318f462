"""The k largest entries: by the sort of the device, or without one where it has none."""
import functools

import jax
import jax.numpy as jnp

from memjax.ops.probe import works


@functools.cache
def has_top_k() -> bool:
  """Whether the default device computes `lax.top_k`."""
  return works('top-k', lambda: jax.lax.top_k(jnp.array([[2.0, 3.0, 3.0, 1.0]]), 2)[1].tolist() == [[1, 2]])


def largest(x, k: int):
  """(values, indices int32) of the k largest floats over the last axis, largest first, of equal ones the first."""
  return jax.lax.top_k(x, k) if has_top_k() else pick_largest(x, k)


def pick_largest(x, k: int):
  """What `largest` returns, without a sort: k times the first of the largest entries that are left. Values carry gradients."""
  free = jax.lax.stop_gradient(x)
  def body(is_left, _):
    left = jnp.where(is_left, free, -jnp.inf)
    index = jnp.argmax(left, -1)
    bottom = jnp.max(left, -1) == -jnp.inf                    # entries of -inf are chosen too, each once
    index = jnp.where(bottom, jnp.argmax(is_left, -1), index).astype(jnp.int32)
    return is_left & (jnp.arange(x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,)) != index[..., None]), index
  index = jnp.moveaxis(jax.lax.scan(body, jnp.ones(x.shape, bool), None, length=k)[1], 0, -1)
  return jnp.take_along_axis(x, index, -1), index
