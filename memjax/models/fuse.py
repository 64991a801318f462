"""How Titans joins what attention and memory found (titans specification section 12)."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.linear import Linear
from memjax.layers.lora import Lora
from memjax.layers.norm import RMSNorm

ACTIVATIONS = {'double_sigmoid': lambda x: 2 * jax.nn.sigmoid(x), 'sigmoid': jax.nn.sigmoid, 'silu': jax.nn.silu}


class Fuse(nn.Module):
  """norm(y; g1) act(norm(m; g2)) per channel, or for kind 'mix' w y + (1 - w) m with w = sigmoid(x W).

  norm_first: y is normalised. zero: g2 starts at 0, so that with 2 sigmoid and without the norm of y the result is y exactly.
  """
  kind: str
  norm_first: bool = True
  zero: bool = False
  epsilon: float = 1e-6
  std: float = 0.0
  dtype: Any = jnp.float32
  lora: Lora = Lora()

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, y_BxLxD: jax.Array, m_BxLxD: jax.Array) -> jax.Array:
    """Returns the joined reads, [B, L, D]; x is the input of both."""
    if self.kind == 'mix':
      width = y_BxLxD.shape[-1]
      share = jax.nn.sigmoid(Linear(width, ('embed', None), std=self.std, dtype=self.dtype, lora=self.lora, name='mix')(x_BxLxD))
      return share * y_BxLxD + (1 - share) * m_BxLxD
    norm = lambda name, zero: RMSNorm(self.epsilon, self.dtype, zero, name=name)
    if self.norm_first: y_BxLxD = norm('norm_attention', False)(y_BxLxD)
    return y_BxLxD * ACTIVATIONS[self.kind](norm('norm_memory', self.zero)(m_BxLxD))
