"""Learning at test time (Titans, Behrouz et al. 2024): a network whose weights follow gradient descent over the tokens, in chunks.

    S_t = eta_t S_{t-1} - theta_t g_t        W_t = W_init + (1 - alpha_t) (W_{t-1} - W_init) + S_t        y_t = M(q_t; W_t)

The state holds M = (W - W_init, momenta): zero is the learned start. In mode 'token' g_t is taken at the weights of the chunk's
start (the anchor), 'exact' (linear memories) at W_{t-1}, and both read the exact W_t; in mode 'block' reads and gradients use the
anchor. Gradients are rank-1, g_t = a_t (x) d_t, so that a chunk is a few matmuls and no weights per token exist:

    z_t = h_t W_init + sum_q reach[q, t] h_t M_0[q] - sum_i weigh[t, i] (h_t . a_i) d_i          layer by layer, then the nonlinearity

Step sizes theta are folded into d. `neural_reference` is the same by a loop over tokens with `jax.grad`.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.neural_exact import solve
from memjax.ops.neural_nets import Network, Plain, Record, dot, inner_loss, probe_shapes
from memjax.ops.neural_steps import TURNS, Coefficients, levels, read_before


@dataclasses.dataclass(frozen=True)
class Rule:
  """The inner loop. `scale` and `argument` belong to the loss; `clip` bounds the gradient norm of one token (0 = off), hard or
  'soft' (1 / (1 + N / clip)); `first_order` (not in mode 'exact') takes inner gradients at weights without outer gradient;
  `grad_at` 'decayed' takes the error of mode 'exact' at the decayed memory; `weight_norm` (mode 'block') rescales each column of a
  matrix, where a chunk ends, to its norm at the learned start (LaCT); `pairs`: keys and values of each token; `refresh` (mode
  'chunk_gates'): chunks between the weights at which gradients are taken, 0 = always the learned ones; `gram` (mode 'token'): each
  gradient is divided by what its inputs have in common with those of the chunk so far (`overlap`)."""
  network: Network
  mode: str = 'token'
  loss: str = 'l2'
  scale: float = 0.5
  argument: float = 0.0
  momentum: str = 'first'
  decay_to: str = 'init'
  read: str = 'after'
  grad_at: str = 'previous'
  clip: float = 0.0
  clip_kind: str = 'hard'
  first_order: bool = False
  solver: str = 'blocked'
  weight_norm: bool = False
  dtype: Any = jnp.float32
  pairs: int = 1
  refresh: int = 0
  gram: bool = False

  @property
  def levels(self) -> int:
    """Q."""
    return levels(self.momentum)


class Weights(NamedTuple):
  """The learned start by name: fast tensors [B, H, ...] (broadcast over rows), slow ones [H, ...]."""
  fast: dict
  slow: dict


class Tokens(NamedTuple):
  """Writes of a chunk: keys [B, H, C, K], values [B, H, C, V], weight [B, H, C] (theta; 0 = no write), keep = 1 - alpha [B, H, C];
  rate: factors on the gradients by fast tensor. Rows of C are pairs: those of one token follow each other."""
  key: jax.Array
  value: jax.Array
  weight: jax.Array
  keep: jax.Array
  rate: dict | None = None


class Factors(NamedTuple):
  """Gradients of a chunk: a and d by name, [B, H, C, width], d times the weight; loss and gradient norm [B, H, C]; the share of
  each gradient that the clip left."""
  a: dict
  d: dict
  loss: jax.Array
  norm: jax.Array
  kept: jax.Array


def anchor(start: Weights, memory: dict) -> dict:
  """The weights W_init + M[0] by name."""
  return {name: start.fast[name] + memory[name][0] for name in memory}


def squared_norms(a: dict, d: dict) -> jax.Array:
  """|g|^2 of each token over all fast tensors, from its factors: |a|^2 |d|^2, and |a (.) d|^2 for vectors."""
  total = 0.0
  for name in a:
    a_, d_ = (side[name].astype(jnp.promote_types(jnp.float32, side[name].dtype)) for side in (a, d))
    total += jnp.sum(a_ * a_, -1) * jnp.sum(d_ * d_, -1) if is_matrix(name) else jnp.sum((a_ * d_) ** 2, -1)
  return total


def is_matrix(name: str) -> bool:
  """Whether a fast tensor is a matrix; the others are gains and biases."""
  return name != 'gain' and not name.startswith('b_')


def clip_share(rule: Rule, norm: jax.Array) -> jax.Array:
  """The factor on the gradient of each token."""
  if rule.clip_kind == 'soft': return 1 / (1 + norm / rule.clip)
  return jnp.minimum(1.0, rule.clip / norm)


def factors(rule: Rule, weights: dict, slow: dict, tokens: Tokens) -> Factors:
  """The gradients of the inner losses of some tokens at `weights`, as rank-1 factors, from one backward pass."""
  wide = tokens.weight.dtype
  probes = {name: jnp.zeros((*tokens.weight.shape, width), rule.dtype if is_matrix(name) else wide)
            for name, width in probe_shapes(rule.network).items()}
  if rule.first_order: weights = jax.lax.stop_gradient(weights)
  def loss(probes):
    ops = Record(weights, slow, rule.dtype, probes)
    each = inner_loss(rule.loss, rule.network(ops, tokens.key.astype(wide)), tokens.value.astype(wide), scale=rule.scale,
                      argument=rule.argument)
    return jnp.sum(each if rule.clip else tokens.weight * each), (ops.seen, each)
  d, (a, each) = jax.grad(loss, has_aux=True)(probes)
  norm = jnp.sqrt(jnp.maximum(squared_norms(a, d), 1e-24))
  kept, scale = (clip_share(rule, norm), tokens.weight) if rule.clip else (jnp.ones_like(norm), None)
  if scale is None: norm /= jnp.where(tokens.weight > 0, tokens.weight, 1)
  else: d = {name: (scale * kept)[..., None] * d_ for name, d_ in d.items()}
  if tokens.rate is not None: d = {name: tokens.rate[name][..., None] * d_ for name, d_ in d.items()}
  return Factors(a, d, each, norm, kept)


class Dual:
  """The interpreter of token reads: every layer sees the weights of its token, which are never formed."""

  def __init__(self, rule: Rule, start: Weights, memory: dict, *, found: Factors, coefficients: Coefficients):
    self.rule, self.start, self.memory, self.found, self.dtype = rule, start, memory, found, rule.dtype
    self.weigh, self.reach = coefficients.weigh, coefficients.reach

  def _parts(self, name):
    """(share of each token, tensor) whose sum is the weights of a token before its chunk's writes."""
    memory, reach = self.memory[name], self.reach
    parts = [(reach[:, :, q], level) for q, level in enumerate(memory)]
    if self.rule.decay_to == 'zero': return [(reach[:, :, 0], self.start.fast[name] + memory[0]), *parts[1:]]
    return [(None, self.start.fast[name]), *parts]

  def linear(self, name, h):
    """h W_t: one matmul with [W_init, M, D] stacked along its inner axis, or where outputs are narrower than inputs one with
    [W_init, M] side by side, whose results are weighed."""
    a, d, parts = self.found.a[name], self.found.d[name], self._parts(name)
    seen = dot('bhti,bhsi->bhts', h, a, self.dtype) * -self.weigh
    cast = lambda arrays, axis: jnp.concatenate([array.astype(self.dtype) for array in arrays], axis)
    right = [tensor for _, tensor in parts]
    if d.shape[-1] < h.shape[-1]:
      made = jnp.split(dot('bhti,bhio->bhto', h, cast(right, -1), self.dtype), len(parts), -1)
      own = sum(z if share is None else z * share[..., None] for z, (share, _) in zip(made, parts, strict=True))
      return (own + dot('bhts,bhso->bhto', seen, d, self.dtype)).astype(self.dtype)
    left = [h if share is None else h * share[..., None] for share, _ in parts]
    return dot('bhti,bhio->bhto', cast([*left, seen], -1), cast([*right, d], 2), self.dtype, wide=False)

  def _vector(self, name):
    """A fast vector as each token sees it, [B, H, C, width]."""
    change = dot('bhts,bhso->bhto', self.weigh, self.found.d[name] * self.found.a[name], self.dtype)
    own = lambda share, tensor: tensor[:, :, None] if share is None else share[..., None] * tensor[:, :, None]
    return sum(own(*part) for part in self._parts(name)) - change

  def scale(self, name, x):
    """x (1 + gamma_t)."""
    return x * (1 + self._vector(name))

  def bias(self, name, x):
    """x + beta_t."""
    return x + self._vector(name)

  def slow(self, name):
    """An ordinary parameter, [H, ...]."""
    return self.start.slow[name]


def read_tokens(rule: Rule, start: Weights, memory: dict, query: jax.Array, *, found: Factors, coefficients: Coefficients) -> jax.Array:
  """y [B, H, C, V]: token t reads W_init + reach_t M - weigh_t (A, D)."""
  return rule.network(Dual(rule, start, memory, found=found, coefficients=coefficients), query.astype(coefficients.weigh.dtype))


def read_anchor(rule: Rule, start: Weights, memory: dict, query: jax.Array) -> jax.Array:
  """y [B, H, C, V]: every token reads the weights of `memory`."""
  wide = jnp.promote_types(jnp.float32, rule.dtype)
  return rule.network(Plain(anchor(start, memory), start.slow, rule.dtype), query.astype(wide))


def commit(rule: Rule, start: Weights, memory: dict, *, found: Factors | dict, coefficients: Coefficients) -> dict:
  """M after the chunk: turn M - push (A, D), for each tensor one matmul of inner size C; `found` may be the sums already, by name."""
  turn, out = coefficients.turn, {}
  for name, old in memory.items():
    pushed = found[name] if isinstance(found, dict) else _pushed(name, found, coefficients.push, rule.dtype)
    share = lambda row, column: turn[:, :, row, column].reshape(*turn.shape[:2], *(1,) * (old[0].ndim - 2))
    new = [sum(share(p, q) * old[q] for q in range(len(old)) if (p, q) in TURNS[rule.momentum]) - pushed[p] for p in range(len(old))]
    if rule.decay_to == 'zero': new[0] -= (1 - share(0, 0)) * start.fast[name]
    out[name] = tuple(new)
  return out


def _pushed(name, found, push, dtype):
  """sum_i push[q, i] a_i (x) d_i, the levels q one after the other."""
  a, d = found.a[name], found.d[name]
  if not is_matrix(name):
    made = dot('bhqc,bhco->bhqo', push, a * d, dtype)
    return [made[:, :, q] for q in range(push.shape[2])]
  levels, side = push.shape[2], -1 if d.shape[-1] < a.shape[-1] else -2       # scale the narrower factor
  narrow = d if side == -1 else a
  scaled = jnp.concatenate([push[:, :, q, :, None] * narrow for q in range(levels)], -1)
  made = dot('bhci,bhco->bhio', *((a, scaled) if side == -1 else (scaled, d)), dtype)
  return jnp.split(made, levels, side)


def orthogonal(x: jax.Array) -> jax.Array:
  """The matrices [..., i, o] with their singular values near 1: five Newton-Schulz steps (Muon)."""
  wide = x.shape[-1] < x.shape[-2]
  x = jnp.swapaxes(x, -1, -2) if wide else x
  x *= jax.lax.rsqrt(jnp.sum(x * x, (-1, -2), keepdims=True) + 1e-12)
  for _ in range(5):
    gram = x @ jnp.swapaxes(x, -1, -2)
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return jnp.swapaxes(x, -1, -2) if wide else x


def finish(rule: Rule, start: Weights, memory: dict) -> dict:
  """M where a chunk of mode 'block' ends: the steps that look at whole matrices."""
  out = dict(memory)
  for name, (weights, *momenta) in memory.items():
    if rule.momentum == 'muon': weights += orthogonal(momenta[0]) if is_matrix(name) else momenta[0]
    if rule.weight_norm and is_matrix(name):
      home, size = start.fast[name], lambda a: jnp.sqrt(jnp.sum(a * a, -2, keepdims=True) + 1e-12)
      weights = (home + weights) * (size(home) / size(home + weights)) - home
    out[name] = (weights, *momenta)
  return out


def find_factors(rule: Rule, start: Weights, memory: dict, tokens: Tokens, *, coefficients: Coefficients) -> Factors:
  """The gradients of a chunk where the mode takes them: at the anchor, or at W_{t-1} of each token by one triangular solve."""
  if rule.mode != 'exact':
    found = factors(rule, anchor(start, memory), start.slow, tokens)
    if not rule.gram: return found
    seen = (jnp.tril(jnp.ones((tokens.weight.shape[-1],) * 2, bool))[None, None] & (tokens.weight > 0)[:, :, None])
    return divided(found, {name: overlap(a, a, seen) for name, a in found.a.items()})
  value = tokens.value.astype(tokens.weight.dtype)
  nothing = Factors(_linear_inputs(rule, tokens), {name: jnp.zeros_like(value) for name in memory}, *[tokens.weight] * 3)
  before = read_before(coefficients)
  if rule.pairs > 1:
    before = before._replace(reach=jnp.repeat(before.reach, rule.pairs, -1), weigh=jnp.repeat(before.weigh, rule.pairs, -2))
  past = read_tokens(rule, start, memory, tokens.key, found=nothing, coefficients=before)
  return online_factors(rule, start, tokens, past, weigh=before.weigh)


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
