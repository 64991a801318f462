"""The arithmetic of the original HAMT memory: read before write, scalar gates, a norm on the state after every write.

Vectors of the circular binding are packed orthonormal spectra throughout (`ops/binding.py`), keys on the unnormalised
scale. Lengths, inner products and the norms below are those of the time domain by Parseval: nothing is transformed.
"""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.binding import bind, key_map, spectrum_scale, unbind
from memjax.ops.keys import random_keys

RMS_EPSILON, LAYER_EPSILON = 1e-8, 1e-5


def position_keys(binding: str, position, width: int, *, seed: int, unitary: bool = False):
  """The keys p_t that values are stored under, fp32 [*position.shape, K]: functions of (seed, position), no parameters.

  bipolar: +1 or -1. hrr: Gaussian of unit length, or with `unitary` of modulus one at every frequency. The spectrum of
  Gaussian noise is Gaussian noise, so it is drawn there directly.
  """
  if binding == 'bipolar' or unitary:
    return random_keys(seed, 'position', position, width, kind='unitary' if unitary else 'bipolar')
  key = random_keys(seed, 'position', position, width, kind='gaussian')
  return key * spectrum_scale(width).reshape((1,) * (key.ndim - 1) + (-1,))


def unit_query(binding: str, x):
  """x / max(|x|, 1e-12) over the last axis, as a query of the binding; fp32 at least, finite gradient at 0."""
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  if binding == 'hrr': return key_map('hrr', wide)
  return wide / jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, -1, keepdims=True), 1e-24))


def slot_sizes(m_BxSxK):
  """|m_s|, [B, S]. Its gradient at an empty slot is 0 (that of the plain square root is 0 / 0)."""
  square_BxS = jnp.sum(m_BxSxK * m_BxSxK, -1)
  is_empty = square_BxS == 0
  return jnp.where(is_empty, 0, jnp.sqrt(jnp.where(is_empty, 1, square_BxS)))


def retrieve(binding: str, m_BxSxK, query_BxK, score_BxK):
  """(c [B, K], alpha [B, S]): c = sum_s alpha_s r_s with r_s = unbind(u, m_s) and alpha = softmax_s(w r_s).

  Unbinding is linear and bind its adjoint: w r_s = <bind(u, w), m_s> with score = bind(u, w) made outside the scan, and
  c = unbind(u, sum_s alpha_s m_s), so that one vector is unbound instead of S.
  """
  alpha_BxS = jax.nn.softmax(jnp.einsum('bk,bsk->bs', score_BxK, m_BxSxK), -1)
  return unbind(binding, query_BxK, jnp.einsum('bs,bsk->bk', alpha_BxS, m_BxSxK)), alpha_BxS


def write_gate(m_BxSxK, hidden_BxD, weights):
  """g = sigmoid(G2 gelu(G1 [q; v; |m_1| ... |m_S|] + b) + b), [B, S]; `hidden` is G1 [q; v] + b.

  weights: the rows of G1 for the sizes [S, D], G2 [D, S] and its bias [S].
  """
  sizes_SxD, out_DxS, bias_S = weights
  hidden_BxD = jax.nn.gelu(hidden_BxD + slot_sizes(m_BxSxK) @ sizes_SxD, approximate=False)
  return jax.nn.sigmoid(hidden_BxD @ out_DxS + bias_S[None])


def superpose(binding: str, m_BxSxK, key_BxK, value_BxK, *, gate_BxS, decay: float):
  """(1 - g_s) (1 - decay) m_s + g_s bind(p, v), [B, S, K]: the slots after the write and before their norm."""
  bound_BxK = bind(binding, key_BxK, value_BxK)
  return ((1 - gate_BxS) * (1 - decay))[..., None] * m_BxSxK + gate_BxS[..., None] * bound_BxK[:, None]


def normalise_slots(kind: str, binding: str, m_BxSxK, scale=None):
  """The slots after their norm, [B, S, K].

  rms: m / sqrt(mean m^2 + 1e-8) * scale; layer: (m - mean) / sqrt(var + 1e-5) * scale (the mean of a signal is bin 0 of
  its spectrum); none: m. Raises UserError for another name.
  """
  if kind == 'none': return m_BxSxK
  if kind not in ('rms', 'layer'): raise UserError(f"unknown norm {kind!r}; 'rms', 'layer' or 'none'")
  if kind == 'layer' and binding == 'hrr': m_BxSxK = m_BxSxK.at[..., 0].set(0)
  elif kind == 'layer': m_BxSxK = m_BxSxK - jnp.mean(m_BxSxK, -1, keepdims=True)
  epsilon = RMS_EPSILON if kind == 'rms' else LAYER_EPSILON
  return m_BxSxK * (scale * jax.lax.rsqrt(jnp.mean(m_BxSxK * m_BxSxK, -1, keepdims=True) + epsilon))


def immediate_error(binding: str, m_BxSxK, key_BxK, value_BxK):
  """Mean square of (mean_s unbind(p, m_s) - v), [B], the target without gradient: is the item just written readable?

  Degenerate by design of the original (forgetting everything else is its optimum); kept for comparison only.
  """
  error_BxK = unbind(binding, key_BxK, jnp.mean(m_BxSxK, 1)) - jax.lax.stop_gradient(value_BxK)
  return jnp.mean(error_BxK * error_BxK, -1)


def remat_scan(body, state, tokens_BxL, *, every: int):
  """(state, outputs [B, L, ...]) of `body(state, token) -> (state, output)`; the gradient keeps one state in `every`.

  Equals `lax.scan`. Leaves of `tokens` lead with [B, L]. The last, shorter piece is its own scan: no token is padded.
  """
  tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens_BxL)
  length = jax.tree.leaves(tokens)[0].shape[0]
  whole = length - length % every
  piece = jax.checkpoint(lambda state, tokens: jax.lax.scan(body, state, tokens))
  outputs = []
  if whole:
    cut = jax.tree.map(lambda a: a[:whole].reshape(-1, every, *a.shape[1:]), tokens)
    state, output = jax.lax.scan(piece, state, cut)
    outputs.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), output))
  if whole < length:
    state, output = piece(state, jax.tree.map(lambda a: a[whole:], tokens))
    outputs.append(output)
  return state, jax.tree.map(lambda *a: jnp.swapaxes(jnp.concatenate(a), 0, 1), *outputs)


def effective_slots(gate_BxLxS, weight_BxL):
  """(tr G)^2 / tr(G^2), G the mean of g g' over unit gate vectors of the weighted tokens: 1 (all slots alike) to S."""
  unit = gate_BxLxS * jax.lax.rsqrt(jnp.maximum(jnp.sum(gate_BxLxS * gate_BxLxS, -1, keepdims=True), 1e-12))
  gram_SxS = jnp.einsum('bl,bls,blz->sz', weight_BxL, unit, unit)
  return jnp.trace(gram_SxS) ** 2 / jnp.maximum(jnp.sum(gram_SxS * gram_SxS), 1e-12)
