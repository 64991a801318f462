"""The launchers: what they would run, what they hand on, and what they do with the exit status. Without jax and without schedulers."""
import json
import os
import re
import shlex
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
WORDS = ['--config', 'configs/with space.py', '--workdir', 'runs/x', '--config.data.path=$HOME/a;b']
TRAIN = ['-m', 'memjax.train', *WORDS]
ALONE = {'PATH': '/usr/bin:/bin'}
SAYS = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" >> "$LOG"\nenv | grep ^MEMJAX_ | sort >> "$LOG"\nexit ${STATUS:-0}\n'


def dry(file, *words):
  """The printed commands, each as a list of words; no scheduler can be found, and Python sees no installed package."""
  program = [sys.executable, '-I', '-S'] if file.endswith('.py') else ['bash']
  done = subprocess.run([*program, str(LAUNCH / file), *words], capture_output=True, text=True, env=ALONE, check=False)
  assert done.returncode == 0 and done.stderr == '', done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


def stand_in(folder, *names):
  """Programs that write down how they were called; the environment that finds them."""
  for name in names:
    (folder / name).write_text(SAYS)
    (folder / name).chmod(0o755)
  return {'PATH': f'{folder}:/usr/bin:/bin', 'LOG': str(folder / 'log')}


def first_command(file):
  """The command in the first comment of a manifest."""
  line = next(line for line in (LAUNCH / file).read_text(encoding='utf-8').splitlines() if not line.startswith('#!'))
  assert line.startswith('# ')
  return line[2:]


def test_slurm():
  assert dry('slurm.sbatch', '--dry-run', *WORDS) == [['srun', '--kill-on-bad-exit=1', 'python', *TRAIN]]
  text = (LAUNCH / 'slurm.sbatch').read_text(encoding='utf-8')
  directives = re.findall(r'^#SBATCH (\S+)', text, re.M)
  assert {'--requeue', '--signal=TERM@120'} <= set(directives) and text.index('#SBATCH') < text.index('\nset ')


@pytest.mark.parametrize(('status', 'queued'), [(0, False), (75, True), (2, False), (137, False)])
def test_slurm_queues_what_is_saved_and_not_finished(tmp_path, status, queued):
  (tmp_path / 'bin').mkdir()
  environment = stand_in(tmp_path / 'bin', 'srun', 'scontrol') | {'SLURM_JOB_ID': '42', 'STATUS': str(status)}
  done = subprocess.run(['bash', str(LAUNCH / 'slurm.sbatch'), *WORDS], env=environment, capture_output=True, check=False)
  calls = Path(environment['LOG']).read_text().split(f'{tmp_path}/bin/')
  assert done.returncode == status and calls[1].splitlines()[3:] == TRAIN
  assert [call.split() for call in calls[2:]] == ([['scontrol', 'requeue', '42']] if queued else [])


SRUN = f'#!{sys.executable}\n' + '''
"""Two tasks with the variables of Slurm; with STOP_AFTER=step they are told to stop once that step is logged."""
import json, os, signal, subprocess, sys, time

def variables(rank):
  return {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_NTASKS': '2', 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank),
          'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1'}

def steps(path):
  return [json.loads(line)['step'] for line in open(path)] if os.path.exists(path) else []

tasks = [subprocess.Popen(sys.argv[2:], env=os.environ | variables(rank)) for rank in (0, 1)]
told = int(os.environ.get('STOP_AFTER', '0'))
while any(task.poll() is None for task in tasks):
  if told and max(steps(os.environ['METRICS']), default=0) >= told:
    for task in tasks: task.send_signal(signal.SIGTERM)
    told = 0
  time.sleep(0.05)
sys.exit(max(task.returncode for task in tasks))
'''


@pytest.mark.slow
def test_slurm_trains_in_two_tasks_is_stopped_and_goes_on(tmp_path):
  """The script with a stand-in for srun: jax finds the other task by Slurm's variables; the second turn resumes where the first saved."""
  from tests.runtime.conftest import CONFIG, write_text
  environment = stand_in(tmp_path, 'scontrol')
  (tmp_path / 'srun').write_text(SRUN)
  (tmp_path / 'srun').chmod(0o755)
  (tmp_path / 'text').mkdir()
  words = ['--config', f'{CONFIG}:{write_text(tmp_path / "text")}', '--workdir', f'{tmp_path}/run', '--nofigures', '--config.mesh.data=2',
           '--config.training.steps=400', '--config.training.log_every=1', '--config.evaluation.every=400', '--config.checkpoint.every=400']
  environment |= {name: value for name, value in os.environ.items() if name.startswith('JAX_')} | {
    'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, 'SLURM_JOB_ID': '42', 'JAX_NUM_CPU_DEVICES': '1',
    'METRICS': f'{tmp_path}/run/metrics.jsonl'}
  def turn(**more):
    return subprocess.run(['bash', str(LAUNCH / 'slurm.sbatch'), *words], env=environment | more, cwd=ROOT, capture_output=True, text=True,
                          check=False)
  first = turn(STOP_AFTER='3')
  assert first.returncode == 75, first.stderr[-2000:]
  assert Path(environment['LOG']).read_text().split()[1:] == ['requeue', '42'] and '2 processes, 2 devices' in first.stderr
  [saved] = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert 3 <= saved < 400
  words[[word.partition('=')[0] for word in words].index('--config.training.steps')] = f'--config.training.steps={saved + 4}'
  second = turn()
  assert second.returncode == 0 and f'at step {saved}' in second.stderr, second.stderr[-2000:]


def test_tpu_vm():
  place = ['--name', 'pod', '--zone', 'us-x', '--dry-run']
  [ssh] = dry('tpu_vm.sh', 'train', *place, '--project', 'p', *WORDS)
  assert ssh[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  assert ssh[6:-1] == ['--zone', 'us-x', '--project', 'p', '--worker=all', '--command']
  inner = shlex.split(ssh[-1])
  assert inner[3:3 + len(TRAIN) + 1] == ['python3', *TRAIN] and ssh[-1].endswith('exit ${PIPESTATUS[0]}')
  create = dry('tpu_vm.sh', 'create', *place, '--type', 'v6e-16', '--spot')
  assert create[0][4:6] == ['create', 'pod'] and create[0][-1] == '--spot' and 'v6e-16' in create[0]
  packed = next(words for words in create if words[0] == 'tar')[3:]
  assert all((ROOT / name).exists() for name in packed) and {'memjax', 'configs', 'pyproject.toml'} <= set(packed)
  assert dry('tpu_vm.sh', 'delete', *place)[0][4:6] == ['delete', 'pod'] and 'tail' in dry('tpu_vm.sh', 'logs', *place)[0][-1]


def test_gke_xpk():
  own = ['--name', 'run1', '--cluster', 'c', '--image', 'i', '--tpu-type', 'v5p-8', '--num-slices', '2', '--zone', 'z', '--dry-run']
  [words] = dry('gke_xpk.sh', *own, *WORDS)
  given = dict(zip(words[3::2], words[4::2], strict=True))
  assert words[:3] == ['xpk', 'workload', 'create'] and shlex.split(given['--command']) == ['python', *TRAIN]
  assert (given['--workload'], given['--tpu-type'], given['--num-slices'], given['--zone']) == ('run1', 'v5p-8', '2', 'z')
  assert given['--restart-on-exit-codes'] == '75' and int(given['--max-restarts']) > 0


@pytest.mark.parametrize('words', [['tpu_vm.sh'], ['tpu_vm.sh', 'train', '--zone', 'z'], ['tpu_vm.sh', 'nonsense', '--name', 'n'],
                                   ['gke_xpk.sh', '--name', 'n'], ['gke_xpk.sh', '--name']])
def test_what_is_missing_is_said(words):
  done = subprocess.run(['bash', str(LAUNCH / words[0]), *words[1:]], capture_output=True, text=True, env=ALONE, check=False)
  assert done.returncode == 2 and done.stdout == '' and done.stderr


def test_jobset():
  text = (LAUNCH / 'jobset.yaml').read_text(encoding='utf-8')
  given = dict(word.split('=', 1) for word in shlex.split(first_command('jobset.yaml').split(' envsubst ')[0]))
  assert set(given) == set(re.findall(r'\$\{(\w+)\}', text))
  [job] = (spec := yaml.safe_load(string.Template(text).substitute(given))['spec'])['replicatedJobs']
  inner = job['template']['spec']
  pod = inner['template']['spec']
  [container] = pod['containers']
  environment = {entry['name']: entry for entry in container['env']}
  assert spec['network']['enableDNSHostnames'] and inner['completionMode'] == 'Indexed'
  assert inner['completions'] == inner['parallelism'] == int(environment['MEMJAX_NUM_PROCESSES']['value']) == 2
  assert environment['MEMJAX_COORDINATOR']['value'] == f'run1-{job["name"]}-0-0.run1:8476'
  assert 'job-completion-index' in environment['MEMJAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
  assert container['command'][-1] == f'exec python -m memjax.train {given["ARGS"]}' and '--workdir /runs/' in given['ARGS']
  assert inner['podFailurePolicy']['rules'][0]['onExitCodes'] == {'containerName': container['name'], 'operator': 'In', 'values': [2]}
  assert spec['failurePolicy']['maxRestarts'] > 0 and spec['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] >= 120
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}


def test_skypilot(tmp_path):
  task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text(encoding='utf-8'))
  command = shlex.split(first_command('skypilot.yaml'))
  assert command[:3] == ['sky', 'jobs', 'launch'] and 'launch/skypilot.yaml' in command
  assert command[-1].partition('=')[0] in task['envs'] and '--workdir /runs/' in command[-1] and '/runs' in task['file_mounts']
  assert task['resources']['job_recovery']['recover_on_exit_codes'] == [75]
  environment = stand_in(tmp_path, 'python') | {'ARGS': '--config C', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'STATUS': '75'}
  variables = {'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'}
  for extra, told in ((variables, ['MEMJAX_COORDINATOR=10.0.0.1:8476', 'MEMJAX_NUM_PROCESSES=2', 'MEMJAX_PROCESS_ID=1']), ({}, [])):
    Path(environment['LOG']).unlink(missing_ok=True)
    assert subprocess.run(['bash', '-c', task['run']], env=environment | extra, check=False).returncode == 75
    assert Path(environment['LOG']).read_text().splitlines() == [f'{tmp_path}/python', '-m', 'memjax.train', '--config', 'C', *told]


RAY = '''
"""As much of Ray as ray_job.py needs: actors are objects, calls are threads."""
import concurrent.futures as futures
import types

pool = futures.ThreadPoolExecutor(16)
util = types.SimpleNamespace(get_node_ip_address=lambda: '10.0.0.9')


def init(address): print('address', address, flush=True)


def remote(**options):
  print('options', sorted(options), flush=True)
  class Actor:
    def __init__(self, made): self.made = made
    def __getattr__(self, name):
      return types.SimpleNamespace(remote=lambda *args: pool.submit(getattr(self.made, name), *args))
  return lambda cls: types.SimpleNamespace(remote=lambda: Actor(cls()))


def get(future): return future.result()


def wait(pending, num_returns, timeout=None):
  done = [next(futures.as_completed(pending, timeout))] if num_returns == 1 else list(futures.wait(pending, timeout).done)
  return done, [one for one in pending if one not in done]


def kill(actor): pass
'''
TRAINING = '''
"""Rank 1 ends with the next status of the list in the file, rank 0 with 0, or never where rank 1 fails."""
import json, os, sys, time
rank, path = os.environ['MEMJAX_PROCESS_ID'], sys.argv[1]
with open(f'{path}.{rank}', 'a') as file: file.write(json.dumps([sys.argv[2:], os.environ['MEMJAX_COORDINATOR']]) + chr(10))
turn = len(open(f'{path}.{rank}').readlines()) - 1
status = json.load(open(path))[turn]
if rank == '0' and status not in (0, 75): time.sleep(600)
lines = lambda: len(open(f'{path}.0').readlines()) if os.path.exists(f'{path}.0') else 0
while rank == '1' and lines() <= turn: time.sleep(0.01)      # a failure ends rank 0, which has to be seen first
sys.exit(status)
'''


@pytest.mark.parametrize(('statuses', 'expected', 'turns'), [([0], 0, 1), ([75, 75, 0], 0, 3), ([75, 2], 2, 2), ([75, 75, 75], 75, 3)])
def test_ray(tmp_path, statuses, expected, turns):
  """Two hosts: saved runs start again as often as allowed, a failure ends the host that would wait for ever."""
  (tmp_path / 'memjax').mkdir()
  for name, text in (('ray.py', RAY), ('memjax/train.py', TRAINING), ('memjax/__init__.py', ''), ('statuses', json.dumps(statuses))):
    (tmp_path / name).write_text(text)
  words = ['--hosts', '2', '--gpus', '8', '--restarts', '2', str(tmp_path / 'statuses'), *WORDS]
  done = subprocess.run([sys.executable, '-S', str(LAUNCH / 'ray_job.py'), *words], cwd=tmp_path, capture_output=True, text=True,
                        env=ALONE | {'PYTHONPATH': str(tmp_path)}, timeout=60, check=False)
  assert done.returncode == expected, done.stderr
  calls = [[json.loads(line) for line in (tmp_path / f'statuses.{rank}').read_text().splitlines()] for rank in (0, 1)]
  assert [len(rank) for rank in calls] == [turns, turns] and calls[0] == calls[1]
  assert calls[0][0][0] == WORDS and re.fullmatch(r'10\.0\.0\.9:\d+', calls[0][0][1])
  assert 'max_concurrency' in done.stdout and done.stderr.count('starting again') == turns - 1


def test_ray_dry():
  first, second = dry('ray_job.py', '--hosts', '2', '--dry-run', *WORDS)
  assert first == ['MEMJAX_COORDINATOR=RANK0:PORT', 'MEMJAX_NUM_PROCESSES=2', 'MEMJAX_PROCESS_ID=0', 'python', *TRAIN]
  assert second[2] == 'MEMJAX_PROCESS_ID=1' and dry('ray_job.py', '--dry-run', *WORDS) == [['python', *TRAIN]]


@pytest.mark.parametrize('kind', ['cpu', 'cuda', 'tpu'])
def test_dockerfiles(kind):
  file = f'Dockerfile.{kind}'
  text = (LAUNCH / file).read_text(encoding='utf-8')
  build = shlex.split(first_command(file))
  assert build[:6] == ['docker', 'build', '-f', f'launch/{file}', '-t', f'memjax:{kind}'] and '--workdir' in build
  assert re.fullmatch(r'\S+:\d+\.\d+\.\d+-\S+', re.search(r'^FROM (.*)$', text, re.M)[1])       # a pinned version
  kept = {line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')}
  copied = [name for line in re.findall(r'^COPY (.*)$', text, re.M) for name in line.split()[:-1]]
  assert set(copied) == kept and all((ROOT / name).exists() for name in copied)
  extras = re.search(r"'\.\[(.*)\]'", text)[1].split(',')
  known = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  assert set(extras) <= set(known) and (kind == 'cpu' or extras[0] == kind)
  assert 'RUN JAX_PLATFORMS=cpu python -m memjax.doctor' in text and json.loads(text.split('ENTRYPOINT ')[1])[1:] == TRAIN[:2]


def test_the_page_names_every_file():
  page = (LAUNCH / 'README.md').read_text(encoding='utf-8')
  files = [path.name for path in LAUNCH.iterdir() if path.is_file() and path.name != 'README.md']
  assert len(files) >= 9 and all(f'`{name}' in page for name in files)
  assert all(os.access(path, os.X_OK) for path in LAUNCH.glob('*.sh'))
