"""The benchmarks of memories that learn at test time: tasks that are what they say, models of equal size, toy runs to the end."""
import jax
import numpy as np
import pytest

from benchmarks import decode, language_models, longstream, needle, neural_models, recall_rows
from memjax.runtime.test_time import learners
from tests.test_benchmarks import check, write_text

SIZES = dict(width=64, layers=2, heads=2, window=16, chunk=16, vocabulary=needle.VOCABULARY, dtype='float32')


@pytest.fixture(scope='module')
def batch():
  """(key, needles) of 300 rows, made once."""
  key = jax.random.key(3)
  return key, needle.hide(key, 300, 4)


def rows_of(batch, rows, span):
  return {name: np.asarray(a) for name, a in needle.part_of_rows(*batch, rows, span).items()}


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
  assert [data['weight'][kinds == kind].sum(1).tolist() for kind in range(3)] == [[4] * 100, [16] * 100, [4] * 100]
  first = np.array([m[0] for m, kind in zip(marks, kinds, strict=True) if kind == 0])
  assert first.min() < 30 and first.max() > 190
  asked = np.asarray(batch[1].key_BxN)[kinds == 2, 0]                  # the needle asked for last is not always the first
  places = [np.flatnonzero(data['token'][kinds == 2][i] == key)[0] for i, key in enumerate(asked)]
  assert np.std(places) > 40


def test_models_have_equal_parameters_and_learn():
  count = language_models.parameters(neural_models.model_config('MAC', **SIZES))
  for name in neural_models.NAMES:
    config = language_models.matched(neural_models.model_config(name, **SIZES), count)
    assert abs(language_models.parameters(config) / count - 1) < 0.02, name
    assert bool(learners(config)) == (name not in ('window', 'attention'))
  assert set(decode.NEURAL.values()) <= set(neural_models.NAMES)
  assert all(recall_rows.model_config(make, width=64, vocabulary=128).mixers['memory'].kind == 'neural'
             for make in recall_rows.NEURAL.values())


@pytest.mark.slow
def test_needle(tmp_path):
  path = tmp_path / 'n.json'
  needle.main(['--models', 'window + linear exact;window', '--width', '32', '--heads', '2', '--layers', '1', '--length', '64', '--window', '8',
               '--chunk', '8', '--steps', '4', '--per_call', '2', '--batch', '3', '--eval_batch', '3', '--batches', '1', '--seeds', '0,1',
               '--lengths', '64,128', '--lookahead', '--output', str(path)])
  memory, window = check(path, 'needle')['rows']
  assert [(t['test_time'], t['length']) for t in memory['tests']] == [('on', 64), ('on', 128), ('frozen', 64), ('off', 64)]
  assert [t['test_time'] for t in window['tests']] == ['on', 'on'] and len(memory['tests'][0]['seeds']) == 2
  assert all(0 <= t[kind] <= 1 for t in memory['tests'] for kind in needle.KINDS) and np.isfinite(memory['curve'][-1]['loss']).all()


@pytest.mark.slow
def test_language_of_wirings(tmp_path):
  from benchmarks import language
  files = write_text(tmp_path, {'train': 60, 'valid': 9, 'test': 7})
  path = tmp_path / 'l.json'
  language.main([*files, '--models', 'MAG;window', '--like', 'MAC', '--width', '16', '--heads', '2', '--layers', '1', '--window', '8',
                 '--chunk', '8', '--steps', '2', '--per_call', '2', '--eval_every', '2', '--batch', '2', '--length', '16', '--seeds', '1',
                 '--warmup', '1', '--eval_batch', '4', '--lanes', '2', '--output', str(path)])
  memory, window = check(path, 'language')['rows']
  assert set(memory['test_nll']) == {'sliding', 'carried', 'frozen', 'off'} and set(window['test_nll']) == {'sliding', 'carried'}
  assert memory['test_nll']['carried'] != memory['test_nll']['off'] and abs(memory['parameters'] / window['parameters'] - 1) < 0.05


@pytest.mark.slow
def test_long_stream(tmp_path):
  """1,000,000 tokens: constant bytes, finite; the time per token is a matter of a quiet machine and is not judged here."""
  path = tmp_path / 's.json'
  longstream.main(['--small', '--models', 'LMM', '--decoded', '100', '--repeats', '2', '--output', str(path)])
  row, = check(path, 'longstream')['rows']
  assert row['tokens'] == 1_000_000 and row['constant'] and row['finite']
