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

from memjax.ops.neural_nets import Network, Record, dot, inner_loss, probe_shapes
from memjax.ops.neural_steps import Coefficients, levels, turns


@dataclasses.dataclass(frozen=True)
class Rule:
  """The inner loop. `scale` and `argument` belong to the loss; `clip` bounds the gradient norm of one token (0 = off), hard or
  'soft' (1 / (1 + N / clip)); `first_order` (not in mode 'exact') takes inner gradients at weights without outer gradient;
  `grad_at` 'decayed' takes the error of mode 'exact' at the decayed memory; `weight_norm` (mode 'block') rescales each column of a
  matrix, where a chunk ends, to its norm at the learned start (LaCT); `shrink` (mode 'block') moves there every weight so far towards
  what forgetting returns to, and not past it; `pairs`: keys and values of each token; `refresh` (mode
  'chunk_gates'): chunks between the weights at which gradients are taken, 0 = always the learned ones; `gram` (mode 'token'): each
  gradient is divided by what its inputs have in common with those of the chunk so far (`overlap`); `order`: momenta of a cascade;
  `backend`: see `neural_backend`; `remat`: what the gradient of a chunk keeps (`neural_scan`)."""
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
  order: int = 0
  backend: str = 'auto'
  remat: str = 'products'
  shrink: float = 0.0

  @property
  def levels(self) -> int:
    """Q."""
    return levels(self.momentum, self.order)

  @property
  def finishes(self) -> bool:
    """Whether something is done to whole tensors where a chunk ends (`finish`)."""
    return self.momentum == 'muon' or self.weight_norm or self.shrink > 0


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
  return name != 'gain' and not name.startswith(('b_', 'g_'))


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


@jax.custom_vjp
def _share_of(share, old, slim):
  del slim
  return share * old


def _share_of_backward(kept, g):
  share, slim = kept
  total = jnp.sum(g * slim.astype(g.dtype), tuple(range(2, g.ndim)), keepdims=True)
  return total.astype(share.dtype), share * g, None


_share_of.defvjp(lambda share, old, slim: (share * old, (share, slim)), _share_of_backward)


def commit(rule: Rule, start: Weights, memory: dict, *, found: Factors | dict, coefficients: Coefficients,
           slim: dict | None = None) -> dict:
  """M after the chunk: turn M - push (A, D), for each tensor one matmul of inner size C; `found` may be the sums already, by name.
  `slim`: the memory in the dtype in which it is kept for the gradient of the turn."""
  turn, out, entries = coefficients.turn, {}, turns(rule.momentum, rule.order)
  for name, old in memory.items():
    pushed = found[name] if isinstance(found, dict) else _pushed(name, found, coefficients.push, rule.dtype)
    share = lambda row, column: turn[:, :, row, column].reshape(*turn.shape[:2], *(1,) * (old[0].ndim - 2))
    part = lambda p, q: _share_of(share(p, q), old[q], old[q] if slim is None else slim[name][q])
    new = [sum(part(p, q) for q in range(len(old)) if (p, q) in entries) - pushed[p] for p in range(len(old))]
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
  """M where a chunk of mode 'block' ends: the steps that are not linear in it. `shrink` is the proximal step of a penalty |W - home|."""
  out = dict(memory)
  for name, (weights, *momenta) in memory.items():
    if rule.momentum == 'muon': weights += orthogonal(momenta[0]) if is_matrix(name) else momenta[0]
    if rule.shrink:
      away = weights if rule.decay_to == 'init' else weights + start.fast[name]
      weights -= jnp.clip(away, -rule.shrink, rule.shrink)
    if rule.weight_norm and is_matrix(name):
      home, size = start.fast[name], lambda a: jnp.sqrt(jnp.sum(a * a, -2, keepdims=True) + 1e-12)
      weights = (home + weights) * (size(home) / size(home + weights)) - home
    out[name] = (weights, *momenta)
  return out
