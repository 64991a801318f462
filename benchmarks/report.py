"""Writes docs/numbers.md and docs/figures/*.png from benchmarks/results/*.json, so that no number is typed by hand.

  python -m benchmarks.report [--results FOLDER] [--docs FOLDER]

A section for each benchmark, in it every machine that has a result; what has no JSON has no section.
"""
import argparse
import json
import math
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import (
  report_banks,
  report_context,
  report_figures,
  report_hosts,
  report_hybrid,
  report_kernels,
  report_neural,
  report_scaling,
  report_text,
)

RESULTS = pathlib.Path(__file__).parent / 'results'
DOCS = pathlib.Path(__file__).parent.parent / 'docs'
SETTINGS = {                                # of benchmarks.recall: what each is for
  'equal': 'equal state', 'wide': 'the yardstick', 'kinds': 'every registered memory', 'curve': 'accuracy over state',
  'preset': 'small_state, one thing changed at a time', 'large': 'many pairs', 'neural': 'memories that learn at test time',
}
Columns = dict[str, str | Callable[[dict], Any]]


def cell(value: Any, digits: int = 3) -> str:
  """A table cell: integers whole, floats with `digits` significant digits, nothing for None."""
  if value is None: return ''
  if isinstance(value, (bool, str)): return str(value)
  if isinstance(value, int): return f'{value:,}'
  rounded = float(f'{value:.{digits}g}')
  if abs(rounded) >= 10 ** (digits - 1): return f'{rounded:,.0f}'
  text = f'{rounded:#.{digits}g}' if abs(rounded) >= 1e-4 or rounded == 0 else f'{rounded:.{digits - 1}e}'
  return '0' if rounded == 0 else text.rstrip('.')


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> list[str]:
  """Lines of a markdown table; a column is the name of a value or a function of the row. Columns without any value go."""
  get = lambda row, how: how(row) if callable(how) else row.get(how)
  filled = {title: how for title, how in columns.items() if any(get(row, how) is not None for row in rows)}
  lines = [[cell(get(row, how)) for how in filled.values()] for row in rows]
  sides = ['---' if any(isinstance(get(row, how), str) for row in rows) else '--:' for how in filled.values()]
  return ['', *(f'| {" | ".join(line)} |' for line in [list(filled), sides, *lines]), '']


def goals(targets: Sequence[dict[str, Any]]) -> list[str]:
  """The table of targets that this run measured."""
  rows = [{**t, 'reached': 'yes' if t['value'] >= t['target'] else '**no**'} for t in targets if t['value'] is not None]
  return table(rows, {'target': 'what', 'at least': 'target', 'measured': 'value', 'reached': 'reached'}) if rows else []


def origin(result: dict[str, Any]) -> list[str]:
  """The exact command, then machine, commit, date, versions, seeds of a result."""
  processes = result.get('processes') or [result.get('arguments', [])]           # those of one run on one machine
  machine, arguments = result.get('machine', {}), processes[0]
  module = result.get('module') or result['benchmark'].partition('-')[0]
  where = machine.get('device', 'machine not recorded')
  if machine.get('platform') == 'cpu': where = f'CPU, {machine["processor"]}'
  stated = arguments[arguments.index('--commit') + 1] if '--commit' in arguments else ''
  commit = machine.get('commit', 'not recorded')
  note = '' if not stated or stated == commit else f' (entered after the run, which named `{stated}`)'
  if not stated and machine.get('modified'): note = ' with changes'
  seeds = result.get('seeds') or list(range(result.get('options', {}).get('seeds', 0)))
  dtype = result.get('dtype') or result.get('options', {}).get('dtype', '')
  facts = [where, f'{machine["cores"]} cores' if 'cores' in machine else '', f'commit `{commit}`{note}', machine.get('date', ''),
           f'jax {machine["jax"]}' if 'jax' in machine else '', f'`{machine["xla_flags"]}`' if machine.get('xla_flags') else '',
           dtype, f'seeds {", ".join(map(str, seeds))}' if seeds else '']
  return ['', '```', *(shlex.join(['python', '-m', f'benchmarks.{module}', *words]) for words in processes), '```', '',
          ', '.join(f for f in facts if f) + '.', '']


def mixing(result: dict[str, Any]) -> list[str]:
  """One table a shape and pass, a row each form; 'automatic' marks the chunk taken by default."""
  lines: list[str] = []
  shapes = sorted({(r['pass'], r['B'], r['L'], r['H'], r['K'], r['S']) for r in result['rows']}, key=lambda s: (s[0] != 'both', s[2]))
  for shape in shapes:
    name, B, L, H, K, S = shape
    rows = [r for r in result['rows'] if (r['pass'], r['B'], r['L'], r['H'], r['K'], r['S']) == shape]
    lines += [f'{"Forward + backward" if name == "both" else "Forward"}, B={B} L={L:,}, {H} x {K}, {S} slots:']
    lines += table(rows, {'row': lambda r: r['row'] + (' (automatic)' if r['automatic'] else ''), 'ms': 'ms', 'fastest ms': 'min_ms',
                          'times attention': 'times_attention', 'temporary MiB': 'temporary_mib', 'compile s': 'compile_s'})
  return lines + goals(result['targets'])


def layers(result: dict[str, Any]) -> list[str]:
  """Whole layers, projections included."""
  return table(result['layers'], {'layer': lambda r: r['row'].removeprefix('layer: '), 'B': 'B', 'L': 'L', 'ms': 'ms',
                                  'times attention': 'times_attention', 'temporary MiB': 'temporary_mib'})


def recall(result: dict[str, Any]) -> list[str]:
  """A table for each setting, with the level of guessing; targets judged anew from the rows."""
  from benchmarks.recall import targets
  words, lines = result['arguments'], []
  given = lambda flag, default: int(words[words.index(flag) + 1]) if flag in words else default
  for name, (width, pairs, length, vocabulary, steps, _, batch, *_) in result['settings'].items():
    rows = [r for r in result['rows'] if r['setting'] == name]
    if not rows: continue
    steps = given('--steps', 1000 if '--small' in words else steps)
    lines += [f'**{name}**, {SETTINGS.get(name, name)}: width {given("--width", width)}, {pairs} pairs in {length} '
              f'tokens, vocabulary {vocabulary:,}, {steps:,} steps of {given("--batch", batch)} rows; guessing among the values in context '
              f'{cell(1 / pairs)}, among all values {cell(2 / vocabulary)}.']
    lines += table(rows, {'memory': 'row', 'accuracy': 'accuracy', 'worst seed': 'worst', 'peak rate': lambda r: f'{r["rate"]:g}',
                          'rates tried': lambda r: len(r['by_rate']), 'steps to .95': 'steps_to_95',
                          'state floats': 'state_floats', 'state bytes': 'state_bytes', 'parameters': 'parameters'})
  return lines + goals(targets(result['rows']))


def decode(result: dict[str, Any]) -> list[str]:
  """Tokens per second by context, and how many times the faster attention of the same context and depth."""
  rows = result['rows']
  def times(row):
    peers = [r['tokens_per_second'] for r in rows if r['row'].startswith('attention') and r['layers'] == row['layers']
             and r['context'] == row['context']]
    return row['tokens_per_second'] / max(peers) if peers else None
  shown = table(rows, {
      'layers': 'layers', 'context': 'context', 'row': 'row', 'tokens/s': 'tokens_per_second', 'µs a token': 'us_per_token',
      'state bytes': 'state_bytes', 'times the faster attention': times})
  checked = [f'{check["row"]} {cell(check["difference"])}' for check in result.get('checks', [])]
  checked = [f'Largest difference of logits by kernels from those by XLA, float32: {", ".join(checked)}.'] if checked else []
  return [f'Batch {result.get("batch", 1)}, width {result["width"]}.', *checked, *shown, *goals(result['targets'])]


def capacity(result: dict[str, Any]) -> list[str]:
  """Recall over pairs, each memory above its theory."""
  lines = [f'{result["width"]} channels a slot, {result["items"]:,} items (guessing {cell(1 / result["items"])}), '
           f'{result["trials"]:,} trials (a quarter, at least 50, for eight slots).']
  for part in ('keyed', 'variants', 'slotted'):
    rows = result[part]
    shown = [{'memory': r['memory'], 'floats': round(r['floats']), 'points': r['worst_points'], 'values': r['recall']} for r in rows]
    theory = [{'memory': 'theory', 'values': r['theory']} for r in rows]
    lines += table([row for pair in zip(shown, theory, strict=True) for row in pair], {
        'memory': 'memory', 'floats': 'floats',
        **{f'N={n}': lambda r, i=i: r['values'][i] for i, n in enumerate(rows[0]['pairs'])},
        'largest difference, points': 'points'})
  return lines + goals(result['targets'])


def language(result: dict[str, Any]) -> list[str]:
  """A row for each model, with guessing as the last one."""
  o, vocabulary = result['options'], result['vocabulary']
  text = (f'{result["tokens"]["train"]:,} training {o["tokens"]}, {result["tokens"]["test"]:,} in the test text; '
          f'vocabulary {vocabulary:,}; width {o["width"]}, {o["layers"]} layers, window {o["window"]}, '
          f'{o["batch"]} x {o["length"]} a step, peak rate(s) {", ".join(map(str, o["rates"]))}, '
          f'dropout {o["dropout"]}, decay {o["weight_decay"]}.')
  seeds = 'perplexity_seeds' if o['tokens'] == 'words' else 'bits_per_byte_seeds'
  bits = math.log2(vocabulary) * result['tokens']['test'] / result['bytes']['test']
  chance = {'model': 'guessing evenly', 'perplexity': float(vocabulary), 'bits_per_byte': bits}
  columns: Columns = {
      'model': 'model', 'parameters': 'parameters', 'test bits per byte': lambda r: cell(r.get('bits_per_byte'), 4) or None,
      'test perplexity per token': 'perplexity', 'of the seeds': lambda r: ', '.join(cell(v, 4) for v in r.get(seeds, [])) or None,
      'best step': lambda r: ', '.join(map(str, r.get('best_step', []))) or None, 'evaluation': 'evaluation',
      'tokens/s': 'tokens_per_second'}
  return [text, *table([*result['rows'], chance], columns)]


def resume(result: dict[str, Any]) -> list[str]:
  """How often it was killed, and whether the parameters are bit-equal."""
  kills = result['kills']
  saving = sum(bool(k.get('while_saving')) for k in kills)
  verdict = 'bit-equal to' if result['equal'] else '**different from**'
  return [f'{len(kills)} kills, {saving} of them while saving; at step {result["step"]} every array and every logged loss is {verdict} '
          'those of the run left alone.', '']


def banks(result: dict[str, Any]) -> list[str]:
  """Memory banks against transformers."""
  return report_banks.banks(result, table, cell)


def routed(result: dict[str, Any]) -> list[str]:
  """Routed attention: times, memory, errors."""
  return report_banks.routed(result, table, cell) + goals(result['targets'])


def adapters(result: dict[str, Any]) -> list[str]:
  """A pretrained host with what was trained beside it."""
  return report_hosts.adapters(result, table, cell)


def decode_host(result: dict[str, Any]) -> list[str]:
  """Decoding with a pretrained host beside transformers."""
  return report_hosts.decode_host(result, table, cell) + goals(result['targets'])


def neural(result: dict[str, Any]) -> list[str]:
  """A layer of neural memory."""
  return report_neural.neural(result, table, cell) + goals(result['targets'])


def context(result: dict[str, Any]) -> list[str]:
  """What a layer costs up to a million tokens."""
  return report_context.context(result, table, cell)


def needle(result: dict[str, Any]) -> list[str]:
  """Needles by length."""
  return report_neural.needle(result, table)


def titans(result: dict[str, Any]) -> list[str]:
  """Text with memories learning, frozen and off."""
  return report_neural.titans(result, table, cell)


def longstream(result: dict[str, Any]) -> list[str]:
  """Streams of a million tokens."""
  return report_neural.longstream(result, table) + goals(result['targets'])


def scaling(result: dict[str, Any]) -> list[str]:
  """Several devices beside one."""
  return report_scaling.scaling(result, table, cell) + goals(result['targets'])


def hybrid(result: dict[str, Any]) -> list[str]:
  """Training steps of the hybrid beside attention."""
  return report_hybrid.hybrid(result, table) + goals(result['targets'])


def flash(result: dict[str, Any]) -> list[str]:
  """Attention through cuDNN beside XLA."""
  return report_hybrid.flash(result, table, cell)


def kernels(result: dict[str, Any]) -> list[str]:
  """Fused kernels by their block sizes."""
  return report_kernels.kernels(result, table)


CAPTIONS = {**report_text.CAPTIONS, **report_neural.CAPTIONS, **report_banks.CAPTIONS, **report_hosts.CAPTIONS, **report_context.CAPTIONS}
ABOUT = {**report_text.ABOUT, **report_banks.ABOUT, **report_hosts.ABOUT, **report_neural.ABOUT, **report_context.ABOUT,
         **report_scaling.ABOUT, **report_kernels.ABOUT, **report_hybrid.ABOUT}
READINGS = {**report_text.READINGS, **report_banks.READINGS, **report_hosts.READINGS, **report_neural.READINGS,
            **report_context.READINGS, **report_hybrid.READINGS}
SECTIONS = (                                # title, benchmark, key that must hold something, body, figure
  ('Mixing', 'holographic', 'rows', mixing, 'mixing'), ('Fused kernels', 'kernels', 'rows', kernels, ''),
  ('Whole layers', 'holographic', 'layers', layers, ''),
  ('Recall', 'recall', 'rows', recall, 'recall'), ('Decoding', 'decode', 'rows', decode, ''),
  ('Capacity', 'capacity', 'keyed', capacity, ''), ('Language modelling', 'language', 'rows', language, 'language'),
  ('Memory banks', 'banks', 'rows', banks, 'banks'), ('Routed attention', 'routed', 'example_shape', routed, ''),
  ('Adapters', 'adapters', 'runs', adapters, 'adapters'),
  ('Pretrained decoding', 'decode_host', 'rows', decode_host, ''), ('Neural memory', 'neural_memory', 'rows', neural, ''),
  ('Writes by one kernel', 'persistent', 'rows', lambda result: report_kernels.persistent(result, table), ''),
  ('Needles', 'needle', 'rows', needle, 'needle'), ('Learning at test time', 'titans', 'rows', titans, 'titans'),
  ('Long stream', 'longstream', 'rows', longstream, ''),
  ('Long context', 'context', 'width', context, 'context'),
  ('Training step', 'hybrid', 'rows', hybrid, ''), ('Flash attention', 'flash', 'rows', flash, ''),
  ('Scaling', 'scaling', 'rows', scaling, ''), ('Resume', 'resume', 'kills', resume, ''))


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{name of the file: result}, in order of names."""
  results = {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*.json'))}
  return {name: {'benchmark': name.rpartition('-')[0] or name, **result} for name, result in results.items()}


def page(results: dict[str, dict[str, Any]], figures: Sequence[str] = ()) -> str:
  """The text of docs/numbers.md."""
  lines = ['# Numbers', '', report_text.OPENING, '']
  for title, kind, key, body, figure in SECTIONS:
    found = {name: r for name, r in results.items() if r['benchmark'].partition('-')[0] == kind and r.get(key)}
    if not found: continue
    lines += [f'## {title}', '', ABOUT[title], '']
    if figure in figures: lines += [f'![{CAPTIONS[figure]}](figures/{figure}.png)', '']
    for name, result in found.items():
      reading = READINGS.get((title, name))
      lines += [f'### {title}: {name.removeprefix(kind).strip("-")}', '', *([reading(result, results), ''] if reading else [])]
      lines += [*origin(result), *body(result)]
  text = '\n'.join(lines)
  while '\n\n\n' in text: text = text.replace('\n\n\n', '\n\n')
  return text.strip() + '\n'


def main(argv: list[str] | None = None) -> pathlib.Path:
  """Writes page and figures; returns the path of the page."""
  make = argparse.ArgumentParser(prog='python -m benchmarks.report', description=__doc__)
  make.add_argument('--results', type=pathlib.Path, default=RESULTS)
  make.add_argument('--docs', type=pathlib.Path, default=DOCS)
  a = make.parse_args(argv)
  results = read_results(a.results)
  figures = report_figures.draw_all(results, a.docs / 'figures')
  path = a.docs / 'numbers.md'
  path.write_text(page(results, figures), encoding='utf-8')
  print(path, *(a.docs / 'figures' / f'{name}.png' for name in figures), sep='\n')
  return path


if __name__ == '__main__':
  main()
