"""Token and learned absolute position tables, and the tied output head."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.linear import partitioned


@jax.custom_vjp
def _scores(x_BxLxD, table_AxD):
  """x table^T in float32 at least. Its gradient is rounded to the compute dtype before the two products that take it: as it comes,
  they would be float32 products, of a third of the work of a small model, at half the speed."""
  return jnp.einsum('bld,ad->bla', x_BxLxD, table_AxD, preferred_element_type=jnp.promote_types(jnp.float32, x_BxLxD.dtype))


def _scores_backward(saved, g_BxLxA):
  x_BxLxD, table_AxD = saved
  g_BxLxA = g_BxLxA.astype(x_BxLxD.dtype)
  return jnp.einsum('bla,ad->bld', g_BxLxA, table_AxD), jnp.einsum('bla,bld->ad', g_BxLxA, x_BxLxD)


_scores.defvjp(lambda x, table: (_scores(x, table), (x, table)), _scores_backward)


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
    return _scores(x_BxLxD.astype(self.dtype), self.table.astype(self.dtype))


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
