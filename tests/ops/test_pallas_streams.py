"""The fused streams of a neural memory, interpreted, against their definition in XLA."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.layers.conv import find_taps, short_conv
from memjax.memory.neural_inputs import narrow_gradient, unit
from memjax.ops.pallas_streams import stream, supports
from tests.ops.inputs import quick
from tests.ops.oracle import relative


def run(dtype, *, has_norm, starts, compiled=quick):
  """[(y, gradients of x, taps and the tail) by XLA, by the kernels]."""
  rng, (B, L, H, K, W, C) = np.random.default_rng(0), (2, 128, 1, 64, 4, 64)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  reset_BxL = np.zeros((B, L), bool)
  for row, at in enumerate(starts): reset_BxL[row, at] = True
  def by_xla(x, taps, before):
    u = narrow_gradient(x.dtype, short_conv(x, taps, before, find_taps(W, L, written_BxL=None, reset_BxL=reset_BxL), dtype=taps.dtype))
    s = jax.nn.silu(u).reshape(B, L, H, K)
    y = unit(s, 'l2') if has_norm else s
    return y.reshape(B, L // C, C, H, K).transpose(1, 0, 3, 2, 4).astype(x.dtype)
  def by_kernels(x, taps, before):
    segment = jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
    return stream(x, taps, before, segment, chunk=C, width=K, has_norm=has_norm)
  def loss(arguments, form):
    y = form(*arguments)
    wide = y.astype(jnp.promote_types(jnp.float32, y.dtype))
    return jnp.sum(wide * jnp.cos(jnp.arange(y.size, dtype=wide.dtype)).reshape(y.shape)), y
  def both(arguments):
    found = [jax.value_and_grad(loss, has_aux=True)(arguments, form) for form in (by_xla, by_kernels)]
    return [(y, *grads) for (_, y), grads in found]
  return compiled(both)((draw(B, L, H * K), draw(W, H * K), draw(B, W - 1, H * K)))


@pytest.mark.parametrize('has_norm', [True, False], ids=['unit', 'plain'])
def test_stream_is_convolution_silu_and_norm(has_norm):
  """Documents that begin with the call, near a chunk's start, in the middle, or not at all."""
  with jax.enable_x64():
    want, got = run(np.float64, has_norm=has_norm, starts=((0, 17, 63, 64, 100), ()))
  for x, y in zip(got, want, strict=True): assert x.dtype == y.dtype and relative(x, y) <= 1e-12
  assert all(np.any(x) for x in want)


def test_what_the_kernels_take():
  """Whole chunks, sizes that are powers of two."""
  others = (0, 64, 64), (100, 64, 64), (96, 48, 64), (128, 64, 8), (512, 256, 64)
  assert supports(128, 64, 64) and not any(supports(*sizes) for sizes in others)
