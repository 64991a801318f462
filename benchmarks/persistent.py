"""Writes of a neural memory, forward: the library's kernels, chunk by chunk, beside one Mosaic GPU kernel for all chunks.

Both give what reads and the gradient need; the JSON holds how far they are from each other (they round operands alike, and differences
of rounding grow from chunk to chunk). The one kernel is an experiment (`persistent_kernel.py`) and not in the library.

  python -m benchmarks.persistent --small    on a CPU, the library's kernels by interpretation: that it runs
  python -m benchmarks.persistent            an H100 or H200, a minute
"""
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, persistent_kernel
from memjax.ops import pallas_neural

SCALE = 0.5


def inputs(chunks: int, rows: int, heads: int, width: int = 256) -> tuple[dict, dict, dict]:
  """Random (learned start, memory, tokens) of chunks of 64 tokens with keys of 64 channels; a document starts in the second chunk."""
  key, C, K = iter(jax.random.split(jax.random.key(0), 12)), 64, 64
  normal = lambda size, *shape: size * jax.random.normal(next(key), shape)
  uniform = lambda size, *shape: size * jax.random.uniform(next(key), shape)
  up, down = (heads, K, width), (heads, width, K)
  start = {'init_up': normal(0.1, 1, *up), 'init_down': normal(0.1, 1, *down), 'init_gain': normal(0.1, 1, heads, K)}
  memory = {f'{side}{q}': normal(0.01, rows, *shape) for side, shape in (('up', up), ('down', down)) for q in range(2)}
  lead = (chunks, rows, heads)
  tokens = {'key': normal(1 / 8, *lead, C, K).astype(jnp.bfloat16), 'value': normal(1, *lead, C, K).astype(jnp.bfloat16),
            'weight': uniform(1, *lead, C), 'push': uniform(0.02, *lead, 2, C),
            'turn': jnp.broadcast_to(jnp.array([[0.9, 0.5], [0, 0.4]]), (*lead, 2, 2)),
            'hold': jnp.ones((chunks, rows)).at[1, 0].set(0), 'flow': jnp.ones((chunks, rows))}
  return start, memory, tokens


def by_chunks(start: dict, memory: dict, tokens: dict) -> dict[str, jax.Array]:
  """What the kernels of the library keep, and the memory after all chunks."""
  launch = pallas_neural.SHORT
  plan = pallas_neural.Plan(2, rows=launch.rows, scale=SCALE, dtype=jnp.dtype(jnp.bfloat16), is_compiled=common.on_gpu())
  (new, seen), (_, _, kept) = pallas_neural._write_forward((plan, launch), start, memory, tokens)
  return {**kept, **new, 'loss': seen['loss']}


def by_one(start: dict, memory: dict, tokens: dict) -> dict[str, jax.Array]:
  """The same by one kernel."""
  return persistent_kernel.write(start, memory, tokens, scale=SCALE)


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves; returns the result."""
  make = common.parser('persistent', __doc__)
  make.add_argument('--repeats', type=int, default=15)
  a = make.parse_args(argv)
  sizes = (2, 1, 1) if a.small else (32, 8, 16)
  given, jobs = inputs(*sizes), {'kernels of the library': by_chunks}
  if getattr(jax.devices()[0], 'compute_capability', '') == '9.0': jobs['one kernel'] = by_one
  else: print('one kernel is left out: it needs a GPU of compute capability 9.0', flush=True)
  cases = common.compile_cases({name: (function, given) for name, function in jobs.items()})
  rows = [{'row': name, **time} for name, time in common.time_cases(cases.values(), repeats=a.repeats).items()]
  result = {'sizes': dict(zip(('chunks', 'rows', 'heads'), sizes, strict=True)), 'rows': rows}
  if 'one kernel' in cases:
    found, wanted = (cases[name].call(*given) for name in ('one kernel', 'kernels of the library'))
    result['differences'] = common.differences({name: found[name][:len(x)] for name, x in wanted.items()}, wanted)
    print('differences', {name: f'{x:.1e}' for name, x in result['differences'].items()}, flush=True)
  common.save('persistent', a.output, result, commit=a.commit)
  title = 'Writes of {chunks} chunks, {rows} rows, {heads} heads, forward'.format(**result['sizes'])
  common.show(title, rows, ('row', 'ms', 'min_ms', 'compile_s'))
  return result


if __name__ == '__main__':
  main()
