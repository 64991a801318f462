"""A table of N^2 values addressed by pairs of half-keys: a memory without state."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.layers.linear import Projection, partitioned
from memjax.layers.norm import RMSNorm
from memjax.memory.base import Memory
from memjax.memory.table import ValueTable
from memjax.ops.product_key import product_key_search, read_values


@struct.dataclass
class ProductKeyInputs:
  """Queries, and the input of the gate."""
  q_BxLxHxK: jax.Array
  x_BxLxD: jax.Array


class ProductKey(Memory):
  """y = W_v (o * silu(W_g x)), o = sum over heads of softmax(top scores) times value rows (Lample et al. 2019; the gate of
  Berges et al. 2024). Each head has its own half-keys, U(+-1/sqrt(K/2)); all heads (and, shared, all layers) one table."""
  reaches_back = False       # every token looks up the table alone

  has_pieces = False

  def setup(self):
    c = self.config
    if not c.share: self.bank = ValueTable(c, self.width, name='bank')
    bound = (c.key_width // 2) ** -0.5
    spread = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    shape = (c.heads, 2, c.keys, c.key_width // 2)
    self.keys = self.param('keys', partitioned(spread, ('heads', None, None, None)), shape)
    inner, shared = c.value_width or self.width, dict(std=self.std, dtype=self.dtype, lora=self.lora)
    self.query = Projection(self.width, c.heads * c.key_width, ('embed', 'heads'), **shared, name='query')
    if c.query_norm: self.norm = RMSNorm(dtype=self.dtype, name='query_norm')
    if c.gate: self.gate = Projection(self.width, inner, ('embed', None), **shared, name='gate')
    self.out = Projection(inner, self.width, (None, 'embed'), zero=self.grafted or c.zero_out, **shared, name='out')

  def init_state(self, batch: int, max_len: int = 0) -> dict:
    """Nothing: no state."""
    del batch, max_len
    return {}

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> ProductKeyInputs:
    """Queries of all tokens, normed as configured."""
    del position_BxL
    q = self.query(x_BxLxD).reshape(*x_BxLxD.shape[:2], self.config.heads, self.config.key_width)
    return ProductKeyInputs(self.norm(q) if self.config.query_norm else q, x_BxLxD)

  def prepare(self, banks: dict | None = None) -> jax.Array:
    """The values, in the compute dtype."""
    return (banks[self.config.share] if self.config.share else self.bank()).astype(self.dtype)

  def write(self, state: dict, inputs: ProductKeyInputs) -> dict:
    """Nothing is written."""
    del inputs
    return state

  def read(self, state: dict, inputs: ProductKeyInputs, prepared: Any = None) -> jax.Array:
    """Gated sum of the chosen values of one token."""
    del state
    return self._look(inputs, prepared if prepared is not None else self.prepare())

  def _look(self, inputs: ProductKeyInputs, values_MxV: jax.Array) -> jax.Array:
    """y [Z, V] of tokens [Z]."""
    y_ZxV = read_values(values_MxV, *self._search(inputs.q_BxLxHxK)).astype(self.dtype)
    return y_ZxV * nn.silu(self.gate(inputs.x_BxLxD)) if self.config.gate else y_ZxV

  def _search(self, q_ZxHxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids, scores) [Z, H, J] of the values that each head reads."""
    keys = self.keys.astype(self.state_dtype)
    return product_key_search(q_ZxHxK.astype(self.state_dtype), keys[:, 0], keys[:, 1], top_k=self.config.top_k)

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None, prepared=None):
    """All tokens at once."""
    del write_mask_BxL, reset_BxL
    B, L = inputs.x_BxLxD.shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(B * L, *a.shape[2:]), inputs)
    y_BxLxE = self._look(flat, self.prepare() if prepared is None else prepared).reshape(B, L, -1)
    return state, y_BxLxE if mask_BxL is None else jnp.where(mask_BxL[..., None], y_BxLxE, 0)

  def statistics(self, state, inputs, y_BxLxE, *, mask_BxL=None, **context):
    """How often each value was read, and its share of the reads' weights (mean of the tokens and heads; the sum is 1)."""
    ids_ZxHxJ, score_ZxHxJ = self._search(inputs.q_BxLxHxK.reshape(-1, self.config.heads, self.config.key_width))
    real_Z = jnp.ones(len(ids_ZxHxJ), bool) if mask_BxL is None else mask_BxL.reshape(-1)
    weight_ZxHxJ = jax.nn.softmax(score_ZxHxJ, -1) * real_Z[:, None, None]
    add = lambda x_ZxHxJ: jnp.zeros(self.config.keys ** 2, jnp.float32).at[ids_ZxHxJ.ravel()].add(x_ZxHxJ.ravel().astype(jnp.float32))
    return super().statistics(state, inputs, y_BxLxE) | {
        'value_use_M': add(jnp.broadcast_to(real_Z[:, None, None], ids_ZxHxJ.shape)),
        'entry_mass_M': add(weight_ZxHxJ) / jnp.maximum(jnp.sum(real_Z) * self.config.heads, 1)}

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """Output projection."""
    return self.out(y_BxLxE)
