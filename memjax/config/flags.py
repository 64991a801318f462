"""Command lines: `--config F.py[:arg] --config.a.b=v` beside the flags that a command declares.

Reads like absl and config_flags (`--flag v`, `--flag=v`, `--noflag`, the last one wins, types from the config) without
them: absl keeps its flags in one global table, takes overrides from `sys.argv`, exits 1 and accepts what should be
refused (a whole group, stray words). Only absl's logging is touched here, for orbax speaks through it.
Every mistake raises UserError; `run` prints it as one line and exits with status 2.
"""
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import absl.logging

from memjax.config.codec import describe, to_json
from memjax.config.errors import UserError, nearest, shown
from memjax.config.files import load_file
from memjax.config.mixers import MIXERS
from memjax.config.options import check
from memjax.config.options import parse as parse_text
from memjax.config.overrides import locate, override
from memjax.config.schema import Config

IS_FLAG = re.compile(r'--[A-Za-z]')
REQUIRED = '--config FILE.py[:arg] is required'
PATHS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS)


class Flag(NamedTuple):
  """A flag of a command: `--name value`. A default of None makes it required; `repeated` collects a tuple."""
  name: str
  type: type = str
  default: Any = ''
  doc: str = ''
  repeated: bool = False
  choices: tuple = ()
  low: float | None = None
  high: float | None = None


HELP = Flag('help', bool, False, 'shows this text')
SHOWS = (Flag('list_fields', bool, False, 'lists every field of the configuration with its value and meaning'),
         Flag('print_config', bool, False, 'prints the configuration as JSON'))


class Answer(Exception):
  """Text that was asked for instead of a run: `--help`, `--list_fields`, `--print_config`."""


def load(source: str, *overrides: str) -> Config:
  """The Config of `load('configs/tiny.py[:arg]', 'training.steps=20', ...)`, for notebooks and tests."""
  pairs = [text.partition('=') for text in overrides]
  for path, equals, _ in pairs:
    if not equals: raise UserError(f"override {shown(path)} is not of the form 'training.steps=20'")
  return override(load_file(str(source)), [(path.strip(), text) for path, _, text in pairs])


def parse(argv: Sequence[str], flags: Sequence[Flag], *, takes_config: bool = True,
          doc: str = '') -> tuple[Config | None, dict[str, Any]]:
  """The Config (None without `takes_config`) and the values of `flags` by name.

  Raises UserError for whatever is wrong, Answer for `--help`, `--list_fields` and `--print_config`.
  """
  words, table = list(argv), {flag.name: flag for flag in (*flags, *(SHOWS if takes_config else ()))}
  given = [_name(word) for word in _before_dashes(words) if IS_FLAG.match(word)]
  if 'help' in given or '-h' in words: raise Answer(_help(flags, takes_config, doc))
  for word in _before_dashes(words): _check_known(word, table, takes_config)
  config = _find_config(words, given) if takes_config else None
  values, overrides = {flag.name: () if flag.repeated else flag.default for flag in table.values()}, []
  for name, text in _pairs(words, lambda name: _is_switch(name, table, config)):
    if name.startswith(('config.', 'noconfig.')): overrides.append(_override(name, text, config))
    elif name != 'config': _store(values, table, name, text)
  if takes_config:
    config = override(config, overrides)
    if values.pop('list_fields'): raise Answer(_fields(config, 'config' in given))
    if values.pop('print_config'): raise Answer(json.dumps(to_json(config), indent=2))
  for flag in flags:
    if values[flag.name] is None: raise UserError(f'--{flag.name} is required: {flag.doc}')
  return config, values


def run(main: Callable, *, flags: Sequence[Flag] = (), takes_config: bool = True,
        argv: Sequence[str] | None = None) -> NoReturn:
  """Ends the process with the status of `call`; the last line of a command's file."""
  sys.exit(call(main, flags=flags, takes_config=takes_config, argv=argv))


def call(main: Callable, *, flags: Sequence[Flag] = (), takes_config: bool = True,
         argv: Sequence[str] | None = None) -> int:
  """Exit status of `main(config, values)`: its own (None = 0), 2 for bad input, 130 when interrupted.

  Bad input, and files that are missing or closed to us, are one line `memjax: ...` on stderr; other errors pass.
  """
  try:
    _configure_logging()
    argv, doc = sys.argv[1:] if argv is None else argv, sys.modules[main.__module__].__doc__ or ''
    status = main(*parse(argv, flags, takes_config=takes_config, doc=f'{_usage(main, takes_config)}\n\n{doc.strip()}'))
    sys.stdout.flush()
    return status or 0
  except Answer as answer:
    sys.stdout.write(f'{answer}\n')
    return 0
  except UserError as error:
    return _complain(error, 2)
  except KeyboardInterrupt:
    return _complain('interrupted', 130)
  except BrokenPipeError:                # the reader of a pipe left; what Python flushes at exit must go nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as error:
    if error.errno not in PATHS or error.filename is None: raise
    return _complain(f'{error.filename}: {error.strerror}', 2)


def _complain(error: object, status: int) -> int:
  sys.stderr.write(f'memjax: {" ".join(str(error).split())}\n')
  return status


class _Formatter(logging.Formatter):
  """`memjax: message`: the first part of the logger's name, then the text on one line."""

  def format(self, record: logging.LogRecord) -> str:
    return f'{record.name.partition(".")[0]}: {super().format(record)}'


def _configure_logging() -> None:
  """Our own progress and the warnings of others go to stderr; orbax's many INFO lines go nowhere."""
  handler = logging.StreamHandler()
  handler.setFormatter(_Formatter('%(message)s'))
  logging.basicConfig(handlers=[handler])
  logging.getLogger('memjax').setLevel(logging.INFO)
  absl.logging.set_verbosity(absl.logging.WARNING)


def _name(word: str) -> str:
  return word[2:].partition('=')[0]


def _before_dashes(words: list[str]) -> list[str]:
  return words[:words.index('--')] if '--' in words else words


def _check_known(word: str, table: dict[str, Flag], takes_config: bool) -> None:
  """Raises for a flag that the command does not have. Values that look like flags are refused, so this sees all."""
  if not IS_FLAG.match(word): return
  name, dotted = _name(word), _name(word).startswith(('config.', 'noconfig.'))
  if not takes_config and (dotted or name == 'config'):
    raise UserError(f'--{name} does not apply: this command takes the configuration from the run it is given')
  switches = {f'no{flag.name}' for flag in table.values() if flag.type is bool}
  known = dotted or name in table or name in switches or (takes_config and name == 'config')
  if known: return
  near = [f'--{other}' for other in ('help', *(['config'] if takes_config else []), *table)]
  raise UserError(f'unknown flag {word.partition("=")[0]}' + nearest(f'--{name}', near))


def _find_config(words: list[str], given: list[str]) -> Config:
  """The Config that `--config` names. Raises where it is missing or comes after an override of it."""
  if 'config' not in given:
    if 'list_fields' in given: return Config()
    raise UserError(REQUIRED)
  early = next(name for name in given if name == 'config' or name.startswith(('config.', 'noconfig.')))
  if early != 'config': raise UserError(f'--config must come before --{early}')
  pairs = _pairs(words, lambda name: name != 'config', strict=False)
  return load_file([text for name, text in pairs if name == 'config'][-1])


def _pairs(words: list[str], is_switch: Callable[[str], bool], strict: bool = True) -> Iterator[tuple[str, str]]:
  """Name and text of each flag; a switch without `=` is 'true'. Words that belong to no flag raise if `strict`."""
  rest, switch = list(reversed(words)), ''
  while rest:
    word = rest.pop()
    if word == '--' or not IS_FLAG.match(word):
      if not strict and word != '--': continue
      if strict: raise UserError(_stray(word if word != '--' or not rest else rest[-1], switch))
      return
    name, equals, text = word[2:].partition('=')
    switch = name if not equals and is_switch(name) else ''
    if switch: text = 'true'
    elif not equals: text = _take_value(name, rest)
    yield name, text


def _take_value(name: str, rest: list[str]) -> str:
  if rest and rest[-1] != '--' and not IS_FLAG.match(rest[-1]): return rest.pop()
  if name == 'config': raise UserError(REQUIRED)
  raise UserError(f'--{name} wants a value' + (f'; if it is {rest[-1]!r}, write --{name}={rest[-1]}' if rest else ''))


def _stray(word: str, switch: str) -> str:
  if switch and word.lower() in ('true', 'false', 't', 'f', '0', '1'):
    return f'stray argument {word!r}; write --{switch}={word}'
  return f'stray argument {shown(word)}' + ('; flags begin with --' if re.match('-[A-Za-z]', word) else '')


def _is_switch(name: str, table: dict[str, Flag], config: Config | None) -> bool:
  """Whether the flag stands alone. Raises for an override of a field that does not exist."""
  if name.startswith('config.'): return locate(config, name.removeprefix('config.')) is bool
  return name.startswith('noconfig.') or (name != 'config' and (name not in table or table[name].type is bool))


def _override(name: str, text: str, config: Config) -> tuple[str, str]:
  if name.startswith('config.'): return name.removeprefix('config.'), text
  path = name.removeprefix('noconfig.')
  if locate(config, path) is not bool or text != 'true':
    raise UserError(f'--{name} is for booleans, without a value; write --config.{path}=value')
  return path, 'false'


def _store(values: dict[str, Any], table: dict[str, Flag], name: str, text: str) -> None:
  """Puts the value of one flag into `values`. Raises for a wrong type, choice or range."""
  if name not in table:
    if text != 'true': raise UserError(f'--{name} takes no value')
    name, text = name.removeprefix('no'), 'false'
  flag = table[name]
  limits = {'choices': flag.choices, 'low': flag.low, 'high': flag.high}
  value = check(f'--{name}', parse_text(f'--{name}', text, flag.type), flag.type, limits)
  values[name] = (*values[name], value) if flag.repeated else value


def _usage(main: Callable, takes_config: bool) -> str:
  spec = getattr(sys.modules[main.__module__], '__spec__', None)
  config = '--config FILE.py[:arg] [--config.a.b=value ...] ' if takes_config else ''
  return f'usage: python -m {spec.name if spec else main.__module__} {config}[--flag=value ...]'


def _help(flags: Sequence[Flag], takes_config: bool, doc: str) -> str:
  heads = [('--config=FILE.py[:arg]', 'the configuration; --config.a.b=value changes a field')] if takes_config else []
  for flag in (*flags, *(SHOWS if takes_config else ()), HELP):
    notes = [f'one of {", ".join(flag.choices)}'] if flag.choices else []
    notes += ['repeatable'] if flag.repeated else []
    if flag.default is None: notes.append('required')
    elif flag.default not in ('', (), False): notes.append(f'default {flag.default}')
    head = f'--{flag.name}' + ('' if flag.type is bool else f'={flag.type.__name__.upper()}')
    heads.append((head, flag.doc + (f' ({"; ".join(notes)})' if notes else '')))
  width = max(len(head) for head, _ in heads)
  return '\n'.join([doc.strip(), '', 'flags:', *(f'  {head:{width}}  {text}' for head, text in heads)]).strip()


def _fields(config: Config, is_given: bool) -> str:
  """Every field, its value and meaning; without a config file, also the fields of each kind of memory."""
  entries = describe(config)
  if not is_given:
    for kind, cls in MIXERS.items(): entries += describe(cls, f'config.model.mixers.<{kind}>')
  rows = [(f'--{entry.path}={shown(entry.value)}', f'{entry.type}: {entry.doc}') for entry in entries]
  width = min(60, max(len(left) for left, _ in rows))
  return '\n'.join(f'{left:{width}}  {right}' for left, right in rows)
