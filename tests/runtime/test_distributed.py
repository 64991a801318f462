"""Jobs of several processes: what they are told, whose rows are whose, and real ones that are stopped, killed and continued."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.runtime import distributed
from memjax.runtime.metrics import read_rows
from tests.runtime.conftest import CONFIG

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / 'launch' / 'local.py'


@pytest.mark.parametrize('values, says', [
    (('h:1', '', ''), 'MEMJAX_COORDINATOR without MEMJAX_NUM_PROCESSES and MEMJAX_PROCESS_ID; set all of'),
    (('', '2', '1'), 'MEMJAX_NUM_PROCESSES and MEMJAX_PROCESS_ID without MEMJAX_COORDINATOR'),
    (('h:1', '2', '2'), 'MEMJAX_PROCESS_ID=2 is not one of the MEMJAX_NUM_PROCESSES=2 processes, counted from 0'),
    (('h:1', 'two', '0'), 'MEMJAX_PROCESS_ID=0 is not one of the MEMJAX_NUM_PROCESSES=two'),
    (('host', '2', '1'), 'MEMJAX_COORDINATOR=host is not of the form HOST:PORT')])
def test_variables_are_all_or_none(values, says, monkeypatch):
  for name, value in zip(distributed.VARIABLES, values, strict=True): monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=re.escape(says)): distributed.maybe_initialize()


def test_without_variables_this_is_a_single_process(monkeypatch):
  for name in distributed.VARIABLES: monkeypatch.delenv(name, raising=False)
  distributed.maybe_initialize()
  assert not jax.distributed.is_initialized() and distributed.is_leader()
  assert distributed.asked_to_stop(1, True) and not distributed.asked_to_stop(2, False)


def shards(monkeypatch, sizes, processes):
  """data_shard of each process, on a mesh of data x fsdp x model x sequence devices that the processes hold in order."""
  count = int(np.prod(sizes))
  devices = np.array([SimpleNamespace(process_index=n * processes // count) for n in range(count)], object).reshape(sizes)
  mesh = SimpleNamespace(devices=devices, shape=dict(zip(('data', 'fsdp', 'model', 'sequence'), sizes, strict=True)))
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  out = []
  for process in range(processes):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    out.append(distributed.data_shard(mesh))
  return out


@pytest.mark.parametrize('sizes, processes, expected', [
    ((4, 1, 1, 1), 2, [(0, 2), (1, 2)]), ((2, 2, 1, 1), 4, [(n, 4) for n in range(4)]), ((2, 1, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((1, 1, 1, 4), 2, [(0, 1), (0, 1)]), ((1, 2, 2, 1), 2, [(0, 2), (1, 2)]), ((3, 1, 1, 2), 2, [(0, 1), (0, 1)])])
def test_processes_read_the_rows_of_their_devices(monkeypatch, sizes, processes, expected):
  assert shards(monkeypatch, sizes, processes) == expected


def test_rows_of_several_processes_must_divide(monkeypatch):
  mesh = SimpleNamespace(shape={'data': 2, 'fsdp': 2})
  distributed.check_rows(mesh, 6, 'evaluation.batch')
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  distributed.check_rows(mesh, 8, 'evaluation.batch')
  with pytest.raises(UserError, match=r'evaluation\.batch=6 does not split over 4 devices'):
    distributed.check_rows(mesh, 6, 'evaluation.batch')


@pytest.fixture(scope='module')
def local():
  """launch/local.py as a module."""
  spec = importlib.util.spec_from_file_location('launch_local', LOCAL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def python(text):
  return [sys.executable, '-c', text]


def test_local_says_what_it_would_run():
  done = subprocess.run([sys.executable, '-I', '-S', str(LOCAL), '--processes', '2', '--devices', '4', '--dry-run', '--config', 'c.py'],
                        capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'}, check=True)
  first, second = done.stdout.splitlines()
  assert first.startswith('JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 MEMJAX_COORDINATOR=127.0.0.1:PORT MEMJAX_NUM_PROCESSES=2 '
                          'MEMJAX_PROCESS_ID=0')
  assert second.endswith('MEMJAX_PROCESS_ID=1 ' + first.partition('PROCESS_ID=0 ')[2]) and second.endswith('-m memjax.train --config c.py')


def test_the_first_failure_ends_the_others(local, capsys):
  started = time.monotonic()
  assert local.run([(python('import time; print("x", flush=True); time.sleep(60)'), {}), (python('raise SystemExit(3)'), {})]) == 3
  assert time.monotonic() - started < 20
  told = capsys.readouterr()
  assert told.err.splitlines()[-1] == 'launch: process 1 failed with status 3; ended the others'
  assert local.run([(python('import os; os.kill(os.getpid(), 9)'), {})]) == 128 + signal.SIGKILL
  assert 'process 0 was ended by SIGKILL' in capsys.readouterr().err
  late = 'import os, time; time.sleep(.5); print(os.environ["A"])'
  assert local.run([(python('raise SystemExit(75)'), {}), (python(late), {'A': 'b'})]) == 75
  assert capsys.readouterr().out == '[1] b\n'


def test_who_was_killed_is_named_before_those_that_failed_for_it(local, capsys):
  assert local.wait([SimpleNamespace(poll=lambda code=code: code) for code in (1, -signal.SIGKILL, 1)]) == 128 + signal.SIGKILL
  assert capsys.readouterr().err == 'launch: process 1 was ended by SIGKILL; ended the others\n'


class Job:
  """A run of the tiny config by several processes, through launch/local.py; 0 = one process without a launcher."""

  def __init__(self, text, workdir, processes, *overrides):
    own = [str(LOCAL), '--processes', str(processes), '--devices', str(4 // processes)] if processes else ['-m', 'memjax.train']
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', **({} if processes else {'JAX_NUM_CPU_DEVICES': '4'})}
    words = ['--config', f'{CONFIG}:{text}', '--config.mesh.data=0', *overrides, '--workdir', str(workdir), '--nofigures']
    self.workdir = workdir
    self.child = subprocess.Popen([sys.executable, *own, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True)

  def end(self, status=0):
    """What it wrote on stderr, after it ended with `status`."""
    out, err = self.child.communicate(timeout=150)
    assert self.child.returncode == status, out + err
    return err

  def wait_for_step(self, step):
    """Returns once the row of a step is written; its first lines of stderr are lost."""
    while not any(row['step'] >= step for row in read_rows(self.workdir)):
      assert self.child.poll() is None, self.child.communicate()
      time.sleep(.05)


def losses(workdir):
  """{(step, name): value} of all losses of a run."""
  return {(row['step'], name): row[name] for row in read_rows(workdir) for name in ('loss', 'eval/loss', 'test/loss') if name in row}


@pytest.fixture(scope='module')
def alone(text, tmp_path_factory):
  """The losses of one process with four devices, left alone."""
  workdir = tmp_path_factory.mktemp('jobs') / 'alone'
  Job(text, workdir, 0).end()
  return losses(workdir)


def same(workdir, expected):
  got = losses(workdir)
  assert got.keys() == expected.keys()
  assert all(got[key] == pytest.approx(expected[key], rel=2e-4) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize('processes, mesh', [(2, ()), (4, ('--config.mesh.preset=fsdp',)),
                                             (2, ('--config.mesh.preset=sequence_parallel', '--config.mesh.sequence=4'))])
def test_processes_do_what_one_does(text, alone, tmp_path, processes, mesh):
  err = Job(text, tmp_path / 'run', processes, *mesh).end()
  same(tmp_path / 'run', alone)
  told = [line for line in err.splitlines() if 'memjax:' in line]
  assert told and all(line.startswith('[0] ') for line in told)


@pytest.mark.slow
@pytest.mark.parametrize('first, second', [(2, 4), (4, 2), (2, 0)])
def test_a_killed_process_ends_the_job_which_goes_on_with_others(text, alone, tmp_path, first, second):
  job = Job(text, tmp_path / 'run', first, '--config.training.steps=100000', '--config.optimizer.groups.main.schedule=constant')
  pids = [int(re.search(r'process \d is (\d+)', job.child.stderr.readline())[1]) for _ in range(first)]
  job.wait_for_step(10)
  os.kill(pids[1], signal.SIGKILL)
  err = job.end(128 + signal.SIGKILL)
  assert err.splitlines()[-1] == 'launch: process 1 was ended by SIGKILL; ended the others'
  saved = max(int(step.name) for step in (tmp_path / 'run' / 'checkpoints').iterdir() if step.name.isdigit())
  steps = saved + 4
  same_words = [f'--config.training.steps={steps}', '--config.optimizer.groups.main.schedule=constant']
  Job(text, tmp_path / 'run', second, *same_words).end()
  Job(text, tmp_path / 'whole', 0, *same_words).end()
  same(tmp_path / 'run', losses(tmp_path / 'whole'))


@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all(text, tmp_path):
  job = Job(text, tmp_path / 'run', 2, '--config.training.steps=100000', '--config.optimizer.groups.main.schedule=constant')
  pids = [int(re.search(r'process \d is (\d+)', job.child.stderr.readline())[1]) for _ in range(2)]
  job.wait_for_step(6)
  os.kill(pids[1], signal.SIGTERM)
  err = job.end(75)
  stopped = int(re.search(r'stopped by SIGTERM at step (\d+), saved', err)[1])
  assert (tmp_path / 'run' / 'checkpoints' / str(stopped)).is_dir()
  record = json.loads((tmp_path / 'run' / 'checkpoints' / str(stopped) / 'record' / 'metadata').read_text())
  assert record['data']['step'] == stopped


@pytest.mark.slow
def test_bad_input_of_a_job_is_one_line_a_process(text, tmp_path):
  err = Job(text, tmp_path / 'run', 2, '--config.evaluation.batch=6').end(2)
  assert '[0] memjax: evaluation.batch=6 does not split over 4 devices' in err and 'Traceback' not in err


@pytest.mark.slow
def test_slurm_is_detected():
  """Two processes that find each other by what `srun` sets."""
  code = ('from memjax.runtime import distributed as d; d.maybe_initialize(); import jax; print(jax.process_count(), d.is_leader())')
  job = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1'}
  start = lambda rank: subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.PIPE, text=True, env={
      **os.environ, **job, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank), 'JAX_PLATFORMS': 'cpu'})
  children = [start(rank) for rank in (0, 1)]
  assert [child.communicate(timeout=60)[0].splitlines()[-1] for child in children] == ['2 True', '2 False']
