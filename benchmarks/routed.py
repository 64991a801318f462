"""Routed attention to chapters of a bank: time and temporaries beside gathered keys and values, and beside a transformer layer.

small: 2,048 tokens, 5 of 50 chapters of 64 entries, fp32, every implementation against the plain gather.
layer: 65,536 tokens, 20 of 100 chapters of 1,024 entries, 12 heads of 128, bf16: a whole memory layer (router, projections of
queries, of the bank and of the result) beside one layer of Qwen2.5-1.5B's sizes (causal attention of 12 heads with 2 key heads
through cuDNN, SwiGLU of 8,960), forward + backward with the gradients of parameters and input. memory: the same attention
compiled and not run. probe: the GPU path against the gathered oracle. Peak memory is what XLA plans beside arguments and results.

  python -m benchmarks.routed --small               two CPU cores, about a minute: small and memory
  python -m benchmarks.routed --probe --layer       one H200, about six minutes, compilation included
"""
import concurrent.futures
import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from memjax.ops.routed_attention import routed_attend

PARTS = ('y', 'dq', 'dk', 'dv', 'dw', 'dk_shared', 'dv_shared')


class Size(NamedTuple):
  """Tokens, chapters, entries of a chapter, chapters a token, heads, key heads, channels a head."""
  Z: int
  P: int
  T: int
  J: int
  H: int
  G: int
  K: int


SMALL = Size(2048, 50, 64, 5, 4, 4, 32)
EXAMPLE = Size(65536, 100, 1024, 20, 12, 12, 128)
TOY = Size(512, 10, 64, 3, 2, 2, 32)


def inputs(size: Size, dtype: str, *, skew: float = 0.0):
  """q, k, v, log weights, ids of a random router; `skew` adds a ramp to its logits."""
  Z, P, T, J, H, G, K = size
  def make(key):
    q, k, v, z = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(((Z, H, K), (P, T, G, K), (P, T, G, K), (Z, P))))
    top, ids = jax.lax.top_k(z + skew * jnp.arange(P)[None] / P, J)
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), jax.nn.log_softmax(top, -1), ids
  return jax.jit(make)(jax.random.key(0))


def naive(q, k, v, log_weight, ids):
  """Mixture over chapters with gathered keys and values, as one writes it down."""
  k, v = k[ids], v[ids]
  s = jnp.einsum('zhk,zjthk->zhjt', q, k) * q.shape[-1] ** -0.5
  return jnp.einsum('zhjt,zjthk,zj->zhk', jax.nn.softmax(s, -1), v, jnp.exp(log_weight))


def attend(q, k, v, log_weight, ids, **options):
  """`routed_attend` in the order of `inputs`."""
  return routed_attend(q, k, v, ids, log_weight_ZxJ=log_weight, **options)


def both(function: Callable, trained: int = 4) -> Callable:
  """(result, gradients of the first `trained` arguments for a cotangent of ones)."""
  def run(*arguments):
    y, pull = jax.vjp(lambda *some: function(*some, *arguments[trained:]), *arguments[:trained])
    return y, pull(jnp.ones_like(y))
  return run


# A row that fails is a row -------------------------------------------------------------------------------------------------------

def _guarded(row: dict[str, Any], function: Callable, *arguments) -> Any:
  """The function's result; what it raises becomes the row's error."""
  try: return function(*arguments)
  except Exception as error:      # whatever a compiler or a device raises: the other rows still run
    row['error'] = f'{type(error).__name__}: {error}'[:400]
    print(traceback.format_exc()[-1500:], flush=True)
    return None


def measure(jobs: list[tuple[dict[str, Any], Callable, tuple]], *, repeats: int, inner: int, run: bool = True, keep=None):
  """The rows with compile_s, temporary_mib, ms, min_ms, or error: compiled together, timed one by one. `keep(rows)` after each."""
  rows = [row for row, _, _ in jobs]
  compile_row = lambda row, function, arguments: _guarded(row, common.compile_case, row['row'], function, arguments)
  with concurrent.futures.ThreadPoolExecutor(8 if common.on_gpu() else 1) as pool:
    cases = list(pool.map(lambda job: compile_row(*job), jobs))
  for row, case in zip(rows, cases, strict=True):
    if case is None: continue
    row.update(compile_s=case.compile_s, temporary_mib=case.temporary_mib)
    if run: row.update((_guarded(row, lambda: common.time_cases([case], repeats=repeats, inner=inner)) or {}).get(case.name, {}))
    if keep is not None: keep(rows)
  return rows


# Small: against the plain gather -------------------------------------------------------------------------------------------------

def small_rows(size: Size, *, repeats: int) -> list[dict[str, Any]]:
  """Every implementation and the plain gather, forward and with gradients, fp32 mixture."""
  arguments = inputs(size, 'float32')
  ways = {'naive gather': naive, 'gather': functools.partial(attend, impl='gather'), 'scan': functools.partial(attend, impl='scan'),
          'tiles': functools.partial(attend, impl='tiles'), 'tiles 64': functools.partial(attend, impl='tiles', block=64),
          'capacity': functools.partial(attend, impl='capacity')}
  jobs = [({'pass': name, 'row': row}, function if name == 'forward' else both(function), arguments)
          for name in ('forward', 'both') for row, function in ways.items()]
  rows = measure(jobs, repeats=repeats, inner=1)
  slow = {row['pass']: row.get('ms') for row in rows if row['row'] == 'naive gather'}
  for row in rows:
    if row.get('ms') and slow[row['pass']]: row['times_naive'] = slow[row['pass']] / row['ms']
  return rows


# Memory: compiled only -----------------------------------------------------------------------------------------------------------

def memory_rows(size: Size) -> list[dict[str, Any]]:
  """Temporaries of the attention at the example's shape, nothing run; key heads as many as heads, and 2."""
  jobs = []
  for G in (size.H, 2):
    Z, P, T, J, H, _, K = size
    half = [jax.ShapeDtypeStruct(s, 'bfloat16') for s in ((Z, H, K), (P, T, G, K), (P, T, G, K))]
    arguments = (*half, jax.ShapeDtypeStruct((Z, J), 'float32'), jax.ShapeDtypeStruct((Z, J), 'int32'))
    ways = {'tiles': dict(impl='tiles'), 'tiles joint_bias': dict(impl='tiles', mode='joint_bias'),
            'tiles 256': dict(impl='tiles', block=256), 'scan': dict(impl='scan'), 'capacity': dict(impl='capacity'),
            'gather, one chunk': dict(impl='gather', token_chunk=Z)}
    for row, options in ways.items():
      function = functools.partial(attend, **options)
      jobs += [({'pass': name, 'row': row, 'G': G}, run, arguments) for name, run in (('forward', function), ('both', both(function)))]
  rows = measure(jobs, repeats=0, inner=0, run=False)
  for row in rows: row['GiB'] = row['temporary_mib'] / 1024 if 'temporary_mib' in row else None
  return rows


# Layer: beside a transformer layer -----------------------------------------------------------------------------------------------

def _norm(x):
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _weights(shapes: dict[str, tuple[int, ...]], dtype: str):
  def make(key): return {n: (s[-2] ** -0.5 * jax.random.normal(jax.random.fold_in(key, i), s)).astype(dtype)
                         for i, (n, s) in enumerate(shapes.items())}
  return jax.jit(make)(jax.random.key(1))


def memory_layer(w, x_ZxD, *, size: Size, skew: float = 0.0, **options):
  """x + W_o attend(W_q norm(x), chapters of W_k and W_v of the bank) with a router of the same norm(x)."""
  Z, P, T, J, H, G, K = size
  x = _norm(x_ZxD)
  logit = jnp.dot(x, w['router'], preferred_element_type=jnp.float32) + skew * jnp.arange(P, dtype=jnp.float32)[None] / P
  top, ids = jax.lax.top_k(logit, J)
  k, v = ((w['bank'] @ w[name]).reshape(P, T, G, K) for name in ('key', 'value'))
  y = attend((x @ w['query']).reshape(Z, H, K), k, v, jax.nn.log_softmax(top, -1), ids, **options)
  return x_ZxD + y.reshape(Z, H * K) @ w['out']


def backbone_layer(w, x_ZxD, *, rows: int, size: Size):
  """One pre-norm layer: causal attention of H heads with 2 key heads, then SwiGLU."""
  Z, H, K = size.Z, size.H, size.K
  x = _norm(x_ZxD)
  q, k, v = ((x @ w[name]).reshape(rows, Z // rows, -1, K) for name in ('query', 'key', 'value'))
  y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn' if common.on_gpu() else 'xla')
  x_ZxD = x_ZxD + y.reshape(Z, H * K) @ w['out']
  x = _norm(x_ZxD)
  return x_ZxD + (jax.nn.silu(x @ w['gate']) * (x @ w['up'])) @ w['down']


def sorted_attention(size: Size, dtype: str):
  """(function, arguments): the same number of rows, sorted for free, by cuDNN alone: what the attention cannot be faster than."""
  Z, P, T, J, H, G, K = size
  q = jnp.ones((P, -(-Z * J // P // 64) * 64, H, K), dtype)
  k = jax.random.normal(jax.random.key(3), (P, T, G, K), dtype)
  return functools.partial(jax.nn.dot_product_attention, implementation='cudnn' if common.on_gpu() else 'xla'), (q, k, k)


def layer_jobs(size: Size, dtype: str, rows: int):
  """(row, function, arguments) of the backbone layer, of memory layers, and of their attention alone."""
  D = size.H * size.K
  x = jax.random.normal(jax.random.key(2), (size.Z, D), dtype)
  F = round(8960 * D / 1536)
  peer = _weights(dict(query=(D, D), key=(D, 2 * size.K), value=(D, 2 * size.K), out=(D, D), gate=(D, F), up=(D, F), down=(F, D)), dtype)
  jobs = [({'row': 'attention + MLP layer', 'pass': 'both'}, both(functools.partial(backbone_layer, rows=rows, size=size), 2), (peer, x))]
  path = dict(impl='cudnn' if common.on_gpu() else 'capacity')
  ways: dict[str, dict[str, Any]] = {'auto': {}, 'kept partials': dict(remat=False)}
  ways |= {f'block {b}': dict(block=b, **path) for b in (256, 512, 1024)}
  ways |= {f'chunk {size.Z // n}': dict(token_chunk=size.Z // n, **path) for n in (16, 4, 2)}
  ways |= {'joint': dict(mode='joint'), 'joint_bias': dict(mode='joint_bias'), 'skewed': dict(skew=4.0)}
  for G in (size.H, 2):
    some = size._replace(G=G)
    w = _weights(dict(query=(D, D), out=(D, D), router=(D, size.P), key=(D, G * size.K), value=(D, G * size.K),
                      bank=(size.P * size.T, D)), dtype)
    for name, options in ways.items() if size.H == G else [('auto', {}), ('kept partials', dict(remat=False))]:
      layer = functools.partial(memory_layer, size=some, **options)
      jobs.append(({'row': f'memory layer, {name}', 'pass': 'both', 'G': G}, both(layer, 2), (w, x)))
    arguments = inputs(some, dtype)
    for name, wrap in (('forward', lambda f: f), ('both', both)):
      jobs.append(({'row': 'attention alone, auto', 'pass': name, 'G': G}, wrap(attend), arguments))
      function, alone = sorted_attention(some, dtype)
      run = function if name == 'forward' else both(function, 3)
      jobs.append(({'row': 'cuDNN, rows sorted for free', 'pass': name, 'G': G}, run, alone))
  slow = both(functools.partial(attend, impl='tiles'))
  jobs.append(({'row': 'attention alone, XLA tiles', 'pass': 'both', 'G': 2}, slow, arguments))
  return jobs


def layer_rows(size: Size, dtype: str, *, rows: int, only: str, repeats: int, keep: Callable) -> list[dict[str, Any]]:
  """One dict a layer, all of them given to `keep` after each; times_layer is its time in transformer layers, TFLOP/s those of
  its attention (2.5 times as many backward)."""
  is_wanted = lambda row: not only or 'MLP' in row or any(word in row for word in only.split(','))
  jobs = [job for job in layer_jobs(size, dtype, rows) if is_wanted(job[0]['row'])]
  flops = 4 * size.Z * size.J * size.T * size.H * size.K
  def finish(rows):
    unit = rows[0].get('ms')
    for row in rows:
      if not row.get('ms'): continue
      if unit: row['times_layer'] = row['ms'] / unit
      if 'MLP' not in row['row']: row['TFLOP/s'] = flops * (1 if row['pass'] == 'forward' else 3.5) / row['ms'] / 1e9
    keep(rows)
  return measure(jobs, repeats=repeats, inner=2, keep=finish)


# Probe: the GPU path against the oracle ------------------------------------------------------------------------------------------

def probe_rows(size: Size, dtype: str, impl: str) -> list[dict[str, Any]]:
  """Relative errors (to the largest entry) of results and gradients in 16 bits against gathered fp32, with tiles beside."""
  arguments = inputs(size, dtype, skew=12.0)                          # some chapters overflow a round, some are never chosen
  arguments = (*arguments[:4], arguments[4].at[::7, 0].set(-1))
  shared = tuple(jax.random.normal(jax.random.key(i), (64, size.G, size.K), dtype) for i in (5, 6))
  out = []
  for mode in ('mixture', 'joint', 'joint_bias'):
    def run(q, k, v, log_weight, k_shared, v_shared, ids, **options):
      return attend(q, k, v, log_weight, ids, mode=mode, shared_kv=(k_shared, v_shared), routed_scale=1.5, **options)
    def errors(row, **options):
      given = (*arguments[:4], *shared, arguments[4])
      exact = [x.astype('float32') if x.dtype == arguments[0].dtype else x for x in given]
      with jax.default_matmul_precision('highest'): want = jax.jit(both(functools.partial(run, impl='gather'), 6))(*exact)
      got = jax.jit(both(functools.partial(run, **options), 6))(*given)
      for name, a, b in zip(PARTS, (got[0], *got[1]), (want[0], *want[1]), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        row[name] = float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-6))
      row['worst'] = max(row[name] for name in PARTS)
    for name, options in (('tiles', dict(impl='tiles')), (impl, dict(impl=impl, token_chunk=size.Z // 4)),
                          (f'{impl} kept', dict(impl=impl, remat=False)), (f'{impl} block 64', dict(impl=impl, block=64))):
      row = {'row': name, 'mode': mode}
      _guarded(row, functools.partial(errors, row, **options))
      row['good'] = row.get('worst', 1.0) < 0.04
      out.append(row)
  return out


COLUMNS = ('pass', 'row', 'G', 'ms', 'min_ms', 'times_layer', 'times_naive', 'TFLOP/s', 'MiB', 'compile_s', 'error')


def show(title: str, rows: list[dict[str, Any]], columns=COLUMNS) -> None:
  """Prints a table, without the columns that no row has."""
  rows = [{**row, 'MiB': round(row['temporary_mib'])} if 'temporary_mib' in row else row for row in rows]
  common.show(title, rows, [c for c in columns if any(c in row for row in rows)])


def plain_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Tiles against the plain gather, both passes."""
  found = {r['pass']: r.get('times_naive') for r in rows if r['row'] == 'tiles'}
  return [{'what': f'tiles against the plain gather, {name}', 'value': value, 'target': 15.0} for name, value in found.items()]


def layer_targets(rows: list[dict[str, Any]], heads: int) -> list[dict[str, Any]]:
  """At most two transformer layers in one memory layer, for automatic settings and for the fastest mixture; all heads have keys."""
  named = {r['row']: r.get('times_layer') for r in rows if r.get('G') == heads and r['row'].startswith('memory')}
  mixture = [t for row, t in named.items() if t and 'joint' not in row]
  values = {'automatic': named.get('memory layer, auto'), 'fastest': min(mixture, default=None)}
  return [{'what': f'transformer layers / memory layer, {name}', 'value': t and 1 / t, 'target': 0.5} for name, t in values.items()]


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the tables; returns the result."""
  make = common.parser('routed', __doc__)
  for name, about in (('probe', 'first check the path of this device against the oracle'), ('layer', 'whole layers (GPU)'),
                      ('memory', 'compile at full size, run nothing'), ('plain', 'against the plain gather'), ('tiny', 'toy sizes')):
    make.add_argument(f'--{name}', action='store_true', help=about)
  make.add_argument('--repeats', type=int, default=0, help='timed rounds; default 5')
  make.add_argument('--only', default='', help='layer rows to run: parts of their names, separated by commas')
  a = make.parse_args(argv)
  gpu, repeats = common.on_gpu(), a.repeats or (3 if a.tiny else 5)
  chosen = [n for n in ('probe', 'layer', 'memory', 'plain') if getattr(a, n)] or (['probe', 'layer'] if gpu else ['plain', 'memory'])
  dtype, example = 'bfloat16' if gpu else 'float32', TOY if a.tiny else EXAMPLE
  shapes = {'small_shape': SMALL._asdict(), 'example_shape': example._asdict()}
  result: dict[str, Any] = {'dtype': dtype, 'repeats': repeats, 'seeds': [0], **shapes, 'targets': []}
  def keep(name, rows): result.update({name: rows}), common.save('routed', a.output, result, commit=a.commit)
  if 'probe' in chosen:
    size = Size(4096, 8, 256, 3, 4, 2, 64) if gpu else Size(256, 8, 32, 3, 4, 2, 16)
    rows = probe_rows(size, 'bfloat16', 'cudnn' if gpu else 'capacity')
    show('Probe: errors against gathered fp32', rows, ('mode', 'row', *PARTS, 'good', 'error'))
    keep('probe', rows)
  if 'plain' in chosen:
    rows = small_rows(TOY if a.tiny else SMALL, repeats=repeats)
    show('Against the plain gather, fp32 mixture', rows)
    result['targets'] += plain_targets(rows)
    keep('small', rows)
  if 'memory' in chosen:
    rows = memory_rows(example)
    show('Temporaries at the example shape, compiled only', rows, ('row', 'G', 'pass', 'GiB', 'compile_s', 'error'))
    keep('memory', rows)
  if 'layer' in chosen:
    rows = layer_rows(example, dtype, rows=8, only=a.only, repeats=repeats, keep=functools.partial(keep, 'layer'))
    show('Layers, forward + backward', rows)
    result['targets'] += layer_targets(rows, example.G)
    keep('layer', rows)
  common.judge(result['targets'])
  return result


if __name__ == '__main__':
  main()
