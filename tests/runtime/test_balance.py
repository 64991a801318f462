"""Training of banks: the selection bias, rows without gradient, frozen tables, learned steps of rounding."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankConfig, BankFormConfig, BankLossConfig, BankQuantConfig, BankShapeConfig, MixingConfig, RouterConfig
from memjax.config.errors import UserError
from memjax.config.schema import Config, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime import optim, state
from memjax.runtime.balance import move_biases
from memjax.train import build
from tests.runtime import toy

RATE, CHAPTERS = .01, 6
SHAPE = BankShapeConfig(entries=4 * CHAPTERS, chapters=CHAPTERS)
BIASED = BankConfig(heads=2, shape=SHAPE, router=RouterConfig(top_k=2), mixing=MixingConfig(shared=1), form=BankFormConfig(kind='gather'),
                    loss=BankLossConfig(bias_rate=RATE), zero_out=False)
PLAIN = dataclasses.replace(BIASED, shape=BankShapeConfig(entries=8), router=RouterConfig(), mixing=MixingConfig(), loss=BankLossConfig())
LEARNED = dataclasses.replace(PLAIN, quant=BankQuantConfig(bits=4, group=0, train='learned'))
MODEL = ModelConfig(width=8, hidden=-1, vocabulary=toy.VOCABULARY, mixers={'a': BIASED, 'c': LEARNED}, prefix=('a',),
                    pattern=('c>a',), repeats=2)
GROUPS = {'sparse': GroupConfig(rate=.01, sparse=True, weight_decay=.5), 'frozen': GroupConfig(rate=0.0), 'main': GroupConfig(rate=.01)}
CONFIG = Config(model=MODEL, training=TrainingConfig(batch=8, length=8, steps=6),
                optimizer=OptimizerConfig(rules=('repeats/.*/a/bank/=sparse', 'prefix/.*/bank/=frozen', '.*=main'), groups=GROUPS))
PLACES = {'prefix/layer_0/a': 'prefix/layer_0/mixers/a', 'repeats/layer_0/a': 'repeats/layer_0/mixers_1/a'}


@pytest.fixture(scope='module')
def trained():
  """(flat parameters before and after each of three steps, the loads that the model reports, the optimiser, its state, the step)."""
  model = build_decoder(MODEL)
  params = jax.jit(lambda key: init_params(model, key)[0])(jax.random.key(0))
  for place in PLACES.values():                                              # nobody picks the last chapter
    flat = named(params)
    params = unnamed({**flat, f'{place}/router/bias': flat[f'{place}/router/bias'].at[..., -1].set(-50.0)}, params)
  optimizer = optim.make_optimizer(CONFIG.optimizer, params, 6)
  step = state.make_train_step(model, optimizer, CONFIG)
  now = state.TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(1)), (), jnp.int32(0))
  call = lambda p, batch: model.apply({'params': p}, batch['token'], model.init_state(8), position_BxL=batch['position'])[2]['load']
  load_of, seen, loads = jax.jit(call), [jax.device_get(named(params))], []
  for number in range(3):
    loads.append(jax.device_get(load_of(now.params, toy.batch(number))))
    now, metrics = step(now, toy.batch(number))
    seen.append(jax.device_get(named(now.params)))
    assert float(metrics['skipped']) == 0 and np.isfinite(float(metrics['loss'])) and 'load' not in metrics
  return seen, loads, optimizer, now, step


def test_each_step_moves_the_selection_bias_by_the_use_of_the_chapters(trained):
  """6.1: e_i + rate sign(mean c - c_i) in every layer, repeated ones each by their own use; no decay, no moments."""
  seen, loads, optimizer, now, _ = trained
  for before, after, load in zip(seen[:-1], seen[1:], loads, strict=True):
    assert set(load) == set(PLACES)
    for place, use in load.items():
      path = f'{PLACES[place]}/router/selection_bias'
      assert use.shape == before[path].shape == ((2,) if place.startswith('repeats') else ()) + (CHAPTERS - 1,)
      assert (use.sum(-1) == 2 * 64).all() and not use[..., -1].any()
      np.testing.assert_array_equal(after[path], before[path] + np.float32(RATE) * np.sign(use.mean(-1, keepdims=True) - use))
  biases = [path for path in seen[0] if path.endswith('selection_bias')]
  assert len(biases) == 2 and set(biases) <= optimizer.frozen
  assert not any('selection_bias' in path for path in named(now.opt_state))


def test_a_step_that_is_not_finite_moves_no_bias(trained):
  seen, _, optimizer, now, step = trained
  flat = {**named(now.params), 'embed/table': now.params['embed']['table'] * jnp.nan}
  params = jax.tree.map(jnp.array, unnamed(flat, now.params))                # the step gives its input away
  after, metrics = step(now._replace(params=params, opt_state=optimizer.init(params), key=jnp.array(now.key)), toy.batch(5))
  assert int(metrics['skipped']) == 1
  for path, leaf in named(after.params).items():
    if path.endswith('selection_bias'): np.testing.assert_array_equal(leaf, seen[-1][path])


def test_chapters_that_nobody_reads_stay_as_they_are_where_the_group_is_sparse(trained):
  """P10.15: bit-identical, while the others move, and the frozen table stays whole."""
  first, *_, last = trained[0]
  path = f"{PLACES['repeats/layer_0/a']}/bank/entries"
  np.testing.assert_array_equal(last[path][:, -4:], first[path][:, -4:])
  assert (last[path] != first[path])[:, :4].all()                            # the shared chapter, which everybody reads
  same = {path for path in first if np.array_equal(first[path], last[path])}
  assert same == {'prefix/layer_0/mixers/a/bank/entries'}
  assert 'repeats/layer_0/mixers/c/bank/entries_step' in first               # learned: it moved with all else


@pytest.mark.parametrize('sparse', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_without_gradient_are_moved_by_decay_and_momentum_unless_sparse(sparse):
  config = OptimizerConfig(groups={'main': GroupConfig(rate=.1, schedule='constant', weight_decay=.5, clip=0.0, sparse=sparse)})
  params = {'bank': {'entries': jnp.ones((4, 2))}, 'repeats': {'entries': jnp.ones((2, 4, 2))}}
  optimizer = optim.make_optimizer(config, params, 3)
  opt_state, used = optimizer.init(params), [jnp.array([[1.0, 0], [0, 0], [-1, 1], [0, 0]]), jnp.array([[0.0, 0], [1, 1], [1, 0], [0, 0]])]
  for grad in used:
    before = params
    params, opt_state = optim.apply(optimizer, {'bank/entries': grad, 'repeats/entries': jnp.stack([grad, grad[::-1]])}, opt_state, params)
    moved = named(jax.tree.map(lambda a, b: (a != b).any(-1), params, before))
    expected = (grad != 0).any(-1) if sparse else np.ones(4, bool)
    np.testing.assert_array_equal(moved['bank/entries'], expected)
    np.testing.assert_array_equal(moved['repeats/entries'], np.stack([expected, expected[::-1]]))


def test_balancing_evens_out_the_use_of_a_skewed_router():
  """P6.5: the squared variation of the loads falls; the probabilities, and with them the weights, stay those of the router."""
  averaged = dataclasses.replace(BIASED, router=RouterConfig(strategy='prefix-mean', top_k=2))
  config = dataclasses.replace(MODEL, mixers={'a': averaged}, prefix=('a',), pattern=(), repeats=0)
  model, rng = build_decoder(config), np.random.default_rng(0)
  params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), param_shapes(model)[0])
  router = params['prefix']['layer_0']['mixers']['a']['router']
  router |= {'kernel': router['kernel'] / 2, 'bias': jnp.linspace(0.0, 4.0, CHAPTERS), 'selection_bias': jnp.zeros(CHAPTERS - 1)}
  token, position = rng.integers(0, toy.VOCABULARY, (4, 16)), np.broadcast_to(np.arange(16), (4, 16))
  def step(params, _):
    aux = model.apply({'params': params}, token, model.init_state(4), position_BxL=position)[2]
    load = aux['load']['prefix/layer_0/a']
    return move_biases(config, params, aux['load']), (load, aux['router_entropy'], jnp.var(load) / jnp.mean(load) ** 2)
  end, (load, entropy, variation) = jax.jit(lambda params: jax.lax.scan(step, params, None, length=120))(params)
  assert variation[0] > .5 and variation[-20:].mean() < .2 * variation[0] and load[0].min() == 0 and load[-1].min() > 10
  np.testing.assert_array_equal(entropy, entropy[:1].repeat(120))
  moved = [path for path, leaf in named(end).items() if not np.array_equal(leaf, named(params)[path])]
  assert moved == ['prefix/layer_0/mixers/a/router/selection_bias']
  changed = jax.jit(lambda p: model.apply({'params': p}, token, model.init_state(4), position_BxL=position)[0])
  assert np.abs(changed(end) - changed(params)).max() > 1e-3                 # evaluation uses it


def test_a_bank_of_integers_cannot_be_trained():
  stored = dataclasses.replace(PLAIN, quant=BankQuantConfig(bits=8, group=8))
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, mixers={**MODEL.mixers, 'c': stored}))
  with pytest.raises(UserError, match=r'^model\.mixers\.c\.quant\.bits stores integers, which cannot be trained; [^\n]*$'):
    build(config, None)
