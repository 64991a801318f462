"""Trains on the hosts of a Ray cluster: one actor a host, the address of rank 0 to all.

  python launch/ray_job.py --hosts 4 --gpus 8 [--address auto] [--restarts 20] [--dry-run] --config configs/default.py --workdir /runs/x

What this file does not know goes to `python -m memjax.train`. The workdir lies where all hosts see it. The first host that fails ends
the others; status 75 (saved, not finished) starts all again, any other status is returned.
"""
import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys

SAVED = 75


def options(argv):
  """(own options, the words for memjax.train)."""
  make = argparse.ArgumentParser(prog='launch/ray_job.py', description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  make.add_argument('--hosts', type=int, default=1, help='actors, one a host')
  make.add_argument('--gpus', type=float, default=0, help='GPUs of each host')
  make.add_argument('--cpus', type=float, default=1, help='CPUs reserved on each host')
  make.add_argument('--address', default='auto', help='of the Ray cluster')
  make.add_argument('--restarts', type=int, default=20, help='how often status 75 starts the hosts again')
  make.add_argument('--dry-run', action='store_true', help='print what each host would run, and start nothing')
  return make.parse_known_args(argv)


def environment(rank, hosts, coordinator):
  """The variables of one host; none for a single one."""
  if hosts == 1: return {}
  return {'MEMJAX_COORDINATOR': coordinator, 'MEMJAX_NUM_PROCESSES': str(hosts), 'MEMJAX_PROCESS_ID': str(rank)}


def command(words):
  """What every host runs."""
  return [sys.executable or 'python', '-m', 'memjax.train', *words]


class Host:
  """An actor: the training process of one host."""

  def __init__(self):
    self.process = None

  def address(self):
    """An address of this host with a port that is free."""
    import ray
    with socket.socket() as free:
      free.bind(('', 0))
      return f'{ray.util.get_node_ip_address()}:{free.getsockname()[1]}'

  def train(self, words, variables):
    """Exit status of the training, whose output goes to the log of the actor."""
    self.process = subprocess.Popen(words, env={**os.environ, **variables}, start_new_session=True)
    return self.process.wait()

  def stop(self):
    """Ends the training with all of its processes at once: SIGTERM would make it wait for hosts that are gone."""
    if self.process and self.process.poll() is None: os.killpg(self.process.pid, signal.SIGKILL)


def attempt(ray, own, words):
  """Exit status of one run on all hosts: that of the first which fails, else 0."""
  made = ray.remote(num_gpus=own.gpus, num_cpus=own.cpus, max_concurrency=2, scheduling_strategy='SPREAD')(Host)
  hosts = [made.remote() for _ in range(own.hosts)]
  coordinator = ray.get(hosts[0].address.remote())
  running = [host.train.remote(command(words), environment(rank, own.hosts, coordinator)) for rank, host in enumerate(hosts)]
  status = 0
  while running and not status:
    done, running = ray.wait(running, num_returns=1)
    status = ray.get(done[0])
  if status == SAVED and running: ray.wait(running, num_returns=len(running), timeout=60)      # they were told to stop, too
  for host in hosts: ray.get(host.stop.remote())
  for host in hosts: ray.kill(host)
  return status


def main(argv=None):
  """Exit status of the training."""
  own, words = options(argv)
  if own.dry_run:
    for rank in range(own.hosts):
      variables = [f'{name}={value}' for name, value in environment(rank, own.hosts, 'RANK0:PORT').items()]
      print(shlex.join([*variables, 'python', *command(words)[1:]]))
    return 0
  import ray
  ray.init(address=own.address)
  for left in reversed(range(1 + own.restarts)):
    status = attempt(ray, own, words)
    if status != SAVED or not left: return status
    print('memjax: saved, not finished; starting again', file=sys.stderr, flush=True)


if __name__ == '__main__': sys.exit(main())
