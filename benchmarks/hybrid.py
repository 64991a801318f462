"""Training steps of the 150M hybrid on one device, beside an attention transformer of its size: tokens/s, MFU, peak memory.

The step is that of `memjax.train` (gradient, AdamW, guard against NaN, donation) in bf16 on random tokens; each row is one text. MFU is by
the library's counter, three forward passes over the peak of the device; `mfu_matrices` counts the products with parameters alone.

  python -m benchmarks.hybrid --small                        both models, tiny, on a CPU: that it runs
  python -m benchmarks.hybrid                                one H200; compiling takes most of it
  python -m benchmarks.hybrid --jobs hybrid:16x4096 --profile
"""
import argparse
import concurrent.futures
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import common, kernel_times
from memjax.config.flags import load
from memjax.config.schema import Config
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime import sharding
from memjax.runtime.flops import forward_flops
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import abstract_state, make_train_step
from memjax.runtime.utilisation import step_share
from memjax.runtime.workarounds import avoid_crash

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
JOBS = 'hybrid:32x4096 attention:32x4096 hybrid:4x32768 attention:4x32768'
WHOLE = {'hybrid': ('model.mixers.learns.exec.aligned=true', 'model.mixers.near.backend=cudnn_rows'),       # rows are one text each
         'attention': ('model.mixers.attention.backend=cudnn_rows',)}
SMALL = {'hybrid': ('model.mixers.near.heads=2', 'model.mixers.near.window=8', 'model.mixers.slots.heads=2', 'model.mixers.slots.slots=4',
                    'model.mixers.learns.heads=2', 'model.mixers.learns.key_width=8', 'model.mixers.learns.chunk=8', 'model.repeats=1'),
         'attention': ('model.mixers.attention.heads=2', 'model.repeats=2')}
COLUMNS = ('model', 'rows', 'length', 'ms', 'tokens_per_second', 'mfu', 'mfu_matrices', 'peak_gib', 'temporary_gib', 'compile_s')


class Job(NamedTuple):
  """One row of the table; `overrides` are those of its config."""
  model: str
  rows: int
  length: int
  overrides: tuple[str, ...] = ()


def job(text: str) -> Job:
  """'hybrid:16x4096' or 'hybrid:16x4096:model.hidden=2560' as a Job."""
  model, size, *overrides = text.split(':')
  return Job(model, *map(int, size.split('x')), tuple(overrides))


def config_of(job: Job, a: argparse.Namespace) -> Config:
  """The config of a job, its rows as one batch."""
  own = (*SMALL[job.model], 'model.width=32', 'model.hidden=32', 'model.vocabulary=64', 'model.dtype=float32') if a.small else ()
  whole = () if a.small else WHOLE[job.model]
  return load(str(CONFIGS / f'{job.model}_150m.py'), f'training.batch={job.rows}', f'training.length={job.length}',
              'training.accumulate=1', *own, *whole, *a.set, *job.overrides)


class Run:
  """The training step of one job."""

  def __init__(self, job: Job, a: argparse.Namespace):
    self.job, self.a, config = job, a, config_of(job, a)
    self.model, self.mesh = build_decoder(config.model), sharding.make_mesh(config.mesh, jax.devices()[:1])
    shapes, axes = param_shapes(self.model)
    optimizer = make_optimizer(config.optimizer, shapes, config.training.steps, axes=axes)
    self.abstract, self.vocabulary = abstract_state(self.model, optimizer, config, self.mesh), config.model.vocabulary
    self.parameters = int(sum(np.prod(x.shape) for x in named(shapes).values()))
    self.matrices = int(sum(np.prod(x.shape) for path, x in named(shapes).items() if path.endswith(('kernel', 'table'))))
    with jax.set_mesh(self.mesh):
      self.lowered = make_train_step(self.model, optimizer, config, self.abstract).lower(self.abstract, self.batch())

  def batch(self) -> dict[str, jax.Array]:
    """Random rows, each one text."""
    shape, draw = (self.job.rows, self.job.length), np.random.default_rng(0)
    token, target = draw.integers(0, self.vocabulary, (2, *shape), dtype=np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return sharding.put_batch({'token': token, 'target': target, 'position': position, 'weight': np.ones(shape, bool)}, self.mesh)

  def state(self) -> Any:
    """Random parameters, empty moments: made on the host, which compiles nothing."""
    draw = np.random.default_rng(1)
    params = {path: np.ones(x.shape, x.dtype) if path.endswith('scale') else 0.02 * draw.standard_normal(x.shape, np.float32)
              for path, x in named(self.abstract.params).items()}
    whole = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.abstract)._replace(params=unnamed(params, self.abstract.params))
    return jax.tree.map(lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding), whole, self.abstract)

  def compile(self) -> None:
    """Compiles its program."""
    started = time.perf_counter()
    self.program = self.lowered.compile()
    self.compile_s = time.perf_counter() - started

  def measure(self) -> dict[str, Any]:
    """Its row. After two steps, three lots of steps that do not wait for each other, as in the trainer; the median lot counts."""
    state, batch, times = self.state(), self.batch(), []
    for _ in range(2): state, metrics = jax.block_until_ready(self.program(state, batch))
    for _ in range(3):
      started = time.perf_counter()
      for _ in range(self.a.steps): state, metrics = self.program(state, batch)
      loss = float(metrics['loss'])
      times.append((time.perf_counter() - started) / self.a.steps)
    seconds, job, devices = float(np.median(times)), self.job, jax.devices()[:1]
    speed, used = job.rows * job.length / seconds, self.program.memory_analysis()
    held = sum(getattr(used, f'{name}_size_in_bytes', 0) for name in ('temp', 'argument', 'generated_code'))
    row = {**job._asdict(), 'ms': 1000 * seconds, 'best_ms': 1000 * min(times), 'tokens_per_second': speed, 'loss': loss,
           'mfu': speed * step_share(forward_flops(self.model, job.length), devices), 'parameters': self.parameters,
           'mfu_matrices': speed * step_share(2 * self.matrices, devices), 'peak_gib': held / 2 ** 30,
           'temporary_gib': getattr(used, 'temp_size_in_bytes', 0) / 2 ** 30, 'compile_s': self.compile_s}
    if not self.a.profile: return row
    def steps(state=state):
      for _ in range(2): state, metrics = self.program(state, batch)
      return metrics
    row['profile'] = kernel_times.summarise(kernel_times.events(steps), kernel_times.scopes(self.program), 2)
    return row


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """40 % MFU at 4,096 tokens; as fast as attention there, twice as fast at 32,768. None where this run lacks a row."""
  best = {}
  for row in sorted(rows, key=lambda row: row['tokens_per_second']): best[row['model'], row['length']] = row
  def times(length):
    pair = [best.get((model, length)) for model in ('hybrid', 'attention')]
    return pair[0]['tokens_per_second'] / pair[1]['tokens_per_second'] if all(pair) else None
  hybrid = best.get(('hybrid', 4096))
  return [{'what': 'hybrid, MFU at 4,096 tokens', 'value': hybrid and hybrid['mfu'], 'target': .4},
          {'what': 'hybrid over attention, 4,096 tokens', 'value': times(4096), 'target': 1.0},
          {'what': 'hybrid over attention, 32,768 tokens', 'value': times(32768), 'target': 2.0}]


def arguments(argv: list[str] | None) -> argparse.Namespace:
  """What was asked for."""
  made = common.parser('hybrid', __doc__)
  made.add_argument('--jobs', type=job, nargs='*', default=[], help=f'MODEL:ROWSxLENGTH[:override ...]; default {JOBS}')
  made.add_argument('--set', action='append', default=[], help="override of the configs of all jobs, such as model.mixers.near.window=256")
  made.add_argument('--steps', type=int, default=0, help='steps a lot; default 6 (1 with --small)')
  made.add_argument('--profile', action='store_true', help='where the time of a step goes, by kernel (GPUs)')
  made.add_argument('--threads', type=int, default=1, help='programs compiled at the same time, while others may be timed')
  a = made.parse_args(argv)
  a.jobs = a.jobs or [job(one) for one in ('hybrid:2x32 attention:2x32' if a.small else JOBS).split()]
  a.steps = a.steps or (1 if a.small else 6)
  return a


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """The rows, also printed and written as each is there."""
  a, started, rows = arguments(argv), time.perf_counter(), []
  avoid_crash()
  def tell(text): print(f'{time.perf_counter() - started:6.1f} s  {text}', flush=True)
  def compiled(run):
    run.compile()
    tell(f'{run.job}: compiled in {run.compile_s:.1f} s')
  def guarded(name: str, call: Callable, *given: Any) -> Any:
    try: return call(*given)
    except Exception as error:           # one that fails (too little memory) must not cost the rest
      tell(f'{name} failed: {type(error).__name__}: {str(error)[:2000]}')
      return None
  with concurrent.futures.ThreadPoolExecutor(a.threads) as pool:
    waiting = {}
    for one in a.jobs:                   # the next one is traced while those before it compile
      if run := guarded(f'{one}', Run, one, a):
        tell(f'{one}: traced, {run.parameters:,} parameters')
        waiting[pool.submit(compiled, run)] = run
    for done in concurrent.futures.as_completed(waiting):
      name, run = f'{waiting[done].job}', waiting[done]
      guarded(name, done.result)
      if done.exception() or not (row := guarded(name, run.measure)): continue
      tell(f'{name}: {row["ms"]:.1f} ms, {row["tokens_per_second"]:,.0f} tokens/s, MFU {row["mfu"]:.3f}, loss {row["loss"]:.3f}')
      if 'profile' in row: kernel_times.show(name, row['profile'])
      rows.append(row)
      common.save('hybrid', a.output, {'rows': rows, 'targets': targets(rows), 'options': {**vars(a), 'jobs': [list(j) for j in a.jobs]}},
                  commit=a.commit)
  common.show('Training steps', rows, COLUMNS)
  if not a.small: common.judge(targets(rows))
  return rows


if __name__ == '__main__':
  main()
