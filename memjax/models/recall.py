"""What MAC asks its memory: queries from tokens or learned ones, and what attention is shown of the answers."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.conv import find_taps, next_tail, short_conv
from memjax.layers.linear import Linear, partitioned
from memjax.layers.lora import Lora
from memjax.layers.norm import RMSNorm
from memjax.memory.neural_inputs import finished, same_tap


class Recall(nn.Module):
  """Queries to the memory, from the tokens or learned, unless it is told what the memory read (`given`); and the vectors that answers
  become."""
  config: Any
  shape: tuple[int, int, int]
  width: int
  learned: int = 0
  given: bool = False
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  std: float = 0.0
  lora: Lora = Lora()

  def setup(self):
    (H, K, _), shared, p = self.shape, dict(std=self.std, dtype=self.dtype, lora=self.lora), self.config.proj
    self.norm = RMSNorm(self.epsilon, self.dtype, name='norm')
    self.out = Linear(self.width, ('heads', 'embed'), name='out', **shared)
    if self.given: return
    if self.learned:
      self.own = self.param('learned', partitioned(nn.initializers.normal(1.0), (None, 'heads')), (self.learned, H * K))
      return
    self.query = Linear(H * K, ('embed', 'heads'), name='query', **shared)
    if p.taps('q'): self.taps = self.param('taps', partitioned(same_tap, (None, 'heads')), (p.conv_width, H * K))

  def queries(self, x_BxLxD: jax.Array, tail_BxTxE: jax.Array, *, position_BxL: jax.Array, **flow) -> tuple[jax.Array, jax.Array]:
    """(queries [B, L, H, K] by convolution over written tokens of a document, activation and norm; next tail)."""
    p, (H, K, _) = self.config.proj, self.shape
    x = self.query(x_BxLxD).astype(jnp.promote_types(jnp.float32, self.dtype))
    if p.taps('q'):
      taps = find_taps(p.conv_width, x.shape[1], **flow)
      x, tail_BxTxE = short_conv(x, self.taps, tail_BxTxE, taps), next_tail(x, tail_BxTxE, taps)
    if p.activates('q'): x = jax.nn.silu(x)
    return finished(x.reshape(*x.shape[:2], H, K), self.config, position_BxL).astype(self.dtype), tail_BxTxE

  def constants(self, rows: int) -> jax.Array:
    """The learned queries, [B, N, H, K]."""
    H, K, _ = self.shape
    own = finished(self.own.reshape(1, self.learned, H, K), self.config).astype(self.dtype)
    return jnp.broadcast_to(own, (rows, *own.shape[1:]))

  def vectors(self, read_BxLxHxV: jax.Array) -> jax.Array:
    """h [B, L, D]."""
    return self.out(self.norm(read_BxLxHxV.reshape(*read_BxLxHxV.shape[:2], -1)))
