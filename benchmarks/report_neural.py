"""The section of docs/numbers.md on neural memory: one layer beside another implementation."""
from typing import Any

ABOUT = {
  'Neural memory': 'One layer of memory that learns at test time, projections included (`benchmarks/neural_memory.py`). Rows compute '
                   'different functions, and the table says which; the peer is run in float32, as its users run it.',
}


def neural(result: dict[str, Any], table, cell) -> list[str]:
  """A row each mode and chunk."""
  text = f'{result["tokens"]:,} tokens, width {result["width"]}, {result["heads"]} heads.'
  return [text, *table(result['rows'], {
      'row': 'row', 'mode': 'mode', 'computes': 'computes', 'chunk': 'chunk', 'tokens a row': 'length', 'dtype': 'dtype', 'pass': 'pass',
      'ms': 'ms', 'fastest ms': 'min_ms', 'peak GiB': lambda r: cell(r['peak_gib']), 'compile s': 'compile_s'})]


def h200(result, _):
  """What a layer on an H200 says."""
  rows = {(r['mode'], r['chunk']): r for r in result['rows'] if r['pass'] == 'both'}
  at64, refreshed = rows['token', 64], rows['refreshed', 64]
  best = min((r for (mode, _), r in rows.items() if mode == 'token'), key=lambda r: r['ms'])
  return (f'Missed: {at64["ms"]:.1f} ms at chunk 64 (target 20), {best["ms"]:.1f} ms at the best chunk of those tried (target 12); '
          f'{refreshed["ms"] / at64["ms"]:.0f} times faster than titans-pytorch with weights refreshed every chunk (target 18), '
          f'{refreshed["ms"] / best["ms"]:.0f} times at chunk {best["chunk"]}. Memory is met: {at64["peak_gib"]:.2f} GiB of temporaries. '
          'Tried on the mixing alone, bf16, forward + backward at chunks of 64 / 128 / 256: first form 35.7 / 27.4 / 27.4 ms; loops '
          'unrolled by four 30.1 / 20.8 / -; levels of the memory apart and row masks instead of full ones in the gradient '
          '29.2 / 21.3 / 21.0; the narrow side of each product scaled and hidden channels kept in bf16 23.2 / 17.7 / 15.7. Keeping all '
          'instead of recomputing took 47.0 / 33.6 / 25.3 before these changes, and five times the memory; '
          'putting loops into CUDA graphs changed nothing. About a third of the time at chunk 128 is between kernels, some '
          'hundreds of which a chunk needs: a kernel of our own is what is left.')


READINGS = {('Neural memory', 'neural_memory-h200'): h200}
