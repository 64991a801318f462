"""Token and learned absolute position tables, and the tied output head."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.linear import partitioned, wide_dot


class Embed(nn.Module):
  """A table [A, D] that reads tokens and, tied, scores them."""
  vocabulary: int
  width: int
  std: float = 0.02
  dtype: Any = jnp.float32

  def setup(self):
    init = nn.initializers.normal(self.std)
    self.table = self.param('table', partitioned(init, ('vocabulary', 'embed')), (self.vocabulary, self.width))

  def __call__(self, token_BxL: jax.Array) -> jax.Array:
    """Rows of the table, [B, L, D]."""
    return jnp.take(self.table.astype(self.dtype), token_BxL, axis=0, mode='clip')

  def attend(self, x_BxLxD: jax.Array) -> jax.Array:
    """Scores of all tokens, [B, L, A], accumulated in float32 (float64 under float64)."""
    return wide_dot(x_BxLxD.astype(self.dtype), self.table, 'ed')


class PositionTable(nn.Module):
  """Learned absolute positions, [rows, D]."""
  rows: int
  width: int
  std: float = 0.02
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, position_BxL: jax.Array) -> jax.Array:
    """Rows of the table, [B, L, D]; positions past its end are NaN, never a silent repeat of the last row."""
    table = self.param('position', partitioned(nn.initializers.normal(self.std), (None, 'embed')), (self.rows, self.width))
    return jnp.take(table.astype(self.dtype), position_BxL, axis=0, mode='fill')
