"""Reads of a neural memory: each token through the weights that it sees, which are never formed; and gradients that need such reads.

    z_t = h_t W_init + sum_q reach[q, t] h_t M[q] - sum_i weigh[t, i] (h_t . a_i) d_i          layer by layer, then the nonlinearity

A chunk's part of this (`Prepared`) is what its writes leave behind; reads of many chunks then are one call, chunks leading the rows.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.neural import Factors, Rule, Tokens, Weights, anchor, factors, is_matrix
from memjax.ops.neural_exact import solve
from memjax.ops.neural_nets import Plain, dot
from memjax.ops.neural_steps import Coefficients, read_before


class Prepared(NamedTuple):
  """What tokens read of a memory and of a chunk's factors, by name. a: first factors in the compute dtype. of matrices, all in that dtype:
  [M_0; M_1; ..; d] one below the other, or for outputs narrower than inputs ([M_0 M_1 ..] side by side, d). Of vectors:
  (M [B, H, Q, width], a (.) d)."""
  a: dict
  parts: dict


def prepare(rule: Rule, start: Weights, memory: dict, found: Factors) -> Prepared:
  """What reads see; with decay to zero M_0 includes the learned start."""
  narrow, parts = lambda array: array.astype(rule.dtype), {}
  for name, levels in memory.items():
    a, d = found.a[name], found.d[name]
    if rule.decay_to == 'zero': levels = (start.fast[name] + levels[0], *levels[1:])
    if not is_matrix(name): parts[name] = jnp.stack(levels, 2), d * a
    elif d.shape[-1] < a.shape[-1]: parts[name] = jnp.concatenate(list(map(narrow, levels)), -1), narrow(d)
    else: parts[name] = (jnp.concatenate([*map(narrow, levels), narrow(d)], -2),)
  return Prepared({name: narrow(found.a[name]) for name in memory if is_matrix(name)}, parts)


class Dual:
  """The interpreter of token reads. Rows of tokens are a multiple of those of the start: chunks lead."""

  def __init__(self, rule: Rule, start: Weights, seen: Prepared, coefficients: Coefficients):
    self.rule, self.start, self.seen, self.dtype = rule, start, seen, rule.dtype
    self.weigh, self.reach = coefficients.weigh, coefficients.reach

  def _home(self, name, h):
    """h W_init; h has the rows of many chunks."""
    home = self.start.fast[name]
    folded = h.reshape(-1, home.shape[0], *h.shape[1:])
    return dot('nbhti,bhio->nbhto', folded, home, self.dtype, wide=False).reshape(*h.shape[:-1], -1)

  def linear(self, name, h):
    """h W_t."""
    a, parts, reach = self.seen.a[name], self.seen.parts[name], self.reach
    seen = dot('bhti,bhsi->bhts', h, a, self.dtype) * -self.weigh
    if len(parts) == 2:
      made = dot('bhti,bhio->bhto', h, parts[0], self.dtype)
      made = made.reshape(*made.shape[:-1], reach.shape[2], -1) * jnp.swapaxes(reach, 2, 3)[..., None]
      z = made.sum(-2) + dot('bhts,bhso->bhto', seen, parts[1], self.dtype)
    else:
      left = [(reach[:, :, q, :, None] * h).astype(self.dtype) for q in range(reach.shape[2])]
      z = dot('bhti,bhio->bhto', jnp.concatenate([*left, seen.astype(self.dtype)], -1), parts[0], self.dtype, wide=False)
    return (z if self.rule.decay_to == 'zero' else z + self._home(name, h)).astype(self.dtype)

  def _vector(self, name):
    """A fast vector as each token sees it, [B, H, C, width]."""
    memory, pushed = self.seen.parts[name]
    z = jnp.einsum('bhqt,bhqo->bhto', self.reach, memory, precision='highest') - dot('bhts,bhso->bhto', self.weigh, pushed, self.dtype)
    if self.rule.decay_to == 'zero': return z
    home = self.start.fast[name][None, :, :, None]
    return (z.reshape(-1, home.shape[1], *z.shape[1:]) + home).reshape(z.shape)

  def scale(self, name, x):
    """x (1 + gamma_t)."""
    return x * (1 + self._vector(name))

  def bias(self, name, x):
    """x + beta_t."""
    return x + self._vector(name)

  def slow(self, name):
    """An ordinary parameter, [H, ...]."""
    return self.start.slow[name]


def read_prepared(rule: Rule, start: Weights, seen: Prepared, query: jax.Array, *, coefficients: Coefficients) -> jax.Array:
  """y [N B, H, C, V] of the tokens of N chunks, whose rows are those of the first chunk, then of the next."""
  return rule.network(Dual(rule, start, seen, coefficients), query.astype(coefficients.weigh.dtype))


def read_tokens(rule: Rule, start: Weights, memory: dict, query: jax.Array, *, found: Factors, coefficients: Coefficients) -> jax.Array:
  """y [B, H, C, V]: token t reads W_init + reach_t M - weigh_t (A, D)."""
  return read_prepared(rule, start, prepare(rule, start, memory, found), query, coefficients=coefficients)


def read_anchor(rule: Rule, start: Weights, memory: dict, query: jax.Array) -> jax.Array:
  """y [B, H, C, V]: every token reads the weights of `memory`."""
  wide = jnp.promote_types(jnp.float32, rule.dtype)
  return rule.network(Plain(anchor(start, memory), start.slow, rule.dtype), query.astype(wide))


def find_factors(rule: Rule, start: Weights, memory: dict, tokens: Tokens, *, coefficients: Coefficients) -> Factors:
  """The gradients of a chunk where the mode takes them: at the anchor, or at W_{t-1} of each token by one triangular solve."""
  if rule.mode != 'exact': return anchored_factors(rule, anchor(start, memory), start.slow, tokens)
  value = tokens.value.astype(tokens.weight.dtype)
  nothing = Factors(_linear_inputs(rule, tokens), {name: jnp.zeros_like(value) for name in memory}, *[tokens.weight] * 3)
  before = read_before(coefficients)
  if rule.pairs > 1:
    before = before._replace(reach=jnp.repeat(before.reach, rule.pairs, -1), weigh=jnp.repeat(before.weigh, rule.pairs, -2))
  past = read_tokens(rule, start, memory, tokens.key, found=nothing, coefficients=before)
  return online_factors(rule, start, tokens, past, weigh=before.weigh)


def anchored_factors(rule: Rule, weights: dict, slow: dict, tokens: Tokens) -> Factors:
  """The gradients of a chunk at `weights`."""
  found = factors(rule, weights, slow, tokens)
  if not rule.gram: return found
  seen = (jnp.tril(jnp.ones((tokens.weight.shape[-1],) * 2, bool))[None, None] & (tokens.weight > 0)[:, :, None])
  return divided(found, {name: overlap(a, a, seen) for name, a in found.a.items()})


def overlap(a: jax.Array, past: jax.Array, seen: jax.Array) -> jax.Array:
  """sum_j |a_t . past_j| over the tokens j that `seen` [B, H, C, P] shows to each token t, [B, H, C], without gradient: a row sum that
  bounds what gradients at one anchor add up to, whatever the keys."""
  a, past = (side.astype(jnp.promote_types(jnp.float32, side.dtype)) for side in jax.lax.stop_gradient((a, past)))
  return jnp.sum(jnp.abs(jnp.einsum('bhti,bhsi->bhts', a, past)) * seen, -1)


def divided(found: Factors, size: dict) -> Factors:
  """The factors with each gradient divided by its `size` [B, H, C] of that tensor."""
  return found._replace(d={name: d / jnp.maximum(size[name], 1e-6)[..., None] for name, d in found.d.items()})


def _linear_inputs(rule, tokens):
  """The first factors of a linear memory: keys, and ones for its bias."""
  wide = tokens.weight.dtype
  return {name: tokens.key.astype(wide) if is_matrix(name) else jnp.ones_like(tokens.value, wide) for name in rule.network.fast}


def online_factors(rule: Rule, start: Weights, tokens: Tokens, past: jax.Array, *, weigh: jax.Array) -> Factors:
  """The gradients of a linear memory at W_{t-1}: `past` is its prediction without the writes of the tokens given, `weigh` [B, H, C, C]
  (strictly lower) how these reach each other's reads."""
  net, wide = rule.network, tokens.weight.dtype
  a, value, key = _linear_inputs(rule, tokens), tokens.value.astype(wide), tokens.key.astype(wide)
  if rule.grad_at == 'decayed':
    fixed = 0 if rule.decay_to == 'zero' else net(Plain(start.fast, start.slow, rule.dtype), key)
    past, weigh = fixed + tokens.keep[..., None] * (past - fixed), weigh * tokens.keep[..., None]
  rate = 2 * rule.scale * tokens.weight[..., None]
  gram = dot('bhti,bhsi->bhts', key, key, rule.dtype) + float(net.bias)
  d = solve(rate * weigh * gram, rate * (past - value), how=rule.solver)
  unit = d / jnp.where(rate == 0, 1, tokens.weight[..., None])
  square = jnp.sum(unit * unit, -1)
  norm = jnp.sqrt(jnp.maximum(square * (jnp.sum(key * key, -1) + float(net.bias)), 1e-24))
  return Factors(a, dict.fromkeys(a, d), square / (4 * rule.scale), norm, jnp.ones_like(norm))
