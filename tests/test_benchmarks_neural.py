"""The benchmarks of memories that learn at test time: tasks that are what they say, models of equal size, toy runs to the end."""
import argparse
import functools
import os
import time

import jax
import numpy as np
import pytest

from benchmarks import (
  decode,
  join,
  language,
  language_models,
  longstream,
  needle,
  neural_memory,
  neural_models,
  persistent,
  persistent_kernel,
  recall_rows,
  report,
  report_neural,
)
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.test_time import held, learners
from memjax.runtime.workarounds import avoid_crash
from tests.ops.inputs import gpu_text
from tests.test_benchmarks import check, write_text

SIZES = dict(width=64, layers=2, heads=2, window=16, chunk=16, vocabulary=needle.VOCABULARY, dtype='float32')


@pytest.fixture(scope='module')
def batch():
  """(key, needles) of 90 rows, made once."""
  key = jax.random.key(3)
  return key, jax.tree.map(np.asarray, jax.jit(needle.hide, static_argnums=(1, 2))(key, 90, 4))


@functools.cache
def compiled(rows, size):
  return jax.jit(lambda key, hidden, start, total: needle.part_of_rows(key, hidden, rows, (start, size, total)))


def rows_of(batch, rows, span):
  start, size, total = span
  return {name: np.asarray(a) for name, a in compiled(rows, size)(*batch, start, total).items()}


def test_needles_hold_the_answers(batch):
  data, hidden = rows_of(batch, needle.TEST, (0, 128, 128)), batch[1]
  for row, kind in enumerate(np.asarray(hidden.kind_B)):
    token, final = data['token'][row], data['final'][row]
    answer = data['target'][row][final]
    marks = np.flatnonzero(token == needle.MARK)
    assert len(marks) == needle.TEST.needles[kind] and len(answer) == (1 if kind == 2 else needle.DIGITS)
    assert (data['weight'][row] == final).all() and (answer == token[1:][final[:-1]]).all() and final[-2] and not final[-1]
    asked = token[np.flatnonzero(token == needle.ASK)]
    assert len(asked) == 1
    key = token[np.flatnonzero(token == needle.ASK)[0] + 1]
    hay = token[:np.flatnonzero(token == needle.ASK)[0]]
    found = [m for m in marks if hay[m + 1] == key]
    assert len(found) == 1 and (hay[found[0] + 2:found[0] + 2 + len(answer)] == answer).all()
    if kind == 1:                                                      # the sentence repeats where there is no needle
      plain = np.ones(len(hay), bool)
      plain[found[0]:found[0] + needle.SLOT] = False
      assert (hay == np.asarray(hidden.sentence_BxS)[row][np.arange(len(hay)) % needle.SENTENCE])[plain].all()


def test_parts_join_to_the_row(batch):
  whole = rows_of(batch, needle.TEST, (0, 128, 128))
  parts = [rows_of(batch, needle.TEST, (start, 64, 128)) for start in (0, 64)]
  keyed = np.asarray(batch[1].kind_B) == 1                             # noise is drawn by part; the sentence is not
  joined = {name: np.concatenate([part[name] for part in parts], 1) for name in whole}
  assert (joined['token'][keyed] == whole['token'][keyed]).all() and (joined['final'] == whole['final']).all()
  assert (joined['position'] == np.arange(128)).all()
  for part in parts: assert (part['token'] < needle.VOCABULARY).all()


def test_needles_stand_anywhere_and_training_asks_for_all(batch):
  data = rows_of(batch, needle.TRAIN, (0, 256, 256))
  marks = [np.flatnonzero(row == needle.MARK) for row in data['token']]
  kinds = np.asarray(batch[1].kind_B)
  assert all(len(m) == needle.TRAIN.needles[kind] for m, kind in zip(marks, kinds, strict=True))
  assert [data['weight'][kinds == kind].sum(1).tolist() for kind in range(3)] == [[4] * 30, [16] * 30, [4] * 30]
  first = np.array([m[0] for m, kind in zip(marks, kinds, strict=True) if kind == 0])
  assert first.min() < 50 and first.max() > 170
  asked = np.asarray(batch[1].key_BxN)[kinds == 2, 0]                  # the needle asked for last is not always the first
  places = [np.flatnonzero(data['token'][kinds == 2][i] == key)[0] for i, key in enumerate(asked)]
  assert np.std(places) > 40


@pytest.mark.slow
def test_models_have_equal_parameters():
  count = language_models.parameters(neural_models.model_config('MAC', **SIZES))
  for name in neural_models.NAMES:
    config = language_models.matched(neural_models.model_config(name, **SIZES), count)
    assert abs(language_models.parameters(config) / count - 1) < 0.02, name


def test_models_that_learn_can_be_held():
  for name in neural_models.NAMES:
    config = neural_models.model_config(name, **SIZES)
    assert bool(learners(config)) == (name not in ('window', 'attention')) == ('off' in neural_models.ways(config))
  assert set(decode.NEURAL.values()) <= set(neural_models.NAMES)
  assert all(recall_rows.model_config(make, width=64, vocabulary=128).mixers['memory'].kind == 'neural'
             for make in recall_rows.NEURAL.values())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['MAC', 'MAL', 'window + linear exact', 'window + holographic'])
def test_held_parameters_do_what_the_library_does(name):
  config = neural_models.model_config(name, **SIZES | {'width': 16, 'layers': 1})
  model, token = build_decoder(config), jax.random.randint(jax.random.key(1), (2, 40), 0, SIZES['vocabulary'])
  position = jax.numpy.broadcast_to(jax.numpy.arange(40)[None], (2, 40))
  params = init_params(model, jax.random.key(0))[0]
  def run(params, **keywords): return model.apply({'params': params}, token, model.init_state(2), position_BxL=position, **keywords)[:2]
  call = jax.jit(run)
  on, off = call(params)[0], call(neural_models.held(params, 'off'))[0]
  library = jax.jit(lambda params: run(params, **held(config, 'off')))(params)[0]
  assert np.allclose(off, library, atol=1e-5) and not np.allclose(on, off, atol=1e-3)
  if 'frozen' not in neural_models.ways(config): return
  frozen, state = call(neural_models.held(params, 'frozen'))
  moved = [np.abs(leaf).max() for path, leaf in jax.tree_util.tree_leaves_with_path(state) if 'fast' in jax.tree_util.keystr(path)]
  assert moved and max(moved) == 0 and not np.allclose(frozen, off, atol=1e-3)


@pytest.mark.slow
def test_needle(tmp_path):
  path = tmp_path / 'n.json'
  needle.main(['--models', 'window + linear exact;window', '--width', '32', '--heads', '2', '--layers', '1', '--length', '64',
               '--window', '8', '--chunk', '8', '--steps', '4', '--per_call', '2', '--batch', '3', '--eval_batch', '3', '--batches', '1',
               '--seeds', '0,1', '--lengths', '64,128', '--lookahead', '--output', str(path)])
  memory, window = check(path, 'needle')['rows']
  assert [(t['test_time'], t['length']) for t in memory['tests']] == [('on', 64), ('on', 128), ('frozen', 64), ('off', 64)]
  assert [t['test_time'] for t in window['tests']] == ['on', 'on'] and len(memory['tests'][0]['seeds']) == 2
  assert all(0 <= t[kind] <= 1 for t in memory['tests'] for kind in needle.KINDS) and np.isfinite(memory['curve'][-1]['loss']).all()


@pytest.mark.slow
def test_language_of_wirings(tmp_path):
  files = write_text(tmp_path, {'train': 60, 'valid': 9, 'test': 7})
  path = tmp_path / 'l.json'
  language.main([*files, '--models', 'window + linear exact;window', '--like', 'MAG', '--width', '16', '--heads', '2', '--layers', '1',
                 '--window', '8', '--chunk', '8', '--carried', '--steps', '4', '--per_call', '2', '--eval_every', '2', '--batch', '2',
                 '--length', '16', '--seeds', '1', '--warmup', '1', '--eval_batch', '4', '--lanes', '2', '--fuse', 'mix',
                 '--room', '9000,3000', '--budget', '.001', '--output', str(path)])
  memory, window = check(path, 'language')['rows']
  assert memory['steps'] == 2                             # of four: the budget was spent
  assert set(memory['test_nll']) == {'carried', 'frozen', 'off'} and set(window['test_nll']) == {'carried'}
  assert memory['test_nll']['carried'] != memory['test_nll']['off'] and abs(memory['parameters'] / window['parameters'] - 1) < 0.05


def test_join_keeps_all_rows_and_refuses_other_sizes():
  made = lambda model, steps: {'benchmark': f'needle-{model}', 'arguments': [model], 'machine': {}, 'rows': [{'model': model}],
                               'options': {'models': [model], 'steps': steps, 'name': model}}
  joined = join.join([made('a', 3), made('b', 3)], 'needle')
  assert [row['model'] for row in joined['rows']] == ['a', 'b'] and joined['processes'] == [['a'], ['b']]
  assert joined['benchmark'] == joined['module'] == 'needle' and joined['options'] == {'steps': 3}
  with pytest.raises(ValueError, match='needle-b differs from needle-a in steps'): join.join([made('a', 3), made('b', 4)], 'needle')


def test_the_ratio_of_a_long_stream_is_late_over_early():
  calls = []
  found = longstream.compare(lambda n: calls.append(n) or time.sleep(0.001 * n) or np.zeros(1), (2,), (6,), 3)
  assert calls.count(2) == calls.count(6) == 4 and found['early_us'] < found['late_us']
  assert found['ratio'] == found['late_us'] / found['early_us'] > 1.5
  form = {'ratio': 1.25}
  assert [t['value'] for t in longstream.targets([{'model': 'x', 'tokens': 9, 'decode': form, 'parallel': form}])] == [0.8, 0.8]


def test_only_the_jaxlib_that_crashes_gets_the_flag(monkeypatch):
  for version, given, flags in (('0.10.2', '--a=1', '--a=1 --xla_cpu_experimental_ynn_fusion_type='), ('0.11.2', '--a=1', '--a=1'),
                                ('0.10.2', '--xla_cpu_experimental_ynn_fusion_type=2', '--xla_cpu_experimental_ynn_fusion_type=2')):
    monkeypatch.setattr(jax.lib, '__version__', version)
    monkeypatch.setenv('XLA_FLAGS', given)
    avoid_crash()
    assert os.environ['XLA_FLAGS'] == flags


@pytest.mark.slow
def test_long_stream(tmp_path):
  """1,000,000 tokens: constant bytes, finite; the time per token is a matter of a quiet machine and is not judged here."""
  path = tmp_path / 's.json'
  longstream.main(['--small', '--models', 'LMM', '--decoded', '100', '--repeats', '2', '--output', str(path)])
  row, = check(path, 'longstream')['rows']
  assert row['tokens'] == 1_000_000 and row['constant'] and row['finite']


def test_one_kernel_for_all_chunks_gives_what_the_library_keeps():
  given = persistent.inputs(2, 1, 1)
  wanted, found = (jax.eval_shape(form, *given) for form in (persistent.by_chunks, persistent.by_one))
  longer = {'h', 'slope', 'bend'}                                      # by a chunk that nobody reads
  assert wanted.keys() == found.keys()
  for name, x in wanted.items():
    assert found[name].dtype == x.dtype and found[name].shape == ((3, *x.shape[1:]) if name in longer else x.shape), name
  assert 'mosaic_gpu' in gpu_text(persistent.by_one, *given)           # lowered for an H200; only there it runs
  with pytest.raises(ValueError, match='not 64, 64, 128'): persistent_kernel.write(*persistent.inputs(2, 1, 1, width=128), scale=0.5)


@pytest.mark.slow
def test_writes_by_one_kernel(tmp_path):
  path = tmp_path / 'p.json'
  persistent.main(['--small', '--repeats', '1', '--output', str(path)])
  saved = check(path, 'persistent')
  assert [row['row'] for row in saved['rows']] == ['kernels of the library'] and 'differences' not in saved
  text = report.page({'persistent-cpu': saved | {'differences': {'h': 0.001}}})
  assert '### Writes by one kernel: cpu' in text and '1.0e-03' in text


def test_kernels_of_a_neural_layer_are_compared_with_xla():
  """Output and gradients of all there is, here in float32: next to nothing apart; the page shows each."""
  a = argparse.Namespace(tokens=64, width=16, heads=1, small=True)
  found = neural_memory.against_xla(a, 16)
  assert {'output', 'input', 'out.kernel', 'projections.taps', 'start_w_0'} <= found.keys()
  assert max(found.values()) < 1e-4 and any(found.values())
  rows = [{'row': 'memjax', 'mode': 'token', 'chunk': 16, 'peak_gib': 1.0}]
  result = {'tokens': 64, 'width': 16, 'heads': 1, 'rows': rows, 'differences': {'16': found}}
  text = '\n'.join(report_neural.neural(result, report.table, report.cell))
  assert all(f'| {name} |' in text for name in found) and 'chunks of 16' in text
