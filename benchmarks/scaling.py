"""Training steps of a hybrid of window attention and holographic (or neural) memory on one device and on several: tokens a second.

- weak: every device gets as many rows as one has alone; strong: the rows of one device are split over all
- long: one row of `--long_length` tokens on one device, and in pieces over all of them (sequence_parallel)

  python -m benchmarks.scaling --small                                fake CPU devices, one minute
  python -m benchmarks.scaling --devices 2                            two H200s, about a minute a row, mostly compilation

Rows are measured in a process of their own: where the compiler or a device ends it, that row is lost, and the next begin in another.
Fake devices share the cores of one machine: their times say nothing about scaling, only that everything runs.
"""
import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from memjax.config.mesh import MeshConfig
from memjax.config.mixers import FormConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig
from memjax.config.schema import BlockConfig, Config, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, param_shapes
from memjax.ops import flash, mixing
from memjax.runtime import sharding
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import abstract_state, make_train_step

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')
PARTS = ('weak', 'strong', 'long')
COLUMNS = ('part', 'preset', 'devices', 'rows', 'length', 'ms', 'tokens_per_second', 'times_one', 'efficiency', 'temporary_gib',
           'compile_s')


@dataclasses.dataclass(frozen=True)
class Job:
  """One row of the table."""
  part: str
  preset: str
  devices: int
  rows: int
  length: int
  pattern: tuple[str, ...]


@functools.cache
def numbers(shape: tuple[int, ...]) -> np.ndarray:
  """Small random numbers."""
  return 0.02 * np.random.default_rng(1).standard_normal(shape, np.float32)


def jobs(a: argparse.Namespace) -> list[Job]:
  """What is measured: one device first in each part, which the others are compared with. The rows of weak on one are those of strong."""
  made, N = [], a.devices
  if {'weak', 'strong'} & set(a.parts): made.append(Job('one', 'dp', 1, a.rows, a.length, a.pattern))
  for preset in a.presets:
    if 'weak' in a.parts: made.append(Job('weak', preset, N, N * a.rows, a.length, a.pattern))
    if 'strong' in a.parts: made.append(Job('strong', preset, N, a.rows, a.length, a.pattern))
  if 'long' in a.parts:
    made.append(Job('long', 'dp', 1, a.long_rows, a.long_length, a.long_pattern))
    made.append(Job('long', 'sequence_parallel', N, a.long_rows, a.long_length, a.long_pattern))
  return made


class Run:
  """The training step of one job for its mesh, lowered."""

  def __init__(self, job: Job, a: argparse.Namespace):
    self.job, self.a, heads = job, a, a.width // 64 or 1
    mixers = {'near': WindowConfig(heads=heads, window=a.window, backend=a.attention), 'learns': NeuralConfig(heads=heads, chunk=a.chunk),
              'slots': HolographicConfig(heads=heads, slots=a.slots, form=FormConfig(backend=a.mixing))}
    used = {name for layer in job.pattern for name in re.split('[+>:]', layer)}
    model = ModelConfig(width=a.width, vocabulary=a.vocabulary, pattern=job.pattern, repeats=a.layers // len(job.pattern), dtype=a.dtype,
                        mixers={name: mixer for name, mixer in mixers.items() if name in used}, block=BlockConfig(init_std=0.02))
    training = TrainingConfig(batch=job.rows, length=job.length, remat=a.remat)
    config = Config(model=model, mesh=MeshConfig(preset=job.preset), training=training,
                    optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=1e-4, schedule='constant')}))
    self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:job.devices])
    sharding.check_batch(self.mesh, config.training)
    model = build_decoder(sharding.placed(config))
    shapes, axes = param_shapes(model)
    optimizer = make_optimizer(config.optimizer, shapes, 1000, axes=axes)
    self.abstract = abstract_state(model, optimizer, config, self.mesh)
    self.parameters = sum(np.prod(x.shape) for x in named(shapes).values())
    with jax.set_mesh(self.mesh):
      self.lowered = make_train_step(model, optimizer, config, self.abstract).lower(self.abstract, self.batch())

  def batch(self) -> dict[str, jax.Array]:
    """Random rows, each one document."""
    shape, draw = (self.job.rows, self.job.length), np.random.default_rng(0)
    token, target = draw.integers(0, self.a.vocabulary, (2, *shape), dtype=np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return sharding.put_batch({'token': token, 'target': target, 'position': position, 'weight': np.ones(shape, bool)}, self.mesh)

  def state(self) -> Any:
    """Random parameters, empty moments: made on the host, which compiles nothing."""
    flat = named(self.abstract.params)
    params = unnamed({path: numbers(x.shape) for path, x in flat.items()}, self.abstract.params)
    whole = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.abstract)._replace(params=params)
    return jax.tree.map(lambda x, like: jax.device_put(jnp.asarray(x, like.dtype), like.sharding), whole, self.abstract)

  def compile(self) -> None:
    """Compiles its program."""
    started = time.perf_counter()
    self.program = self.lowered.compile()
    self.compile_s = time.perf_counter() - started

  def measure(self) -> dict[str, Any]:
    """Its row: median of the steps after the first two."""
    state, batch, times = self.state(), self.batch(), []
    for _ in range(2 + self.a.steps):
      started = time.perf_counter()
      state, metrics = jax.block_until_ready(self.program(state, batch))
      times.append(time.perf_counter() - started)
    seconds, job, text = float(np.median(times[2:])), self.job, self.program.as_text()
    usage = self.program.memory_analysis()
    return {**dataclasses.asdict(job), 'ms': 1000 * seconds, 'tokens_per_second': job.rows * job.length / seconds,
            'loss': float(metrics['loss']), 'temporary_gib': getattr(usage, 'temp_size_in_bytes', 0) / 2 ** 30,
            'compile_s': self.compile_s, 'parameters': int(self.parameters),
            'collectives': {name: len(re.findall(rf' {name}(?:-start)?\(', text)) for name in COLLECTIVES}}


def measure(job: Job, a: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
  """The row of a job, telling how far it is."""
  name = f'{job.part} {job.preset} on {job.devices}'
  run = Run(job, a)
  tell(f'{name}: traced, {run.parameters / 1e6:.0f}M parameters')
  run.compile()
  tell(f'{name}: compiled in {run.compile_s:.1f} s')
  row = run.measure()
  tell(f'{name}: {row["ms"]:.1f} ms, {row["tokens_per_second"]:,.0f} tokens/s')
  return row


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows with `times_one`, tokens a second over those of one device in the same part, and `efficiency`, that over the devices."""
  one = {row['part']: row['tokens_per_second'] for row in rows if row['devices'] == 1}
  def with_share(row):
    base = one.get('long' if row['part'] == 'long' else 'one')
    if row['devices'] == 1 or not base: return row
    times = row['tokens_per_second'] / base
    return row | {'times_one': times, 'efficiency': times / row['devices']}
  return [with_share(row) for row in rows]


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Weak scaling of dp and fsdp: .9 of the devices, which is 3.6 of 4."""
  weak = [row for row in rows if row['part'] == 'weak' and row['preset'] in ('dp', 'fsdp')]
  return [{'what': f'{row["preset"]}, weak scaling, {row["devices"]} devices over one', 'value': row.get('times_one'),
           'target': .9 * row['devices']} for row in weak]


def arguments(argv: list[str] | None) -> argparse.Namespace:
  """What was asked for; `--small` shrinks what is not given."""
  made = common.parser('scaling', __doc__)
  made.add_argument('--devices', type=int, default=0, help='how many to compare with one; 0 = all (with --small 4 fake ones)')
  made.add_argument('--parts', type=common.words, default=list(PARTS), help=f'of {", ".join(PARTS)}')
  made.add_argument('--presets', type=common.words, default=['dp', 'fsdp'], help='of weak and strong')
  made.add_argument('--pattern', type=lambda text: tuple(common.words(text)), default=('near+slots',),
                    help="layers; 'near+learns' has a neural memory, whose program compiles for more than a minute")
  made.add_argument('--long_pattern', type=lambda text: tuple(common.words(text)), default=('near+slots',))
  made.add_argument('--dtype', default='bfloat16')
  made.add_argument('--mixing', choices=mixing.BACKENDS, default='auto', help='how slots are computed')
  made.add_argument('--attention', choices=flash.BACKENDS, default='auto', help='how near is computed')
  made.add_argument('--remat', action=argparse.BooleanOptionalAction, default=True)
  sizes = {'width': (768, 64), 'layers': (12, 1), 'vocabulary': (32_000, 64), 'window': (512, 8), 'slots': (8, 4), 'chunk': (64, 4),
           'rows': (8, 4), 'length': (4096, 16), 'long_rows': (1, 1), 'long_length': (65_536, 64), 'steps': (8, 1)}
  for name, (size, _) in sizes.items(): made.add_argument(f'--{name}', type=int, default=0, help=f'default {size:,}')
  a = made.parse_args(argv)
  for name, pair in sizes.items(): setattr(a, name, getattr(a, name) or pair[a.small])
  return a


def work(pipe: Connection, rows: list[dict[str, Any]], a: argparse.Namespace) -> None:
  """Nothing; measures the jobs after those of `rows`: sends (job, None) before each and (job, row) after it, and saves all rows."""
  faulthandler.enable(sys.stdout)
  if a.small and 'JAX_NUM_CPU_DEVICES' not in os.environ: jax.config.update('jax_num_cpu_devices', a.devices or 4)
  a.devices = a.devices or jax.device_count()
  started = time.perf_counter()
  tell = lambda text: print(f'{time.perf_counter() - started:6.1f} s  {text}', flush=True)
  if rows: save(rows, a)                 # what the last process has died of
  for job in jobs(a)[len(rows):]:        # one after the other: what goes wrong in one is seen, and costs the others nothing
    name = dataclasses.asdict(job)
    pipe.send((name, None))
    try: row = measure(job, a, tell)
    except Exception as error:           # one that fails (too little memory) must not cost the rest
      row = name | {'failed': f'{type(error).__name__}: {str(error)[:2000]}'}
    pipe.send((name, row))
    rows.append(row)
    save(rows, a)


def save(rows: list[dict[str, Any]], a: argparse.Namespace) -> None:
  """Nothing; the JSON holds the rows so far, and apart from them the jobs that failed."""
  done = compare([row for row in rows if 'failed' not in row])
  failed = [row for row in rows if 'failed' in row]
  common.save('scaling', a.output, {'rows': done, 'failed': failed, 'targets': targets(done), 'dtype': a.dtype, 'options': vars(a)},
              commit=a.commit)


def in_processes(target: Callable, *arguments: Any) -> list[dict[str, Any]]:
  """All rows of `target(pipe, rows, *arguments)`, as `work` sends them. Where its process dies, the job at hand has failed, and another
  process begins after it; raises SystemExit with the status of one that ends outside of any job.
  """
  rows, code, spawn = [], -1, multiprocessing.get_context('spawn')
  while code:
    receive, send = spawn.Pipe(duplex=False)
    process, job = spawn.Process(target=target, args=(send, rows, *arguments), daemon=True), None
    process.start()
    send.close()                         # or the end of the process would not be the end of the pipe
    with contextlib.suppress(EOFError):
      while True:
        job, row = receive.recv()
        if not row: continue
        rows.append(row)
        job = None
    process.join()
    code = process.exitcode
    if code and job is None: sys.exit(code)
    if code: rows.append(job | {'failed': f'died by signal {-code}' if code < 0 else f'ended with status {code}'})
  return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """The rows, also printed and written as each is there."""
  a = arguments(argv)
  made = in_processes(work, a)
  rows = compare([row for row in made if 'failed' not in row])
  common.show('Training steps', rows, COLUMNS)
  for row in made:
    if 'failed' in row: print(f'{row["part"]} {row["preset"]} on {row["devices"]} failed: {row["failed"]}', flush=True)
  if not a.small: common.judge(targets(rows))
  return rows


if __name__ == '__main__':
  main()
