"""What the benchmarks share: compiling and timing, the stamp of machine and commit, tables, JSON."""
import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = pathlib.Path(__file__).parent / 'results'
MEBI = 2 ** 20


class Case(NamedTuple):
  """A function and its arguments, compiled: what to call, seconds of compilation, MiB of temporaries."""
  name: Any
  call: Callable
  arguments: tuple
  compile_s: float
  temporary_mib: float


def on_gpu() -> bool:
  """Whether the default device is a GPU."""
  return jax.default_backend() in ('gpu', 'cuda', 'rocm')


def compile_case(name: Any, function: Callable, arguments: tuple, **options: Any) -> Case:
  """The compiled case; temporaries are those that XLA plans, arguments and results not counted."""
  return compiled_case(name, jax.jit(function, **options).lower(*arguments), arguments)


def compiled_case(name: Any, lowered: Any, arguments: tuple) -> Case:
  """The case of a function that is lowered already."""
  started = time.perf_counter()
  compiled = lowered.compile()
  usage = compiled.memory_analysis()
  return Case(name, compiled, arguments, time.perf_counter() - started, getattr(usage, 'temp_size_in_bytes', 0) / MEBI)


def compile_cases(jobs: dict[Any, tuple[Callable, tuple]], **options: Any) -> dict[Any, Case]:
  """All jobs compiled; on an accelerator several at once, since compilation is what such a run waits for. Options of `jax.jit`.

  They are traced one after the other: Python dataclasses, as Flax modules are, cannot be looked at while another thread makes some.
  """
  workers = min(8, os.cpu_count() or 1) if on_gpu() else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting = [pool.submit(compiled_case, name, jax.jit(function, **options).lower(*arguments), arguments)
               for name, (function, arguments) in jobs.items()]
    return {case.name: case for case in (one.result() for one in waiting)}


def time_cases(cases: Iterable[Case], *, repeats: int, inner: int = 1) -> dict[str, dict[str, float]]:
  """{name: {'ms' median, 'min_ms', 'compile_s', 'temporary_mib'}}: every case once a round, so that a busy machine hits all alike.

  A call is finished before the next case starts; `inner` calls in a row are timed as one, which hides their dispatch.
  """
  cases, times = list(cases), {}
  for case in cases: jax.block_until_ready(case.call(*case.arguments))
  for _ in range(repeats):
    for case in cases:
      started = time.perf_counter()
      for _ in range(inner): out = case.call(*case.arguments)
      jax.block_until_ready(out)
      del out
      times.setdefault(case.name, []).append(1000 * (time.perf_counter() - started) / inner)
  return {case.name: {'ms': statistics.median(times[case.name]), 'min_ms': min(times[case.name]),
                      'compile_s': case.compile_s, 'temporary_mib': case.temporary_mib} for case in cases}


def repeated(case: Case, calls: int = 8) -> float:
  """The share of further calls whose result is that of the first one, bit for bit."""
  bits = lambda: [x.tobytes() for x in jax.device_get(jax.tree.leaves(case.call(*case.arguments)))]
  first = bits()
  return sum(bits() == first for _ in range(calls)) / calls


def differences(found: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> dict[str, float]:
  """Root mean square difference of each array, as a share of its size."""
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
  return {name: float(norm(found[name].astype(jnp.float32) - x.astype(jnp.float32)) / norm(x)) for name, x in wanted.items()}


def _git(*command: str) -> str:
  try:
    done = subprocess.run(['git', *command], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
  except OSError:
    return ''
  return done.stdout.strip() if done.returncode == 0 else ''


def _processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return platform.processor()
  return next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def stamp(commit: str = '') -> dict[str, Any]:
  """Machine, commit, date and versions of this run. `commit` is for machines without the repository's history."""
  device = jax.devices()[0]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'platform': device.platform, 'device': device.device_kind, 'devices': jax.device_count(), 'processor': _processor(),
          'cores': cores, 'commit': commit or _git('rev-parse', 'HEAD') or 'unknown',
          'modified': bool(_git('status', '--porcelain', '--untracked-files=no')),
          'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ'),
          'jax': jax.__version__, 'python': platform.python_version(), 'xla_flags': os.environ.get('XLA_FLAGS', '')}


def parser(name: str, about: str) -> argparse.ArgumentParser:
  """An argument parser with what every benchmark takes: --small, --output, --commit."""
  made = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}', description=about)
  made.add_argument('--small', action='store_true', help='a run of a few minutes on two CPU cores')
  made.add_argument('--output', default='', help=f'JSON file; default benchmarks/results/{name}-MACHINE.json, - = none')
  made.add_argument('--commit', default='', help='commit to record where git knows none')
  return made


def numbers(text: str) -> list[int]:
  """'256,1024' as [256, 1024]."""
  return [int(part) for part in text.split(',') if part]


def words(text: str) -> list[str]:
  """'a,b' as ['a', 'b']."""
  return [part for part in text.split(',') if part]


def rates(text: str) -> tuple[float, ...]:
  """'1e-3,1e-2' as (0.001, 0.01)."""
  return tuple(float(part) for part in words(text))


def machine() -> str:
  """A short name of the device for file names: cpu, h200, ..."""
  kind = jax.devices()[0].device_kind.lower()
  return 'cpu' if jax.default_backend() == 'cpu' else kind.replace('nvidia', '').strip().replace(' ', '-')


def target_path(name: str, output: str, suffix: str = '.json') -> pathlib.Path | None:
  """Where the result goes; None for '-'. A figure lies beside the JSON, with another suffix."""
  if output == '-': return None
  return (pathlib.Path(output) if output else RESULTS / f'{name}-{machine()}.json').with_suffix(suffix)


def save(name: str, output: str, result: dict[str, Any], *, commit: str = '') -> pathlib.Path | None:
  """The JSON file, written whole or not at all: {'benchmark', 'command', 'machine', **result}."""
  path = target_path(name, output)
  if path is None: return None
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = {'benchmark': name, 'arguments': sys.argv[1:], 'machine': stamp(commit), **result}
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(tidy(whole), indent=1) + '\n', encoding='utf-8')
  partial.replace(path)
  return path


def tidy(value: Any) -> Any:
  """The value with floats at five significant digits, arrays as lists, and what is not finite as None."""
  if isinstance(value, dict): return {str(k): tidy(v) for k, v in value.items()}
  if isinstance(value, (np.ndarray, np.generic, jax.Array)): value = np.asarray(value).tolist()
  if isinstance(value, (list, tuple)): return [tidy(v) for v in value]
  if isinstance(value, float): return float(f'{value:.5g}') if np.isfinite(value) else None
  return value


def show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
  """Prints a table: one line a row, numbers to the right, what a row lacks left empty."""
  def text(value):
    if value is None or value == '': return ''
    if isinstance(value, float): return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'
    return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)
  cells = [list(columns)] + [[text(row.get(column)) for column in columns] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  right = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
  print(f'\n{title}')
  for line in cells:
    print('  '.join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip())
  sys.stdout.flush()


def judge(targets: Sequence[dict[str, Any]]) -> None:
  """Prints each {'what', 'value', 'target'} with whether value >= target; a value of None was not measured."""
  rows = [{**t, 'reached': 'not run' if t['value'] is None else 'yes' if t['value'] >= t['target'] else 'NO'} for t in targets]
  if rows: show('Targets (at least)', rows, ('what', 'value', 'target', 'reached'))
