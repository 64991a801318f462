"""Fast and slow slots: every `interval` valid tokens a share of the fast state is consolidated into the slow one."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from memjax.config.mixers import HolographicConfig
from memjax.layers.linear import kernel_init, partitioned

FAST_DECAY = 1e-3   # the fast tier forgets at least this share a token
SLOW_DECAY = 1e-4   # lambda of the slow tier


def rms(x: jax.Array) -> jax.Array:
  """x over its root mean square along the last axis."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-8)


class Tiers(nn.Module):
  """Parameters and arithmetic of the two tiers; shapes as in `HolographicConfig` with H heads of width K."""
  config: HolographicConfig
  width: int
  dtype: Any = jnp.float32

  def setup(self):
    t, H = self.config.tiers, self.config.heads
    K = self.config.key_width or self.width // H
    zeros = nn.initializers.zeros_init()
    matrix = lambda name, *shape: self.param(name, partitioned(kernel_init(fan_in=shape[-2]), (*(None,) * (len(shape) - 1), None)), shape)
    vector = lambda name, *shape: self.param(name, partitioned(zeros, (None,) * len(shape)), shape)
    self.hidden, self.hidden_bias = matrix('hidden', H, 2 * K, K), vector('hidden_bias', H, K)
    self.score, self.score_bias = matrix('score', H, K, 1), vector('score_bias', H)
    if t.mix == 'learned':
      start = nn.initializers.constant(float(np.log(t.fast_share / (1 - t.fast_share))))
      self.share_logit = self.param('share_logit', partitioned(start, (None,)), (H,))
    if t.controller:
      self.control_in, self.control_bias = matrix('control_in', self.width + H * K, H * K), vector('control_bias', H * K)
      self.control_out, self.control_out_bias = matrix('control_out', H * K, 3 * H), vector('control_out_bias', 3 * H)

  def share(self) -> jax.Array:
    """alpha [H], the fast tier's share of the read."""
    t = self.config.tiers
    return jax.nn.sigmoid(self.share_logit) if t.mix == 'learned' else jnp.full((self.config.heads,), t.fast_share)

  def blend(self, fast: jax.Array, slow: jax.Array) -> jax.Array:
    """alpha fast + (1 - alpha) slow for mixed slots [..., H, K]."""
    alpha = self.share().astype(fast.dtype).reshape((1,) * (fast.ndim - 2) + (-1, 1))
    return alpha * fast + (1 - alpha) * slow.astype(fast.dtype)

  def control(self, x_BxD: jax.Array, m_BxHxSxK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write, read and consolidation gates [B, H] from the layer input and the mean slot."""
    mean_BxE = m_BxHxSxK.mean(2).reshape(m_BxHxSxK.shape[0], -1)
    z = jnp.concatenate([x_BxD.astype(mean_BxE.dtype), mean_BxE], -1) @ self.control_in + self.control_bias[None]
    logits = jax.nn.gelu(z, approximate=False) @ self.control_out + self.control_out_bias[None]
    return tuple(jnp.split(jax.nn.sigmoid(logits), 3, -1))

  def strength(self, m_BxHxSxK: jax.Array, bound_BxHxK: jax.Array) -> jax.Array:
    """kappa [B, H] = sigmoid(MLP[bound ; mean slot]), hard or soft."""
    t = self.config.tiers
    z = jnp.concatenate([bound_BxHxK.astype(m_BxHxSxK.dtype), m_BxHxSxK.mean(2)], -1)
    z = jnp.einsum('bhk,hkj->bhj', z, self.hidden.astype(z.dtype)) + self.hidden_bias.astype(z.dtype)[None]
    z = jnp.einsum('bhk,hk->bh', jax.nn.gelu(z, approximate=False), self.score[..., 0].astype(z.dtype))
    kappa = jax.nn.sigmoid(z + self.score_bias.astype(z.dtype)[None])
    if not t.hard: return kappa
    return kappa + jax.lax.stop_gradient(jnp.where(kappa > t.threshold, kappa, 0) - kappa)

  def consolidate(self, slow_BxHxSxK, m_BxHxSxK, bound_BxHxK, address_BxHxS, *, gate_BxH=None) -> jax.Array:
    """slow <- (1 - lambda)^interval (1 - rho kappa) slow + rho kappa rms(source): the last act of an interval's last token."""
    t = self.config.tiers
    share = t.rate * self.strength(m_BxHxSxK, bound_BxHxK)
    if gate_BxH is not None: share *= gate_BxH
    share = share[..., None, None]
    source = rms(m_BxHxSxK) if t.source == 'fast' else (
        address_BxHxS[..., None] * rms(bound_BxHxK.astype(m_BxHxSxK.dtype))[:, :, None]).astype(m_BxHxSxK.dtype)
    return (1 - SLOW_DECAY) ** t.interval * (1 - share) * slow_BxHxSxK + share * source
