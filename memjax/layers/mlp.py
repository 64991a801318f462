"""Position-wise feed-forward networks."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.axes import constrain
from memjax.layers.linear import Linear, dropout
from memjax.layers.lora import Lora

PLAIN = {'silu': jax.nn.silu, 'relu': jax.nn.relu, 'gelu': functools.partial(jax.nn.gelu, approximate=False),
         'sigmoid': jax.nn.sigmoid, 'tanh': jnp.tanh}


def hidden_width(width: int, hidden: int, activation: str) -> int:
  """F of the config: `hidden`, or for 0 the usual multiple of D rounded up to 32 (8/3 for SwiGLU, else 4)."""
  if hidden: return hidden
  wide = -(-8 * width // 3) if activation == 'swiglu' else 4 * width
  return -(-wide // 32) * 32


class MLP(nn.Module):
  """SwiGLU, W_d (silu(W_g x) * W_u x) (Shazeer 2020), or W_d a(W_u x) with another activation a (GELU is the exact one, by erf).

  `std` is that of the matrices at initialisation, `out_std` that of W_d; 0 = 1 / sqrt(fan-in), and `std`.
  """
  hidden: int
  activation: str = 'swiglu'
  bias: bool = False
  inner_dropout: float = 0.0
  std: float = 0.0
  dtype: Any = jnp.float32
  out_std: float = 0.0
  lora: Lora = Lora()

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Returns [B, L, D]; `key` switches the dropout on the hidden layer on."""
    shared = dict(use_bias=self.bias, dtype=self.dtype, lora=self.lora)
    def up(name):
      return Linear(self.hidden, ('embed', 'hidden'), std=self.std, name=name, **shared)(x_BxLxD)
    h_BxLxF = jax.nn.silu(up('gate')) * up('up') if self.activation == 'swiglu' else PLAIN[self.activation](up('up'))
    h_BxLxF = constrain(h_BxLxF, ('batch', 'tokens', 'hidden'))
    h_BxLxF = dropout(h_BxLxF, self.inner_dropout, key)
    down = Linear(x_BxLxD.shape[-1], ('hidden', 'embed'), std=self.out_std or self.std, name='down', **shared)
    return down(h_BxLxF)
