"""What linear maps are told about their kernels: the low-rank change y = x W + s (x A) B, and in how many bits W is stored.

B starts at zero, so that the map starts as it was.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, rank_of, scale_of
from memjax.config.quant import PACKED, QuantConfig, storage_of
from memjax.ops.low_rank import magnitude_growth
from memjax.ops.quantize import Quantized, packed_shapes, quantize, quantized_dot

NONE, FLOAT = LoraConfig(), QuantConfig()
NOISE = 'lora'              # the stream of random numbers that switches the dropout of changes on


@dataclasses.dataclass(frozen=True)
class Lora:
  """What linear maps are told: the settings of their changes, the path `above` of a module that is applied outside of its model,
  and how kernels are stored."""
  config: LoraConfig = NONE
  above: str = ''
  quant: QuantConfig = FLOAT


class Change(NamedTuple):
  """A [in, R], B [R, out] and s; for DoRA how far the magnitudes [out] have moved."""
  a_DxR: jax.Array
  b_RxE: jax.Array
  scale: float
  moved_E: jax.Array | None = None

  def __call__(self, x: jax.Array) -> jax.Array:
    """s (x A) B in the dtype of x."""
    return self.scale * ((x @ self.a_DxR.astype(x.dtype)) @ self.b_RxE.astype(x.dtype))

  def growth(self, kernel: jax.Array | Quantized, dtype: jnp.dtype) -> jax.Array | None:
    """The factor of the outputs of W + s A B, less 1, [out]; None without magnitudes."""
    if self.moved_E is None: return None
    return magnitude_growth(kernel, self.a_DxR, self.b_RxE, scale=self.scale, moved=self.moved_E).astype(dtype)


def path_of(module: nn.Module) -> str:
  """The path of the kernel of a linear map."""
  return '/'.join((*filter(None, [module.lora.above]), *module.path, 'kernel'))


def find_change(module: nn.Module, shape: tuple[int, int]) -> Change | None:
  """The change of the kernel [in, out] of a linear map, its parameters 'lora_a' ~ U(+-1 / sqrt(in)), 'lora_b' = 0 and for DoRA
  'lora_m' = 0; None where `module.lora` gives that kernel none."""
  lora, (inputs, features) = module.lora, shape
  if not lora.config.rank: return None
  path = path_of(module)
  rank, bound = rank_of(lora.config, path), inputs ** -0.5
  if not rank: return None
  def spread(key, shape): return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
  boxed = lambda init, *axes: nn.with_logical_partitioning(init, axes)
  zeros = nn.initializers.zeros_init()
  a_DxR = module.param('lora_a', boxed(spread, module.axes[0], None), (inputs, rank))
  b_RxE = module.param('lora_b', boxed(zeros, None, module.axes[1]), (rank, features))
  moved_E = module.param('lora_m', boxed(zeros, module.axes[1]), (features,)) if lora.config.dora else None
  return Change(a_DxR, b_RxE, scale_of(lora.config, path), moved_E)


def find_kernel(module: nn.Module, init: Callable, shape: tuple[int, int]) -> jax.Array | Quantized:
  """The kernel [in, out] of a linear map as it is stored: 'kernel', or 'kernel_codes' and 'kernel_scale' of its transpose."""
  boxed = lambda init, *axes: nn.with_logical_partitioning(init, axes)
  storage, (inputs, outputs) = storage_of(module.lora.quant, path_of(module)), module.axes
  if storage not in PACKED: return module.param('kernel', boxed(init, inputs, outputs), shape, jnp.dtype(storage or 'float32'))
  bits, scheme, group = PACKED[storage]
  how = dict(bits=bits, scheme=scheme, group=group)
  try:
    packed_shapes(shape[::-1], bits=bits, group=group)
  except UserError as error:
    raise UserError(f'{path_of(module)} cannot be stored as {storage}: {error}; name it in config.model.block.quant.exclude') from None
  made = quantize(init(module.make_rng('params'), shape).T, **how) if module.is_initializing() else None
  start = lambda key, part: getattr(made or quantize(init(key, shape).T, **how), part)
  part = lambda name: module.param(f'kernel_{name}', boxed(start, outputs, inputs), name)
  return Quantized(part('codes'), part('scale'), width=shape[0], **how)


def multiply(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
  """x W in the dtype of x."""
  return quantized_dot(x, kernel) if isinstance(kernel, Quantized) else jnp.dot(x, kernel.astype(x.dtype))
