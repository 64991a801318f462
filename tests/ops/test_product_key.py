"""Product keys against brute force and plain gathers: section 8, P8.1 to P8.3."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import product_key
from tests.ops.inputs import quick
from tests.ops.oracle import relative

Z, H, N, K, V = 5, 2, 32, 6, 4


def draw(heads=(), seed=0):
  """q, first and second keys, float64."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(Z, H, K)), rng.normal(size=(*heads, N, K // 2)), rng.normal(size=(*heads, N, K // 2))


def brute(q, first, second):
  """Sums of all pairs [Z, H, N, N]."""
  halves = [np.einsum('zhk,hnk->zhn', x, np.broadcast_to(keys, (H, N, K // 2))) for x, keys in ((q[..., :3], first), (q[..., 3:], second))]
  return halves[0][..., None] + halves[1][..., None, :]


search = quick(product_key.product_key_search, static_argnames='top_k')


@pytest.mark.parametrize('heads', [(), (H,)])
def test_search_is_exact(heads):
  """P8.1: ids and scores of the best of all n^2 sums."""
  with jax.enable_x64():
    for seed in range(8):
      given = draw(heads, seed)
      ids, score = search(*given, top_k=8)
      every = brute(*given).reshape(Z, H, -1)
      want = np.argsort(-every, -1)[..., :8]
      assert ids.dtype == jnp.int32 and np.array_equal(ids, want)
      assert np.abs(np.asarray(score) - np.take_along_axis(every, want, -1)).max() <= 1e-12


def test_every_count_and_uneven_halves():
  """Also where the count exceeds a half, up to all slots."""
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
  every = (first[:, :, None] + second[:, None]).reshape(3, -1)
  for count in (1, 2, 5, 11, 24):
    ids, score = quick(lambda a, b: product_key.top_pairs(a, b, top_k=count))(first, second)
    assert np.array_equal(ids, np.argsort(-every, -1)[:, :count]) and np.all(np.diff(score) <= 0)
  joined = product_key.joined_logits(first, second)
  assert np.array_equal(joined, every)
  for count in (0, 25):
    with pytest.raises(UserError, match='top_k'): product_key.top_pairs(first, second, top_k=count)
  assert len(product_key._pairs(32, 1024, 1024)[0]) == 119


def test_relabelling_sub_keys_permutes_slots():
  """P8.2."""
  q, first, second = draw()
  order = np.random.default_rng(1).permutation(N)
  with jax.enable_x64():
    ids, score = search(q, first, second, top_k=8)
    moved, same = search(q, first[order], second, top_k=8)
  assert np.array_equal(order[np.asarray(moved) // N] * N + np.asarray(moved) % N, ids) and np.array_equal(score, same)


def test_scores_are_wide_and_widths_checked():
  q, first, second = (jnp.asarray(x, jnp.bfloat16) for x in draw())
  assert jax.eval_shape(lambda *a: product_key.product_key_search(*a, top_k=3), q, first, second)[1].dtype == jnp.float32
  for bad in (q[..., :5], q[..., :4]):
    with pytest.raises(UserError, match='width'): product_key.product_key_scores(bad, first, second)


def plain(values, ids, score):
  """The read as one gather."""
  weight = jax.nn.softmax(score, -1)
  return jnp.einsum('zhj,zhjv->zv', weight, values[ids])


def test_read_values_and_gradients():
  """Equal to the plain gather in stretches of any size; P8.3: no gradient for rows that were not read."""
  rng, M, J = np.random.default_rng(0), 20, 3
  values, score = rng.normal(size=(M, V)), rng.normal(size=(Z, H, J))
  ids, way = rng.integers(0, 12, (Z, H, J)), rng.normal(size=(Z, V))
  with jax.enable_x64():
    def both(read):
      return lambda values, score: jax.value_and_grad(lambda v, s: jnp.sum(read(v, ids, s) * way), (0, 1))(values, score)
    want, (dvalues, dscore) = quick(both(plain))(values, score)
    for limit in (1 << 28, 2 * H * J * V * 8, 1):
      got, (a, b) = quick(both(lambda *x: product_key.read_values(*x, limit=limit)))(values, score)
      assert abs(got - want) <= 1e-12 and relative(a, dvalues) <= 1e-12 and relative(b, dscore) <= 1e-12
      read = np.isin(np.arange(M), ids)
      assert np.all(np.asarray(a)[~read] == 0) and np.all(np.abs(np.asarray(a)[read]).sum(-1) > 0)


def test_absent_slots_read_nothing():
  """ids of -1 carry no weight; a token of them alone reads zero with finite gradients."""
  values, score = np.ones((6, V), np.float32), np.random.default_rng(0).normal(size=(2, H, 3)).astype(np.float32)
  ids = np.array([[[0, 1, -1]] * H, [[-1] * 3] * H])
  y, (a, b) = quick(lambda v, s: (product_key.read_values(v, ids, s),
                                  jax.grad(lambda v, s: jnp.sum(product_key.read_values(v, ids, s) ** 2), (0, 1))(v, s)))(values, score)
  assert np.allclose(y[0], H, atol=1e-6) and np.all(np.asarray(y)[1] == 0)
  assert np.all(np.isfinite(a)) and np.all(np.isfinite(b)) and np.all(np.asarray(b)[1] == 0) and np.all(np.asarray(a)[2:] == 0)


def test_the_gather_is_never_whole():
  """Temporaries stay near the limit where the whole gather would be 40 times as large."""
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((64, 256), jnp.float32), ((512, 2, 16), jnp.int32), ((512, 2, 16), jnp.float32))]
  whole, limit = 512 * 32 * 256 * 4, 1 << 18
  f = jax.grad(lambda v, i, s: jnp.sum(product_key.read_values(v, i, s, limit=limit) ** 2), (0, 2))
  temporary = quick(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  assert temporary < whole / 4


def test_bfloat16_values_sum_in_single_precision():
  values = jnp.asarray(np.random.default_rng(0).normal(size=(600, V)), jnp.bfloat16)
  ids, score = np.arange(512).reshape(1, 1, 512), np.zeros((1, 1, 512), np.float32)
  y = quick(lambda v, s: product_key.read_values(v, ids, s))(values, score)
  assert y.dtype == jnp.bfloat16 and np.abs(np.asarray(y, np.float32) - np.asarray(values[:512], np.float32).mean(0)).max() <= 1e-3
