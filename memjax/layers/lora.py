"""The low-rank change of a linear map: y = x W + s (x A) B. B starts at zero, so that the map starts as it was."""
import dataclasses
from typing import NamedTuple

import jax
from flax import linen as nn

from memjax.config.lora import LoraConfig, rank_of, scale_of

NONE = LoraConfig()
NOISE = 'lora'              # the stream of random numbers that switches the dropout of changes on


@dataclasses.dataclass(frozen=True)
class Lora:
  """What linear maps are told: the settings, and the path `above` of a module that is applied outside of its model."""
  config: LoraConfig = NONE
  above: str = ''


class Change(NamedTuple):
  """A [in, R], B [R, out] and s."""
  a_DxR: jax.Array
  b_RxE: jax.Array
  scale: float

  def __call__(self, x: jax.Array) -> jax.Array:
    """s (x A) B in the dtype of x."""
    return self.scale * ((x @ self.a_DxR.astype(x.dtype)) @ self.b_RxE.astype(x.dtype))


def find_change(module: nn.Module, shape: tuple[int, int]) -> Change | None:
  """The change of the kernel [in, out] of a linear map, its parameters 'lora_a' ~ U(+-1 / sqrt(in)) and 'lora_b' = 0; None
  where `module.lora` gives that kernel none."""
  lora, (inputs, features) = module.lora, shape
  if not lora.config.rank: return None
  path = '/'.join((*filter(None, [lora.above]), *module.path, 'kernel'))
  rank, bound = rank_of(lora.config, path), inputs ** -0.5
  if not rank: return None
  def spread(key, shape): return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
  boxed = lambda init, *axes: nn.with_logical_partitioning(init, axes)
  a_DxR = module.param('lora_a', boxed(spread, module.axes[0], None), (inputs, rank))
  b_RxE = module.param('lora_b', boxed(nn.initializers.zeros_init(), None, module.axes[1]), (rank, features))
  return Change(a_DxR, b_RxE, scale_of(lora.config, path))
