"""The norm of heads with its gate: the definition in numpy, and the kernels, interpreted, against the plain form."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.head_norm import head_norm, supports
from tests.ops.inputs import gpu_text, quick
from tests.ops.oracle import relative

B, L, H, V = 2, 64, 3, 32


def draw(dtype=np.float64):
  rng = np.random.default_rng(0)
  y, gate, weight = (rng.normal(size=(B, L, H * V)) for _ in range(3))
  y[0, 0, :V] = 0                                                             # an empty memory
  return tuple(jnp.asarray(a, dtype) for a in (y, rng.normal(size=H * V), gate, weight))


def run(backend, arguments, *, activation, dtype):
  """(out, gradients of y, scale and, with an activation, gate)."""
  *given, weight = arguments
  def value(*given):
    out = head_norm(*given, width=V, activation=activation, dtype=dtype, backend=backend)
    return jnp.sum((out * weight).astype(jnp.promote_types(jnp.float32, dtype))), out
  given = given if activation else given[:2]
  (_, out), grads = jax.value_and_grad(value, range(len(given)), has_aux=True)(*given)
  return out, *grads


@pytest.mark.parametrize('activation', ['silu', 'sigmoid', ''])
def test_kernels_equal_the_plain_form(activation):
  with jax.enable_x64():
    arguments = draw()
    got, want = quick(lambda arguments: [run(backend, arguments, activation=activation, dtype=np.float64)
                                         for backend in ('pallas', 'xla')])(arguments)
    y, scale, gate, _ = map(np.asarray, arguments)
  for x, other in zip(got, want, strict=True): assert x.dtype == other.dtype and relative(x, other) <= 1e-12
  heads = y.reshape(B, L, H, V)
  unit = (heads / np.sqrt(np.mean(heads ** 2, -1, keepdims=True) + 1e-6)).reshape(y.shape)
  sigmoid = 1 / (1 + np.exp(-gate))
  assert relative(want[0], unit * scale * {'silu': gate * sigmoid, 'sigmoid': sigmoid, '': 1}[activation]) <= 1e-12


def test_narrow_arrays():
  """bf16: kernels round once, so they are nearer than the plain form to float64 of the same numbers."""
  with jax.enable_x64():
    y, scale, gate, weight = draw(jnp.bfloat16)
    want = run('xla', [a.astype(np.float64) for a in (y, scale, gate, weight)], activation='silu', dtype=np.float64)
  given = y, scale.astype(jnp.float32), gate, weight
  ours, plain = (run(backend, given, activation='silu', dtype=jnp.bfloat16) for backend in ('pallas', 'xla'))
  for got, other, true in zip(ours, plain, want, strict=True):
    assert got.dtype == other.dtype
    assert relative(np.asarray(got, np.float64), true) <= relative(np.asarray(other, np.float64), true)


def test_what_the_kernels_take():
  """Whole programs of heads that are powers of two."""
  for fitting in ((8, 2048, 64), 64), ((64, 2, 48), 16), ((1, 256, 256), 128): assert supports(*fitting)
  for other in ((0, 8, 64), 64), ((1, 100, 64), 64), ((4, 16, 64), 64), ((1, 128, 96), 48), ((1, 128, 64), 8), ((1, 128, 256), 256):
    assert not supports(*other)


def test_kernels_lower_for_a_gpu(monkeypatch):
  """To Triton, forward and backward, at the sizes of the benchmark."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  wide, row = jax.ShapeDtypeStruct((8, 2048, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024,), jnp.float32)
  def value(*given): return jnp.sum(head_norm(*given, width=64, dtype=jnp.bfloat16, backend='pallas').astype(jnp.float32))
  assert gpu_text(jax.value_and_grad(value, range(3)), wide, row, wide).count('xla.gpu.triton') == 2
