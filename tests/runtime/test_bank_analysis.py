"""What the analysis says of banks is what they did: shares add up, planted entries are found, counts follow the formulas."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import (
  BankConfig,
  BankFormConfig,
  BankQuantConfig,
  BankShapeConfig,
  MixingConfig,
  ProductKeyConfig,
  RouterConfig,
)
from memjax.config.schema import EvaluationConfig, ModelConfig
from memjax.data.tokens import Tokens
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime import flops, optim
from memjax.runtime.analysis import measure
from memjax.runtime.analysis.banks import DIRECT, PROJECTED, ROUTER, VALUE, curve, evenness
from memjax.runtime.analysis.report import write_analysis
from memjax.runtime.footprint import bank_footprint, table_footprint
from memjax.runtime.reading import Run
from tests.pieces import ByteTokenizer, small_config

pytestmark = pytest.mark.slow

M, P, J, D = 12, 4, 2, 8
MEM = BankConfig(heads=2, kv_heads=1, zero_out=False, shape=BankShapeConfig(entries=M, chapters=P, share='m'), router=RouterConfig(top_k=J),
                 mixing=MixingConfig(shared=1, scale=2.5))
MIXERS = {'mem': MEM, 'pk': ProductKeyConfig(heads=2, keys=3, top_k=2, key_width=4),
          'low': BankConfig(heads=2, zero_out=False, shape=BankShapeConfig(entries=6, low_rank='reduced', rank=4))}
LABELS = ['0 mem', '1 mem', '2 pk', '2 low']
FIGURES = {'chapter_use', 'router_entropy', 'entry_attention', 'nearest_tokens', 'chapter_similarity'}
TOKENS = Tokens(np.random.default_rng(0).integers(97, 123, 200).astype(np.uint8), np.array([0, 100]), 200, '', 256, 10, 'made up', 'val')


def make_run(folder, mixers, pattern, **model):
  config = dataclasses.replace(small_config('plays'), evaluation=EvaluationConfig(sample=0))
  config = dataclasses.replace(config, model=ModelConfig(width=D, hidden=-1, vocabulary=256, mixers=mixers, pattern=pattern,
                                                         **{'repeats': 1, **model}))
  built = build_decoder(config.model)
  return Run(str(folder), config, built, jax.jit(lambda key: init_params(built, key)[0])(jax.random.key(0)), ByteTokenizer(), 1, {}, 'hash')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A model with a shared bank whose entry 4 is the embedding of 'q', its own low-rank bank and a product-key table."""
  folder = tmp_path_factory.mktemp('banks')
  found = make_run(folder, MIXERS, ('mem',), repeats=2, suffix=('pk>low',))
  entries = found.params['bank_m']['entries']
  found.params['bank_m']['entries'] = entries.at[4].set(0.3 * found.params['embed']['table'][ord('q')])
  rows = [{'step': step, 'loss': 5.0 - step, 'config': 'hash', **dict.fromkeys(ROUTER[:6], 0.5 + step / 10)} for step in range(1, 4)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return found


@pytest.fixture(scope='module')
def report(run):
  """The analysis, as it is read back from the file."""
  folder, _ = write_analysis(run, TOKENS, rows=2, length=16, lengths=())
  return json.loads((folder / 'analysis.json').read_text())


@pytest.mark.slow
def test_every_figure_is_drawn(run, report):
  assert set(report['figures']) >= FIGURES and set(report['skipped']) & FIGURES == set()
  for name in FIGURES:
    with open(f'{run.workdir}/analysis/{name}.png', 'rb') as file: assert file.read(8) == b'\x89PNG\r\n\x1a\n'
  assert report['training']['router']['router_entropy'] == {'step': [1, 2, 3], 'value': [0.6, 0.7, 0.8]}
  token = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  call = lambda params, token: run.model.apply({'params': params}, token, run.model.init_state(1), position_BxL=token)[2]
  assert set(ROUTER[:6]) <= jax.eval_shape(call, run.params, token).keys()           # what the trainer logs has these names


def test_shares_add_up(report):
  layers = report['banks']['layers']
  assert [layer['label'] for layer in layers] == LABELS and report['banks']['tokens'] == 32
  for layer in layers:
    assert layer['attention_total'] == pytest.approx(1, abs=1e-4)
    assert layer['attention']['rank'] == list(range(1, layer['entries'] + 1)) and 1 <= layer['effective_entries'] <= layer['entries'] + 1e-3
  for layer in layers[:2]:
    assert layer['chapter_use'][0] == 1 and sum(layer['chapter_use']) == pytest.approx(1 + J, rel=1e-3)
    assert sum(entry['share'] for entry in layer['nearest']['entries'] if entry['chapter'] == 0) == pytest.approx(1 / 3.5, rel=1e-3)
  assert sum(layers[2]['value_use']['value']) == pytest.approx(4, rel=1e-3)          # heads * top_k reads a token


def test_nearest_tokens(run, report):
  layers = report['banks']['layers']
  assert [layer['nearest']['of'] for layer in layers] == [DIRECT, DIRECT, VALUE, PROJECTED]
  planted = next(entry for entry in layers[0]['nearest']['entries'] if entry['entry'] == 4)
  assert planted['tokens'][0] == 'q' and planted['cosine'][0] == pytest.approx(1, abs=1e-4) and planted['chapter'] == 1
  own, first = run.params['suffix']['layer_0']['mixers_1']['low'], layers[3]['nearest']['entries'][0]
  vector = np.asarray(own['bank']['entries'][first['entry']] @ own['value']['kernel'] @ own['out']['kernel'])
  table = np.asarray(run.params['embed']['table'])
  cosine = table @ vector / np.linalg.norm(table, axis=1) / np.linalg.norm(vector)
  assert first['tokens'][0] == run.tokenizer.decode([int(cosine.argmax())]) and first['cosine'][0] == pytest.approx(cosine.max(), rel=1e-3)


def test_similarity_of_chapters(run, report):
  found, = report['banks']['similarity']
  mean = np.asarray(run.params['bank_m']['entries']).reshape(P, -1, D).mean(1)
  mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
  cosine = mean @ mean.T
  np.testing.assert_allclose(found['cosine'], cosine, atol=1e-3)
  assert found['mean'] == pytest.approx((cosine.sum() - P) / (P * (P - 1)), abs=1e-3)
  assert found['table'] == 'bank m' and found['shown'] == list(range(P))


@pytest.mark.slow
def test_a_router_that_sees_the_future_is_left_out_of_pieces(tmp_path, monkeypatch):
  """The analysis goes on, with reasons; costs are measured of stored integers and shared tables too."""
  quant, shape = BankQuantConfig(bits=8, group=0), dataclasses.replace(MEM.shape, entries=8)
  router = RouterConfig(strategy='sequence', top_k=J, allow_noncausal=True)
  found = make_run(tmp_path, {'mem': dataclasses.replace(MEM, shape=shape, quant=quant, router=router, zero_out=True)}, ('mem',))
  monkeypatch.setattr(measure, 'median_ms', lambda *_: 1.0)
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *_, **__: None)
  _, report = write_analysis(found, TOKENS, rows=2, length=8, lengths=(4,))
  assert flops.bank_facts(found.model)['bank entries'] == '8 in 1 table'
  assert not report['in_pieces'] and 'sees the future' in report['skipped']['state_norms']
  assert report['skipped']['router_entropy'] == 'metrics.jsonl holds no router' and report['cost']['memories']['mem']['state_bytes'] == [0]
  assert report['banks']['layers'][0]['attention_total'] == pytest.approx(1, abs=1e-4)


def test_footprint_and_dry_run(run):
  found = bank_footprint(run.model)
  assert found['entries'] == M + 9 + 6 and found['active_entries'] == 2 * (J + 1) * (M // P) + 4 + 6
  assert found['parameters'] == M * D + 9 * D + 6 * 4 and found['bytes'] == {'float32': 4 * 192, 'bfloat16': 2 * 192}
  assert found['layers']['mem']['prepared_bytes'] == 2 * 2 * M * 1 * 4 * 4               # layers, K and V, one head of four floats
  wide = table_footprint(BankConfig(heads=2, shape=BankShapeConfig(entries=64, low_rank='factorized', rank=32)), 96)
  size = 32 * (64 + 96)
  assert wide['bytes'] == {'float32': 4 * size, 'bfloat16': 2 * size, 'int8': size + 4 * 160, 'int4': size // 2 + 2 * 160,
                           'nf4': size // 2 + 2 * 160}
  optimizer = optim.make_optimizer(run.config.optimizer, param_shapes(run.model)[0], 5)
  printed = flops.cost_table(run.model, optimizer, run.config)
  for name, value in {'bank entries': '27 in 3 tables', 'entries read a token': '28 in 4 layers', 'bank bytes': '768 float32'}.items():
    assert f'{name + ":":26}{value}' in printed
  assert 'bank' not in flops.cost_table(*_vanilla())


def _vanilla():
  config = small_config('plays', vocabulary=16)
  model = build_decoder(config.model)
  return model, optim.make_optimizer(config.optimizer, param_shapes(model)[0], 5), config


def big_bank(kind):
  """One layer with a bank at a real size: shapes alone."""
  bank = BankConfig(heads=8, shape=BankShapeConfig(entries=64 * 32, chapters=64), router=RouterConfig(top_k=8),
                    mixing=MixingConfig(shared=2), form=BankFormConfig(kind=kind))
  return build_decoder(ModelConfig(width=512, hidden=-1, vocabulary=16, mixers={'mem': bank}, pattern=('mem',), repeats=1))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['auto', 'tiles', 'capacity'])
def test_operations_of_routed_attention(kind):
  """P11.2: within 5 % of the products, per token, of queries, router, 4 K H entries, output; and of keys and values a call."""
  model, L, P, T, H, K, D = big_bank(kind), 300, 64, 32, 8, 64, 512
  token = 4 * D * H * K + 2 * D * P + 4 * H * K * (8 + 2) * T
  call = 4 * P * T * D * H * K
  found = flops.bank_flops(model, L)['mem']
  assert found == {'token': pytest.approx(token, rel=0.05), 'call': pytest.approx(call, rel=0.05)}
  assert flops.forward_flops(model, L) == pytest.approx(token + call / L + 2 * D * 16, rel=0.05)


@pytest.mark.parametrize('kind', ['scan', 'dense'])
def test_operations_of_the_forms_that_read_all_chapters(kind):
  token = flops.bank_flops(big_bank(kind), 300)['mem']['token'] - flops.bank_flops(big_bank('auto'), 300)['mem']['token']
  assert token == pytest.approx(4 * 512 * 32 * (64 - 8), rel=0.05)


def test_training_counts_three_forwards():
  model = big_bank('tiles')
  config = dataclasses.replace(small_config('plays'), model=model.config)
  config = dataclasses.replace(config, training=dataclasses.replace(config.training, length=128))
  optimizer = optim.make_optimizer(config.optimizer, param_shapes(model)[0], 5)
  rows = config.training.batch
  forward = flops.forward_flops(model, 128) - (1 - 1 / rows) * flops.bank_flops(model, 128)['mem']['call'] / 128
  assert flops.training_flops(model, optimizer, config) == pytest.approx(3 * forward, rel=0.05)


def test_what_is_computed_twice_counts_once():
  a = jax.ShapeDtypeStruct((3, 3), jnp.float32)
  assert flops.count_flops(lambda a: (a @ a) + (a @ a), a) == 54 + 9
  assert flops.count_flops(lambda a: (a @ a, a @ (a + 1))[0], a) == 54
  assert flops.count_flops(lambda a: (a @ a) + (a @ a.T), a) == 108 + 9


def test_curves_and_evenness():
  assert curve(np.array([1.0, 3.0, 2.0])) == {'rank': [1, 2, 3], 'value': [3, 2, 1]}
  assert evenness(np.array([0, 0, 0, 8])) == {'coverage': 0.25, 'gini': 0.75, 'top_share': 1.0}
  assert evenness(np.ones(4)) == {'coverage': 1.0, 'gini': 0.0, 'top_share': 0.25}
