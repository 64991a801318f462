"""Random problems for the neural memory, float64 numpy, tiny; and what is compared."""
import jax
import jax.numpy as jnp
import numpy as np

from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import Network
from memjax.ops.neural_steps import Gates
from tests.ops.inputs import quick

LENGTH = 14


def rule(momentum='first', mode='token', **options) -> Rule:
  """A rule in float64 with a tiny network; `options` of `Network` and of `Rule`."""
  own = {name: options.pop(name) for name in list(options) if name in Rule.__dataclass_fields__}
  network = Network(**{'key_width': 4, 'value_width': 4, 'hidden': 6, 'rank': 3, **options})
  return Rule(network, mode=mode, momentum=momentum, **{'dtype': jnp.float64, **own})


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  return 1 / (1 + np.exp(-x))


def gates(rng, shape, *, order=0, hard=True, theta=0.3, rates=()):
  """Gates with a fifth of each at 0 or 1 exactly, and tokens that do not write; `rates`: names of fast tensors with factors; `order`
  of a cascade."""
  eta, alpha = sigmoid(rng.normal(size=shape)), sigmoid(rng.normal(size=shape) - 2)
  theta = theta * sigmoid(rng.normal(size=shape))
  if hard:
    for a in (eta, alpha): a[rng.random(shape) < .1], a[rng.random(shape) < .1] = 0, 1
    theta[rng.random(shape) < .1] = 0
  more = dict(higher=tuple(sigmoid(rng.normal(size=(order - 1, *shape)))), mix=tuple(rng.normal(size=(order + 1, *shape)))) if order else {}
  if rates: more['rate'] = {name: 2 * rng.random(shape) for name in rates}
  return Gates(theta, eta, alpha, rng.random(shape) < .8, **more)


def problem(given: Rule, L=LENGTH, B=2, H=2, seed=0, rates=False, **options):
  """(fast and slow parameters, memory, (query, key, value), gates)."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  spread = lambda shape: shape[0] ** -.5 if len(shape) > 1 else .2
  net = given.network
  fast, slow = ({name: draw(H, *shape) * spread(shape) for name, shape in kind.items()} for kind in (net.fast, net.slow))
  memory = {name: .1 * draw(B, H, given.levels, *shape) for name, shape in net.fast.items()}
  rows = L * given.pairs
  tokens = unit(draw(B, H, L, net.key_width)), unit(draw(B, H, rows, net.key_width)), draw(B, H, rows, net.value_width)
  return (fast, slow), memory, tokens, gates(rng, (B, H, L), order=given.order, rates=net.fast if rates else (), **options)


def run(form, given: Rule, arguments, *, learned=None, **options):
  """((memory, y), gradients of all arguments, and of `learned` by name) of `reference` or `mix`."""
  def value(differentiable, write):
    (fast, slow), memory, tokens, more, floats = differentiable
    out = form(given, start_of(fast, slow, tokens[0].shape[0]), memory, tokens, gates=floats._replace(write=write), **more, **options)
    return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(out)), out
  *rest, found = arguments
  (_, out), grads = quick(jax.value_and_grad(value, has_aux=True))((*rest, learned or {}, found._replace(write=None)), found.write)
  return out, grads


def start_of(fast, slow, rows=1) -> Weights:
  """The learned start for some rows."""
  return Weights({name: jnp.broadcast_to(a[None], (rows, *a.shape)) for name, a in fast.items()}, slow)


def furthest(actual, expected) -> float:
  """The largest difference of any leaf relative to the largest entry of that leaf; infinite where something is not finite."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()): return np.inf
    if b.size: worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))
  return worst
