"""The section of docs/numbers.md on several devices."""
from typing import Any

ABOUT = {
  'Scaling': 'Training steps on one device and on several of one host (`benchmarks/scaling.py`): the whole optimiser step, without reading '
             'data. weak: as many rows a device; strong: as many rows in all; long: one row, in pieces of which each device holds one. '
             'Efficiency is tokens a second over those of one device, divided by the devices; 1 is ideal.',
}


def scaling(result: dict[str, Any], table, cell) -> list[str]:
  """A row for each part and preset."""
  o, parameters = result['options'], result['rows'][0]['parameters']
  text = (f'{parameters / 1e6:.0f}M parameters: width {o["width"]}, {o["layers"]} layers of {", ".join(o["pattern"])} (near: window of '
          f'{o["window"]}; slots: holographic, {o["slots"]} slots), vocabulary {o["vocabulary"]:,}, {result["dtype"]}, recomputation of '
          f'layers {"on" if o["remat"] else "off"}.')
  moved = lambda row: ', '.join(f'{count} {name}' for name, count in row['collectives'].items() if count) or 'none'
  return [text, *table(result['rows'], {
      'part': 'part', 'preset': 'preset', 'devices': 'devices', 'rows': 'rows', 'tokens a row': 'length', 'ms a step': 'ms',
      'tokens/s': 'tokens_per_second', 'times one device': lambda r: r.get('times_one'), 'efficiency': lambda r: r.get('efficiency'),
      'temporaries, GiB a device': lambda r: cell(r['temporary_gib']), 'collectives in the program': moved})]
