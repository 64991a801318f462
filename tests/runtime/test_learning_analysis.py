"""What the analysis says of a neural memory is what it did: no token is missed, weights move as far as the state says."""
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.mixers import WindowConfig
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig
from memjax.data.tokens import Tokens
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.analysis.learning import learning_of, weight_change
from memjax.runtime.analysis.report import write_analysis
from memjax.runtime.reading import Run
from tests.pieces import ByteTokenizer, small_config

MIXERS = {'near': WindowConfig(heads=1, window=4),
          'mem': NeuralConfig(heads=2, chunk=4, net=NeuralNetConfig(kind='linear'), exec=NeuralExecConfig(group=-1))}
TOKEN_N = np.random.default_rng(0).integers(97, 123, 32).astype(np.uint8)
TOKENS = Tokens(TOKEN_N, np.array([0, 3, 5, 10, 16, 21]), 32, '', 256, 10, 'made up', 'val')


def make_run(folder):
  config = small_config('plays', mixers=MIXERS, pattern=('near+mem',), vocabulary=256)
  built = build_decoder(config.model)
  params = jax.jit(lambda key: init_params(built, key)[0])(jax.random.key(0))
  return Run(str(folder), config, built, params, ByteTokenizer(), 1, {}, 'hash')


@pytest.fixture(scope='module')
def analysed(tmp_path_factory):
  """(run, folder, report) of two rows of 16 tokens with borders of documents inside chunks."""
  found = make_run(tmp_path_factory.mktemp('run'))
  folder, report = write_analysis(found, TOKENS, rows=2, length=16, lengths=())
  assert json.loads((folder / 'analysis.json').read_text()) == report
  return found, folder, report


@pytest.mark.slow
def test_figures_are_drawn_where_something_learns(analysed):
  _, folder, report = analysed
  assert {'surprise', 'learning'} <= set(report['figures']) and not {'surprise', 'learning'} & set(report['skipped'])
  for name in ('surprise', 'learning'): assert (folder / f'{name}.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  near, mem = report['layers']
  assert 'learning' not in near and 'state_norm' not in mem
  replay = mem['replay']
  assert replay['delay'][0] == 0 and len(replay['cosine']) == len(replay['control']) and all(-1 <= x <= 1 for x in replay['cosine'])


@pytest.mark.slow
def test_no_token_is_missed(analysed):
  """Documents that begin inside chunks take more chunks than the config has room for."""
  seen = analysed[2]['layers'][1]['learning']
  assert seen['tokens'] == list(range(1, 17)) and seen['weight_tokens'][-1] == 16
  assert min(seen['surprise']) > 0 and min(seen['inner_loss']) > 0 and set(seen['gates']) == {'theta', 'eta', 'alpha'}
  assert all(len(series) == 16 for series in seen['gates'].values())
  assert 0 < np.mean(seen['gates']['alpha']) < 0.1 < np.mean(seen['gates']['eta']) < 1


@pytest.mark.slow
def test_weights_move_as_far_as_the_state_says(analysed):
  found, _, report = analysed
  seen = report['layers'][1]['learning']
  token = np.array([[10, *TOKEN_N[10:15], *[0] * 5], [10, *TOKEN_N[21:31]]], np.int32)             # the last documents of both rows
  mask, position = np.arange(11)[None] < np.array([[6], [11]]), np.broadcast_to(np.arange(11)[None], (2, 11))
  flow = dict(position_BxL=position, mask_BxL=mask)
  run = jax.jit(lambda params: found.model.apply({'params': params}, token, found.model.init_state(2), **flow)[1])
  names = [name for name in named(found.params) if '/mem/start_' in name]
  home = np.sqrt(sum(np.square(np.asarray(named(found.params)[name])[0]).sum((1, 2)) for name in names))
  fast = run(found.params)['repeats']['layer_0']['mem'].fast
  expected = np.sqrt(sum(np.square(np.asarray(a[0])[:, 0]).sum((2, 3)) for a in fast.values())).mean(0) / home
  np.testing.assert_allclose(seen['weight_change'][-1], expected, rtol=1e-3)


def test_means_count_real_tokens_alone():
  a, mask = np.array([[1.0, 5.0, 9.0], [3.0, 7.0, 9.0]])[..., None], np.array([[1, 1, 0], [1, 0, 0]], bool)
  seen = dict.fromkeys(('surprise_BxLxH', 'inner_loss_BxLxH', 'kept_BxLxH', 'theta_BxLxH'), a)
  found = learning_of(seen, mask, np.ones((1, 2, 1)), [3])
  assert found['tokens'] == [1, 2] and found['surprise'] == [2, 5] == found['gates']['theta'] and found['weight_change'] == [[1]]


def test_weight_change_is_relative_to_the_start():
  state = SimpleNamespace(fast={'a': (jnp.full((2, 1, 2, 2), 3.0),)})
  np.testing.assert_allclose(weight_change(state, {'a': np.ones((1, 2, 2))}), [[3.0], [3.0]])
