"""Holding the memory: nothing is written, or nothing is read, and attention beside it notices neither."""
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import evaluate
from memjax.config.errors import UserError
from memjax.config.flags import call
from memjax.config.mixers import MIXERS, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig, NeuralProjConfig
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.test_time import LEARNING, held, learners
from tests.pieces import make_workdir, small_config, write_plays

B, L, A = 2, 7, 11
NEAR = WindowConfig(heads=2, window=4)
NEURAL = NeuralConfig(heads=2, chunk=2, net=NeuralNetConfig(kind='linear'), proj=NeuralProjConfig(conv_width=0),
                      exec=NeuralExecConfig(group=-1))
HOLOGRAPHIC = HolographicConfig(heads=2)
TOKEN_BxL = jnp.asarray(np.random.default_rng(0).integers(0, A, (B, L)), jnp.int32)
POSITION_BxL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))


def make(layer, mem=NEURAL):
  """(model, random parameters, run(params, choice) -> (logits, state))."""
  model = build_decoder(ModelConfig(width=8, hidden=-1, vocabulary=A, mixers={'near': NEAR, 'mem': mem}, pattern=(layer,), repeats=1))
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0))[0])
  params = jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), shapes)
  def run(params, choice):
    kept = held(model.config, choice)
    one = lambda params: model.apply({'params': params}, TOKEN_BxL, model.init_state(B), position_BxL=POSITION_BxL, **kept)[:2]
    return jax.jit(one)(params)
  return model, params, run


def edited(params, **changes):
  """The parameters with those whose name ends in the key replaced by a number."""
  def one(path, a):
    return next((jnp.full_like(a, x) for key, x in changes.items() if path.endswith((f'mem/{key}', f'projections/{key}'))), a)
  return unnamed({path: one(path, a) for path, a in named(params).items()}, params)


@pytest.mark.parametrize('layer', ['mem>near', pytest.param('near+mem:mac', marks=pytest.mark.slow)])
def test_frozen_reads_the_learned_start(layer):
  """As with step sizes and forgetting of exactly 0; attention goes on as ever."""
  model, params, run = make(layer)
  logits, state = run(params, 'frozen')
  closed = edited(params, theta=0, theta_bias=-np.inf, alpha=0, alpha_bias=-np.inf)
  still, beside = run(closed, 'on')
  np.testing.assert_allclose(logits, still, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(run(params, 'on')[0]) - np.asarray(logits)).max() > 1e-3
  inner = lambda state, name: state['repeats']['layer_0'][name]
  chex.assert_trees_all_equal(inner(state, 'mem'), inner(model.init_state(B), 'mem'))
  chex.assert_trees_all_close(inner(state, 'near'), inner(beside, 'near'), rtol=1e-5, atol=1e-5)
  assert np.asarray(jax.tree.leaves(inner(state, 'near'))[0]).any()


@pytest.mark.parametrize('layer, mem', [pytest.param('mem>near', NEURAL, marks=pytest.mark.slow), ('near+mem', HOLOGRAPHIC)])
def test_off_reads_zeros(layer, mem):
  """As with an output projection of exactly 0; a kind whose empty memory reads 0 is as well off frozen."""
  _, params, run = make(layer, mem)
  logits, params_off = run(params, 'off')[0], edited(params, **{'out/kernel': 0})
  np.testing.assert_allclose(logits, run(params_off, 'on')[0], rtol=1e-5, atol=1e-5)
  frozen = np.abs(np.asarray(run(params, 'frozen')[0]) - np.asarray(logits)).max()
  assert frozen == 0 if mem.kind == 'holographic' else frozen > 1e-3


def test_which_kinds_learn():
  assert set(LEARNING) | {'attention', 'window', 'bank', 'product_key'} == set(MIXERS)
  model = make('near+mem')[0].config
  assert learners(model) == ('mem',) and held(model, 'on') == {}
  with pytest.raises(UserError, match='--test_time=frozen needs a memory that learns at test time'):
    held(dataclasses.replace(model, pattern=('near',)), 'frozen')


@pytest.fixture(scope='module')
def text(tmp_path_factory): return write_plays(tmp_path_factory.mktemp('plays'))


@pytest.mark.parametrize('choice, mem', [
  *(pytest.param(choice, mem, marks=pytest.mark.slow)
    for choice, mem in (('frozen', HOLOGRAPHIC), *((choice, NEURAL) for choice in evaluate.CHOICES)))])
def test_evaluate_prints_the_difference(text, choice, mem, tmp_path, capsys):
  run = make_workdir(tmp_path / 'run', small_config(text, mixers={'near': NEAR, 'mem': mem}, pattern=('near+mem',)))
  argv = [f'--workdir={run}', '--split=val', '--stream', f'--test_time={choice}']
  assert call(evaluate.main, flags=evaluate.FLAGS, takes_config=False, argv=argv) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert result['test_time'] == choice and ('difference' in result) == (choice != 'on') and result['tokens'] == 380
  if choice != 'on': assert abs(result['difference']['loss']) > 1e-7 and set(result['difference']) == set(evaluate.COMPARED)


def test_evaluate_refuses_where_nothing_learns(text, tmp_path, capsys):
  run = make_workdir(tmp_path / 'run', small_config(text))
  argv = [f'--workdir={run}', '--test_time=off']
  assert call(evaluate.main, flags=evaluate.FLAGS, takes_config=False, argv=argv) == 2
  err = capsys.readouterr().err
  assert '--test_time=off needs a memory that learns' in err and 'Traceback' not in err
