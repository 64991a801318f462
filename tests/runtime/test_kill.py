"""Processes that are killed while they train."""
import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def disturbed(*arguments):
  done = subprocess.run([sys.executable, f'{ROOT}/benchmarks/resume.py', *arguments], capture_output=True, text=True, cwd=ROOT,
                        check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['equal']
  return result['kills']


@pytest.mark.slow
def test_kills_change_nothing():
  """SIGKILL and SIGTERM at random instants: parameters, optimiser state, memory and rows have the undisturbed run's bits.

  SIGTERM saves the step it came in and ends with status 75.
  """
  first, second = disturbed('--kills', '2', '--signals', 'KILL', 'TERM', '--steps', '20')
  assert first['status'] == -9
  assert second['status'] == 75 and second['saved'] >= second['written'] > 0


@pytest.mark.slow
def test_ten_sigkills_change_nothing():
  assert [kill['status'] for kill in disturbed('--kills', '10')] == [-9] * 10
