"""docs/finetune.md on a tiny host: its commands run, and a run on conversations goes on after a stop as if there had been none."""
import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from memjax import evaluate, generate, train
from memjax.config.flags import call, load, parse
from memjax.layers.tree import named
from memjax.runtime.reading import open_run
from tests.adapters.gguf_files import write_case
from tests.pieces import write_plays
from tests.runtime.test_instruction import write_chats

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / 'docs' / 'finetune.md').read_text(encoding='utf-8')
COMMANDS = [shlex.split(line) for line in re.findall(r'^python -m memjax\.(.*)$', PAGE, re.M)]
[CONFIG] = re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S)
SMALL = ('training.steps=2', 'training.length=64', 'training.batch=2', 'evaluation.length=128', 'evaluation.batches=1',
         'evaluation.sample=4', 'mesh.data=1')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with host.gguf, conversations, plays and the config of the page."""
  root = tmp_path_factory.mktemp('finetune')
  write_case(root / 'host.gguf', 'llama_plain')
  write_chats(root / 'talks')
  folder = write_plays(root / 'plays')
  for path in folder.iterdir(): path.write_text(''.join(re.findall(r'[a-zA-H.,?!\n ]', path.read_text())))
  (root / 'own.py').write_text(CONFIG)
  return root


def words(root, command, *more):
  """The words of a command of the page, its places those of the folder; a training is made small."""
  places = {'HOST': f'{root}/host.gguf', 'CHATS': f'{root}/talks', 'TEXT': f'{root}/plays', 'W/': f'{root}/'}
  given = [re.sub('HOST|CHATS|TEXT|^W/', lambda found: places[found[0]], word) for word in command[1:]]
  if command[0] == 'train': more = (*(f'--config.{one}' for one in (*SMALL, f'data.cache={root}/cache')), '--nofigures', *more)
  return [*given, *more]


def run(root, command, *more):
  module = {'train': train, 'evaluate': evaluate, 'generate': generate}[command[0]]
  takes = command[0] == 'train'
  assert call(module.main, flags=module.FLAGS, takes_config=takes, argv=words(root, command, *more)) == 0


def test_the_commands_are_understood(root):
  """The configs that the training commands of the page ask for, and the sizes in its table."""
  found = [parse(words(root, command), train.FLAGS)[0] for command in COMMANDS if command[0] == 'train']
  assert [config.training.mode for config in found] == ['pretraining', 'instruction']
  assert all(config.training.host == f'{root}/host.gguf' and config.data.tokenizer.kind == 'host' for config in found)
  table = re.findall(r'^\| `(configs/\w+\.py):HOST` \|.*\| ([\d,]+)', PAGE, re.M)
  for path, count in table: assert f'{count} trainable of' in ast.get_docstring(ast.parse((ROOT / path).read_text()))
  own = load(f'{root}/own.py:{root}/host.gguf')
  assert len(table) == 4 and set(own.optimizer.groups) == {'memory', 'memory_bank', 'lora', 'base'}
  assert own.model.layers == ('attention', 'memory:bare') * 2 and own.model.block.lora.rank == 8


@pytest.mark.slow
def test_the_page_runs(root, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  for command in COMMANDS:
    run(root, command)
    said = capsys.readouterr().out
    if command[0] == 'evaluate': scores = json.loads(said)
  tokens = scores['tokens']
  assert scores['split'] == 'test' and 0 < tokens < 100 and scores['corpus'] == 'talks'
  assert scores['bits_per_byte'] == pytest.approx(scores['loss'] / np.log(2) * tokens / scores['bytes'])
  run(root, ['evaluate', '--workdir', f'{root}/chat', '--text', f'{root}/talks/test.jsonl'])
  again = json.loads(capsys.readouterr().out)
  assert again['split'] == 'text' and {name: again[name] for name in ('loss', 'tokens', 'bytes')} == {
    name: scores[name] for name in ('loss', 'tokens', 'bytes')}
  run(root, ['train', '--config', f'{root}/own.py:{root}/host.gguf', '--workdir', f'{root}/own', '--config.training.steps=1'])
  assert (root / 'chat' / 'tokenizer' / 'chat_template.jinja').exists()


@pytest.mark.slow
def test_a_run_on_conversations_resumes_exactly(root, monkeypatch):
  """Four steps, and two steps twice: the same arrays, bit for bit."""
  monkeypatch.chdir(ROOT)
  command = next(command for command in COMMANDS if '--config.training.mode=instruction' in command)
  names = ['whole', 'parts']
  made = {name: [word.replace('W/chat', f'W/{name}') for word in command] for name in names}
  flat = [f'--config.optimizer.groups.{group}.schedule=constant' for group in ('memory', 'memory_bank', 'lora')]
  for name, steps in (('whole', 4), ('parts', 2), ('parts', 4)): run(root, made[name], *flat, f'--config.training.steps={steps}')
  whole, parts = (named(open_run(f'{root}/{name}', step=4).params) for name in names)
  for path, x in whole.items(): np.testing.assert_array_equal(x, parts[path], err_msg=path)
