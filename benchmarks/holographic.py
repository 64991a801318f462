"""Time and temporaries of the holographic mixing and of whole layers beside softmax attention of equal width, in one run.

The mixing is bind + slot recurrence + unbind with keys, addresses and picks given (for circular convolution the
transforms of key, value, query and read belong to it). Forward + backward returns the result and the gradients of all
inputs, for both sides. Attention is `jax.nn.dot_product_attention`: cuDNN in bfloat16 on a GPU, XLA in float32 on a CPU.

  python -m benchmarks.holographic --small          two CPU cores, about two minutes
  python -m benchmarks.holographic                  one H200, about four minutes, compilation included
"""
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from memjax.config.mixers import (
  AddressConfig,
  AttentionConfig,
  BindingConfig,
  FormConfig,
  HolographicConfig,
  KeepConfig,
  ReadConfig,
)
from memjax.memory.registry import make_memory
from memjax.ops.binding import resolve_transform
from memjax.ops.chunked import choose_chunk
from memjax.ops.keys import random_keys
from memjax.ops.mixing import holographic_mix

LIMIT_MIB = {'cpu': 3000, 'gpu': 60_000}      # what a form may need by its formula before its row is left out


class Size(NamedTuple):
  """Rows, tokens, heads, channels a head, slots a head."""
  B: int
  L: int
  H: int
  K: int
  S: int


class Mixing(NamedTuple):
  """One row of the table: how it binds, which form, which keep. chunk 0 = automatic."""
  binding: str
  transform: str = ''
  form: str = 'chunk'
  keep: str = 'head'
  chunk: int = 0
  decay: str = 'auto'
  backend: str = 'xla'

  @property
  def label(self) -> str:
    """'elementwise chunk 64'."""
    binding = {'bipolar': 'elementwise', 'hrr': 'convolution'}.get(self.binding, self.binding)
    form = self.form if self.backend == 'xla' else 'fused'
    parts = (binding, self.transform, form, str(self.chunk or ''), '' if self.keep == 'head' else f'{self.keep} keep',
             '' if self.decay == 'auto' else self.decay)
    return ' '.join(part for part in parts if part)


def mix(way: Mixing, key_BxLxHxK, value_BxLxHxK, query_BxLxGxHxK, address_BxLxHxS, pick_BxLxGxHxS, log_keep):
  """The reads [B, L, G, H, K] of all tokens from an empty state."""
  B, _, H, K = key_BxLxHxK.shape
  state = jnp.zeros((B, H, address_BxLxHxS.shape[-1], K), jnp.float32)
  transform = resolve_transform(way.binding, way.transform)
  return holographic_mix(state, (key_BxLxHxK, value_BxLxHxK, query_BxLxGxHxK), address_BxLxHxS, pick_BxLxGxHxS, binding=way.binding,
                         transform=transform, backend=way.backend, log_keep=log_keep, form=way.form, chunk=way.chunk, decay=way.decay,
                         floor=-2.5 if way.keep == 'slot' else -20.0)[1]


def attend(implementation: str, q_BxLxHxK, k_BxLxHxK, v_BxLxHxK):
  """Causal softmax attention."""
  return jax.nn.dot_product_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, is_causal=True, implementation=implementation)


def both_passes(function, cotangent, *arguments):
  """(result, gradients of all arguments)."""
  y, back = jax.vjp(function, *arguments)
  return y, back(cotangent)


@functools.lru_cache(maxsize=4)
def _inputs(size: Size, dtype: str) -> dict[str, jax.Array]:
  """Random tokens: unit addresses, bipolar and phasor keys, values, one cotangent."""
  B, L, H, K, S = size
  kinds = dict(value=(B, L, H, K), query=(B, L, 1, H, K), address=(B, L, H, S), pick=(B, L, 1, H, S), cotangent=(B, L, 1, H, K))
  def make(key):
    made = {n: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (n, shape) in enumerate(kinds.items())}
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True))
    made |= {'address': unit(made['address']), 'pick': unit(made['pick'])}
    token_BxLxH = jnp.arange(B * L * H).reshape(B, L, H)
    for kind in ('bipolar', 'phasor'): made[kind] = random_keys(0, 'benchmark', token_BxLxH, K, kind=kind)
    made['key'] = jax.random.normal(jax.random.fold_in(key, 99), (B, L, H, K)) * K ** -0.5
    return {n: x.astype(dtype) for n, x in made.items()}
  return jax.jit(make)(jax.random.key(0))


def _log_keep(keep: str, size: Size):
  B, L, H, _, S = size
  shapes = {'head': (B, L, H, 1), 'slot': (B, L, H, S), 'static': (1, 1, H, S)}
  return -0.02 * jax.random.uniform(jax.random.key(1), shapes[keep]) if keep in shapes else None


def mixing_job(way: Mixing, size: Size, dtype: str, backward: bool):
  """(function, arguments) of a mixing."""
  x = _inputs(size, dtype)
  key = x[way.binding] if way.binding in ('bipolar', 'phasor') else x['key']
  query = jnp.roll(key, 1, 1)[:, :, None]
  arguments = (key, x['value'], query, x['address'], x['pick'], _log_keep(way.keep, size))
  forward = functools.partial(mix, way)
  return (functools.partial(both_passes, forward), (x['cotangent'], *arguments)) if backward else (forward, arguments)


def attention_job(size: Size, dtype: str, backward: bool):
  """(function, arguments) of attention of the same rows, tokens and width."""
  x, forward = _inputs(size, dtype), functools.partial(attend, 'cudnn' if common.on_gpu() else 'xla')
  arguments = (x['query'][:, :, 0], x['key'], x['value'])
  return (functools.partial(both_passes, forward), (x['cotangent'][:, :, 0], *arguments)) if backward else (forward, arguments)


def layer_config(name: str, size: Size):
  """The mixer of a layer by the name of its row: a memory, or the one of S slots with something left out."""
  few = HolographicConfig(heads=size.H, slots=size.S)
  off = {'conv': dict(conv_width=0), 'recomputation': dict(form=FormConfig(remat=False)), 'norm': dict(read=ReadConfig(norm='')),
         'keep': dict(keep=KeepConfig(kind='none')), 'binding': dict(binding=BindingConfig(kind='none')),
         'gate': dict(address=AddressConfig(gate=''))}
  named = {'attention': AttentionConfig(heads=size.H), f'holographic S={size.S}': few, 'holographic S=K': HolographicConfig(heads=size.H)}
  return named[name] if name in named else dataclasses.replace(few, **off[name.removeprefix('without ')])


PARTS = tuple(f'without {part}' for part in ('conv', 'recomputation', 'norm', 'keep', 'binding', 'gate'))


def layer_job(memory: str, size: Size, dtype: str):
  """(function, arguments) of a whole layer, projections included: result, gradients of parameters and input."""
  B, L, H, K, _ = size
  config = layer_config(memory, size)
  module = make_memory(config, H * K, dtype=jnp.dtype(dtype), parent=None)
  position = jnp.arange(L)[None] + jnp.ones((B, 1), jnp.int32)                  # no document starts inside
  x = jax.random.normal(jax.random.key(0), (B, L, H * K), dtype)
  params = jax.jit(lambda key: module.init(key, x[:, :2], module.init_state(B), position_BxL=position[:, :2]))(jax.random.key(1))
  def attention(module, x):
    inputs = module.project(x, position)
    y = attend('cudnn' if common.on_gpu() else 'xla', inputs.q_BxLxHxK, inputs.k_BxLxGxK, inputs.v_BxLxGxK)
    return module.readout(x, y.reshape(B, L, -1))
  def forward(params, x):
    if memory == 'attention': return module.apply(params, x, method=attention)
    return module.apply(params, x, module.init_state(B), position_BxL=position, reset_BxL=None)[0]
  return functools.partial(both_passes, forward), (jnp.ones_like(x), params, x)


def fits(form: str, size: Size, dtype: str) -> bool:
  """Whether the form's large arrays, logits or states per token, stay under the limit of this machine."""
  B, L, H, K, S = size
  item = jnp.dtype(dtype).itemsize
  if form == 'attention': need = 0 if common.on_gpu() else 3 * B * H * L * L * item
  else: need = 0 if form == 'chunk' else 6 * B * L * H * S * K * 4
  return need / common.MEBI <= LIMIT_MIB['gpu' if common.on_gpu() else 'cpu']


def ways(preset: str, length: int) -> list[Mixing]:
  """The rows of a table: all forms, bindings and keeps; 'small' those of the targets; 'length' what scales; 'gpu' chunk sizes too."""
  auto = [Mixing('bipolar'), Mixing('phasor'), Mixing('hrr', 'dft')]
  slow = [Mixing('bipolar', form='associative')]
  if preset == 'tiny': return [*auto[:1], *slow, Mixing('hrr', 'fft', form='scan')]
  if preset == 'length': return auto[:2] + slow
  if preset == 'small': return [*auto, Mixing('hrr', 'fft'), Mixing('bipolar', form='scan'), *slow]
  if preset == 'forms':
    others = [Mixing(kind, form=form) for kind in ('bipolar', 'phasor') for form in ('scan', 'associative')]
    keeps = [Mixing('bipolar', keep=keep) for keep in ('none', 'static', 'slot')] + [Mixing('bipolar', keep='slot', decay='exact')]
    return [*auto, Mixing('hrr', 'fft'), *others, Mixing('hrr', 'dft', form='associative'), *keeps]
  chosen = automatic(length)
  fused = [Mixing(*way, backend='pallas') for way in (('bipolar',), ('hrr', 'dft'), ('phasor',))]
  if preset == 'fused': return fused
  sizes = sorted({64, 128, 256, chosen})
  rows = [Mixing(kind, transform, chunk=size) for kind, transform in (('bipolar', ''), ('hrr', 'dft')) for size in sizes]
  rows += [Mixing('phasor', chunk=chosen), Mixing('hrr', 'fft', chunk=chosen), Mixing('bipolar', keep='slot')]
  return rows + fused + (slow if length <= 2048 else [])


def automatic(length: int) -> int:
  """The chunk that head keep takes by default."""
  return choose_chunk(length, 0, is_slot=False, floor=-20.0)


def run_table(preset: str, size: Size, dtype: str, *, passes: list[str], repeats: int, inner: int) -> list[dict[str, Any]]:
  """One dict a row: mixing or attention, per pass; ratios are to attention of the same pass."""
  rows, peer = ways(preset, size.L), Size(size.B, size.L, 8 if size.H == 1 else size.H, 0, 0)
  peer = peer._replace(K=size.H * size.K // peer.H, S=8)
  out = []
  for name in passes:
    backward = name == 'both'
    jobs = {way.label: mixing_job(way, size, dtype, backward) for way in rows if fits(way.form, size, dtype)}
    if size.S != size.K and preset in ('gpu', 'fused'):
      full = [Mixing('phasor', backend='pallas')] if preset == 'fused' else [Mixing('bipolar'), Mixing('phasor')]
      jobs |= {f'{way.label} S=K': mixing_job(way, size._replace(S=size.K), dtype, backward) for way in full}
    if fits('attention', peer, dtype): jobs['attention'] = attention_job(peer, dtype, backward)
    times = common.time_cases(common.compile_cases(jobs).values(), repeats=repeats, inner=inner)
    reference = times.get('attention', {}).get('ms')
    for row, values in times.items():
      out.append({'pass': name, 'row': row, 'automatic': row.endswith(f'chunk {automatic(size.L)}'), **size._asdict(), **values,
                  'times_attention': reference / values['ms'] if reference else None})
  return out


def run_layers(size: Size, dtype: str, *, repeats: int, inner: int, parts: bool = False) -> list[dict[str, Any]]:
  """One dict a layer, forward + backward with projections; `parts` adds the layer of few slots with one thing left out at a time."""
  names = [f'holographic S={size.S}', 'holographic S=K'] + (['attention'] if fits('attention', size._replace(H=8), dtype) else [])
  names += PARTS if parts else ()
  jobs = {name: layer_job(name, size, dtype) for name in names}
  times = common.time_cases(common.compile_cases(jobs).values(), repeats=repeats, inner=inner)
  reference = times.get('attention', {}).get('ms')
  return [{'pass': 'both', 'row': f'layer: {name}', **size._asdict(), **values, 'times_attention': reference and reference / values['ms']}
          for name, values in times.items()]


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The speed-ups that the project promises, forward + backward; None where this run lacks a row."""
  def ratio(slow, fast, **size):
    found = {r['row']: r['ms'] for r in rows if r['pass'] == 'both' and size.items() <= r.items()}
    return found[slow] / found[fast] if slow in found and fast in found else None
  if not common.on_gpu():
    size = dict(B=4, L=1024, H=1, K=512, S=8)
    goals = [('softmax attention', 'attention', 10.0), ('associative scan', 'elementwise associative', 4.0)]
    return [{'what': f'elementwise chunk against {name}, B4 L1024 D512 S8', 'target': goal,
             'value': ratio(row, 'elementwise chunk', **size)} for name, row, goal in goals]
  goals = [('elementwise chunk', 32768, 4.0), ('convolution dft chunk', 32768, 4.0), ('elementwise chunk', 2048, 0.7)]
  return [{'what': f'{what} L={L}, automatic chunk, against cuDNN', 'target': goal,
           'value': ratio('attention', f'{what} {automatic(L)}', L=L)} for what, L, goal in goals] + fused_targets(rows)


def fused_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """What the fused kernels promise at 65,536 tokens, 16 x 64, 8 slots: milliseconds allowed over taken, and speed against cuDNN."""
  taken = {(r['row'], r['L']): r['ms'] for r in rows if r['pass'] == 'both' and r['S'] == 8}
  over = lambda x, y: x / y if x and y else None
  out = [{'what': f'{row}: {most} ms over those taken, L={L}', 'target': 1.0, 'value': over(most, taken.get((row, L)))}
         for row, most in (('elementwise fused', 1.5), ('convolution dft fused', 2.5)) for L in (2048, 8192, 32768)]
  return out + [{'what': f'{row} L={L}, against cuDNN', 'target': goal, 'value': over(taken.get(('attention', L)), taken.get((row, L)))}
                for row in ('elementwise fused', 'convolution dft fused') for L, goal in ((2048, 2.0), (32768, 15.0))]


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the tables; returns the result."""
  make = common.parser('holographic', __doc__)
  make.add_argument('--lengths', type=common.numbers, default=[], help='tokens a row; default 256 to 32768 (CPU), 2048 to 32768 (GPU)')
  make.add_argument('--tokens', type=int, default=0, help='rows x tokens at every length; default 4096 (CPU), 65536 (GPU)')
  make.add_argument('--passes', type=common.words, default=[], help='forward,both; default both of them on CPU, both on GPU')
  make.add_argument('--repeats', type=int, default=0, help='timed rounds; default 5')
  make.add_argument('--tiny', action='store_true', help='a few rows at toy sizes')
  make.add_argument('--parts', action='store_true', help='whole layers also with one part left out at a time')
  make.add_argument('--backend', choices=('all', 'pallas'), default='all', help='pallas: fused kernels beside attention alone')
  make.add_argument('--no_mixing', action='store_true', help='whole layers only')
  make.add_argument('--no_layers', action='store_true', help='leave the whole layers out')
  a = make.parse_args(argv)
  gpu, repeats = common.on_gpu(), a.repeats or (3 if a.small else 5)
  dtype, timing = ('bfloat16', dict(repeats=repeats, inner=4)) if gpu else ('float32', dict(repeats=repeats, inner=1))
  tokens = a.tokens or (65536 if gpu else 4096)
  lengths = a.lengths or ([2048, 8192, 32768] if gpu else [256, 4096] if a.small else [256, 2048, 4096, 8192, 32768])
  shape = dict(H=16, K=64, S=8) if gpu else dict(H=1, K=16 if a.tiny else 512, S=8)
  preset = 'fused' if a.backend == 'pallas' else 'gpu' if gpu else 'tiny' if a.tiny else 'length'
  tables = [(preset, Size(max(tokens // L, 1), L, **shape)) for L in lengths]
  if not gpu and not a.tiny: tables.insert(0, ('small' if a.small else 'forms', Size(4, 1024, **shape)))
  passes, rows = a.passes or (['both'] if gpu or a.small else ['forward', 'both']), []
  for preset, size in [] if a.no_mixing else tables:
    table = run_table(preset, size, dtype, passes=passes, **timing)
    report(f'Mixing: B={size.B} L={size.L} {size.H} x {size.K}, {size.S} slots, {dtype}', table)
    rows += table
  layer = dict(H=shape['H'] if gpu else 2 if a.tiny else 8, K=64 if gpu else 8 if a.tiny else 64, S=8)
  layer_lengths = [] if a.no_layers else lengths if gpu or a.tiny else [1024] if a.small else [256, 1024, 4096]
  sizes = [Size(max(tokens // L, 1), L, **layer) for L in layer_lengths]
  layers = [row for size in sizes for row in run_layers(size, dtype, parts=a.parts, **timing)]
  if layers: report('Whole layers, forward + backward', layers)
  judged = targets(rows)
  common.judge(judged)
  result = {'dtype': dtype, 'repeats': repeats, 'seeds': [0], 'rows': rows, 'layers': layers, 'targets': judged}
  common.save('holographic', a.output, result, commit=a.commit)
  return result


def report(title: str, rows: list[dict[str, Any]]) -> None:
  """Prints one table."""
  shown = [{**r, 'MiB': round(r['temporary_mib']), 'row': r['row'] + (' (automatic)' if r.get('automatic') else '')} for r in rows]
  common.show(title, shown, ('pass', 'row', 'B', 'L', 'ms', 'min_ms', 'times_attention', 'MiB', 'compile_s'))


if __name__ == '__main__':
  main()
