"""The section of docs/numbers.md on fused kernels."""
from typing import Any

ABOUT = {
  'Fused kernels': 'The Pallas kernels of holographic mixing alone and all together, forward + backward, by the tokens of a chunk and of a '
                   'program, warps and stages of the loads (`benchmarks/kernels.py`); one keep a head, circular convolution as a Fourier '
                   'matrix inside of the kernels. Stages with commas are those of the four kernels in order.',
  'Writes by one kernel': 'Writes of a neural memory, forward: kernels of the library beside one Mosaic GPU kernel for all chunks, an '
                          'experiment (`benchmarks/persistent.py`).',
}
ORDER = ('all', 'write_kernel', 'read_kernel', 'read_back_kernel', 'write_back_kernel', 'attention')


def persistent(result: dict[str, Any], table) -> list[str]:
  """Both ways to write, and how far they are from each other."""
  rows = table(result['rows'], {'writes by': 'row', 'ms': 'ms', 'fastest ms': 'min_ms', 'compile s': 'compile_s'})
  apart = [{'array': name, 'difference': f'{x:.1e}'} for name, x in result.get('differences', {}).items()]
  return rows + (table(apart, {'array': 'array', 'difference': 'difference'}) if apart else [])


def kernels(result: dict[str, Any], table) -> list[str]:
  """A table for each length and number of slots, fastest first within a kernel."""
  lines = []
  for L, S in sorted({(row['L'], row['S']) for row in result['rows']}):
    rows = [row for row in result['rows'] if (row['L'], row['S']) == (L, S)]
    rows.sort(key=lambda row: (ORDER.index(row['kernel']), row.get('binding') or '', row['ms']))
    size = rows[0]
    lines += [f'B={size["B"]} L={L:,}, {size["H"]} x {size["K"]}, {S} slots, {result["dtype"]}:']
    lines += table(rows, {'kernel': 'kernel', 'binding': lambda r: r.get('binding'), 'chunk': lambda r: r.get('chunk') or None,
                          'tokens a program': lambda r: r.get('tokens') or None, 'warps': lambda r: r.get('warps') or None,
                          'stages': lambda r: r.get('stages') or None, 'ms': 'ms'})
  return lines
