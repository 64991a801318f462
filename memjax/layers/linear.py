"""Linear maps whose kernels carry logical axis names; parameters are float32, the product runs in the compute dtype."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.lora import NOISE, Change, Lora, find_change, find_kernel, multiply
from memjax.ops.low_rank import as_kernel
from memjax.ops.quantize import Quantized


def kernel_init(std: float = 0.0, *, fan_in: int = 0, zero: bool = False) -> Callable:
  """N(0, std^2), or N(0, 1 / fan_in) when `std` is 0; all zeros when `zero` (grafted output projections)."""
  if zero: return nn.initializers.zeros_init()
  return nn.initializers.normal(std or fan_in ** -0.5)


def partitioned(init: Callable, axes: tuple) -> Callable:
  """`init` whose result is boxed with the logical axis names `axes`."""
  return nn.with_logical_partitioning(init, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def wide_dot(x: jax.Array, kernel: jax.Array, axes: str = 'de', precision: Any = None) -> jax.Array:
  """x W in float32 at least, of operands in the dtype of x; `axes` 'ed' takes W as [features, in].

  Its gradient is rounded to that dtype before the two products that take it. As it comes, a GPU would compute these in float32: at half
  the speed for a vocabulary, at a hundredth for a few columns.
  """
  wide = jnp.promote_types(jnp.float32, x.dtype)
  return jnp.einsum(f'...d,{axes}->...e', x, kernel.astype(x.dtype), precision=precision, preferred_element_type=wide)


def _wide_dot_backward(axes, precision, saved, g):
  (x, kernel), g, dot = saved, g.astype(saved[0].dtype), functools.partial(jnp.einsum, precision=precision)
  dkernel = dot(f'...d,...e->{axes}', x, g, preferred_element_type=jnp.promote_types(jnp.float32, x.dtype))
  return dot(f'...e,{axes}->...d', g, kernel.astype(x.dtype)), dkernel.astype(kernel.dtype)


wide_dot.defvjp(lambda x, kernel, axes, precision: (wide_dot(x, kernel, axes, precision), (x, kernel)), _wide_dot_backward)


class Linear(nn.Module):
  """y = x W + b (+ s (x A) B, or with magnitudes m: m / ||W + s A B|| (x W + s (x A) B) + b) over the last axis of x.

  W is [in, features] with logical axes `axes`.
  """
  features: int
  axes: tuple
  use_bias: bool = False
  bias_init: float = 0.0
  std: float = 0.0
  zero: bool = False
  dtype: Any = jnp.float32
  lora: Lora = Lora()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x W (+ b) in the compute dtype."""
    fan_in = x.shape[-1]
    init = kernel_init(self.std, fan_in=fan_in, zero=self.zero)
    kernel, bias = find_kernel(self, init, (fan_in, self.features)), None
    if self.use_bias: bias = self.param('bias', partitioned(nn.initializers.constant(self.bias_init), self.axes[1:]), (self.features,))
    change, x = find_change(self, (fan_in, self.features)), x.astype(self.dtype)
    product = multiply(x, kernel)
    y = product if bias is None else product + _along_last(bias.astype(self.dtype), product)
    return y if change is None else y + _moved(self, change, kernel, x=x, product=product)


def _along_last(x_E: jax.Array, y: jax.Array) -> jax.Array:
  return x_E.reshape((1,) * (y.ndim - 1) + (-1,))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """x with a share `rate` of its entries zeroed and the rest scaled by 1 / (1 - rate); x itself without a key."""
  if key is None or rate == 0.0: return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def _moved(module: nn.Module, change: Change, kernel: jax.Array | Quantized, *, x: jax.Array, product: jax.Array) -> jax.Array:
  """What the change adds to the output, exactly zero at its start: s (x A) B, or f s (x A) B + (f - 1) x W with the factor f of
  the magnitudes. x loses a share of its entries before A where random numbers are given for that."""
  rate = module.lora.config.dropout
  added = change(dropout(x, rate, module.make_rng(NOISE) if rate and module.has_rng(NOISE) else None))
  growth = change.growth(kernel, x.dtype)
  if growth is None: return added
  growth = _along_last(growth, product)
  return added + growth * (added + product)


class Projection(nn.Module):
  """x W without bias, W [inputs, features] of full rank (+ s A B) or W = down up of rank R: entries of variance std^2 either way.

  With `rank`, down ~ N(0, std^2) and up ~ N(0, 1 / rank); `zero` starts W (with `rank`, up alone) at zero.
  """
  inputs: int
  features: int
  axes: tuple
  rank: int = 0
  std: float = 0.0
  zero: bool = False
  dtype: Any = jnp.float32
  lora: Lora = Lora()

  def setup(self):
    first = kernel_init(self.std, fan_in=self.inputs, zero=self.zero and not self.rank)
    if not self.rank:
      self.kernel = find_kernel(self, first, (self.inputs, self.features))
      self.change = find_change(self, (self.inputs, self.features))
      return
    last = kernel_init(self.rank ** -0.5, zero=self.zero)
    self.down = self.param('down', partitioned(first, (self.axes[0], None)), (self.inputs, self.rank))
    self.up = self.param('up', partitioned(last, (None, self.axes[1])), (self.rank, self.features))

  def matrix(self) -> jax.Array:
    """W in the compute dtype, with its change."""
    if self.rank: return self.down.astype(self.dtype) @ self.up.astype(self.dtype)
    kernel = as_kernel(self.kernel, self.dtype)
    if self.change is None: return kernel
    return kernel + _moved(self, self.change, self.kernel, x=jnp.eye(self.inputs, dtype=self.dtype), product=kernel)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x W in the compute dtype."""
    x = x.astype(self.dtype)
    if self.rank: return (x @ self.down.astype(self.dtype)) @ self.up.astype(self.dtype)
    y = multiply(x, self.kernel)
    return y if self.change is None else y + _moved(self, self.change, self.kernel, x=x, product=y)
