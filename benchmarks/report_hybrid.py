"""The sections of docs/numbers.md on the training step of a hybrid and on flash attention."""
from typing import Any

ABOUT = {
  'Training step': 'Whole training steps of the shipped 150M configs on one device (`benchmarks/hybrid.py`): gradient, AdamW and the guard '
                   'against NaN, donated, without reading data; each row is one text of random tokens. MFU is by the counter that fills '
                   'metrics.jsonl: three forward passes over the peak of the device, attention counted without its causal mask and '
                   'windows as the two blocks that XLA computes. "of matrices" counts the products with parameters alone, twice their '
                   'number a token and pass.',
  'Flash attention': 'Causal attention of 1024 channels through cuDNN and in XLA, forward + backward (`benchmarks/flash.py`), and how far '
                     'both are, in bfloat16, from XLA in float32 (root mean square over that of the exact value; reads and gradients).',
}


def candidates_h200(result: dict[str, Any], _) -> str:
  """What was tried on the shape of the hybrid."""
  rate = {tuple(r['overrides']): r['tokens_per_second'] for r in result['rows']}
  heads, other, windows = rate['model.mixers.learns.heads=4',], rate[()], rate['model.pattern=near,near,near,slots', 'model.repeats=2']
  return (f'Shapes of the hybrid tried after the run with eight heads of neural memory: four heads reached the target '
          f'({heads / other:.3f} times attention, which was timed in the same minutes, with the autotuner of XLA) and are shipped since; '
          f'they are 1 % fewer parameters. Six windows and two holographic layers in place of four each came to {windows / other:.3f} with '
          'eight heads. What the shapes do to quality was not measured.')


def h200(result: dict[str, Any], results: dict[str, Any]) -> str:
  """The shipped configs at both lengths, in one run."""
  again = {row['length']: row for row in results['hybrid-again-h200']['rows']}
  return ('The shipped configs, all in one run. XLA chooses anew with every compilation: the hybrid compiled again within the hour took '
          f'{again[4096]["ms"]:.0f} and {again[32768]["ms"]:.0f} ms.')


def eight_heads_h200(result: dict[str, Any], _) -> str:
  """Before four heads were shipped."""
  return 'Before: eight heads of neural memory; with XLA in place of the kernels, with shorter chunks, and what a profile says.'


READINGS = {('Training step', 'hybrid-candidates-h200'): candidates_h200, ('Training step', 'hybrid-h200'): h200,
            ('Training step', 'hybrid-eight-heads-h200'): eight_heads_h200}


def hybrid(result: dict[str, Any], table) -> list[str]:
  """A row for each model and length; what a profile says of the hybrid."""
  rows, names = result['rows'], {}
  for row in rows: names[row['model']] = row['parameters']
  lines = [', '.join(f'{model}: {count:,} parameters' for model, count in names.items()) + '.']
  lines += table(rows, {
      'model': 'model', 'changed': lambda r: ', '.join(r['overrides']).replace('model.', '') or None, 'rows': 'rows',
      'tokens a row': 'length', 'ms a step': 'ms', 'tokens/s': 'tokens_per_second', 'MFU': 'mfu', 'of matrices': 'mfu_matrices',
      'GiB held': 'peak_gib', 'compiled in s': 'compile_s'})
  for row in rows:
    if 'profile' not in row: continue
    found = row['profile']
    lines += [f'Kernels of one step of {row["model"]} at {row["length"]:,} tokens, {found["ms"]:.0f} ms in all, by kind and by part of the '
              'model; in a run of its own, without command buffers, which is slower by little:']
    lines += table([{'name': f'{what}: {name}', 'ms': ms} for what in ('kinds', 'parts') for name, ms in found[what].items() if ms >= 0.05],
                   {'': 'name', 'ms': 'ms'})
  return lines


def flash(result: dict[str, Any], table, cell) -> list[str]:
  """Times, then differences."""
  lines = table(result['rows'], {'attention': 'row', 'ms': 'ms', 'temporaries, MiB': 'temporary_mib'})
  far = lambda name: lambda row: ', '.join(cell(value, 2) for value in row[name].values())
  shape = lambda row: ' x '.join(map(str, row['shape'])) + (f', window {row["window"]}' if row['window'] else ', full')
  return lines + table(result['checks'], {'B x L x H x K': shape, 'key heads': 'groups', 'cuDNN (y, dq, dk, dv)': far('cudnn'),
                                          'XLA': far('xla')})
