"""Which tokens a read depends on, by the whole Jacobian, bit for bit, and under permutations: specification 16.2."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.neural import NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig
from memjax.ops.neural_custom import feature_map
from tests.laws.cases import neural
from tests.memory.exactly import NEURAL, B, D, Exact, exact, far

N = 10                                                   # tokens, in chunks of 2 to 4
feature_map('products', lambda x: jnp.concatenate([x, x * jnp.roll(x, 1, -1)], -1))
MORE = {'own-features': neural(proj=NeuralProjConfig(features='products', rope='full'), rule=NeuralRuleConfig(momentum='second', clip=.1),
                               net=NeuralNetConfig(expansion=1, residual='off')),
        'own-network': neural(net=NeuralNetConfig(kind='custom', function='gated_pair', residual='off'),
                              rule=NeuralRuleConfig(momentum='cascade', clip=.1, clip_kind='soft', read='before')),
        'block-cascade': neural(rule=NeuralRuleConfig(mode='block', momentum='cascade'), net=NeuralNetConfig(kind='gated', depth=1))}
ALL = {**NEURAL, **MORE}
every = pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow) for name in sorted(ALL)])


def case(name): return exact(name) if name in NEURAL else Exact(MORE[name])


def reached(config, t, s):
  """Whether the read of token t must depend on token s <= t: by its own query, or by a write that is read."""
  chunk, mode = config.chunk, config.rule.mode
  if s == t: return True
  if config.gates.surprise or config.gates.row_factor: return False                # may not write, may count for nothing
  if mode == 'chunk_gates': return (s // chunk + 1) * chunk <= t + 1
  return s // chunk < t // chunk if mode == 'block' else True


@every
def test_reads_depend_on_no_later_token_and_no_other_row(name):
  """Exactly zero after t and across rows, non-zero at t and wherever a write is read; a changed end leaves the outputs before bit-equal."""
  with jax.enable_x64():
    c = case(name)
    x, position, weight = c.x[:, :N], c.position[:, :N] + 1, np.random.default_rng(2).normal(size=D)
    run = jax.jit(lambda x: c.call(c.params, x, c.empty, position)[0])
    size = np.abs(np.asarray(jax.jit(jax.jacrev(lambda x: run(x) @ weight))(x))).max(-1)              # [B, t, B, s]
    y = np.asarray(run(x))
    for t in (0, 5, N - 2):
      other = x.copy()
      other[0, t + 1:], other[1] = 100 * x[1, t + 1:], -x[1]
      np.testing.assert_array_equal(np.asarray(run(other))[0, :t + 1], y[0, :t + 1])
  assert np.isfinite(size).all()
  for b in range(B):
    for t in range(N):
      assert not size[b, t, b, t + 1:].any() and not size[b, t, 1 - b].any(), (b, t)
      for s in range(t + 1): assert size[b, t, b, s] > 0 or not reached(c.memory.config, t, s), (b, t, s)


def by_heads(name, a, heads, order):
  """A parameter whose heads are in another order."""
  if name.endswith('/taps') or '/out_gate/' in name or name.split('/')[-2] in ('query', 'key', 'value'): axis = a.ndim - 1
  elif '/out/' in name: axis = 0
  else: axis = a.ndim - 1 if '/projections/' in name or name.endswith('/scale') else 0
  groups = 3 if name.endswith('/taps') else 1
  cut = a.reshape(*a.shape[:axis], groups, heads, -1, *a.shape[axis + 1:])
  return jnp.take(cut, jnp.asarray(order), axis + 1).reshape(a.shape)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['neural-deep', 'neural-tnt', 'neural-features', 'neural-surprise', 'neural-ttt'])
def test_order_of_rows_and_heads(name):
  """Rows in another order read the same in that order; heads, with their parameters, may stand in any."""
  with jax.enable_x64():
    config = dataclasses.replace(NEURAL[name], heads=4)
    c = Exact(dataclasses.replace(config, write=dataclasses.replace(config.write, pairs=1)))
    order = (2, 0, 3, 1)
    flat, tree = jax.tree_util.tree_flatten_with_path(c.params)
    moved = tree.unflatten([by_heads(jax.tree_util.keystr(path, simple=True, separator='/'), a, 4, order) for path, a in flat])
    y, end = c.run(c.params, c.x, c.empty, c.position)
    flipped, _ = c.run(c.params, c.x[::-1], c.empty, c.position)
    got, after = c.run(moved, c.x, c.empty, c.position)
    assert far(flipped[::-1], y) <= 1e-13
    assert far(got, y) <= 1e-12
    whole = lambda state: state.whole if hasattr(state, 'whole') else state
    for name_, levels in whole(after).fast.items():
      for a, b in zip(levels, whole(end).fast[name_], strict=True): assert far(a, b[:, np.array(order)]) <= 1e-12
  assert np.abs(np.asarray(y[0]) - np.asarray(y[1])).max() > 1e-3
