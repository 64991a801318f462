"""The commands on one small trained run: train, evaluate, generate and analyze, as their users call them."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from memjax import analyze, evaluate, generate, train
from memjax.config.codec import to_json
from memjax.config.flags import call
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.data.tokenizers import WordTokenizer
from memjax.runtime.analysis.report import training_of
from memjax.runtime.metrics import read_rows
from memjax.runtime.reading import open_run
from tests.pieces import PLAYS, make_workdir, small_config, write_plays

SOURCE = '''
from memjax.config.codec import read_config, thaw


def get_config(arg=''):
  return thaw(read_config(__file__ + '.json'))
'''
MIXERS = {'near': WindowConfig(heads=2, window=4), 'mem': HolographicConfig(heads=2)}
FIGURES = {'state_norms', 'slot_use', 'predictions', 'layer_norms', 'cost', 'capacity', 'memory_over_time', 'effective_slots',
           'loss_curve', 'memory_analysis'}


@pytest.fixture(scope='session')
def workdir(tmp_path_factory):
  """A run of seven steps with a window and a holographic layer, trained by the command."""
  folder = tmp_path_factory.mktemp('commands')
  config = small_config(write_plays(folder / 'plays'), mixers=MIXERS, pattern=('near', 'mem'))
  (folder / 'config.py').write_text(SOURCE)
  tree = to_json(config)
  tree['training']['log_every'] = 1
  tree['evaluation'] |= {'sample': 0, 'every': 4}
  tree['mesh']['data'] = 1
  (folder / 'config.py.json').write_text(json.dumps(tree))
  argv = [f'--config={folder}/config.py', f'--workdir={folder}/run', '--nofigures']
  assert call(train.main, flags=train.FLAGS, argv=argv) == 0
  return folder / 'run'


@pytest.fixture
def do(workdir, capsys):
  """do(command, '--flag', ..., run=workdir) -> what the command printed on stdout; it must end well."""
  def run(command, *words, run=workdir):
    capsys.readouterr()
    status = call(command.main, flags=command.FLAGS, takes_config=False, argv=[f'--workdir={run}', *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out
  return run


def last(text): return json.loads(text.splitlines()[-1])


def test_evaluate_repeats_the_score_of_training(do, workdir, tmp_path):
  result = last(do(evaluate, '--split=test', f'--output={tmp_path}/o.json'))
  row = next(row for row in read_rows(str(workdir)) if 'test/loss' in row)
  assert result['loss'] == pytest.approx(row['test/loss'], rel=1e-5)
  assert result['step'] in (4, 7) and result['split'] == 'test' and result['config'] == row['config'] and result['token'] == 'byte'
  assert result['tokens'] == result['bytes'] == len(PLAYS['test'].encode())
  assert result['bits_per_byte'] == pytest.approx(result['loss'] / math.log(2))
  assert result['perplexity'] == pytest.approx(math.exp(result['loss']))
  assert json.loads((tmp_path / 'o.json').read_text()) == result


@pytest.mark.parametrize('words', [('--context=6', '--batch=3'), ('--stream',), ('--length=999', '--batch=1')])
def test_evaluate_scores_every_token_once(do, words):
  result = last(do(evaluate, *words))
  assert result['tokens'] == len(PLAYS['test'])
  assert 1 < result['bits_per_byte'] < 9 and result['stream'] == ('--stream' in words)


def test_evaluate_reads_a_file_as_it_reads_a_split(do, workdir):
  file = last(do(evaluate, f'--text={workdir.parent}/plays/val.txt'))
  split = last(do(evaluate, '--split=val'))
  assert file['loss'] == split['loss'] and (file['split'], file['corpus']) == ('text', 'val.txt')


def test_word_perplexity_is_per_word(do, tmp_path):
  text = write_plays(tmp_path / 'plays')
  words = WordTokenizer.train([PLAYS['train'], PLAYS['test']])
  run = make_workdir(tmp_path / 'run', small_config(text, tokenizer='word'), words)
  result = last(do(evaluate, run=run))
  words = len(PLAYS['test'].split()) + PLAYS['test'].count('\n')
  assert result['tokens'] == words and result['token'] == 'word' and result['bytes'] == len(PLAYS['test'])
  assert result['perplexity'] == pytest.approx(math.exp(result['loss'])) and result['loss'] > 1
  assert result['bits_per_byte'] == pytest.approx(math.log2(result['perplexity']) * words / result['bytes'])


def test_generate_prints_one_text(do, tmp_path):
  words = ('--prompt=A rose', '--max_new_tokens=40', '--seed=3', '--temperature=0.7', '--top_k=50', '--top_p=0.9', '--min_p=0.01')
  out = do(generate, *words, f'--output={tmp_path}/o.json')
  saved = json.loads((tmp_path / 'o.json').read_text())
  [row] = saved['continuations']
  assert out == f'A rose{row["text"]}\n' and (row['tokens'], row['ended']) == (40, 'length')
  assert (saved['top_k'], saved['seed'], saved['temperature']) == (50, 3, 0.7) and saved['step'] in (4, 7)
  assert do(generate, *words) == out and do(generate, *words, '--seed=4') != out


@pytest.mark.slow
def test_generate_prints_blocks_and_stops(do, tmp_path):
  (tmp_path / 'p.txt').write_text('What is', encoding='utf-8')
  words = ('--prompt=A', '--prompt=Parting is sweet', f'--prompt_file={tmp_path}/p.txt', '--max_new_tokens=30', '--temperature=0')
  blocks = do(generate, *words, f'--output={tmp_path}/o.json')
  rows = json.loads((tmp_path / 'o.json').read_text())['continuations']
  assert blocks == ''.join(f'--- {n} of 3 ---\n{row["prompt"]}{row["text"]}\n' for n, row in enumerate(rows, 1))
  assert do(generate, '--prompt=A', '--max_new_tokens=30', '--temperature=0') == f'A{rows[0]["text"]}\n'
  stop = rows[0]['text'][5:7]
  cut = rows[0]['text'][:rows[0]['text'].index(stop)]
  assert do(generate, '--prompt=A', '--max_new_tokens=30', '--temperature=0', f'--stop={stop}') == f'A{cut}\n'


@pytest.mark.slow
def test_commands_run_as_programs(workdir):
  """One real process each way: result on stdout alone, bad input on stderr alone."""
  def run(*words):
    command = [sys.executable, '-m', 'memjax.generate', f'--workdir={workdir}', *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)
  good, bad = run('--prompt=A', '--max_new_tokens=3', '--temperature=0'), run('--prompt=')
  assert good.returncode == 0 and good.stdout.startswith('A') and good.stdout.endswith('\n') and good.stderr == ''
  assert bad.returncode == 2 and bad.stdout == '' and bad.stderr == 'memjax: prompt 1 has no tokens; give it at least one\n'


@pytest.fixture(scope='session')
def analysis(workdir):
  """(folder, report) of the analysis of the run."""
  argv = [f'--workdir={workdir}', '--tokens=32', '--rows=2', '--lengths=8,16']
  assert call(analyze.main, flags=analyze.FLAGS, takes_config=False, argv=argv) == 0
  return workdir / 'analysis', json.loads((workdir / 'analysis' / 'analysis.json').read_text())


@pytest.mark.slow
def test_analyze_leaves_figures_and_numbers(analysis):
  folder, report = analysis
  assert set(report['figures']) == FIGURES and report['skipped'] == {}
  for name in report['figures'].values():
    head = (folder / name).read_bytes()[:24]
    assert head[:8] == b'\x89PNG\r\n\x1a\n' and int.from_bytes(head[16:20]) > 600
  near, mem = report['layers']
  assert (near['label'], mem['label']) == ('0 near', '1 mem') and 'state_norm' not in near
  assert np.shape(mem['state_norm']) == np.shape(mem['use']) == np.shape(mem['pick']) == (2, 4)
  assert np.shape(mem['state_norm_over_time']) == (len(mem['tokens']), 2, 4) and mem['tokens'][-1] == 32
  assert all(1 <= s <= 4 for s in mem['effective_slots']) and all(-1 <= c <= 1 for c in mem['replay']['cosine'])
  assert report['cost']['memories'].keys() == {'near', 'mem', 'full attention'}
  assert all(ms > 0 for row in report['cost']['memories'].values() for ms in row['ms'])
  assert report['cost']['memories']['mem']['state_bytes'][0] == report['cost']['memories']['mem']['state_bytes'][1]
  ring = report['cost']['memories']['full attention']['state_bytes']
  assert ring[1] - ring[0] == 8 * 2 * 8 * 4                          # 8 tokens more, keys and values, 8 channels, float32


@pytest.mark.slow
def test_predictions_shifted(analysis):
  """The prediction at t is compared with the token after input t, not with input t itself."""
  found = analysis[1]['predictions']
  assert len(found['target']) == len(found['prediction']) == len(found['probability']) == 32
  inside = [(a, b) for a, b in zip(found['input'][1:], found['target'][:-1], strict=True) if b == a]
  assert len(inside) >= 30 and found['input'] != found['target']
  assert all(0 <= p <= 1 for p in found['probability'])


@pytest.mark.slow
def test_loss_curve_one_model(analysis, workdir, tmp_path):
  """Rows of another configuration are no part of the curve."""
  training = analysis[1]['training']
  assert training['loss']['step'] == list(range(1, 8)) and training['eval']['step'] == [4, 7] and training['foreign'] == 0
  assert training['loss']['value'][0] == pytest.approx(training['guess'], abs=0.1) and training['test'] is not None
  (tmp_path / 'metrics.jsonl').write_text((workdir / 'metrics.jsonl').read_text() + '{"step": 8, "config": "another", "loss": 1.8}\n')
  mixed = training_of(open_run(str(workdir))._replace(workdir=str(tmp_path)))
  assert mixed['loss'] == training['loss'] and mixed['foreign'] == 1


def test_analyze_without_slots_and_without_plots(do, tmp_path, monkeypatch):
  run = make_workdir(tmp_path / 'run', small_config(write_plays(tmp_path / 'plays')))
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  out = do(analyze, '--nocost', '--tokens=16', '--rows=2', f'--text={tmp_path}/plays/val.txt', run=run)
  assert out == f'{run}/analysis\n' and [path.name for path in (run / 'analysis').iterdir()] == ['analysis.json']
  report = json.loads((run / 'analysis' / 'analysis.json').read_text())
  assert report['figures'] == {} and 'memjax[plot]' in report['skipped']['all'] and report['corpus'] == 'val.txt'
  monkeypatch.undo()
  do(analyze, '--nocost', '--tokens=16', '--rows=2', run=run)
  report = json.loads((run / 'analysis' / 'analysis.json').read_text())
  assert set(report['figures']) == {'predictions', 'layer_norms'} and set(report['figures']) | set(report['skipped']) == FIGURES
  assert report['skipped']['state_norms'] == 'no layer of this model has memory slots' and report['skipped']['cost'] == 'not measured'
