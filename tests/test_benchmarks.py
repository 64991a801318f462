"""The benchmarks at toy sizes: each finishes, prints its table and leaves JSON that says where it comes from."""
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
  banks,
  common,
  decode,
  decode_host,
  flash,
  holographic,
  hybrid,
  kernel_times,
  kernels,
  language,
  language_models,
  recall,
  recall_rows,
  report,
  report_scaling,
  routed,
  scaling,
)
from tests.adapters.gguf_files import write_case

ABSENT = ('ml_collections', 'grain', 'orbax', 'tokenizers', 'tensorboardX')


def check(path, name, rows='rows'):
  """The parsed JSON, with a full stamp and at least one row."""
  saved = json.loads(path.read_text(encoding='utf-8'))
  assert saved['benchmark'] == name and saved[rows]
  assert all(saved['machine'][key] for key in ('platform', 'device', 'processor', 'commit', 'date', 'jax'))
  assert not list(path.parent.glob('*.partial'))
  return saved


@pytest.mark.slow
def test_holographic(tmp_path, capsys):
  path = tmp_path / 'h.json'
  holographic.main(['--tiny', '--lengths', '32', '--tokens', '32', '--passes', 'both', '--repeats', '1', '--output', str(path)])
  saved = check(path, 'holographic')
  rows = {row['row']: row for row in saved['rows']}
  assert {'elementwise chunk', 'elementwise associative', 'convolution fft scan', 'attention'} <= rows.keys()
  assert all(row['ms'] > 0 and row['temporary_mib'] >= 0 for row in saved['rows'] + saved['layers'])
  assert rows['attention']['times_attention'] == 1 and len(saved['layers']) == 3
  assert 'elementwise chunk' in capsys.readouterr().out


@pytest.mark.slow
def test_forms_of_the_benchmark_agree():
  size = holographic.Size(2, 40, 2, 8, 4)
  results = []
  for form in ('scan', 'associative', 'chunk'):
    for transform in ('dft', 'fft'):
      function, arguments = holographic.mixing_job(holographic.Mixing('hrr', transform, form), size, 'float32', backward=False)
      results.append(np.asarray(jax.jit(function)(*arguments)))
  assert all(np.allclose(r, results[0], atol=1e-5 * np.abs(results[0]).max()) for r in results) and np.abs(results[0]).max() > 0.1


@pytest.mark.slow
def test_scaling(tmp_path):
  path = tmp_path / 's.json'
  scaling.main(['--small', '--parts', 'weak,long', '--presets', 'dp', '--pattern', 'near', '--long_pattern', 'near', '--output', str(path)])
  rows = {(row['part'], row['preset']): row for row in check(path, 'scaling')['rows']}
  assert list(rows) == [('one', 'dp'), ('weak', 'dp'), ('long', 'dp'), ('long', 'sequence_parallel')]
  weak, pieces = rows['weak', 'dp'], rows['long', 'sequence_parallel']
  one = rows['one', 'dp']
  assert weak['devices'] == 4 and weak['rows'] == 4 * one['rows'] and weak['loss'] == pytest.approx(one['loss'], rel=.05)
  assert pieces['loss'] == pytest.approx(rows['long', 'dp']['loss'], rel=1e-2) and pieces['collectives']['collective-permute'] > 0
  assert weak['efficiency'] == pytest.approx(weak['times_one'] / 4, rel=1e-3)
  assert report_scaling.scaling(json.loads(path.read_text()), report.table, report.cell)


def test_holographic_targets_compare_the_named_rows():
  row = lambda name, ms, **more: {'row': name, 'pass': 'both', 'ms': ms, 'B': 4, 'L': 1024, 'H': 1, 'K': 512, 'S': 8} | more
  rows = [row('elementwise chunk', 2.0), row('elementwise chunk slot keep', 1.0), row('attention', 30.0), row('attention', 1.0, B=1),
          row('elementwise associative', 6.0)]
  assert [target['value'] for target in holographic.targets(rows)] == [15.0, 3.0]


def test_targets_of_fused_kernels():
  row = lambda name, L, ms: {'row': name, 'pass': 'both', 'ms': ms, 'L': L, 'S': 8}
  found = {t['what']: t['value'] for t in holographic.fused_targets([row('elementwise fused', 2048, 1.2), row('attention', 2048, 3.0)])}
  assert found.pop('elementwise fused: 1.5 ms over those taken, L=2048') == 1.25
  assert found.pop('elementwise fused L=2048, against cuDNN') == 2.5
  assert len(found) == 8 and not any(found.values())


@pytest.mark.slow
def test_kernels(tmp_path):
  path = tmp_path / 'k.json'
  kernels.main(['--small', '--output', str(path)])
  saved = check(path, 'kernels')
  assert {row['kernel'] for row in saved['rows']} == {'all', *kernels.READS} and all(row['ms'] > 0 for row in saved['rows'])
  assert len(report.kernels(saved)) > len(saved['rows'])


@pytest.mark.slow
def test_recall(tmp_path):
  path = tmp_path / 'r.json'
  recall.main(['--settings', 'equal', '--rows', 'small_state;linear attention', '--seeds', '2', '--rates', '1e-2', '--steps', '4',
               '--per_call', '2', '--batch', '2', '--width', '16', '--output', str(path)])
  saved = check(path, 'recall')
  by_name = {row['row']: row for row in saved['rows']}
  assert by_name['small_state']['state_floats'] == 8 * 16 and by_name['linear attention']['state_floats'] == 16 * 16 // 8
  assert all(0 <= row['accuracy'] <= 1 and len(row['seeds']) == 2 and list(row['by_rate']) == ['0.01'] for row in saved['rows'])
  assert path.with_suffix('.png').stat().st_size > 1000
  assert [t['value'] is None for t in saved['targets']] == [True, True, True, False, False]


def test_rows_of_equal_state():
  for name, make in (recall_rows.EQUAL | recall_rows.PRESET).items():
    config = recall_rows.model_config(make, width=64, vocabulary=128)
    mixer = config.mixers['memory']
    K = mixer.key_width or 64 // mixer.heads
    assert mixer.heads * (mixer.slots or K) * K == 512, name


@pytest.mark.slow
def test_decode_host(tmp_path):
  path = tmp_path / 'd.json'
  decode_host.main(['--model', write_case(tmp_path / 'm.gguf', 'llama_plain'), '--batches', '1,2', '--prompts', '5', '--tokens', '16',
                    '--repeats', '1', '--alone', '--output', str(path)])
  saved = check(path, 'decode_host')
  assert [(row['row'], row['batch'], row['same_tokens']) for row in saved['rows']] == [('memjax', 1, 1), ('memjax', 2, 1)]
  assert all(row['tokens_per_second'] > 0 and row['prefill_ms'] > 0 for row in saved['rows']) and saved['weight_bytes'] > 0
  assert [target['value'] for target in saved['targets']] == [None, None]


def test_targets_take_the_faster_peer():
  row = lambda name, batch, speed: {'row': name, 'batch': batch, 'prompt': 37, 'tokens_per_second': speed}
  rows = [row('memjax', 1, 30.0), row('transformers dynamic', 1, 20.0), row('transformers static', 1, 15.0), row('memjax', 8, 1.0)]
  assert [target['value'] for target in decode_host.targets(rows, 1.0)] == [1.5, None]
  rows = [{**row, 'prefill_ms': 100.0 if row['row'] == 'memjax' else 50.0} for row in rows]
  values = [target['value'] for target in decode_host.targets(rows[:3], 1.0, tokens=3)]
  assert values == pytest.approx([1.5, (0.05 + 3 / 20) / (0.1 + 3 / 30)])


@pytest.mark.slow
def test_decode_in_batches(tmp_path):
  path = tmp_path / 'd.json'
  rows = 'holographic;neural;attention, plain cache;attention'
  decode.main(['--contexts', '32', '--layers', '1', '--tokens', '4', '--repeats', '1', '--width', '128', '--batch', '3', '--rows', rows,
               '--kernels', '--output', str(path)])
  saved = check(path, 'decode')
  assert saved['batch'] == 3 and {row['row']: row['state_bytes'] for row in saved['rows']}['attention, plain cache'] == 3 * 2 * 128 * 32 * 4
  assert saved['targets'][0]['target'] == 10 and 'Batch 3' in report.decode(saved)[0]
  assert [(check['row'], check['difference'] < 1e-5) for check in saved['checks']] == [('neural', True)]


def test_plain_cache_is_attention():
  """Rows of a batch against the written part of a cache, as the library attends."""
  keys, values = (np.random.default_rng(n).standard_normal((2, 3, 4, 8), np.float32) for n in (0, 1))
  q, k, v = np.random.default_rng(2).standard_normal((3, 2, 3, 4), np.float32)
  flat = [x.reshape(6, 4, 8) for x in (keys, values)]
  y, (new, _) = decode.plain_attend(q, k, v, flat, jax.numpy.full((2,), 5))
  new = new.reshape(keys.shape)
  seen, stored = (np.concatenate([a[..., :5], b[..., None]], 3) for a, b in ((keys, k), (values, v)))
  logits = np.einsum('bhk,bhkm->bhm', q, seen) / 2
  weight = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(y, np.einsum('bhm,bhkm->bhk', weight, stored), rtol=1e-5, atol=1e-5)
  assert np.array_equal(new[..., 5], k) and np.array_equal(new[..., 6:], keys[..., 6:])


@pytest.mark.slow
def test_flash(tmp_path):
  path = tmp_path / 'f.json'
  flash.main(['--small', '--repeats', '1', '--output', str(path)])
  saved = check(path, 'flash')
  assert all(value < 0.01 for row in saved['checks'] for name in ('cudnn', 'xla') for value in row[name].values())
  assert len(report.flash(saved)) > len(saved['rows'])


@pytest.mark.slow
def test_hybrid(tmp_path):
  path = tmp_path / 'y.json'
  hybrid.main(['--small', '--profile', '--output', str(path)])
  saved = check(path, 'hybrid')
  assert {row['model'] for row in saved['rows']} == {'hybrid', 'attention'} and all(0 < row['loss'] < 9 for row in saved['rows'])
  assert report.hybrid(saved)


def test_jobs_and_targets_of_the_hybrid():
  assert hybrid.job('hybrid:2x32') == ('hybrid', 2, 32, ()) and hybrid.job('attention:1x8:a=1:b=2').overrides == ('a=1', 'b=2')
  row = lambda model, length, speed: {'model': model, 'length': length, 'tokens_per_second': speed, 'mfu': speed / 1000}
  rows = [row('hybrid', 4096, 300.0), row('hybrid', 4096, 450.0), row('attention', 4096, 400.0), row('hybrid', 32768, 90.0)]
  assert [target['value'] for target in hybrid.targets(rows)] == [0.45, 1.125, None]


def test_kernels_are_summed_by_part_and_kind():
  scopes = {'loop_add_fusion_3': 'jit(step)/jvp(Decoder)/repeats/layer_0/mlp/mul', 'gemm_1': 'jit(step)/mixers/slots/dot'}
  rows = [('loop_add_fusion_3', {'hlo_op': 'command_buffer_1'}, 4.0), ('nvjet_x', {'hlo_op': 'gemm.1'}, 2.0), ('memcpy128', {}, 1.0)]
  found = kernel_times.summarise(rows, scopes, 2)
  assert found['parts'] == {'feed-forward': 2.0, 'holographic': 1.0, 'unknown': 0.5} and found['ms'] == 3.5
  assert found['kinds'] == {'elementwise': 2.0, 'matmul': 1.0, 'copy': 0.5} and found['kernels'][0]['calls'] == 0.5


@pytest.mark.slow
def test_decode(tmp_path):
  path = tmp_path / 'd.json'
  decode.main(['--contexts', '32,64', '--layers', '1', '--tokens', '4', '--repeats', '1', '--width', '32', '--output', str(path)])
  saved = check(path, 'decode')
  size = {(row['row'], row['context']): row['state_bytes'] for row in saved['rows']}
  assert size['holographic', 32] == size['holographic', 64]
  assert size['attention, plain cache', 64] == 2 * size['attention, plain cache', 32] == 2 * 64 * 32 * 4
  assert size['neural', 32] == size['neural', 64] and size['MAC', 32] == size['MAC', 64]
  assert [t['value'] for t in saved['targets'] if 'state' in t['what']] == [1.0, 1.0] and 'neural' in saved['targets'][-1]['what']
  assert all(row['tokens_per_second'] > 0 for row in saved['rows'])


def write_text(folder, sizes):
  draw = np.random.default_rng(0)
  for split, lines in sizes.items():
    rows = [' '.join(draw.choice(['to', 'be', 'or', 'not'], 5)) for _ in range(lines)]
    (folder / split).write_text('\n'.join(rows) + '\n', encoding='utf-8')
  return [part for split in sizes for part in (f'--{split}', str(folder / split))]


@pytest.mark.slow
def test_language(tmp_path):
  files = write_text(tmp_path, {'train': 60, 'valid': 9, 'test': 7})
  path = tmp_path / 'l.json'
  language.main([*files, '--tokens', 'words', '--models', 'holographic;attention', '--width', '16', '--layers', '1', '--hidden', '32',
                 '--steps', '4', '--per_call', '2', '--eval_every', '2', '--batch', '2', '--length', '8', '--seeds', '2', '--warmup', '1',
                 '--eval_batch', '4', '--lanes', '2', '--dropout', '0.1', '--patience', '3', '--output', str(path)])
  saved = check(path, 'language')
  assert saved['tokens']['test'] == 7 * 6 and saved['bytes']['test'] == (tmp_path / 'test').stat().st_size
  memory, attention = saved['rows']
  assert abs(memory['parameters'] / attention['parameters'] - 1) < 0.05
  assert set(memory['test_nll']) == {'sliding', 'carried'} and set(attention['test_nll']) == {'sliding'}
  nll = np.array(memory['test_nll'][memory['evaluation']])
  assert np.allclose(memory['bits_per_byte_seeds'], nll / np.log(2) * 7 * 6 / saved['bytes']['test'], rtol=1e-3)
  assert np.allclose(memory['perplexity_seeds'], np.exp(nll), rtol=1e-3)
  assert path.with_suffix('.png').stat().st_size > 1000


def test_text_as_bytes_and_words(tmp_path):
  files = write_text(tmp_path, {'train': 6, 'valid': 3, 'test': 2})
  paths = dict(zip(('train', 'valid', 'test'), files[1::2], strict=True))
  texts, vocabulary = language.read_texts(paths, 'bytes', 5)
  assert vocabulary == 256 and texts['test'].tokens == texts['test'].bytes == (tmp_path / 'test').stat().st_size
  assert texts['test'].stream.shape == texts['valid'].stream.shape == (texts['valid'].tokens + 6,)
  texts, vocabulary = language.read_texts(paths, 'words', 5)
  assert vocabulary == 5 and texts['test'].tokens == 2 * 6                 # five words and <eos> a line
  inputs, targets = language.window(texts['train'].stream, jax.numpy.array([0, 6]), 6)
  assert inputs[0, 0] == targets[0, 5] == targets[1, 5] and (inputs[:, 1:] == targets[:, :-1]).all()


def test_equal_parameters():
  sizes = dict(width=64, layers=2, heads=4, window=8, vocabulary=256, dropout=0.0, dtype='float32')
  count = language_models.parameters(language_models.model_config('hybrid', **sizes))
  for name in language_models.NAMES:
    found = language_models.parameters(language_models.matched(language_models.model_config(name, **sizes), count))
    assert abs(found / count - 1) < 0.02, name


def test_tables_and_numbers(capsys):
  common.show('T', [{'a': 'x', 'b': 1234567, 'c': 0.12345}, {'a': 'long', 'b': None}], ('a', 'b', 'c'))
  out = capsys.readouterr().out.splitlines()
  assert out[1:] == ['T', 'a             b      c', 'x     1,234,567  0.123', 'long']
  assert common.tidy({'a': np.float32(1 / 3), 'b': [float('nan'), np.arange(2)], 3: True}) == {'a': 0.33333, 'b': [None, [0, 1]], '3': True}
  common.judge([{'what': 'w', 'value': 1.0, 'target': 2.0}, {'what': 'v', 'value': None, 'target': 2.0}])
  assert 'NO' in (printed := capsys.readouterr().out) and 'not run' in printed


def test_imports_need_no_training_libraries():
  block = f'import sys\nfor name in {ABSENT}: sys.modules[name] = None\n'
  names = ', '.join(('decode', 'holographic', 'language', 'recall'))
  done = subprocess.run([sys.executable, '-c', f'{block}from benchmarks import {names}'], cwd=Path(__file__).parent.parent,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_banks(tmp_path):
  text, path = tmp_path / 't.txt', tmp_path / 'b.json'
  text.write_text('To be, or not to be, that is the question. ' * 20)
  texts = [word for split in ('train', 'valid', 'test') for word in (f'--{split}', str(text))]
  sizes = '--small --width 16 --heads 2 --length 16 --batch 2 --steps 4 --warmup 1 --eval_every 2 --per_call 2'
  models = 'bank, token;vanilla, equal parameters;bank, sequence'
  banks.main([*texts, *sizes.split(), '--entries', '16', '--chapters', '4', '--top_k', '2', '--models', models, '--output', str(path)])
  rows = {row['model']: row for row in check(path, 'banks')['rows']}
  assert rows['bank, sequence']['noncausal_routing'] and not rows['bank, token']['noncausal_routing']
  assert rows['bank, sequence']['causal_perplexity'] > 0 and 'causal_perplexity' not in rows['bank, token']
  assert abs(rows['vanilla, equal parameters']['parameters'] / rows['bank, token']['parameters'] - 1) < 0.05


@pytest.mark.slow
def test_routed(tmp_path):
  path = tmp_path / 'r.json'
  routed.main(['--tiny', '--plain', '--layer', '--only', 'auto', '--repeats', '1', '--output', str(path)])
  saved = check(path, 'routed', 'layer')
  assert not any('error' in row for row in saved['layer'] + saved['small']) and len(saved['targets']) == 4
