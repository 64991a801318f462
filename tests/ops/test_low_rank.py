"""The growth of the outputs of a low-rank change with magnitudes, against its formula; products with kernels of integers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.low_rank import as_kernel, kernel_norms, magnitude_growth
from memjax.ops.quantize import dequantize, quantize, quantized_dot

D, E, R, S = 32, 6, 3, 0.7
RNG = np.random.default_rng(0)
W, A, B, MOVED = (RNG.normal(size=shape).astype(np.float32) for shape in ((D, E), (D, R), (R, E), (E,)))
grow = jax.jit(lambda w, a, b, moved: magnitude_growth(w, a, b, scale=S, moved=moved))


def formula(w, a, b, moved):
  """m / ||V|| - 1 in float64."""
  w, a, b, moved = (np.asarray(x, np.float64) for x in (w, a, b, moved))
  norm = lambda x: np.linalg.norm(x, axis=-2)
  return (norm(w) + moved) / norm(w + S * a @ b) - 1


def test_growth_is_that_of_the_formula():
  np.testing.assert_allclose(grow(W, A, B, MOVED), formula(W, A, B, MOVED), rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(kernel_norms(jnp.asarray(W)), np.linalg.norm(W, axis=0), rtol=1e-6)
  stacked = grow(*(np.stack([x, 2 * x]) for x in (W, A, B, MOVED)))
  np.testing.assert_allclose(stacked[1], formula(2 * W, 2 * A, 2 * B, 2 * MOVED), rtol=2e-5, atol=2e-6)


def test_nothing_grows_at_the_start():
  zeros = np.zeros((R, E), np.float32), np.zeros(E, np.float32)
  assert not grow(W, A, *zeros).any() and not grow(1e-3 * W, 1e3 * A, *zeros).any() and not grow(0 * W, A, *zeros).any()
  assert not np.isnan(grow(0 * W, A, B, MOVED)).any()


def test_norms_are_constants_of_the_gradient():
  """d/dm = 1 / ||V||, and nothing through A, B or W."""
  total = lambda w, a, b, moved: jnp.sum(magnitude_growth(w, a, b, scale=S, moved=moved) * jnp.arange(E))
  dw, da, db, dm = jax.jit(jax.grad(total, (0, 1, 2, 3)))(W, A, B, MOVED)
  assert not dw.any() and not da.any() and not db.any()
  np.testing.assert_allclose(dm, np.arange(E) / np.linalg.norm(W + S * A @ B, axis=0), rtol=1e-5)


@pytest.mark.parametrize('how', [dict(bits=8, group=0), dict(bits=4, group=32), dict(bits=4, scheme='nf4', group=32),
                                 dict(bits=4, scheme='nf4', group=0)], ids=['int8', 'int4', 'nf4', 'nf4 rows'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_with_codes(how, dtype):
  """x W, its gradient and the growth are those of the numbers that the codes stand for; codes have no gradient."""
  q, x = quantize(jnp.asarray(W.T), **how), jnp.asarray(RNG.normal(size=(2, 5, D)), dtype)
  exact = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64).T
  y, pull = jax.vjp(jax.jit(quantized_dot), x, q)
  def check(found, meant):
    np.testing.assert_allclose(np.asarray(found, np.float64), meant, atol=(1e-6 if dtype == 'float32' else 2e-2) * np.abs(meant).max())
  assert y.dtype == x.dtype and y.shape == (2, 5, E)
  check(y, exact)
  check(jax.jit(quantized_dot)(jnp.concatenate([x, x, x, x], 1), q)[:, :5], exact)          # many tokens go another way
  dx, dq = pull(y)
  check(dx, np.asarray(y, np.float64) @ np.asarray(dequantize(q), np.float64))
  assert dx.dtype == x.dtype and not np.asarray(dq.scale).any() and dq.codes.dtype == jax.dtypes.float0
  if dtype == 'float32':
    np.testing.assert_allclose(grow(q, A, B, MOVED), grow(as_kernel(q), A, B, MOVED), rtol=1e-5, atol=1e-6)
