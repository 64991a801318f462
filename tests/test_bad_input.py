"""Bad input of any command is one line on stderr, exit status 2, and no traceback.

To add a case, append a Row to ROWS. `act` is one of
- a tuple of words: the command line of a command that takes `--config` and the FLAGS below; 'PLACE' in a word is a
  fresh folder that holds FILES;
- a function of that folder, which either raises UserError or returns the exit status of a command run in this process,
  as in `lambda place: call(evaluate.main, flags=evaluate.FLAGS, takes_config=False, argv=['--workdir', str(place)])`.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from memjax.config.codec import from_json, read_config
from memjax.config.errors import UserError
from memjax.config.flags import Flag, call, load
from tests.bad_readers import READERS
from tests.data.bad_input import DATA

BASE = '''
from memjax.config.codec import thaw
from memjax.config.mixers import AttentionConfig, HolographicConfig, HolographicSeedConfig, WindowConfig
from memjax.config.schema import Config, ModelConfig


def get_config(arg=''):
  steps = {'': 20, 'long': 200}[arg]
  mixers = {'mem': HolographicConfig(), 'swa': WindowConfig(), 'full': AttentionConfig(),
            'seed': HolographicSeedConfig(key_width=64)}
  config = thaw(Config(model=ModelConfig(width=64, mixers=mixers, pattern=('swa+mem:gate', 'swa'), repeats=1)))
  config.training.steps = steps
  return config
'''
FILES = {
  'base.py': BASE,
  'syntax.py': 'def get_config(arg=""):\n  return (\n',
  'raises.py': 'import json\n\nvalue = json.loads("{")\n',
  'deep.py': 'import json\n\ndef read(text):\n  return json.loads(text)\n\ndef get_config(arg=""):\n  return read("[")\n',
  'leaves.py': 'raise SystemExit(3)\n',
  'empty.py': '',
  'dict.py': 'def get_config(arg=""):\n  return {"seed": 1}\n',
  'plain.py': BASE.replace("arg=''", '').replace('[arg]', '[""]'),
  'wants.py': BASE.replace("arg=''", 'arg'),
  'typo.py': BASE.replace('training.steps = steps', 'training.stepz = steps'),
  'wrong_type.py': BASE.replace('training.steps = steps', 'training.steps = "many"'),
  'bad_class.py': BASE.replace('WindowConfig()', 'WindowConfig(window=0)'),
  'bad_wiring.py': BASE.replace("'swa')", "'swa+mems')"),
  'extra.py': 'import ml_collections\n\ndef get_config(arg=""):\n  return ml_collections.ConfigDict({"modle": {}})\n',
  'latin.py': b'name = "caf\xe9"\n',
  'run.json': '{}',
  'run.yaml': 'seed: 1\n',
  'broken.json': '{"seed": ',
  'list.json': '[1]',
  'unknown.json': '{"seeed": 1}',
  'none.json': '{"seed": null}',
  'untagged.json': '{"model": {"mixers": {"attention": {"heads": 4}}}}',
  'badtag.json': '{"model": {"mixers": {"attention": {"kind": "atention"}}}}',
  'nan.json': '{"training": {}, "optimizer": {"eps": NaN}}',
  'notutf8.json': b'{"name": "\xe9"}',
}
FLAGS = (
  Flag('workdir', str, None, 'folder of the run'),
  Flag('dry_run', bool, False, 'prints and exits'),
  Flag('prompt', str, doc='text to continue', repeated=True),
  Flag('max_new_tokens', int, 100, 'length of the continuation', low=1),
  Flag('temperature', float, 1.0, 'of sampling', low=0.0),
  Flag('split', str, 'test', 'split to read', choices=('train', 'val', 'test')),
)


class Row(NamedTuple):
  """One bad input: a name, what is done, and what the line must contain."""
  id: str
  act: tuple | Callable[[Path], int | None]
  says: str


def with_config(*words: str) -> tuple:
  """Words of a command line that is sound but for `words`."""
  return ('--config=PLACE/base.py', '--workdir=PLACE/run', *words)


COMMAND_LINE = [
  Row('no config', ('--workdir=PLACE/run',), '--config FILE.py[:arg] is required'),
  Row('no arguments', (), '--config FILE.py[:arg] is required'),
  Row('config without value', ('--workdir=PLACE/run', '--config'), '--config FILE.py[:arg] is required'),
  Row('config empty', ('--config=',), '--config FILE.py[:arg] is required'),
  Row('config then a flag', ('--config', '--workdir=PLACE/run'), '--config FILE.py[:arg] is required'),
  Row('override first', ('--config.seed=1', '--config=PLACE/base.py'), '--config must come before --config.seed'),
  Row('no-override first', ('--noconfig.model.embedding.tie', '--config', 'PLACE/base.py'),
      '--config must come before --noconfig.model.embedding.tie'),
  Row('misspelt config', ('--confg=PLACE/base.py',), "unknown flag --confg; did you mean '--config'?"),
  Row('misspelt flag', with_config('--wrokdir=x'), "unknown flag --wrokdir; did you mean '--workdir'?"),
  Row('dash for underscore', with_config('--dry-run'), "unknown flag --dry-run; did you mean '--dry_run'?"),
  Row('single dash', with_config('-workdir', 'x'), "stray argument '-workdir'; flags begin with --"),
  Row('unlike any flag', with_config('--zzz=1'), 'unknown flag --zzz'),
  Row('required flag', ('--config=PLACE/base.py',), '--workdir is required: folder of the run'),
  Row('flag without value', with_config('--split'), '--split wants a value'),
  Row('flag for a value', with_config('--prompt', '--dry_run'), "if it is '--dry_run', write --prompt=--dry_run"),
  Row('positional', with_config('tiny'), "stray argument 'tiny'"),
  Row('positional first', ('tiny', *with_config()), "stray argument 'tiny'"),
  Row('after dashes', with_config('--', '--dry_run'), "stray argument '--dry_run'"),
  Row('dashes alone', with_config('--'), "stray argument '--'"),
  Row('boolean and space', with_config('--config.training.carry', 'false'),
      "stray argument 'false'; write --config.training.carry=false"),
  Row('own boolean and space', with_config('--dry_run', 'False'), "stray argument 'False'; write --dry_run=False"),
  Row('own boolean value', with_config('--dry_run=maybe'), "--dry_run wants bool, got 'maybe'"),
  Row('no-boolean with value', with_config('--nodry_run=1'), '--nodry_run takes no value'),
  Row('no for a number', with_config('--nomax_new_tokens'), 'unknown flag --nomax_new_tokens'),
  Row('flag type', with_config('--max_new_tokens=ten'), "--max_new_tokens wants int, got 'ten'"),
  Row('flag range', with_config('--max_new_tokens=0'), '--max_new_tokens must be at least 1, not 0'),
  Row('negative temperature', with_config('--temperature=-1'), '--temperature must be at least 0.0, not -1.0'),
  Row('negative after space', with_config('--temperature', '-1'), '--temperature must be at least 0.0, not -1.0'),
  Row('temperature nan', with_config('--temperature=nan'), '--temperature must be finite, not nan'),
  Row('flag choice', with_config('--split=tset'), "--split must be one of 'train', 'val', 'test', not 'tset'; did you"),
]

CONFIG_FILES = [
  Row('missing file', ('--config=PLACE/bose.py',), '/base.py'),
  Row('missing file, no name near', ('--config=PLACE/zzzzzz.py',), 'no such config file: PLACE/zzzzzz.py'),
  Row('missing suffix', ('--config=PLACE/base',), '/base.py'),
  Row('folder', ('--config=PLACE',), 'PLACE is a folder, not a config file'),
  Row('json', ('--config=PLACE/run.json',),
      'PLACE/run.json is not a Python config; use configs/saved.py:PLACE/run.json'),
  Row('yaml', ('--config=PLACE/run.yaml',), 'PLACE/run.yaml is not a Python config'),
  Row('syntax error', ('--config=PLACE/syntax.py',), 'PLACE/syntax.py:2: SyntaxError: '),
  Row('exception', ('--config=PLACE/raises.py',), 'PLACE/raises.py:3: JSONDecodeError: Expecting property name'),
  Row('exit', ('--config=PLACE/leaves.py',), 'PLACE/leaves.py:1: SystemExit: 3'),
  Row('exception in a call', ('--config=PLACE/deep.py',), 'PLACE/deep.py:4: JSONDecodeError'),
  Row('not utf-8', ('--config=PLACE/latin.py',), ': SyntaxError: '),
  Row('no get_config', ('--config=PLACE/empty.py',), 'PLACE/empty.py has no get_config()'),
  Row('returns a dict', ('--config=PLACE/dict.py',), 'PLACE/dict.py: get_config returned dict, not a ConfigDict'),
  Row('unknown argument', ('--config=PLACE/base.py:huge',), "PLACE/base.py:8: KeyError: 'huge'"),
  Row('takes no argument', ('--config=PLACE/plain.py:huge',), 'PLACE/plain.py takes no argument, got :huge'),
  Row('wants an argument', ('--config=PLACE/wants.py',), 'PLACE/wants.py wants an argument'),
  Row('misspelt in the file', ('--config=PLACE/typo.py',), 'Did you mean "steps" instead of "stepz"?'),
  Row('type in the file', ('--config=PLACE/wrong_type.py',), 'PLACE/wrong_type.py:12: TypeError'),
  Row('range in the file', ('--config=PLACE/bad_class.py',), 'PLACE/bad_class.py:9: window must be at least 1, not 0'),
  Row('wiring in the file', ('--config=PLACE/bad_wiring.py',), "PLACE/bad_wiring.py:11: pattern names 'mems'"),
  Row('unknown key of a file', ('--config=PLACE/extra.py',),
      "PLACE/extra.py: unknown key config.modle; did you mean 'model'?"),
]

OVERRIDES = [
  Row('unknown key', with_config('--config.model.widht=3'), "unknown key config.model.widht; did you mean 'width'?"),
  Row('unknown group', with_config('--config.modle.width=3'), "unknown key config.modle; did you mean 'model'?"),
  Row('unknown key, no name near', with_config('--config.mesh.zzz=3'), 'config.mesh has preset, data, fsdp, model, sequence'),
  Row('unknown preset', with_config('--config.mesh.preset=sequence'), "'sequence'; did you mean 'sequence_parallel'?"),
  Row('key of another group', with_config('--config.steps=3'), "did you mean 'config.training.steps'?"),
  Row('unknown memory', with_config('--config.model.mixers.mom.heads=3'),
      "config.model.mixers.mom; did you mean 'mem'?"),
  Row('unknown key of a memory', with_config('--config.model.mixers.mem.slot=3'),
      "mixers.mem.slot; did you mean 'slots'?"),
  Row('index', with_config('--config.model.pattern[0]=z'), "config.model.pattern[0]; did you mean 'pattern'?"),
  Row('no key', with_config('--config.=3'), 'unknown key config.'),
  Row('field of a number', with_config('--config.training.steps.x=3'),
      "config.training.steps is an int, it has no field 'x'"),
  Row('field of a tuple', with_config('--config.model.pattern.x=3'),
      "config.model.pattern is a tuple of str, it has no"),
  Row('whole group', with_config('--config.model={}'), 'config.model is a group; set its fields one by one'),
  Row('whole memory', with_config('--config.model.mixers.mem=seed'), 'config.model.mixers.mem is a group'),
  Row('kind of a memory', with_config('--config.model.mixers.mem.kind=window'),
      "config.model.mixers.mem.kind is 'holographic' in this config"),
  Row('int from float', with_config('--config.training.steps=2.5'), "config.training.steps wants int, got '2.5'"),
  Row('int from exponent', with_config('--config.training.steps=1e3'), "config.training.steps wants int, got '1e3'"),
  Row('int from text', with_config('--config.training.steps', 'abc'), "config.training.steps wants int, got 'abc'"),
  Row('int from nothing', with_config('--config.training.steps='), "config.training.steps wants int, got ''"),
  Row('int from None', with_config('--config.training.steps=None'), "config.training.steps wants int, got 'None'"),
  Row('int without value', with_config('--config.training.steps'), '--config.training.steps wants a value'),
  Row('float from text', with_config('--config.optimizer.b1=high'), "config.optimizer.b1 wants float, got 'high'"),
  Row('float nan', with_config('--config.optimizer.eps=nan'), 'config.optimizer.eps must be finite, not nan'),
  Row('float inf', with_config('--config.optimizer.groups.main.rate=inf'), 'groups.main.rate must be finite, not inf'),
  Row('bool from text', with_config('--config.training.carry=yes'), "config.training.carry wants bool, got 'yes'"),
  Row('no for an int', with_config('--noconfig.training.steps'), '--noconfig.training.steps is for booleans'),
  Row('no with a value', with_config('--noconfig.training.carry=1'), '--noconfig.training.carry is for booleans'),
  Row('choice', with_config('--config.model.dtype=float16'),
      "config.model.dtype must be one of 'float32', 'bfloat16', 'float64', not 'float16'; did you mean"),
  Row('nested choice', with_config('--config.model.mixers.mem.binding.kind=7'),
      "config.model.mixers.mem.binding.kind must be one of 'phasor',"),
  Row('negative size', with_config('--config.training.batch=-4'), 'config.training.batch must be at least 1, not -4'),
  Row('above range', with_config('--config.model.block.dropout=1.5'),
      'config.model.block.dropout must be at most 0.999'),
  Row('seed too large', with_config('--config.seed=99999999999'), 'config.seed must be at most 2147483647'),
  Row('tuple element type', with_config('--config.model.pattern=(1,2)'), 'config.model.pattern[0] wants str, got 1'),
  Row('tuple broken', with_config("--config.model.pattern=('swa',"), 'config.model.pattern wants tuple of str, got'),
  Row('empty pattern', with_config('--config.model.pattern='),
      'config.model.pattern, prefix and suffix together hold no'),
  Row('pattern of another name', with_config('--config.model.pattern=swa,mom'), "config.model.pattern names 'mom'"),
  Row('rule without group', with_config('--config.optimizer.rules=memory'), "config.optimizer.rules holds 'memory'"),
  Row('rule of another group', with_config('--config.optimizer.rules=.*=slow'), "whose group 'slow' is not one of"),
  Row('rule no regex', with_config('--config.optimizer.rules=(=main'), 'which is not a regular expression'),
  Row('between groups', with_config('--config.training.carry'), "config.training.carry needs data.order='lanes'"),
  Row('load without equals', lambda place: load(place / 'base.py', 'training.steps') and None,
      "override 'training.steps' is not of the form"),
  Row('load unknown key', lambda place: load(place / 'base.py', 'training.stepz=1') and None,
      "config.training.stepz; did you mean 'steps'?"),
]


def read(name: str) -> Callable[[Path], None]:
  """Reads one of FILES as the saved config of a run."""
  return lambda place: read_config(str(place / name)) and None


SAVED = [
  Row('saved: missing', read('no.json'), 'no such file: '),
  Row('saved: workdir without config', lambda place: read_config(str(place)) and None, 'config.json'),
  Row('saved: truncated', read('broken.json'), 'broken.json is not JSON'),
  Row('saved: not utf-8', read('notutf8.json'), 'notutf8.json is not JSON'),
  Row('saved: a list', read('list.json'), 'list.json: config is a group of fields, not [1]'),
  Row('saved: unknown key', read('unknown.json'), "unknown.json: unknown key config.seeed; did you mean 'seed'?"),
  Row('saved: null', read('none.json'), "none.json: config.seed is None; off is written 0, '', False or ()"),
  Row('saved: no tag', read('untagged.json'), 'config.model.mixers.attention.kind is missing; it is one of attention'),
  Row('saved: wrong tag', read('badtag.json'), "not 'atention'; did you mean 'attention'?"),
  Row('saved: nan', read('nan.json'), 'config.optimizer.eps must be finite, not nan'),
  Row('saved: number for a group', lambda place: from_json({'model': 3}) and None, 'config.model is a group of fields'),
  Row('saved: list of memories', lambda place: from_json({'model': {'mixers': []}}) and None,
      'config.model.mixers holds named groups, not []'),
  Row('saved: bool for int', lambda place: from_json({'seed': True}) and None, 'config.seed wants int, got True'),
  Row('saved: text for tuple', lambda place: from_json({'model': {'pattern': 'attention'}}) and None,
      "config.model.pattern wants tuple of str, got 'attention'"),
  Row('saved: key of another kind',
      lambda place: from_json({'model': {'mixers': {'m': {'kind': 'attention', 'window': 4}}}}) and None,
      "unknown key config.model.mixers.m.window; config.model.mixers.m has heads"),
  Row('saved: name of a memory',
      lambda place: from_json({'model': {'mixers': {'a+b': {'kind': 'attention'}}}}) and None,
      "config.model.mixers holds the name 'a+b'"),
]

ROWS = COMMAND_LINE + CONFIG_FILES + OVERRIDES + SAVED + [Row(*row) for row in DATA + READERS]


def nothing(config, values):
  """A command whose input is always sound once it was parsed."""


@pytest.fixture
def place(tmp_path):
  for name, text in FILES.items():
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  return tmp_path


@pytest.mark.parametrize('row', ROWS, ids=[row.id for row in ROWS])
def test_one_line_and_status_2(row, place, capsys):
  if callable(row.act):
    try:
      status, line = row.act(place), ''
    except UserError as error:
      status, line = 2, str(error)
  else:
    words = [word.replace('PLACE', str(place)) for word in row.act]
    status, line = call(nothing, flags=FLAGS, argv=words), ''
  printed = capsys.readouterr()
  if not line:
    assert printed.err.startswith('memjax: ')
    line = printed.err.removeprefix('memjax: ').removesuffix('\n')
  assert status == 2
  assert row.says.replace('PLACE', str(place)) in line
  assert line.isprintable() and len(line) < 400
  assert printed.out == ''


def test_enough_rows_with_different_names():
  assert len(ROWS) >= 60
  assert len({row.id for row in ROWS}) == len(ROWS)
