"""Groups, schedules, clipping and decay of the optimiser."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import GroupConfig, OptimizerConfig
from memjax.layers.tree import named, nbytes
from memjax.runtime import optim

PARAMS = {'embed': {'table': jnp.ones((4, 3))}, 'layer': {'mem': {'w': jnp.ones((3, 3)), 'bias': jnp.ones(3)},
                                                          'mlp': {'w': jnp.ones((3, 5))}}}
GROUPS = {'memory': GroupConfig(rate=1e-2, schedule='constant'), 'rest': GroupConfig(rate=1e-3, schedule='constant')}
TWO = OptimizerConfig(rules=('mem/=memory', '.*=rest'), groups=GROUPS)


def ones(optimizer, scale=1.0):
  return jax.tree.map(lambda x: jnp.full(x.shape, scale), optimizer.split(PARAMS)[0])


def test_first_match_wins_and_each_group_has_its_rate():
  optimizer = optim.make_optimizer(TWO, PARAMS, 10)
  assert optimizer.groups == {'embed/table': 'rest', 'layer/mem/bias': 'memory', 'layer/mem/w': 'memory',
                              'layer/mlp/w': 'rest'}
  params, state = optim.apply(optimizer, ones(optimizer), optimizer.init(PARAMS), PARAMS)
  rates = {k: float(v) for k, v in optim.rates(state).items()}
  assert rates == pytest.approx({'learning_rate/memory': 1e-2, 'learning_rate/rest': 1e-3})
  moved = {k: float(jnp.max(jnp.abs(1 - v))) for k, v in named(params).items()}
  assert moved['layer/mem/bias'] == pytest.approx(1e-2, rel=1e-3)
  assert moved['layer/mlp/w'] == pytest.approx(1.1e-3, rel=1e-3)


@pytest.mark.parametrize('change, words', [
    ({'rules': ('mem/=memory', 'mlp=rest')}, 'no rule matches parameter embed/table'),
    ({'rules': ('nothing=memory', '.*=rest')}, 'optimizer.groups.memory has no parameter'),
    ({'groups': {k: GroupConfig(rate=0.0) for k in GROUPS}}, 'nothing to train')])
def test_bad_groups_are_one_line(change, words):
  with pytest.raises(UserError) as caught: optim.make_optimizer(dataclasses.replace(TWO, **change), PARAMS, 10)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_frozen_groups_hold_no_state_and_do_not_count_in_clips():
  frozen = dataclasses.replace(TWO, groups={**GROUPS, 'rest': GroupConfig(rate=0.0)})
  optimizer = optim.make_optimizer(frozen, PARAMS, 10)
  trainable, rest = optimizer.split(PARAMS)
  assert sorted(trainable) == ['layer/mem/bias', 'layer/mem/w'] and len(rest) == 2
  state = optimizer.init(PARAMS)
  moments = nbytes([s for s in jax.tree.leaves(state) if s.ndim])
  assert moments == 2 * nbytes(trainable)
  params, _ = optim.apply(optimizer, ones(optimizer), state, PARAMS)
  np.testing.assert_array_equal(params['layer']['mlp']['w'], PARAMS['layer']['mlp']['w'])


def test_clip_acts_inside_its_group():
  """With a huge gradient in one group the other group's moments stay as if it were alone."""
  optimizer = optim.make_optimizer(TWO, PARAMS, 10)
  grads = ones(optimizer, 0.01)
  big = {k: v * 1e6 if k.startswith(('embed', 'layer/mlp')) else v for k, v in grads.items()}
  both = [optimizer.tx.update(g, optimizer.init(PARAMS), optimizer.split(PARAMS)[0])[1] for g in (grads, big)]
  first, second = ({k: v for k, v in named(s).items() if 'mem/' in k and '/mu/' in k} for s in both)
  assert len(first) == 2
  for name in first: np.testing.assert_array_equal(first[name], second[name])
  clipped = [v for k, v in named(both[1]).items() if '/mu/' in k and ('embed' in k or 'mlp' in k)]
  assert float(optax.tree.norm(clipped)) == pytest.approx(0.1, rel=1e-4)    # (1 - b1) of a gradient clipped to norm 1


def test_decay_spares_vectors_and_named_matrices():
  group = GroupConfig(rate=0.1, schedule='constant', weight_decay=0.5)
  config = OptimizerConfig(groups={'main': group}, no_decay='(^|/)table$')
  optimizer = optim.make_optimizer(config, PARAMS, 10)
  params, _ = optim.apply(optimizer, ones(optimizer, 0.0), optimizer.init(PARAMS), PARAMS)
  kept = {k: float(v.ravel()[0]) for k, v in named(params).items()}
  assert kept == pytest.approx({'embed/table': 1.0, 'layer/mem/bias': 1.0, 'layer/mem/w': 0.95, 'layer/mlp/w': 0.95})


def test_stacked_vectors_do_not_decay():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((2, 3))}
  config = OptimizerConfig(groups={'main': GroupConfig(rate=0.1, schedule='constant', weight_decay=0.5)})
  optimizer = optim.make_optimizer(config, params, 10, axes={'a': ('layers', None), 'b': ('embed', 'heads')})
  new, _ = optim.apply(optimizer, jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  assert float(new['a'][0, 0]) == 1.0 and float(new['b'][0, 0]) == pytest.approx(0.95)


@pytest.mark.parametrize('group, points', [
    (GroupConfig(rate=2.0, warmup=10), {0: 0.2, 9: 2.0, 10: 2.0, 55: 1.0841, 99: 0.2, 500: 0.2}),
    (GroupConfig(rate=1.0, schedule='linear', end=0.0), {0: 1.0, 50: 1 - 50 / 99, 99: 0.0}),
    (GroupConfig(rate=1.0, schedule='constant', warmup=4), {0: 0.25, 1: 0.5, 3: 1.0, 99: 1.0}),
    (GroupConfig(rate=1.0, schedule='wsd', end=0.0, warmup=2), {0: 0.5, 50: 1.0, 79: 1.0, 89: 0.5, 99: 0.0}),
    (GroupConfig(rate=1.0, schedule='wsd', decay_shape='cosine'), {79: 1.0, 84: 0.8682, 89: 0.55, 94: 0.2318, 99: 0.1}),
    (GroupConfig(rate=1.0, schedule='wsd', end=0.0, decay_shape='one_minus_sqrt'), {79: 1.0, 84: 0.5, 94: 0.1340, 99: 0.0})])
def test_schedules(group, points):
  rate = optim.schedule(group, 100)
  for count, value in points.items(): assert float(rate(count)) == pytest.approx(value, abs=1e-4), count
