"""Kills a training run at random instants and compares what comes out with the run left alone, bit for bit.

  python -m benchmarks.resume --kills 10 [--signals KILL TERM] [--steps 60] [--seed 0]

Each run is a process of its own, killed a random moment after a random step; with a checkpoint every second step some
kills fall into a save. Prints one JSON object; exits with 1 if anything differs.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time

IMPORTS = ['memjax.train', 'memjax.runtime.loop', 'memjax.runtime.reading', 'grain', 'orbax.checkpoint', 'tensorboardX']
CONFIG = '''
from memjax.config.codec import thaw
from memjax.config.mixers import WindowConfig
from memjax.config.schema import *

def get_config(arg=''):
  return thaw(Config(
      model=ModelConfig(width=8, hidden=16, mixers={'near': WindowConfig(heads=2, window=4)}, pattern=('near',), repeats=1,
                        block=BlockConfig(dropout=0.1)),
      data=DataConfig(order='lanes', source='path', path=arg, cache=arg + '/cache'),
      training=TrainingConfig(steps=60, batch=8, length=8, carry=True, log_every=1),
      evaluation=EvaluationConfig(every=10, batch=8, batches=1, sample=0), checkpoint=CheckpointConfig(every=2)))
'''


def train(folder: str, workdir: str, steps: int) -> None:
  """The whole command in a fresh process, its stderr in a file."""
  os.dup2(os.open(f'{folder}/log', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
  from memjax.config.flags import call
  from memjax.train import FLAGS, main
  argv = ['--config', f'{folder}/config.py:{folder}', '--workdir', workdir, '--nofigures', f'--config.training.steps={steps}']
  os._exit(call(main, flags=FLAGS, argv=argv))


def launch(folder: str, workdir: str, steps: int) -> multiprocessing.Process:
  """A started process of `train`, forked from one that has imported everything but used no device."""
  process = multiprocessing.get_context('forkserver').Process(target=train, args=(folder, workdir, steps))
  process.start()
  return process


def write_inputs(folder: str) -> None:
  """The config and a small text."""
  draw = random.Random(0)
  with open(f'{folder}/config.py', 'w', encoding='utf-8') as file: file.write(CONFIG)
  for split, size in {'train': 4000, 'val': 400, 'test': 400}.items():
    with open(f'{folder}/{split}.txt', 'w', encoding='utf-8') as file: file.write(''.join(draw.choices('abcdefgh \n', k=size)))


def saved_state(workdir: str) -> dict:
  """Checksum of every array of the newest checkpoint, with its step and evaluation losses."""
  from memjax.runtime.checkpoint import list_steps
  from memjax.runtime.checksum import inspect, read_record
  from memjax.runtime.metrics import read_rows
  step = list_steps(workdir)[-1]
  root = os.path.join(workdir, 'checkpoints', str(step))
  record = read_record(root)
  verdict = inspect(root, {name: entry[:2] for name, entry in record['arrays'].items()})
  rows = [{k: v for k, v in row.items() if k != 'tokens_per_second'} for row in read_rows(workdir)]
  return {'step': step, 'fault': verdict.fault, 'arrays': record['arrays'], 'rows': rows}


def written_steps(workdir: str) -> int:
  """Rows of metrics so far: one a step."""
  try:
    with open(f'{workdir}/metrics.jsonl', 'rb') as file: return file.read().count(b'"loss"')
  except FileNotFoundError:
    return 0


def disturb(folder: str, workdir: str, args: argparse.Namespace) -> list[dict]:
  """Runs until done, killed at random steps (the first kill may come before any step) and a random moment after."""
  from memjax.runtime.checkpoint import list_steps
  draw, kills, signals = random.Random(args.seed), [], itertools.cycle(getattr(signal, f'SIG{name}') for name in args.signals)
  targets = sorted(draw.randrange(args.steps - 5) for _ in range(args.kills))
  for target in [*targets, None]:
    number = next(signals)
    process = launch(folder, workdir, args.steps)
    while target is not None and process.is_alive() and written_steps(workdir) < target: time.sleep(0.005)
    time.sleep(draw.uniform(0.0, args.delay))
    if target is not None and process.is_alive(): os.kill(process.pid, number)
    process.join()
    if process.exitcode not in (0, 75, -number): raise SystemExit(f'status {process.exitcode}: see {folder}/log')
    names = os.listdir(f'{workdir}/checkpoints') if os.path.isdir(f'{workdir}/checkpoints') else []
    if target is not None:
      kills.append({'written': written_steps(workdir), 'saved': max(list_steps(workdir), default=0), 'status': process.exitcode,
                    'while_saving': any('tmp' in name for name in names)})
  return kills


def main() -> int:
  """0 if the disturbed run equals the undisturbed one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--signals', choices=('KILL', 'TERM'), nargs='+', default=['KILL'], help='taken in turn')
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--delay', type=float, default=0.1, help='longest wait after the step, in seconds')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', default='', help='JSON file for the result')
  args = parser.parse_args()
  multiprocessing.get_context('forkserver').set_forkserver_preload(IMPORTS)
  with tempfile.TemporaryDirectory() as folder:
    write_inputs(folder)
    launch(folder, f'{folder}/alone', args.steps).join()
    kills = disturb(folder, f'{folder}/killed', args)
    alone, killed = saved_state(f'{folder}/alone'), saved_state(f'{folder}/killed')
    equal = alone == killed and not alone['fault']
    result = {'equal': equal, 'step': alone['step'], 'kills': kills}
    print(json.dumps(result))
    if args.output:
      from benchmarks import common  # not before: it imports jax, and the runs are forked from a clean process
      common.save('resume', args.output, result)
    return 0 if equal else 1


if __name__ == '__main__': sys.exit(main())
