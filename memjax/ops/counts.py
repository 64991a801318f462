"""Running counts of tokens."""
from collections.abc import Callable

import jax
import jax.numpy as jnp


def cumulate(a: jax.Array, op: Callable = jnp.add, axis: int = 1) -> jax.Array:
  """Inclusive running sums along an axis, or running results of another associative `op`; booleans are counted in int32.

  As jnp.cumsum, by doubling: where masks are constants of a program XLA folds this at once, and a cumsum for seconds each.
  """
  return jax.lax.associative_scan(op, a.astype(jnp.int32) if a.dtype == bool else a, axis=axis)
