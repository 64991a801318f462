"""The inner loop of the public package titans-pytorch (0.5.5), for comparison: gates of whole chunks, reads of finished ones.

    u_c = -sum_{i in c} theta_i grad l_i(A_c)      S_c = eta_c S_{c-1} + u_c      W_c = (1 - alpha_c) W_{c-1} + S_c

A_c are the learned weights (its default: a deep memory is then linearised for the whole text), or those after the last `refresh`
chunks (its batch_size). Token t reads the weights after floor((t + 1) / C) chunks: the token that completes a chunk sees it. Tokens
of an incomplete last chunk write nothing. All of it is a different function from the other modes; it exists for parity alone.
"""
import jax
import jax.numpy as jnp

from memjax.ops.neural import Rule, Tokens, Weights, factors
from memjax.ops.neural_nets import Plain


def chunk_gates(rule: Rule, start: Weights, tokens: tuple, *, theta: jax.Array, chunk_gate: tuple, chunk: int,
                refresh: int = 0) -> jax.Array:
  """y [B, H, L, V] of L tokens from the learned weights.

  tokens = (query, key, value) [B, H, L, width]; theta [B, H, L]; chunk_gate = (eta, alpha) of the floor(L / chunk) whole chunks
  [B, H, N]; `refresh`: chunks between the points where gradients are taken, 0 = always at the learned weights. Forgetting goes to
  zero; momentum 'none' or 'first'.
  """
  query, key, value = tokens
  B, H, L = query.shape[:3]
  N = L // chunk
  cut = lambda a: jnp.moveaxis(a[:, :, :N * chunk].reshape(B, H, N, chunk, *a.shape[3:]), 2, 0)
  def body(carry, given):
    number, weights, momentum, fixed = carry
    key, value, theta, eta, alpha = given
    if refresh: fixed = jax.tree.map(lambda new, old: jnp.where(number % refresh == 0, new, old), weights, fixed)
    found = factors(rule, fixed, start.slow, Tokens(key, value, theta, theta))
    lift = lambda gate, like: gate.reshape(*gate.shape, *(1,) * (like.ndim - 2))
    surprise = {name: _sum(a, found.d[name], fixed[name].ndim) for name, a in found.a.items()}
    momentum = {name: lift(eta, s) * momentum[name] - s for name, s in surprise.items()}
    weights = {name: lift(1 - alpha, w) * w + momentum[name] for name, w in weights.items()}
    return (number + 1, weights, momentum, fixed), weights
  eta, alpha = (jnp.moveaxis(gate, 2, 0) for gate in chunk_gate)
  nothing = {name: jnp.zeros_like(a) for name, a in start.fast.items()}
  given = (*map(cut, (key, value, theta)), jnp.zeros_like(eta) if rule.momentum == 'none' else eta, alpha)
  _, after = jax.lax.scan(body, (0, start.fast, nothing, start.fast), given)
  states = {name: jnp.concatenate([start.fast[name][None], a]) for name, a in after.items()}
  shifted = jnp.pad(query, ((0, 0), (0, 0), (1, -(L + 1) % chunk), (0, 0)))             # token t sits at place t + 1
  shifted = jnp.moveaxis(shifted.reshape(B, H, -1, chunk, query.shape[-1]), 2, 0)
  y = jax.vmap(lambda fast, query: rule.network(Plain(fast, start.slow, rule.dtype), query))(states, shifted)
  return jnp.moveaxis(y, 0, 2).reshape(B, H, -1, y.shape[-1])[:, :, 1:L + 1]


def _sum(a, d, ndim):
  return jnp.einsum('bhci,bhco->bhio', a, d) if ndim == 4 else jnp.sum(a * d, 2)
