"""Routed attention without routing: every token against all entries of a small bank at once, unread chapters weighing nothing."""
import jax
import jax.numpy as jnp


def attend_all_chapters(q_ZxHxK, k_PxTxGxK, v_PxTxGxV, ids_ZxJ, *, log_weight_ZxJ, mode: str = 'mixture', shared_kv=None,
                        routed_scale: float = 1.0, scale: float = 0.0):
  """y [Z, H, V], equal to `routed_attend`: two matmuls over all P T entries, P / J times the work of the chapters read.

  mixture: probabilities of a chapter times its weight; joint forms: a softmax over the log-sum-exps of the chapters read (plus
  log weight in joint_bias). No sort, no loop, [Z, H, P T] scores: the fastest form where banks are small.
  """
  (Z, H, K), (P, _, G, _) = q_ZxHxK.shape, v_PxTxGxV.shape
  wide, scale = jnp.promote_types(jnp.float32, q_ZxHxK.dtype), scale or K ** -0.5
  q = q_ZxHxK.reshape(Z, G, H // G, K)
  score = jnp.einsum('zgrk,ptgk->zgrpt', q, k_PxTxGxK, preferred_element_type=wide) * scale
  lse = jax.nn.logsumexp(score, -1)
  chosen_ZxP = jnp.zeros((Z, P), bool).at[jnp.arange(Z)[:, None], ids_ZxJ].set(True, mode='drop', wrap_negative_indices=False)
  spread = lambda x: jnp.zeros((Z, P), wide).at[jnp.arange(Z)[:, None], ids_ZxJ].add(x, mode='drop', wrap_negative_indices=False)
  log_weight_ZxP = spread(log_weight_ZxJ.astype(wide))
  column = lambda x_ZxP: x_ZxP[:, None, None]
  y_shared, lse_shared = _shared(q, shared_kv, scale, wide)
  if mode == 'mixture':
    share = jnp.where(column(chosen_ZxP), column(routed_scale * jnp.exp(log_weight_ZxP)), 0) * jnp.ones_like(lse)
    return _join(score, lse, share, v_PxTxGxV, shared=(y_shared, None), like=q_ZxHxK)
  bias = jnp.log(jnp.asarray(routed_scale, wide)) + (column(log_weight_ZxP) if mode == 'joint_bias' else 0)
  seen = jnp.where(column(chosen_ZxP), lse + bias, -jnp.inf)
  every = seen if lse_shared is None else jnp.concatenate([seen, lse_shared[..., None]], -1)
  top = jax.lax.stop_gradient(jnp.maximum(every.max(-1, keepdims=True), jnp.finfo(wide).min))
  mass = jnp.exp(every - top)
  share = mass / jnp.maximum(mass.sum(-1, keepdims=True), jnp.finfo(wide).tiny)
  beside = y_shared, None if lse_shared is None else share[..., P]
  return _join(score, lse, share[..., :P], v_PxTxGxV, shared=beside, like=q_ZxHxK)


def _shared(q_ZxGxRxK, shared_kv, scale, wide):
  """(y [Z, G, R, V], log-sum-exp [Z, G, R]) of the entries that everybody reads, (None, None) without."""
  if shared_kv is None: return None, None
  score = jnp.einsum('zgrk,mgk->zgrm', q_ZxGxRxK, shared_kv[0], preferred_element_type=wide) * scale
  p = jax.nn.softmax(score, -1).astype(q_ZxGxRxK.dtype)
  return jnp.einsum('zgrm,mgv->zgrv', p, shared_kv[1], preferred_element_type=wide), jax.nn.logsumexp(score, -1)


def _join(score, lse, share, v_PxTxGxV, *, shared, like):
  """y [Z, H, V] of the chapters' probabilities times their share, plus that of the shared entries."""
  p = (jnp.exp(score - lse[..., None]) * share[..., None]).astype(like.dtype)
  y = jnp.einsum('zgrpt,ptgv->zgrv', p, v_PxTxGxV, preferred_element_type=score.dtype)
  y_shared, share_shared = shared
  if y_shared is not None: y += y_shared if share_shared is None else y_shared * share_shared[..., None]
  return y.reshape(*like.shape[:2], -1).astype(like.dtype)
