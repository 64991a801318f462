"""Normalisation over the last axis, computed in float32 (float64 for float64 input)."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.linear import partitioned


def _row(parameter: jax.Array, like: jax.Array) -> jax.Array:
  return parameter.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


class RMSNorm(nn.Module):
  """x / rms(x) * scale (Zhang and Sennrich 2019); `zero`: the scale starts at 0."""
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  zero: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the normalised x in the compute dtype."""
    scale = self.param('scale', partitioned(nn.initializers.constant(0.0 if self.zero else 1.0), (None,)), (x.shape[-1],))
    wide = x.astype(jnp.promote_types(jnp.float32, self.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
    return (wide * _row(scale, wide)).astype(self.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias (Ba et al. 2016)."""
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the normalised x in the compute dtype."""
    scale = self.param('scale', partitioned(nn.initializers.ones_init(), (None,)), (x.shape[-1],))
    bias = self.param('bias', partitioned(nn.initializers.zeros_init(), (None,)), (x.shape[-1],))
    wide = x.astype(jnp.promote_types(jnp.float32, self.dtype))
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
    return (wide * _row(scale, wide) + _row(bias, wide)).astype(self.dtype)


def make_norm(kind: str, *, epsilon: float, dtype: Any, name: str) -> nn.Module:
  """The norm module of config value `kind`: 'rmsnorm' or 'layernorm'."""
  return {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}[kind](epsilon=epsilon, dtype=dtype, name=name)
