"""Config files: `configs/x.py[:arg]` holds `get_config(arg='')`, which returns a ConfigDict."""
import difflib
import inspect
import os
import re
import traceback
import types
from pathlib import Path

from ml_collections import ConfigDict

from memjax.config.codec import freeze
from memjax.config.errors import ConfigError, UserError
from memjax.config.schema import Config

FOLDER = 'configs'


def load_file(source: str) -> Config:
  """The Config of `F.py` or `F.py:arg`. Raises UserError that says what is wrong with the file, and in which line."""
  path, colon, arg = _split(source)
  if not path: raise UserError('--config FILE.py[:arg] is required')
  _check_path(path)
  build = _execute(path)
  tree = _call(path, build, (arg,) if colon else ())
  if not isinstance(tree, ConfigDict):
    raise UserError(f'{path}: get_config returned {type(tree).__name__}, not a ConfigDict')
  try:
    return freeze(tree)
  except ConfigError as error:
    raise UserError(f'{path}: {error}') from None


def _split(source: str) -> tuple[str, str, str]:
  """Path, ':' and argument; a colon before the end of `.py` belongs to the path."""
  match = re.fullmatch(r'(.*?\.py)(:)(.*)', source, re.DOTALL)
  if match: return match.groups()
  return (source, '', '') if source.endswith('.py') or os.path.exists(source) else source.partition(':')


def _check_path(path: str) -> None:
  if os.path.isdir(path): raise UserError(f'{path} is a folder, not a config file')
  if not os.path.exists(path):
    names = {file.name: file for folder in (Path(FOLDER), Path(path).parent) for file in folder.glob('*.py')}
    close = difflib.get_close_matches(Path(path).name, names, 1) or difflib.get_close_matches(f'{path}.py', names, 1)
    raise UserError(f'no such config file: {path}' + (f'; did you mean {str(names[close[0]])!r}?' if close else ''))
  if path.endswith('.json'): raise UserError(f'{path} is not a Python config; use {FOLDER}/saved.py:{path}')
  if not path.endswith('.py'): raise UserError(f'{path} is not a Python config; it wants get_config() in a .py file')


def _execute(path: str):
  """`get_config` of the file, run as a module that nothing else can import and that leaves no bytecode."""
  module = types.ModuleType(f'memjax_config_{Path(path).stem}')
  module.__file__ = path
  try:
    exec(compile(Path(path).read_bytes(), path, 'exec', dont_inherit=True), module.__dict__)
  except (Exception, SystemExit) as error:
    raise _fault(path, error) from None
  if not callable(getattr(module, 'get_config', None)): raise UserError(f'{path} has no get_config()')
  return module.get_config


def _call(path: str, build, args: tuple[str, ...]):
  """What get_config returns; an argument it cannot take is the user's error, not a TypeError."""
  try:
    inspect.signature(build).bind(*args)
  except TypeError as error:
    if args: raise UserError(f'{path} takes no argument, got :{args[0]}') from None
    raise UserError(f'{path} wants an argument ({error}); write {path}:arg') from None
  try:
    return build(*args)
  except (Exception, SystemExit) as error:
    raise _fault(path, error) from None


def _fault(path: str, error: BaseException) -> UserError:
  """One line for an exception of a config file, with the line in that file."""
  if isinstance(error, UserError) and not isinstance(error, ConfigError): return error
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  if isinstance(error, SyntaxError) and error.filename == path: lines.append(error.lineno)
  text = ' '.join(str(error.msg if isinstance(error, SyntaxError) else error).split())
  if len(text) > 200: text = f'{text[:100]} ... {text[-100:]}'
  name = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
  return UserError(f'{path}{f":{lines[-1]}" if lines else ""}: {name}{text}'.rstrip(': '))
