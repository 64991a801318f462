"""The original way to weigh chapters: entries times their weight before keys and values (specification section 4.5)."""
import jax
import jax.numpy as jnp

from memjax.ops.routed_attention import combine, cut_tokens, join_tokens, routed_partials


def attend_scaled_entries(q_ZxHxK, k_PxTxGxK, v_PxTxGxK, ids_ZxJ, *, log_weight_ZxJ, shared: int = 0, scale: float = 1.0,
                          token_chunk: int = 0, remat: bool = False, **form):
  """y [Z, H, K]: one softmax over the entries of the S shared and J routed chapters, each chapter's entries times u.

  u = (1 for each shared, scale * w for each routed) / their sum. Keys and values are linear in the entries, so a chapter
  with weight u has logits u (q . k) and values u v: each (token, chapter) pair is a token of its own with the query u q.
  `form` goes to `routed_partials`; `token_chunk` tokens at a time (0: all), computed again in the backward pass with `remat`.
  The weight scales logits and values together, so that with many chapters of equal weight both shrink: kept to reproduce
  published runs.
  """
  tokens, Z = (q_ZxHxK, ids_ZxJ, log_weight_ZxJ), ids_ZxJ.shape[0]
  one = lambda tokens: _attend(tokens, (k_PxTxGxK, v_PxTxGxK), shared=shared, scale=scale, **form)
  if remat: one = jax.checkpoint(one)
  if not 0 < token_chunk < Z: return one(tokens)
  return join_tokens(jax.lax.map(one, cut_tokens(tokens, token_chunk)), Z)


def _attend(tokens, kv, *, shared, scale, **form):
  (q_ZxHxK, ids_ZxJ, log_weight_ZxJ), (k_PxTxGxK, v_PxTxGxK) = tokens, kv
  Z, J = ids_ZxJ.shape
  weight_ZxJ = jnp.where(ids_ZxJ >= 0, scale * jnp.exp(log_weight_ZxJ), 0)
  if shared:
    first = jnp.broadcast_to(jnp.arange(shared, dtype=ids_ZxJ.dtype)[None], (Z, shared))
    ids_ZxJ = jnp.concatenate([jnp.where(ids_ZxJ[:, :1] >= 0, first, -1), ids_ZxJ], 1)
    weight_ZxJ = jnp.concatenate([jnp.ones((Z, shared), weight_ZxJ.dtype), weight_ZxJ], 1)
    J += shared
  u_ZxJ = weight_ZxJ / jnp.maximum(weight_ZxJ.sum(1, keepdims=True), jnp.finfo(weight_ZxJ.dtype).tiny)
  q_XxHxK = (q_ZxHxK[:, None] * u_ZxJ[..., None, None].astype(q_ZxHxK.dtype)).reshape(Z * J, *q_ZxHxK.shape[1:])
  o, lse = routed_partials(q_XxHxK, k_PxTxGxK, v_PxTxGxK, ids_ZxJ.reshape(Z * J, 1), **form)
  o_ZxJxHxV, lse_ZxJxH = o.reshape(Z, J, *o.shape[2:]), lse.reshape(Z, J, -1)
  o_ZxJxHxV = o_ZxJxHxV * u_ZxJ[..., None, None].astype(o.dtype)
  return combine(o_ZxJxHxV, lse_ZxJxH, jnp.zeros_like(u_ZxJ), mode='joint')
