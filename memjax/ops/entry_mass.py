"""How much of the attention of routed reads each entry of a bank gets: for figures, computed beside the read."""
import math

import jax
import jax.numpy as jnp

from memjax.ops.tiles import take_chapters, wide_dtype

LIMIT = 1 << 24        # numbers gathered or scored at a time


def entry_mass(q_ZxHxK, k, ids_ZxJ, *, log_weight_ZxJ, mode: str, shared: int = 0, routed_scale: float = 1.0):
  """mass [P, T] in float32: the share of attention that each entry gets, mean of the real tokens and heads; the sum is 1.

  The arguments are those of the read (`routed_attend`, or `attend_scaled_entries` for mode 'legacy_scale'; keys may be
  `Quantized`); tokens whose ids are all -1 do not exist. Within a chapter the share of an entry is its softmax probability. A
  chapter weighs, divided by the sum over the chapters of the token: joint exp(lse), joint_bias exp(lse) w; times the scale
  where routed. mixture: scale * w, and the shared chapters together 1, split by exp(lse). All zeros without real tokens.
  """
  (Z, J), (P, T, G, K) = ids_ZxJ.shape, k.shape
  weight_ZxJ = routed_scale * jnp.exp(log_weight_ZxJ.astype(wide_dtype(q_ZxHxK.dtype)))
  if shared:
    first = jnp.broadcast_to(jnp.arange(shared, dtype=ids_ZxJ.dtype)[None], (Z, shared))
    ids_ZxJ = jnp.concatenate([jnp.where(jnp.any(ids_ZxJ >= 0, -1, keepdims=True), first, -1), ids_ZxJ], 1)
    weight_ZxJ = jnp.concatenate([jnp.ones((Z, shared), weight_ZxJ.dtype), weight_ZxJ], 1)
  most = max(1, LIMIT // ((J + shared) * T * max(G * K, q_ZxHxK.shape[1])))
  count = -(-Z // min(most, Z))
  size = -(-Z // count)
  cut = lambda x, fill: jnp.pad(x, [(0, count * size - Z)] + [(0, 0)] * (x.ndim - 1), constant_values=fill).reshape(
      count, size, *x.shape[1:])
  def body(total_PxT, part):
    q, ids, weight = part
    mass = _mass(q, take_chapters(k, jnp.maximum(ids, 0).reshape(-1), q.dtype).reshape(*ids.shape, T, G, K), weight,
                 mode=mode, shared=shared, routed_scale=routed_scale, is_real=ids >= 0)
    return total_PxT.at[jnp.maximum(ids, 0).reshape(-1)].add(mass.reshape(-1, T).astype(jnp.float32)), None
  parts = cut(q_ZxHxK, 0), cut(ids_ZxJ, -1), cut(weight_ZxJ, 0)
  total_PxT, _ = jax.lax.scan(body, jnp.zeros((P, T), jnp.float32), parts)
  return total_PxT / jnp.maximum(jnp.sum(jnp.any(ids_ZxJ >= 0, -1)), 1)


def _mass(q_ZxHxK, k_ZxJxTxGxK, weight_ZxJ, *, mode, shared, routed_scale, is_real):
  """[Z, J, T]: mean over heads of (share of the chapter) * (share of the entry in it)."""
  (Z, H, K), (J, G) = q_ZxHxK.shape, (weight_ZxJ.shape[1], k_ZxJxTxGxK.shape[3])
  q_ZxJxGxRxK = jnp.broadcast_to(q_ZxHxK.reshape(Z, 1, G, H // G, K), (Z, J, G, H // G, K))
  if mode == 'legacy_scale':
    scale_ZxJ = weight_ZxJ / jnp.maximum(weight_ZxJ.sum(1, keepdims=True), jnp.finfo(weight_ZxJ.dtype).tiny)
    q_ZxJxGxRxK = q_ZxJxGxRxK * scale_ZxJ[..., None, None, None].astype(q_ZxHxK.dtype)
  s = jnp.einsum('zjgrk,zjtgk->zjgrt', q_ZxJxGxRxK, k_ZxJxTxGxK, preferred_element_type=weight_ZxJ.dtype) / math.sqrt(K)
  real = is_real[..., None, None]
  lse = jnp.where(real, jax.nn.logsumexp(s, -1), -jnp.inf)
  inside = lambda lse: jnp.exp(lse - jnp.where(jnp.isfinite(top := lse.max(1, keepdims=True)), top, 0))
  is_shared = (jnp.arange(J) < shared)[None, :, None, None]
  weight = weight_ZxJ[..., None, None]
  if mode == 'mixture':
    one = inside(jnp.where(is_shared, lse, -jnp.inf))
    share = jnp.where(is_shared, one / jnp.maximum(one.sum(1, keepdims=True), 1e-30), weight)
  elif mode == 'joint_bias': share = inside(lse) * weight
  else: share = inside(lse) * jnp.where(is_shared | (mode == 'legacy_scale'), 1.0, routed_scale)
  share = jnp.where(real, share, 0)
  share = share / jnp.maximum(share.sum(1, keepdims=True), 1e-30)
  return jnp.mean(share[..., None] * jax.nn.softmax(s, -1), (2, 3))
