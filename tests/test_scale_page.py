"""docs/scale.md: its commands parse, its presets are those of the config, what it says is refused is refused; the rows of its benchmark."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from memjax import train
from memjax.config.errors import UserError
from memjax.config.flags import call, parse
from memjax.config.mesh import PRESETS
from memjax.memory.registry import MEMORIES
from memjax.runtime import flops
from tests import dies
from tests.runtime.conftest import write_text
from tests.test_readme import ROOT, blocks, commands

PAGE = (Path(__file__).parent.parent / 'docs' / 'scale.md').read_text(encoding='utf-8')
COMMANDS = [words for _, words in commands('\n'.join(blocks('bash', PAGE)))]
DRY = [words for words in COMMANDS if '--dry_run' in words and '--config.mesh.model=1' not in words]
REFUSED = next(words for words in COMMANDS if '--config.mesh.model=1' in words)
SMALL = ('--config.training.steps=2', '--config.training.length=32', '--config.training.batch=8', '--config.evaluation.batch=8',
         '--config.evaluation.batches=1', '--config.evaluation.sample=0', '--nofigures', '--config.data.source=path')


def test_commands_parse_and_presets_are_those_of_the_config(monkeypatch):
  monkeypatch.chdir(ROOT)
  for words in COMMANDS:
    if words is not REFUSED: parse(words, train.FLAGS)
  with pytest.raises(UserError, match="model=1 leaves nothing to preset='fsdp_tp'; use preset='fsdp'"): parse(REFUSED, train.FLAGS)
  first, second = (re.findall(r'^\| (.+?) \|', table, re.M) for table in re.findall(r'(?:^\|.*\n)+', PAGE, re.M))
  assert [name.strip('`') for name in first[1:] if '---' not in name] == [name for name in PRESETS if name]
  assert [kind for kind in MEMORIES if kind not in ' '.join(second)] == []


@pytest.mark.slow
@pytest.mark.parametrize('words', DRY, ids=lambda words: words[-1])
def test_dry_runs_of_the_page(words, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(flops, 'training_flops', lambda *_: 0.0)
  assert call(train.main, flags=train.FLAGS, argv=words) == 0 and 'parameters' in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_and_then_one(tmp_path, monkeypatch):
  """The page's job of two processes, and its continuation by one process on another mesh."""
  monkeypatch.chdir(ROOT)
  text = write_text(tmp_path)
  small = [*SMALL, f'--config.data.path={text}', f'--config.data.cache={tmp_path}/cache']
  place = lambda words: [str(tmp_path / 'run') if word == 'runs/two' else word for word in words]
  job = shlex.split(next(line for line in PAGE.splitlines() if line.startswith('python launch/local.py')))[1:]
  done = subprocess.run([sys.executable, *place(job), *small], capture_output=True, text=True, env={**os.environ}, check=False)
  assert done.returncode == 0, done.stderr
  again = next(words for words in COMMANDS if 'runs/two' in words)
  assert call(train.main, flags=train.FLAGS, argv=[*place(again), *small, '--config.training.steps=3']) == 0
  assert (tmp_path / 'run' / 'checkpoints' / '3').is_dir()


def test_a_row_that_ends_its_process_costs_no_other():
  rows = scaling.in_processes(dies.work, ['one', 'crash', 'two', 'exit'])
  assert rows == [{'part': 'one', 'ms': 1.0}, {'part': 'crash', 'failed': 'died by signal 9'}, {'part': 'two', 'ms': 1.0},
                  {'part': 'exit', 'failed': 'ended with status 3'}]
  with pytest.raises(SystemExit, match='4'): scaling.in_processes(dies.work, [])
