"""The router of a bank: logits over chapters, the learned start of block routing, the selection bias."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.linear import partitioned
from memjax.ops.product_key import joined_logits


class Router(nn.Module):
  """z = W u + b over all chapters, shared ones included, in float32 at least; W ~ N(0, .02^2), b = 0.

  kind product_key: chapter (i, j) of N x N has the logit of row i of one table plus that of row j of another, so that the
  product costs 2 N rows instead of N^2.
  """
  config: Any
  width: int

  def setup(self):
    c = self.config
    chapters, normal, zeros = c.shape.chapters, nn.initializers.normal(0.02), nn.initializers.zeros_init()
    if c.router.kind == 'product_key':
      rows = round(chapters ** 0.5)
      self.kernels = tuple(self.param(f'kernel_{side}', partitioned(normal, ('embed', None)), (self.width, rows)) for side in (0, 1))
    else: self.kernels = (self.param('kernel', partitioned(normal, ('embed', None)), (self.width, chapters)),)
    self.bias = self.param('bias', partitioned(zeros, (None,)), (chapters,))
    if c.router.strategy == 'chunk': self.start = self.param('start', partitioned(normal, (None,)), (self.width,))
    if c.loss.bias_rate:
      self.selection_bias = self.param('selection_bias', partitioned(zeros, (None,)), (chapters - c.mixing.shared,))

  def __call__(self, u_ZxD: jax.Array) -> jax.Array:
    """Logits [Z, P]."""
    wide = jnp.promote_types(jnp.float32, u_ZxD.dtype)
    parts = [jnp.dot(u_ZxD.astype(wide), kernel.astype(wide)) for kernel in self.kernels]
    return (joined_logits(*parts) if len(parts) == 2 else parts[0]) + self.bias.astype(wide)[None]
