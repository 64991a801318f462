"""The k largest without a sort: as `lax.top_k`, ties and infinities included, with its gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import probe
from memjax.ops.top_k import largest, pick_largest

ROWS = [[1.0, 3.0, 3.0, -2.0, 3.0, 0.0], [-np.inf, 2.0, -np.inf, -np.inf, 5.0, -np.inf], [0.0] * 6]


@pytest.mark.parametrize('k', [1, 4, 6])
def test_values_and_indices_are_those_of_the_sort(k):
  x = jnp.concatenate([jnp.array(ROWS), jnp.round(3 * jax.random.normal(jax.random.key(0), (40, 6))) + 0.0]).reshape(1, 43, 6)
  expected = jax.lax.top_k(x, k)
  for actual in (pick_largest(x, k), largest(x, k)):
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])
    assert actual[1].dtype == jnp.int32


def test_gradients_go_to_what_was_chosen():
  x, weight = jax.random.normal(jax.random.key(0), (3, 7)), jnp.arange(1.0, 4.0)[None]
  grads = [jax.grad(lambda x, f=f: jnp.sum(f(x, 3)[0] * weight))(x) for f in (pick_largest, jax.lax.top_k)]
  np.testing.assert_array_equal(*grads)
  assert np.count_nonzero(grads[0]) == 9


def test_a_probe_says_what_is_missing(caplog):
  def broken(): raise RuntimeError('UNIMPLEMENTED: sort\nmore')
  assert jax.jit(lambda x: x * probe.works('sum', lambda: jnp.ones(3).sum() == 3))(2.0) == 2
  assert not caplog.records and not probe.works('top-k', broken) and not probe.works('sum', lambda: jnp.zeros(1).sum() == 1)
  assert [record.getMessage() for record in caplog.records] == [
    'this device has no top-k (UNIMPLEMENTED: sort); the path that needs none is taken',
    'this device has no sum (the result is wrong); the path that needs none is taken']
