"""All benchmarks at once: what is run, with which words, and what becomes of one that fails. And the long-context benchmark."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import context, report, report_context, run_all

ROOT = Path(__file__).parent.parent


@pytest.fixture
def ran(monkeypatch, tmp_path):
  """ran(*words, gpu=..., failing=...) -> (status, commands by name) with nothing really run."""
  def call(*words, gpu=False, failing=()):
    done = {}
    def run(name, words, seconds):
      done[name] = words
      return f'{name}: status 1' if name in failing else ''
    monkeypatch.setattr(run_all, 'run', run)
    monkeypatch.setattr(run_all, 'machine', lambda: ('h200' if gpu else 'cpu', gpu))
    monkeypatch.setattr(run_all, 'ROOT', tmp_path)
    return run_all.main(list(words)), done
  return call


def test_every_benchmark_is_run(ran, capsys):
  """At the small size on a CPU, all but what wants a host; and the page last."""
  known = run_all.benchmarks()
  assert {'holographic', 'recall', 'context', 'resume', 'neural_memory'} <= known.keys() and not {'report', 'common', 'join'} & known.keys()
  assert all(about and '\n' not in about for about in known.values())
  status, done = ran()
  assert status == 0 and list(done) == [name for name in known if name not in run_all.NEEDS] + ['report']
  assert all('--small' in words for name, words in done.items() if name not in ('resume', 'report'))
  assert done['resume'][3:5] == ['--kills', '2'] and done['decode'][-1].endswith('decode-cpu.json')
  out = capsys.readouterr().out
  assert "adapters: left out; it wants --set adapters='--host MODEL" in out and '[1/' in out and out.endswith('all done\n')


def test_sizes_texts_and_options(ran, tmp_path):
  status, done = ran('--only=language,decode_host,holographic', '--set', "decode_host=--model 'a b.gguf' --alone", gpu=True)
  assert status == 0 and list(done) == ['decode_host', 'holographic', 'language', 'report']
  assert not any('--small' in words for words in done.values()) and done['decode_host'][-3:] == ['--model', 'a b.gguf', '--alone']
  words = done['language']
  assert words[words.index('--name') + 1] == 'shakespeare' and 'language-shakespeare-h200.json' in ' '.join(words)
  for split in ('train', 'valid', 'test'):
    path = Path(words[words.index(f'--{split}') + 1])
    assert not path.is_absolute() and (tmp_path / path).stat().st_size > 10_000
  assert '--small' in ran('--only=routed', '--small', gpu=True)[1]['routed']


def test_one_that_fails_is_named_and_the_others_run(ran, capsys):
  status, done = ran('--only=routed,capacity,decode', failing=('capacity',))
  assert status == 1 and list(done) == ['capacity', 'decode', 'routed', 'report']
  assert capsys.readouterr().out.endswith('FAILED: capacity: status 1\n')
  assert ran('--only=decode', failing=('report',))[0] == 1


def test_words_that_are_wrong(capsys):
  for words in (['--only=nonsense'], ['--set', 'nonsense=--x']):
    with pytest.raises(SystemExit): run_all.main(words)
    assert "no benchmark 'nonsense'; there are" in capsys.readouterr().err
  assert run_all.main(['--list']) == 0
  assert re.search(r'^recall +Multi-query associative recall', capsys.readouterr().out, re.M)


def test_a_process_that_fails_or_takes_too_long(capfd):
  assert run_all.run('a', ['sh', '-c', 'echo seen; exit 3'], 0) == 'a: status 3'
  assert run_all.run('b', ['sleep', '60'], 0.1) == 'b: more than 0.1 seconds' and run_all.run('c', ['true'], 0) == ''
  out = capfd.readouterr().out
  assert 'seen' in out and 'a: FAILED after 0 s' in out and 'c: done after 0 s' in out


@pytest.mark.slow
def test_for_real(tmp_path):
  """Two at toy sizes, and a third that fails: the page has sections of what worked."""
  small = ('--set', 'context=--parts predicted,read --rows window;holographic --lengths 64 --predict_lengths 64,256 --piece 32 --width 64',
           '--set', 'holographic=--tiny --lengths 32 --tokens 32 --repeats 1', '--set', 'routed=--nonsense')
  words = ['--only=holographic,context,routed', '--results', str(tmp_path / 'results'), '--docs', str(tmp_path), *small]
  assert run_all.main([word.replace('window;holographic', '"window;holographic"') for word in words]) == 1
  page = (tmp_path / 'numbers.md').read_text()
  assert '## Long context' in page and '## Mixing' in page and '## Routed' not in page and (tmp_path / 'figures' / 'context.png').exists()


# Long context ----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_what_grows_and_what_does_not():
  """Predictions: reading a token costs attention more with each one before it, the others the same; states likewise."""
  layers = {name: context.Layer(mixer, 128, 'float32') for name, mixer in context.mixers(2).items() if name in ('attention', 'holographic')}
  found = {(row['memory'], row['tokens']): row for row in context.predict(layers, [1024, 4096])}
  grown = {(name, key): found[name, 4096][key] / found[name, 1024][key] for name in layers
           for key in ('read_flops', 'train_flops', 'step_flops', 'state_bytes')}
  assert all(0.95 < grown['holographic', key] < 1.05 for key in ('read_flops', 'train_flops')) and grown['holographic', 'state_bytes'] == 1
  assert all(grown['attention', key] > 2 for key in ('read_flops', 'train_flops', 'step_flops'))
  assert grown['attention', 'state_bytes'] == pytest.approx(4, rel=1e-3)
  assert found['attention', 4096]['state_bytes'] == 2 * 4096 * 128 * 4 + 4


@pytest.mark.slow
def test_pieces_read_what_one_call_reads():
  layer = context.Layer(context.mixers(1)['holographic'], 64, 'float32')
  import jax
  params, (x, position) = jax.jit(layer.init)(), context.inputs_of(layer, 64)
  state, parts = layer.memory.init_state(1), []
  for n in range(0, 64, 16):
    y, state = layer.read(params, x[:, n:n + 16], position[:, n:n + 16], state, layer.prepare(params))
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), layer.whole(params, x, position), atol=1e-5)


@pytest.mark.slow
def test_long_context_is_measured(tmp_path, capsys):
  path = tmp_path / 'context-cpu.json'
  context.main(['--parts', 'read,train', '--rows', 'attention;window;bank', '--lengths', '64,128', '--train_lengths', '64', '--piece', '32',
                '--width', '64', '--output', str(path)])
  saved = json.loads(path.read_text())
  assert [(row['memory'], row['tokens'], row['piece']) for row in saved['read']] == [
    ('attention', 64, 64), ('attention', 128, 128), ('window', 64, 32), ('window', 128, 32), ('bank', 64, 32), ('bank', 128, 32)]
  assert [row['memory'] for row in saved['train']] == ['attention', 'window'] and saved['machine']['platform'] == 'cpu'
  assert all(row['seconds'] > 0 and row['temporary_mib'] > 0 for row in saved['read'] + saved['train'])
  assert 'compiled read window 32' in capsys.readouterr().out


def test_section_of_the_page():
  row = {'memory': 'window', 'tokens': 1024, 'seconds': 0.5, 'tokens_per_second': 2048.0, 'piece': 512, 'temporary_mib': 7.0,
         'state_bytes': 4096}
  predicted = {'memory': 'window', 'tokens': 1024, 'read_flops': 2e6, 'train_flops': 6e6, 'step_flops': 3e6, 'state_bytes': 4096}
  result = {'predicted': [predicted], 'predicted_width': 1024, 'width': 256, 'dtype': 'float32', 'read': [row],
            'train': [row | {'seconds': None, 'why': 'does not fit', 'tokens_per_second': None}]}
  lines = report_context.context(result, report.table, report.cell)
  assert '| window | 2.00 |' in lines and '| window | 4.00 |' in lines
  assert '| window | 1,024 | 512 | 0.500 | 2,050 | 7.00 | 4,096 |' in lines and '| window | 1,024 | does not fit | 7.00 |' in lines
