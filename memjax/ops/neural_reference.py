"""The plain reference of the neural memory: a loop over tokens, weights in full, one `jax.grad` per token and row."""
import jax
import jax.numpy as jnp

from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import Plain, inner_loss
from memjax.ops.neural_steps import Gates


def reference(rule: Rule, start: Weights, memory: dict, tokens: tuple, *, gates: Gates, chunk: int,
              window: int = 1, gamma: jax.Array | None = None) -> tuple[dict, jax.Array]:
  """(memory after L tokens, y [B, H, L, V]); memory leaves are [B, H, Q, ...]: W - W_init and the momenta.

  tokens = (query, key, value) [B, H, L, width], gates [B, H, L], chunks counted from the first token. S_t = eta S - theta g,
  W_t = (1 - alpha) W + S towards W_init or zero, g at the chunk's start ('token', 'block') or at W_{t-1} ('exact'). `window` > 1
  (omega rule): g is the sum of the gradients of that many last tokens, each times `gamma` [H, window] of its distance. Keys and values
  are [B, H, L * pairs, width].
  """
  full = {name: leaf.at[:, :, 0].add(start.fast[name]) for name, leaf in memory.items()}
  length, pairs = tokens[0].shape[2], rule.pairs
  query, key, value = (jnp.moveaxis(a.reshape(*a.shape[:2], length, -1, a.shape[-1]), 2, 0) for a in tokens)
  first = lambda a: jnp.moveaxis(a, 2, 0)
  past = jax.tree.map(lambda a: jnp.zeros_like(a[:1], shape=(window, *a.shape[1:])),
                      (key, value, first(gates.write), jax.tree.map(first, gates.rate)))
  def token(carry, now):
    full, held, past = carry
    t, query, key, value, gate = now
    held = jax.tree.map(lambda new, old: jnp.where(t % chunk == 0, new, old), full, held) if rule.mode != 'exact' else full
    past = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), past, (key, value, gate.write, gate.rate))
    fixed = {name: leaf[:, :, 0] for name, leaf in held.items()}
    if rule.grad_at == 'decayed': fixed = _decayed(rule, start, fixed, gate.alpha)
    each = [_gradient(rule, start, fixed, jax.tree.map(lambda a, n=n: a[n], past), pair=pair)
            for n in range(window) for pair in range(pairs)]
    share = [1.0 if gamma is None else gamma[None, :, window - 1 - n] for n in range(window) for _ in range(pairs)]
    g = jax.tree.map(lambda *one: sum(_lift(jnp.asarray(s), a) * a for s, a in zip(share, one, strict=True)), *each)
    new = {name: _update(rule, start.fast[name], leaf, g[name], gates=gate) for name, leaf in full.items()}
    if rule.finishes:
      ends = (t + 1 == length) | (t % chunk == chunk - 1)
      new = {name: jnp.where(ends, _whole(rule, start.fast[name], leaf), leaf) for name, leaf in new.items()}
    seen = held if rule.mode == 'block' else full if rule.read == 'before' else new
    y = rule.network(Plain({name: leaf[:, :, 0] for name, leaf in seen.items()}, start.slow, rule.dtype), query)
    return (new, held, past), y
  gates = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), gates)
  (full, _, _), y = jax.lax.scan(token, (full, full, past), (jnp.arange(length), query, key, value, gates))
  return {name: leaf.at[:, :, 0].add(-start.fast[name]) for name, leaf in full.items()}, jnp.moveaxis(y[..., 0, :], 0, 2)


def _lift(a, like):
  return a.reshape(*a.shape, *(1,) * (like.ndim - a.ndim))


def _decayed(rule, start, weights, alpha):
  home = (lambda name: 0) if rule.decay_to == 'zero' else (lambda name: start.fast[name])
  return {name: home(name) + _lift(1 - alpha, leaf) * (leaf - home(name)) for name, leaf in weights.items()}


def _gradient(rule, start, weights, token, *, pair):
  """The gradient of the inner loss of one pair of a token in every row and head, clipped; zero where it does not write."""
  key, value, write, rate = token
  key, value = key[:, :, pair:pair + 1], value[:, :, pair:pair + 1]
  if rule.first_order: weights = jax.lax.stop_gradient(weights)
  def loss(fast):
    y = rule.network(Plain(fast, start.slow, rule.dtype), key)
    return jnp.sum(inner_loss(rule.loss, y, value, scale=rule.scale, argument=rule.argument))
  g = jax.grad(loss)(weights)
  if rule.clip:
    norm = jnp.sqrt(jnp.maximum(sum(jnp.sum(leaf * leaf, tuple(range(2, leaf.ndim))) for leaf in g.values()), 1e-24))
    share = 1 / (1 + norm / rule.clip) if rule.clip_kind == 'soft' else jnp.minimum(1.0, rule.clip / norm)
    g = {name: leaf * _lift(share, leaf) for name, leaf in g.items()}
  if rate is not None: g = {name: leaf * _lift(rate[name], leaf) for name, leaf in g.items()}
  return {name: jnp.where(_lift(write, leaf), leaf, 0) for name, leaf in g.items()}


def _whole(rule, home, stack):
  """What mode 'block' does to whole tensors at the end of a chunk."""
  w, s = stack[:, :, 0], stack[:, :, -1]
  is_vector = stack.ndim == 4
  if rule.momentum == 'muon' and is_vector: w = w + s
  elif rule.momentum == 'muon':
    x = s / jnp.sqrt(jnp.sum(s * s, (2, 3), keepdims=True) + 1e-12)
    for _ in range(5): x = 3.4445 * x - 4.7750 * x @ x.swapaxes(2, 3) @ x + 2.0315 * x @ x.swapaxes(2, 3) @ x @ x.swapaxes(2, 3) @ x
    w = w + x
  if rule.shrink:
    to = 0 * home if rule.decay_to == 'zero' else home
    w = to + jnp.sign(w - to) * jnp.maximum(jnp.abs(w - to) - rule.shrink, 0)
  if rule.weight_norm and not is_vector:
    w = w * jnp.sqrt(jnp.sum(home ** 2, 2, keepdims=True) + 1e-12) / jnp.sqrt(jnp.sum(w ** 2, 2, keepdims=True) + 1e-12)
  return stack.at[:, :, 0].set(w)


def _update(rule, home, stack, g, *, gates):
  """(W, S1, S2, ..) after one token, from the equations as they are written."""
  theta, eta, alpha = (_lift(a, g) for a in (gates.theta, gates.eta, gates.alpha))
  w, momenta = stack[:, :, 0], [stack[:, :, n] for n in range(1, stack.shape[2])]
  if rule.momentum == 'none': step, new = -theta * g, []
  else:
    s = eta * momenta[0] - theta * g
    step, new = 0 * s if rule.momentum == 'muon' else s, [s]
    if rule.momentum == 'nesterov': step = eta * s - theta * g
    if rule.momentum == 'cascade':
      for eta, old in zip(gates.higher, momenta[1:], strict=True): new.append(_lift(eta, g) * old + new[-1])
      step = sum(_lift(c, g) * one for c, one in zip(gates.mix, [-theta * g, *new], strict=True))
  home = 0 if rule.decay_to == 'zero' else home
  kept = home + (1 - alpha) * (w - home)
  stacked = jnp.stack([kept + step, *new], 2)
  return jnp.where(_lift(gates.write, stacked), stacked, stack)
