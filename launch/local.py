"""Trains in several processes of this machine, each with fake CPU devices: what a job on many hosts does, in small.

  python launch/local.py --processes 2 [--devices 4] [--dry-run] --config configs/default.py --workdir runs/x

What this file does not know goes to `python -m memjax.train`. Every line of output begins with the number of its process. The first
process that fails ends the others, by SIGKILL of their process groups, and its status is returned; SIGTERM is passed on, and 75
(saved, not finished) returned.
"""
import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

SAVED = 75
GRACE = 60.0                           # seconds that a process may take to end after another one has saved


def options(argv):
  """(own options, the words for memjax.train)."""
  make = argparse.ArgumentParser(prog='launch/local.py', description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  make.add_argument('--processes', type=int, default=2, help='how many')
  make.add_argument('--devices', type=int, default=1, help='fake CPU devices of each')
  make.add_argument('--dry-run', action='store_true', help='print what each process would run, and start nothing')
  return make.parse_known_args(argv)


def free_port():
  """A port of this machine that nobody listens on."""
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def environment(rank, count, devices, port):
  """The variables of one process; those of the job only where there are several."""
  job = {'MEMJAX_COORDINATOR': f'127.0.0.1:{port or "PORT"}', 'MEMJAX_NUM_PROCESSES': str(count), 'MEMJAX_PROCESS_ID': str(rank)}
  return {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), **(job if count > 1 else {})}


def start(rank, command, variables):
  """The process, in a group of its own, its output passed on line by line."""
  child = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           errors='replace', start_new_session=True)
  def follow(source, target):
    with source:
      for line in source:
        target.write(f'[{rank}] {line}')
        target.flush()
  pipes = (child.stdout, sys.stdout), (child.stderr, sys.stderr)
  child.readers = [threading.Thread(target=follow, args=pair, daemon=True) for pair in pipes]
  for reader in child.readers: reader.start()
  say(f'process {rank} is {child.pid}')
  return child


def say(text):
  """One line of our own on stderr."""
  sys.stderr.write(f'launch: {text}\n')
  sys.stderr.flush()


def end(children):
  """Ends the process groups of those that still run."""
  for child in children:
    if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
  for child in children: child.wait()


def outcome(code):
  """The status a shell would report, and how to say it."""
  return (code, f'failed with status {code}') if code >= 0 else (128 - code, f'was ended by {signal.Signals(-code).name}')


def wait(children):
  """The status of the job: 0, 75 if all saved, or at once that of the first process that failed."""
  saved = 0.0
  while True:
    codes = [child.poll() for child in children]
    failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, SAVED)]
    if failed:
      rank, code = min(failed, key=lambda one: (one[1] >= 0, one[0]))       # the others fail because one was killed, not the reverse
      status, how = outcome(code)
      say(f'process {rank} {how}; ended the others')
      return status
    if None not in codes: return SAVED if SAVED in codes else 0
    if SAVED in codes: saved = saved or time.monotonic()
    if saved and time.monotonic() - saved > GRACE:
      say(f'process {codes.index(None)} did not end after the others had saved; ended it')
      return SAVED
    time.sleep(0.05)


def run(commands):
  """The status of the job made of (command, variables) of each process."""
  children = []
  def forward(number, frame):
    for child in children:
      if child.poll() is None: child.send_signal(signal.SIGTERM)
  before = signal.signal(signal.SIGTERM, forward)
  try:
    for rank, (command, variables) in enumerate(commands): children.append(start(rank, command, variables))
    return wait(children)
  except KeyboardInterrupt:
    return 130
  finally:
    end(children)
    for child in children:
      for reader in child.readers: reader.join(5)
    signal.signal(signal.SIGTERM, before)


def main(argv=None):
  """Exit status of the job."""
  own, words = options(argv)
  if own.processes < 1 or own.devices < 1:
    say('--processes and --devices are at least 1')
    return 2
  command = [sys.executable or 'python', '-m', 'memjax.train', *words]
  port = 0 if own.dry_run else free_port()
  commands = [(command, environment(rank, own.processes, own.devices, port)) for rank in range(own.processes)]
  if not own.dry_run: return run(commands)
  for command, variables in commands: print(shlex.join([*(f'{name}={value}' for name, value in variables.items()), *command]))
  return 0


if __name__ == '__main__':
  sys.exit(main())
