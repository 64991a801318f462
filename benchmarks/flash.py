"""Attention through cuDNN beside its form in XLA: differences of values and gradients, and milliseconds forward + backward.

Queries, keys and values are random, each row one text; what both are compared with is the form in XLA in float32.

  python -m benchmarks.flash --small         on a CPU, where `jax.nn.dot_product_attention` stands in for cuDNN: that it runs
  python -m benchmarks.flash                 one H200, a minute
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from memjax.ops.attention import attend, attend_window
from memjax.ops.flash import flash


def reference(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, *, window: int = 0):
  """What `flash` computes, in XLA."""
  B, L = q_BxLxHxK.shape[:2]
  k, v = (jnp.swapaxes(a, 1, 2) for a in (k_BxLxGxK, v_BxLxGxK))
  if not window:
    see = lambda start, size: jnp.broadcast_to(jnp.arange(L)[None, None] <= start + jnp.arange(size)[None, :, None], (B, size, L))
    return attend(q_BxLxHxK, k, v, see=see)
  past = lambda a: jnp.pad(a, ((0, 0), (0, 0), (window, 0), (0, 0)))
  exists = jnp.broadcast_to(jnp.arange(window + L)[None] >= window, (B, window + L))
  return attend_window(q_BxLxHxK, past(k), past(v), window=window, see_key_BxM=exists, segment_BxM=jnp.zeros((B, window + L), jnp.int32))


def both_ways(form, q, k, v, dy):
  """(reads, gradients of q, k and v)."""
  y, back = jax.vjp(form, q, k, v)
  return y, *back(dy.astype(y.dtype))


def inputs(shape: tuple[int, int, int, int], groups: int) -> tuple[jax.Array, ...]:
  """Random q, k, v and a cotangent of the reads, bfloat16."""
  B, L, H, K = shape
  sizes = ((B, L, H, K), (B, L, groups, K), (B, L, groups, K), (B, L, H, K))
  return tuple(jax.random.normal(jax.random.key(n), size, jnp.bfloat16) for n, size in enumerate(sizes))


def differences(shape: tuple[int, int, int, int], groups: int, window: int) -> dict[str, Any]:
  """Root mean square differences to the XLA form in float32, as shares of its size, of cuDNN and of XLA in bfloat16."""
  given, row = inputs(shape, groups), {'shape': list(shape), 'groups': groups, 'window': window}
  wide = [a.astype(jnp.float32) for a in given]
  call = lambda form: jax.jit(functools.partial(both_ways, functools.partial(form, window=window)))
  with jax.default_matmul_precision('highest'): exact = call(reference)(*wide)
  size = lambda a: float(jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32)))))
  for name, form in (('cudnn', flash), ('xla', reference)):
    found = call(form)(*given)
    row[name] = {part: size(a - b) / size(b) for part, a, b in zip(('y', 'dq', 'dk', 'dv'), found, exact, strict=True)}
  return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves both tables; returns the result."""
  make = common.parser('flash', __doc__)
  make.add_argument('--repeats', type=int, default=5)
  make.add_argument('--window', type=int, default=0, help='default 512 (8 with --small)')
  a = make.parse_args(argv)
  window, widths = (8, (16,)) if a.small else (a.window or 512, (64, 128))
  checks = []
  for shape, groups, reach in (((2, 64, 4, 16), 2, 8),) if a.small else (((2, 1024, 8, 128), 2, 0), ((2, 1024, 8, 64), 8, 128)):
    checks.append(differences(shape, groups, reach))
    print(checks[-1], flush=True)
  tokens, lengths, jobs = (128, (64,), {}) if a.small else (65_536, (4096,), {})
  for K in widths:
    for L in lengths:
      given = inputs((tokens // L, L, (32 if a.small else 1024) // K, K), (32 if a.small else 1024) // K)
      for reach in (window, 0):
        for name, form in (('cudnn', flash), ('xla', reference)):
          jobs[f'{name}, {f"window {reach}" if reach else "full"}, {K} channels a head, {L} tokens'] = (
              functools.partial(both_ways, functools.partial(form, window=reach)), given)
  rows = []
  for name, case in common.compile_cases(jobs).items():
    rows.append({'row': name, **common.time_cases([case], repeats=a.repeats, inner=1 if a.small else 4)[name]})
    print(rows[-1], flush=True)
    common.save('flash', a.output, {'checks': checks, 'rows': rows, 'tokens': tokens}, commit=a.commit)
  common.show(f'Attention of {tokens:,} tokens of 1024 channels, forward + backward', rows, ('row', 'ms', 'temporary_mib', 'compile_s'))
  return {'checks': checks, 'rows': rows}


if __name__ == '__main__':
  main()
