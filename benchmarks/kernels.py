"""Time of the fused kernels of holographic mixing, each alone and all together, by chunk, tokens a program, warps and stages.

  python -m benchmarks.kernels --small          interpreted on a CPU: that it runs, not how fast
  python -m benchmarks.kernels                  one H200, about a minute and a half, most of it tracing
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.holographic import Size, attention_job
from memjax.ops import pallas_mixing as fused
from memjax.ops.binding import PACKED
from memjax.ops.pallas_chunk import Plan

READS = {'write_kernel': ('key', 'value', 'address'), 'read_kernel': ('key', 'value', 'query', 'address', 'pick', 'start'),
         'read_back_kernel': ('key', 'value', 'query', 'address', 'pick', 'dy', 'start'),
         'write_back_kernel': ('key', 'value', 'query', 'address', 'pick', 'dy', 'dend', 'states', 'picked')}
GIVES = {'write_kernel': (), 'read_kernel': ('y',), 'read_back_kernel': ('query', 'pick', 'states', 'picked'),
         'write_back_kernel': ('key', 'value', 'address', 'log')}
GRID = ((16, 512, 1, 1), (16, 512, 1, 2), (16, 512, 2, 1), (32, 512, 1, 1), (32, 512, 2, 1), (32, 512, 2, 2), (32, 512, 4, 1),
        (64, 512, 4, 1), (64, 2048, 4, 2))
WIDE = ((16, 512, 1, 1), (64, 2048, 4, 1), (32, 512, 2, 1))      # where a head has as many slots as channels


class Way(NamedTuple):
  """One kernel, or all of them forward and backward; chunk 0 = what the library takes."""
  kernel: str
  binding: str
  chunk: int = 0
  tokens: int = 0
  warps: int = 0
  stages: int = 0


@functools.lru_cache(maxsize=4)
def inputs(size: Size) -> dict[str, jax.Array]:
  """Random bfloat16 tokens with one keep a head, and the cotangent of the reads."""
  B, L, H, K, S = size
  shapes = {**dict.fromkeys(('key', 'value', 'query', 'dy'), (B, L, H, K)), **dict.fromkeys(('address', 'pick'), (B, L, H, S))}
  def make(key):
    made = {n: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (n, shape) in enumerate(shapes.items())}
    for n in ('address', 'pick'): made[n] *= jax.lax.rsqrt(jnp.sum(made[n] ** 2, -1, keepdims=True))
    return {'log': -0.02 * jax.random.uniform(key, (B, L, H)), **{n: x.astype(jnp.bfloat16) for n, x in made.items()}}
  return jax.jit(make)(jax.random.key(0))


def launch_of(way: Way) -> fused.Launch:
  """The same warps and stages for every kernel."""
  return fused.Launch(*((way.warps, way.stages),) * 4, programs=1)


def together(way: Way, size: Size):
  """(function, arguments) of reads and all gradients."""
  x = inputs(size)
  B, _, H, K, S = size
  given = dict(chunk=way.chunk, segment=way.tokens // way.chunk, launch=launch_of(way)) if way.chunk else {}
  def run(x):
    def mix(x):
      return fused.pallas_mix(jnp.zeros((B, H, S, K)), (x['key'], x['value'], x['query']), x['address'], x['pick'], binding=way.binding,
                              transform='dft' if way.binding in PACKED else '', log_keep=x['log'][..., None], **given)[1]
    y, back = jax.vjp(mix, {n: v for n, v in x.items() if n != 'dy'})
    return y, back(x['dy'])
  return run, (x,)


def alone(way: Way, size: Size):
  """(function, arguments) of one kernel on made-up states."""
  x, packed = inputs(size), way.binding in PACKED
  plan = Plan(way.chunk, way.tokens // way.chunk, size.S, 2 if packed else 1, packed, 'head', False, packed)
  shapes = {'state': fused.state_shape(plan, x), 'states': fused.state_shape(plan, x, chunks=1), 'picked': x['log'], 'y': x['value']}
  shapes = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in {**x, **shapes}.items()}
  filled = lambda n: jnp.full(shapes[n].shape, 0.1, shapes[n].dtype)
  made = {'start': 'state', 'dend': 'state', 'states': 'states', 'picked': 'picked'}
  arrays = {**x, **fused.basis_of(way.binding, 'dft', size.K, jnp.bfloat16)}
  arrays |= {n: filled(v) for n, v in made.items() if n in READS[way.kernel]}
  outputs = {n: shapes[n] for n in (*GIVES[way.kernel], 'state')}
  call = functools.partial(fused.call_kernel, getattr(fused.kernels, way.kernel), (plan, launch_of(way)), outputs=outputs)
  return call, (fused.select(arrays, *READS[way.kernel]),)


def time_rows(ways: list[Way], size: Size, *, repeats: int, inner: int) -> list[dict[str, Any]]:
  """One dict a way, and attention of the same shape (GPU)."""
  jobs = {str(n): (alone if way.kernel in READS else together)(way, size) for n, way in enumerate(ways)}
  if common.on_gpu(): jobs['attention'] = attention_job(size, 'bfloat16', True)
  times = common.time_cases(common.compile_cases(jobs).values(), repeats=repeats, inner=inner)
  named = {name: ways[int(name)]._asdict() if name != 'attention' else {'kernel': name} for name in times}
  return [{**size._asdict(), **named[name], 'ms': values['ms'], 'min_ms': values['min_ms']} for name, values in times.items()]


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  make = common.parser('kernels', __doc__)
  make.add_argument('--lengths', type=common.numbers, default=[2048, 8192, 32768], help='tokens a row; kernels alone at the second')
  a = make.parse_args(argv)
  a.small |= not common.on_gpu()                 # interpreted elsewhere, which says nothing about time
  bindings, total = ('bipolar', 'hrr'), 64 if a.small else 65536
  lengths = [32] if a.small else a.lengths
  size = lambda L, S=8: Size(max(total // L, 1), L, 2 if a.small else 16, 16 if a.small else 64, S)
  settings, rows = [(16, 32, 1, 1)] if a.small else GRID, []
  timing = dict(repeats=3, inner=1 if a.small else 10)
  for L in lengths:
    whole = [(), (16, min(512, L), 1, 1), (64, min(2048, L), 4, 2)][:1 if a.small else 3]
    ways = [Way('all', binding, *way) for binding in bindings for way in whole]
    if lengths[len(lengths) // 2] == L: ways += [Way(kernel, binding, *way) for kernel in READS for binding in bindings for way in settings]
    rows += time_rows(ways, size(L), **timing)
  if not a.small: rows += time_rows([Way(kernel, 'bipolar', *way) for kernel in READS for way in WIDE], size(lengths[1], 64), **timing)
  common.show('Kernels', rows, ('kernel', 'binding', 'L', 'S', 'chunk', 'tokens', 'warps', 'stages', 'ms'))
  result = {'dtype': 'bfloat16', 'seeds': [0], 'rows': rows}
  common.save('kernels', a.output, result, commit=a.commit)
  return result


if __name__ == '__main__':
  main()
