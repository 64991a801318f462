"""The section of docs/numbers.md on long contexts: what a layer costs from a thousand to a million tokens."""
from typing import Any

ABOUT = {
  'Long context': 'One layer of each memory, projections included, one row of text (`benchmarks/context.py`). Predicted: operations by the '
                  'FLOP counter, which counts the whole square of full attention, although a causal kernel may leave out half; bytes of '
                  'state by the shapes. Measured: seconds to read a text, in pieces with the state carried where that has a fixed size, in '
                  'one call for attention; forward + backward of whole rows. Temporaries are what XLA plans beside arguments and results.',
}
CAPTIONS = {'context': 'Operations a token and bytes of state against tokens read; seconds to read them'}
COLOURS = {'attention': 'black', 'window': 'pink', 'holographic': 'blue', 'neural': 'orange', 'context': 'green',
           'neural, one matrix': 'yellow', 'holographic_seed': 'sky'}
GRID = (('read_flops', 'Operations a token of reading, millions', 1e6), ('train_flops', 'Operations a token of training, millions', 1e6),
        ('step_flops', 'Operations of one more token after so many, millions', 1e6), ('state_bytes', 'Bytes of state a row, KiB', 1024))


def context(result: dict[str, Any], table, cell) -> list[str]:
  """What this run predicted and measured; nothing for what it left out."""
  lines, rows = [], result['predicted']
  lengths = sorted({row['tokens'] for row in rows})
  for key, title, unit in GRID if rows else ():
    found = {(row['memory'], row['tokens']): row[key] / unit for row in rows}
    names = dict.fromkeys(row['memory'] for row in rows)
    lines += [f'{title}, width {result["predicted_width"]:,}:']
    lines += table([{'memory': name} for name in names], {'memory': 'memory', **{
        f'{n:,}': lambda row, n=n, found=found: cell(found[row['memory'], n]) for n in lengths}})
  for part, title in (('read', 'Reading'), ('train', 'Forward + backward')):
    if not result[part]: continue
    lines += [f'{title}, width {result["width"]:,}, {result["dtype"]}:']
    lines += table(result[part], {
        'memory': 'memory', 'tokens': 'tokens', 'tokens a call': 'piece' if part == 'read' else lambda row: None,
        'seconds': lambda row: cell(row['seconds']) if row['seconds'] else row['why'], 'tokens/s': 'tokens_per_second',
        'temporary MiB': 'temporary_mib', 'state bytes': 'state_bytes' if part == 'read' else lambda row: None})
  return lines


def draw(results: dict[str, dict[str, Any]], figure, style) -> bool:
  """Three panels: operations a token, bytes of state, seconds; whether there was anything to draw."""
  found = [r for r in results.values() if r['benchmark'] == 'context']
  predicted = next((r['predicted'] for r in found if r['predicted']), None)
  if predicted is None: return False
  measured = min((r for r in found if r['read']), key=lambda r: r['machine']['platform'] == 'cpu', default=None)
  panels = figure.subplots(1, 3 if measured else 2)
  wanted = [(panels[0], predicted, 'step_flops', 'operations of one more token'), (panels[1], predicted, 'state_bytes', 'bytes of state')]
  if measured: wanted.append((panels[2], measured['read'], 'seconds', 'seconds to read'))
  for axes, rows, key, title in wanted:
    for name, colour in COLOURS.items():
      points = sorted((r['tokens'], r[key]) for r in rows if r['memory'] == name and r[key])
      shade, marker = style[colour]
      if points: axes.plot(*zip(*points, strict=True), color=shade, marker=marker, label=name)
    axes.set(xscale='log', yscale='log', title=title, xlabel='tokens')
    ticks = sorted({r['tokens'] for r in rows})[::2 if rows is predicted else 1]
    axes.set_xticks(ticks, [f'{n // 1024:,}k' if n < 2 ** 20 else '1M' for n in ticks])
    axes.minorticks_off()
  if measured: panels[2].set_title(f'seconds to read, {measured["machine"]["device"].removeprefix("NVIDIA ")}')
  figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
  return True


def h200(result, results):
  """What reading long texts on an H200 says."""
  at = {(row['memory'], row['tokens']): row for row in result['read']}
  seconds = {key: row['seconds'] for key, row in at.items()}
  far, most, piece = 262_144, 1_048_576, result['piece']
  predicted = {row['memory']: row['read_flops'] for row in results['context-cpu']['predicted'] if row['tokens'] == most}
  speed = lambda name: predicted[name] * most / seconds[name, most] / 1e12
  attention, memory, less = at['attention', far], at['holographic', most], seconds['attention', far] / seconds['holographic', far]
  return (
    f'At {far:,} tokens attention (cuDNN) takes {seconds["attention", far]:.3f} s and holds {attention["state_bytes"] / 1e9:.1f} GB of '
    f'keys and values, a holographic layer {seconds["holographic", far]:.3f} s ({less:.0f} times less), window attention '
    f'{seconds["window", far]:.3f} s, a neural memory {seconds["neural", far]:.3f} s. A million tokens take the holographic layer '
    f'{seconds["holographic", most]:.3f} s, with {memory["temporary_mib"]:,.0f} MiB of temporaries and {memory["state_bytes"] / 1e3:,.0f} '
    f'kB of state, and the neural memory {seconds["neural", most]:.2f} s; attention was left out there: its time grows by squares. '
    f'At {piece:,} tokens attention ({1e3 * seconds["attention", piece]:.2f} ms) is as fast as the holographic layer '
    f'({1e3 * seconds["holographic", piece]:.2f} ms). Operations do not predict time: at a million tokens the holographic layer does '
    f'{speed("holographic"):.0f} of the predicted TFLOP a second, the neural memory {speed("neural"):.0f}, and the original HAMT layer, '
    f'which writes token by token, reads {at["holographic_seed", far]["tokens_per_second"]:,.0f} tokens a second at any length. '
    'In this run the clock went on while rows were saved between lengths, some milliseconds each time: what is read in pieces took '
    f'less than listed from {4 * piece:,} tokens on. Forward + backward of whole rows was not run on this machine.')


READINGS = {('Long context', 'context-h200'): h200}
