"""The train command in this process: a whole run, exact resume, other starts, stops, and bad input."""
import json
import os
import shutil

import numpy as np
import pytest

from memjax.config.codec import read_config
from memjax.data.tokenizers import load_tokenizer
from memjax.runtime import checkpoint, loop, sharding
from memjax.runtime.metrics import read_rows
from memjax.train import build
from tests.runtime.conftest import write_text

LIGHT = ('training.accumulate=1', 'training.bptt=0', 'training.carry=false', 'data.order=shuffle')
SHORT = LIGHT[:2]


def last_state(workdir):
  """The newest checkpoint's arrays by name."""
  parts = build(read_config(str(workdir)), load_tokenizer(f'{workdir}/tokenizer'))
  step, state, record = checkpoint.restore(str(workdir), parts.abstract)
  return step, {name: np.asarray(x) for name, x in checkpoint.saved(state).items()}, record


def same_states(one, other):
  (step, a, _), (again, b, _) = last_state(one), last_state(other)
  assert step == again and a.keys() == b.keys() and any('memory' in name for name in a)
  for name in a: np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rows(workdir):
  return [{k: v for k, v in row.items() if k != 'tokens_per_second'} for row in read_rows(str(workdir))]


@pytest.fixture
def crash(monkeypatch):
  """crash(n): the n-th batch from now on raises."""
  def arm(number):
    left, put = [number], sharding.put_batch
    def fail(*args):
      left[0] -= 1
      if not left[0]: raise KeyError('crash')
      return put(*args)
    monkeypatch.setattr(loop.sharding, 'put_batch', fail)
    return lambda: monkeypatch.setattr(loop.sharding, 'put_batch', put)
  return arm


def test_a_run_leaves_what_it_promises(whole, capsys):
  assert sorted(os.listdir(whole)) == ['checkpoints', 'config.json', 'metrics.jsonl', 'tensorboard', 'tokenizer']
  assert checkpoint.list_steps(str(whole)) == [4, 8, 12] and os.listdir(whole / 'tensorboard')
  written = rows(whole)
  assert [r['step'] for r in written if 'loss' in r] == [1, 2, 4, 6, 8, 10, 12]
  assert [r['step'] for r in written if 'eval/loss' in r] == [4, 8, 12] and len({r['config'] for r in written}) == 1
  first = next(r for r in written if 'loss' in r)
  assert {'accuracy', 'grad_norm', 'learning_rate/main', 'penalty', 'skipped', 'tokens'} < first.keys()
  assert first['loss'] == pytest.approx(np.log(257 if first['tokens'] == 0 else 256), abs=0.1) and first['tokens'] == 64
  evaluated = next(r for r in written if 'eval/loss' in r)
  assert evaluated['eval/bits_per_byte'] == pytest.approx(evaluated['eval/loss'] / np.log(2))
  assert evaluated['eval/perplexity'] == pytest.approx(np.exp(evaluated['eval/loss']))
  assert 'test/loss' in written[-1] and written[-1]['test/tokens'] == os.path.getsize(last_text(whole))


def last_text(workdir): return os.path.join(read_config(str(workdir)).data.path, 'test.txt')


def test_a_crash_changes_nothing_in_the_end(train, whole, tmp_path, crash, capsys):
  """Crashed in step 8 and again in step 10, then resumed: parameters, optimiser state, memory, rows equal bit for bit."""
  repair = crash(10)                                                         # evaluation takes two batches
  with pytest.raises(KeyError): train(tmp_path)
  assert checkpoint.list_steps(str(tmp_path)) == [4] and rows(tmp_path)[-1]['step'] > 4
  repair()
  repair = crash(6)
  with pytest.raises(KeyError): train(tmp_path)
  repair()
  capsys.readouterr()
  assert train(tmp_path) == 0
  assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)
  same_states(tmp_path, whole)
  assert rows(tmp_path) == rows(whole)


def test_more_steps_continue_and_a_finished_run_only_reports(train, whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  assert train(tmp_path) == 0 and rows(tmp_path) == rows(whole)
  assert train(tmp_path, 'training.steps=14', 'training.log_every=1') == 0
  assert [r['step'] for r in rows(tmp_path) if 'loss' in r] == [1, 2, 4, 6, 8, 10, 12, 13, 14]
  assert read_config(str(tmp_path)).training.steps == 14


@pytest.mark.slow
def test_another_mesh_continues_a_run(train, whole, tmp_path):
  """From one device to 2 x 2 x 2, and on as one device would."""
  assert train(tmp_path / 'one', *SHORT, 'training.steps=14', resume_from=whole) == 0
  assert train(tmp_path / 'many', *SHORT, 'training.steps=14', 'mesh.data=2', 'mesh.fsdp=2', 'mesh.model=2', resume_from=whole) == 0
  one, many = rows(tmp_path / 'one'), rows(tmp_path / 'many')
  assert [r['step'] for r in one] == [r['step'] for r in many] == [14, 14, 14]
  for a, b in zip(one, many, strict=True):
    for name in a.keys() - {'config'}: assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_parameters_of_another_run_begin_a_new_one(train, whole, tmp_path):
  assert train(tmp_path, *LIGHT, 'training.steps=1', 'optimizer.groups.main.rate=1e-9', init_from=whole) == 0
  best = min((r['eval/loss'], r['step']) for r in rows(whole) if 'eval/loss' in r)
  assert rows(tmp_path)[1]['eval/loss'] == pytest.approx(best[0], rel=1e-5)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_is_remembered(train, tmp_path, capsys):
  early = (*LIGHT, 'evaluation.every=2', 'evaluation.patience=2', 'evaluation.min_delta=9', 'checkpoint.every=100')
  assert train(tmp_path, *early) == 0
  assert checkpoint.list_steps(str(tmp_path)) == [2, 6]
  record = last_state(tmp_path)[2]
  assert record['early']['best_step'] == 2 and record['early']['waited'] == 2
  before = rows(tmp_path)
  assert train(tmp_path, *early) == 0 and rows(tmp_path) == before


def test_divergence_stops_with_the_last_good_state(train, tmp_path, capsys, caplog):
  assert train(tmp_path, *LIGHT, 'optimizer.groups.main.rate=1e30', 'training.nan_limit=2', 'evaluation.every=0') == 1
  step, state, record = last_state(tmp_path)
  assert step <= 6 and int(state['skipped']) >= 2
  assert all(np.isfinite(x).all() for x in state.values())
  assert 'is not finite' in caplog.text and record['loss'] is None


def test_the_dry_run_costs_nothing_and_says_what_a_run_would(train, tmp_path, capsys):
  assert train(None, dry_run=True) == 0
  out = capsys.readouterr().out
  config, end = json.JSONDecoder().raw_decode(out)
  assert config['model']['vocabulary'] >= 256
  table = out[end:]
  assert 'FLOPs a token, training' in table and 'state bytes a row' in table and 'main' in table


@pytest.mark.slow
def test_the_rate_finder_writes_a_curve_and_a_suggestion(train, tmp_path, capsys):
  assert train(tmp_path, *LIGHT, find_lr=True) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('suggested learning rate: ') and lines[-1] == str(tmp_path / 'lr_finder.json')
  result = json.loads((tmp_path / 'lr_finder.json').read_text())
  assert 1e-5 < result['suggestion'] < 1 and len(result['rate']) == len(result['smoothed'])
  assert (tmp_path / 'lr_finder.png').stat().st_size > 1000
  assert train(tmp_path, *LIGHT, 'training.steps=1') == 0                            # the folder can then become a run


@pytest.mark.slow
def test_a_sample_is_printed(train, tmp_path, capsys):
  assert train(tmp_path, *LIGHT, 'training.steps=1', 'evaluation.sample=5', 'evaluation.prompt=ab') == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith('test: ') and out[1] == 'sample:' and out[2].startswith('ab')


def refuse(workdir, whole):
  (workdir / 'notes.txt').write_text('mine')


def damage_all(workdir, whole):
  shutil.copytree(whole, workdir, dirs_exist_ok=True)
  for step in (4, 8, 12): shutil.rmtree(workdir / 'checkpoints' / str(step) / 'state')


def copy(workdir, whole): shutil.copytree(whole, workdir, dirs_exist_ok=True)


def break_tokenizer(workdir, whole):
  copy(workdir, whole)
  (workdir / 'tokenizer' / 'meta.json').write_text('{')


BAD = {
    'foreign folder': (refuse, [], {}, 'is not empty and holds no config.json'),
    'another config': (copy, ['seed=3'], {}, 'they differ in seed'),
    'another width': (copy, ['model.width=16'], {}, 'they differ in model.width'),
    'all damaged': (damage_all, [], {}, 'no usable checkpoint'),
    'broken tokenizer': (break_tokenizer, [], {}, 'tokenizer'),
    'two starts': (None, [], {'resume_from': 'WHOLE', 'init_from': 'WHOLE'}, 'exclude each other'),
    'start in a run': (copy, [], {'resume_from': 'WHOLE'}, 'wants a new workdir'),
    'start from nothing': (None, [], {'init_from': 'no/such'}, '--init_from no/such is not a run'),
    'start from another shape': (None, ['model.width=16'], {'init_from': 'WHOLE'}, 'does not fit'),
    'batch and mesh': (None, ['mesh.data=8'], {}, 'does not split over 8 devices'),
    'mesh too large': (None, ['mesh.data=3', 'mesh.model=4'], {}, 'wants 12 devices'),
    'no such group': (None, ["optimizer.rules=('nothing=main',)"], {}, 'no rule matches parameter'),
    'vocabulary': (None, ['model.vocabulary=5'], {}, 'is below the'),
    'lanes too short': (None, ['training.length=4096', 'training.bptt=0'], {}, 'tokens')}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_status_2(name, train, whole, tmp_path, capsys):
  prepare, overrides, flags, words = BAD[name]
  if prepare: prepare(tmp_path, whole)
  assert train(tmp_path, *overrides, **{k: str(whole) if v == 'WHOLE' else v for k, v in flags.items()}) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('memjax: ') and words in line]
  assert len(lines) == 1
  if prepare is copy: assert rows(tmp_path) == rows(whole)


def test_no_workdir_and_a_file_as_workdir(train, tmp_path, capsys):
  assert train(None) == 2 and '--workdir is required' in capsys.readouterr().err
  (tmp_path / 'file').write_text('')
  assert train(tmp_path / 'file') == 2 and 'is not a folder' in capsys.readouterr().err


def test_a_changed_text_is_refused(train, tmp_path, capsys):
  folder = write_text(tmp_path)
  workdir = tmp_path / 'run'
  assert train(workdir, *LIGHT, 'training.steps=1', source=folder) == 0
  (folder / 'train.txt').write_text((folder / 'train.txt').read_text() + 'more\n')
  assert train(workdir, *LIGHT, 'training.steps=2', source=folder) == 2
  assert 'the training text is not that of checkpoint 1' in capsys.readouterr().err


def test_metrics_are_fetched_one_step_behind():
  """Step n is started before anything of step n - 1 is read on the host."""
  calls = []
  class Value(float):
    def __int__(self): return calls.append('read') or 0
  def step(state, batch):
    calls.append('step')
    return state, {'skipped': Value(0), 'loss': 0.0}
  rows = []
  class Log:
    def write(self, step, row): rows.append(row)
  config = read_config_of(steps=4)
  trainer = loop.Trainer(config, sharding.make_mesh(config.mesh), step, lambda params: {'loss': 1.0, 'bits_per_byte': 1, 'perplexity': 1},
                         Saver(), Log(), {}, share=1e-6)
  state = loop.TrainState(np.int32(0), {}, (), (), (), np.int32(0))
  trainer.run(state, iter([{'token': np.zeros((8, 2), np.int32)}] * 4))
  assert calls == ['step', 'step', 'read', 'step', 'read', 'step', 'read', 'read']
  used = [(row['mfu'], row['tokens_per_second']) for row in rows if 'mfu' in row]
  assert used and all(mfu == pytest.approx(1e-6 * speed, abs=1e-4) for mfu, speed in used)


class Saver:
  """Checkpoints that go nowhere."""

  def save(self, *_): pass

  def wait(self): pass


def read_config_of(steps):
  from memjax.config.flags import load
  return load(f'{os.path.dirname(__file__)}/tiny_run.py:text', f'training.steps={steps}', 'evaluation.every=0', 'checkpoint.every=0')
