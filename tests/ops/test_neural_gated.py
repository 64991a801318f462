"""Writes of surprising tokens alone, against a loop over tokens with `jax.grad`: specification section 15 and property 45."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural import Tokens
from memjax.ops.neural_gated import GatedChunk, Surprise, opens, running, scan_gated
from memjax.ops.neural_nets import Plain
from memjax.ops.neural_reference import _gradient, _update
from memjax.ops.neural_steps import weights
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, problem, rule, run

Z, NORM = Surprise('z', .2, .8), Surprise('norm', 5.0, .8)
CASES = {'z': (rule(clip=.5), Z, {'chunk': 6}),
         'norm-before': (rule('nesterov', read='before', kind='swiglu', decay_to='zero'), NORM, {'chunk': 7}),
         'z-pairs': (rule('cascade', order=2, pairs=2), Z, {'chunk': 6}),
         'z-block': (rule(mode='block', decay_to='zero'), Z, {'chunk': 6})}


def norms_of(given, start, fixed, token):
  """The mean norm [B, H] of the gradients of a token's pairs, not clipped."""
  bare = rule(given.momentum, given.mode, clip=0.0, **{n: getattr(given.network, n) for n in ('kind', 'slow_gain')})
  each = [_gradient(bare, start, fixed, token, pair=pair) for pair in range(given.pairs)]
  return sum(jnp.sqrt(sum(jnp.sum(leaf * leaf, tuple(range(2, leaf.ndim))) for leaf in one.values())) for one in each) / given.pairs


def loop(given, start, memory, tokens, *, gates, chunk, surprise):
  """`reference` with a look at the norm of each gradient before it is written."""
  full, P = {name: leaf.at[:, :, 0].add(start.fast[name]) for name, leaf in memory.items()}, given.pairs
  split = lambda a, rows=1: jnp.moveaxis(a.reshape(*a.shape[:2], -1, rows, *a.shape[3:]), 2, 0)
  def token(carry, item):
    full, held, means = carry
    t, query, key, value, now = item
    held = jax.tree.map(lambda new, old: jnp.where(t % chunk == 0, new[:, :, 0], old), full, held)
    norm = jax.lax.stop_gradient(norms_of(given, start, held, (key, value, now.write, None)))
    mean, square = means[1] / means[0], means[2] / means[0]
    z = (norm - mean) / jnp.sqrt(square - mean ** 2 + 1e-6)
    now = now._replace(write=now.write & (norm >= surprise.threshold if surprise.kind == 'norm' else (t == 0) | (z >= surprise.threshold)))
    means = surprise.keep * means + (1 - surprise.keep) * jnp.stack([jnp.ones_like(norm), norm, norm ** 2])
    each = [_gradient(given, start, held, (key, value, now.write, None), pair=pair) for pair in range(P)]
    g = jax.tree.map(lambda *one: sum(one), *each)
    new = {name: _update(given, start.fast[name], leaf, g[name], gates=now) for name, leaf in full.items()}
    seen = held if given.mode == 'block' else {name: leaf[:, :, 0] for name, leaf in (full if given.read == 'before' else new).items()}
    return (new, held, means), given.network(Plain(seen, start.slow, given.dtype), query)
  items = jnp.arange(gates.theta.shape[2]), split(tokens[0]), split(tokens[1], P), split(tokens[2], P)
  begin = full, {name: leaf[:, :, 0] for name, leaf in full.items()}, jnp.full((3, *gates.theta.shape[:2]), 1e-30)
  (full, _, _), y = jax.lax.scan(token, begin, (*items, jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), gates)))
  return {name: leaf.at[:, :, 0].add(-start.fast[name]) for name, leaf in full.items()}, jnp.moveaxis(y[..., 0, :], 0, 2)


def in_chunks(given, start, memory, tokens, *, gates, chunk, surprise):
  """`scan_gated` of tokens that fill their chunks."""
  def cut(a): return jnp.moveaxis(a.reshape(*a.shape[:2], N, -1, *a.shape[3:]), 2, 0)
  (B, _, L), N = gates.theta.shape, gates.theta.shape[2] // chunk
  more = lambda a: jnp.repeat(a, given.pairs, -1)
  writes = Tokens(*tokens[1:], more(weights(gates)), more(1 - gates.alpha))
  ones = jnp.ones((N, B), bool)
  chunks = GatedChunk(cut(tokens[0]), jax.tree.map(cut, writes), jax.tree.map(cut, gates), jnp.ones((N, B, chunk), bool), ones, ~ones)
  memory = {name: tuple(a[:, :, q] for q in range(a.shape[2])) for name, a in memory.items()}
  is_block = given.mode == 'block'
  carry = ({name: levels[0] for name, levels in memory.items()}, memory) if is_block else memory
  (carry, _), (y, _) = scan_gated(given, start, (carry, jnp.zeros((*gates.theta.shape[:2], 3))), chunks, surprise=surprise)
  memory = {name: jnp.stack(levels, 2) for name, levels in (carry[1] if is_block else carry).items()}
  return memory, jnp.moveaxis(y, 0, 2).reshape(B, y.shape[2], L, -1)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_chunks_equal_the_loop(name):
  """Values and outer gradients in float64; some tokens write and some do not, by the gate alone."""
  given, surprise, options = CASES[name]
  with jax.enable_x64():
    *rest, found = problem(given, L=2 * options['chunk'], hard=False)
    arguments = *rest, found._replace(write=np.ones_like(found.write))
    (out, grads), (want, want_grads) = (run(form, given, arguments, surprise=surprise, **options) for form in (in_chunks, loop))
    free = run(in_chunks, given, arguments, surprise=Surprise('norm', 0.0, .8), **options)[0]
  assert furthest(out, want) <= 1e-12
  assert furthest(grads, want_grads) <= 1e-10
  assert furthest(out, free) > 1e-2


def test_running_means_and_what_opens():
  """Of a loop; z is large where the norms change and not where they go on, and does not depend on other rows or on what follows."""
  rng = np.random.default_rng(0)
  norm = 1 + .1 * rng.random((2, 1, 12)).astype(np.float32)
  norm[:, :, 8] = 3
  new = np.ones((2, 12), bool)
  new[0, :3] = False                                                      # judged in an earlier call
  start = np.stack([.4, .4 * 1.05, .4 * 1.1], -1).astype(np.float32) * np.array([1, 0], np.float32)[:, None, None]
  def look(norm, new, start):
    before, after = running(Z, norm, new, start)
    return before, after, opens(Z, norm, before)
  before, after, write = (np.asarray(a) for a in quick(look)(norm, new, start))
  for b in range(2):
    means = start[b, 0].astype(np.float64)
    for t in range(12):
      np.testing.assert_allclose(before[b, 0, t], means, rtol=1e-5, atol=1e-7)
      if not new[b, t]: continue
      mean = means[1] / max(means[0], 1e-12)
      z = (norm[b, 0, t] - mean) / np.sqrt(max(means[2] / max(means[0], 1e-12) - mean ** 2, 0) + 1e-6)
      assert write[b, 0, t] == (z >= Z.threshold or means[0] == 0)
      if t == 8: assert z > 5
      means = Z.keep * means + (1 - Z.keep) * np.array([1, norm[b, 0, t], norm[b, 0, t] ** 2])
    np.testing.assert_allclose(after[b, 0], means, rtol=1e-5)
  assert write[1, 0, 0] and 0 < write[1].mean() < 1
  alone = quick(look)(norm[1:, :, :9], new[1:, :9], start[1:])
  np.testing.assert_allclose(alone[0], before[1:, :, :9], rtol=1e-6)
  np.testing.assert_array_equal(alone[2], write[1:, :, :9])
