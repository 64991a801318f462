"""The norms of a kernel and of the kernel with its low-rank change: what DoRA (Liu et al. 2024) divides by."""
import jax
import jax.numpy as jnp

from memjax.ops.quantize import Quantized, dequantize

TINY = 1e-30            # below the square of any norm that matters; a column of zeros divides by its root


def as_kernel(kernel, dtype=jnp.float32):
  """W [.., D, E] in `dtype`, from numbers or from the codes of its transpose."""
  return jnp.swapaxes(dequantize(kernel, dtype), -1, -2) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def kernel_norms(kernel):
  """||W|| [.., E] over the inputs, of numbers [.., D, E] or codes, in float32 at least."""
  w = as_kernel(kernel, jnp.promote_types(jnp.float32, jnp.float32 if isinstance(kernel, Quantized) else kernel.dtype))
  return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w), -2), TINY))


def magnitude_growth(kernel, a, b, *, scale: float, moved):
  """m / ||V|| - 1 [.., E] with V = W + s A B and m = ||W|| + moved; the norms are constants of the gradient (paper, section 4.3).

  Computed as (moved - c / (||W|| + ||V||)) / ||V|| with c = ||V||^2 - ||W||^2 = sum_r B (2 s A^T W + s^2 A^T A B): where B and
  `moved` are zero it is exactly zero, whatever rounds how, and A B is never made.
  """
  wide = jnp.promote_types(jnp.float32, moved.dtype)
  w, a, b = jax.lax.stop_gradient((as_kernel(kernel, wide), a.astype(wide), b.astype(wide)))
  times = lambda x, y: jnp.matmul(jnp.swapaxes(x, -1, -2), y, precision='highest')
  square = jnp.sum(jnp.square(w), -2)
  grown = jnp.sum(b * (2 * scale * times(a, w) + scale ** 2 * jnp.matmul(times(a, a), b, precision='highest')), -2)
  before, after = (jnp.sqrt(jnp.maximum(x, TINY)) for x in (square, square + grown))
  return (moved.astype(wide) - grown / (before + after)) / after
