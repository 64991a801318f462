"""A little text, and runs on it."""
import os
import random

import pytest

from memjax.config.flags import call
from memjax.train import FLAGS, main

CONFIG = os.path.join(os.path.dirname(__file__), 'tiny_run.py')


def write_text(folder, seed=0):
  """Splits of a few documents of made-up words."""
  draw = random.Random(seed)
  words = [''.join(draw.choices('abcdefgh', k=draw.randint(1, 6))) for _ in range(40)]
  for split, documents in {'train': 12, 'val': 2, 'test': 2}.items():
    texts = [' '.join(draw.choices(words, k=60)) for _ in range(documents)]
    (folder / f'{split}.txt').write_text('\n\n\n'.join(texts) + '\n')
  return folder


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """A folder with train.txt, val.txt and test.txt."""
  return write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='session')
def train(text):
  """train(workdir, 'training.steps=3', ..., flag='value') -> exit status of the command, in this process."""
  def run(workdir, *overrides, source=text, **flags):
    argv = ['--config', f'{CONFIG}:{source}', *(f'--config.{o}' for o in overrides)]
    argv += ['--nofigures'] + [f'--{name}={value}' if value is not True else f'--{name}' for name, value in flags.items()]
    return call(main, flags=FLAGS, argv=[*argv, *(['--workdir', str(workdir)] if workdir else [])])
  return run


@pytest.fixture(scope='session')
def whole(train, tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  assert train(workdir) == 0
  return workdir
