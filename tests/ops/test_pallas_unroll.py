"""The fused coefficients of a neural memory, interpreted, against those by doubling."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural_steps import steps, unroll
from tests.ops.inputs import quick
from tests.ops.neural_cases import gates
from tests.ops.oracle import relative


@pytest.mark.parametrize('momentum', ['none', 'first', 'nesterov', 'cascade'])
def test_rows_are_the_doubling(momentum):
  """Values, and gradients of the gates, some of which are 0 and 1."""
  given = gates(np.random.default_rng(0), (2, 3, 8), order=2)
  def loss(given, fused):
    found = unroll(steps(momentum, given), fused=fused)
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in found), found
  def both(given): return [jax.value_and_grad(loss, has_aux=True, allow_int=True)(given, fused) for fused in (False, True)]
  with jax.enable_x64(): ((_, want), right), ((_, got), grads) = quick(both)(jax.tree.map(jnp.asarray, given))
  for x, y in zip(got, want, strict=True): assert x.dtype == y.dtype and relative(x, y) <= 1e-13
  real = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == np.float64]
  for x, y in zip(real(grads), real(right), strict=True): assert relative(x, y) <= 1e-12
  assert any(np.any(x) for x in real(right))
