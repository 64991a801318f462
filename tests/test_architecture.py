"""The house: floors, confinement, sizes and words, read from the source. Each check is also seen to fail."""
import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from memjax.config import mixers, schema

ROOT = Path(__file__).parent.parent
FLOORS = ('config', 'ops', 'layers', 'memory', 'models', 'adapters', 'data', 'runtime', 'commands')
MAY_IMPORT = {floor: set(FLOORS[:i + 1]) for i, floor in enumerate(FLOORS)} | {'data': {'config', 'data'}}
LINEN = {'layers', 'memory', 'models'}
COMPLEX = {'fft', 'rfft', 'irfft', 'ifft', 'complex64', 'complex128', 'complexfloating', 'iscomplexobj', 'conj', 'conjugate'}
COMPLEX_HOME = 'memjax/ops/binding.py'
FLAGS_HOME = 'memjax/config/flags.py'
LINES, BODY, POSITIONAL, FIELDS = 300, 40, 4, 12
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LIBRARY = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'memjax').rglob('*.py'))


class Source:
  """One library file: its name, text, tree and floor."""

  def __init__(self, name, text):
    self.name, self.text, self.tree = name, text, ast.parse(text)
    parts = Path(name).parts
    self.floor = parts[1] if len(parts) > 2 else 'commands'

  def imported(self):
    """(line, dotted name) of every import, also those inside functions; relative ones begin with a dot."""
    for node in ast.walk(self.tree):
      if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
      origin = '.' * node.level + (f'{node.module}.' if node.module else '') if isinstance(node, ast.ImportFrom) else ''
      for alias in node.names: yield node.lineno, origin + alias.name

  def functions(self):
    """(name, node) of every function, methods and nested ones included."""
    for node in ast.walk(self.tree):
      if isinstance(node, FUNCTIONS): yield node.name, node

  def classes(self):
    """Every class of the module's top level."""
    return [node for node in self.tree.body if isinstance(node, ast.ClassDef)]


def wrong_floors(source, _):
  for line, module in source.imported():
    if module.startswith('.'): yield line, 'relative import'
    parts = module.split('.')
    if parts[0] != 'memjax' or parts[1:] in ([], ['__version__']): continue
    target = parts[1] if parts[1] in FLOORS else 'commands'
    if target not in MAY_IMPORT[source.floor]: yield line, f'{source.floor} imports {target} ({module})'


def wrong_homes(source, _):
  for line, module in source.imported():
    top = module.split('.')[0]
    if top == 'flax' and source.floor not in LINEN: yield line, 'flax outside of layers, memory and models'
    is_flag = top == 'absl' or 'config_flags' in module
    if is_flag and source.name != FLAGS_HOME and source.floor != 'commands': yield line, f'{module} below the commands'


def complex_numbers(source, _):
  if source.name == COMPLEX_HOME: return
  for line, module in source.imported():
    if 'fft' in module.split('.'): yield line, f'{module} outside of {COMPLEX_HOME}'
  for node in ast.walk(source.tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, complex): yield node.lineno, 'a complex number'
    if isinstance(node, ast.Attribute) and node.attr in COMPLEX: yield node.lineno, f'complex arithmetic: .{node.attr}'
    if isinstance(node, ast.Attribute) and node.attr == 'complex': yield node.lineno, 'lax.complex'


def long_files(source, _):
  lines = source.text.count('\n')
  if lines > LINES: yield lines, f'{lines} lines, {LINES} at most'


def long_functions(source, _):
  for name, node in source.functions():
    lines = node.end_lineno - node.body[0].lineno + 1
    if lines > BODY: yield node.lineno, f'{name} has {lines} lines, {BODY} at most'


def many_arguments(source, _):
  for name, node in source.functions():
    given = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ('self', 'cls')]
    if len(given) > POSITIONAL: yield node.lineno, f'{name} takes {len(given)} positional arguments, {POSITIONAL} at most'


def undocumented(source, documented):
  if source.text.strip() and not ast.get_docstring(source.tree): yield 1, 'the module has no docstring'
  for node in source.tree.body:
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith('_'): continue
    if not ast.get_docstring(node): yield node.lineno, f'{node.name} has no docstring'
    if not isinstance(node, ast.ClassDef): continue
    for method in node.body:
      if not isinstance(method, FUNCTIONS) or method.name.startswith('_') or ast.get_docstring(method): continue
      if method.name != 'setup' and not inherits_words(node, method.name, documented):
        yield method.lineno, f'{node.name}.{method.name} has no docstring'


def inherits_words(node, method, documented):
  """Whether a base class of the library, near or far, documents the method."""
  for base in node.bases:
    name = base.id if isinstance(base, ast.Name) else getattr(base, 'attr', '')
    if name not in documented or name == node.name: continue
    parent, methods = documented[name]
    if method in methods or inherits_words(parent, method, documented): return True
  return False


def documented_methods(sources):
  """Class name -> (node, names of its documented methods), over all files."""
  return {node.name: (node, {m.name for m in node.body if isinstance(m, FUNCTIONS) and ast.get_docstring(m)})
          for source in sources for node in source.classes()}


def loud(source, _):
  if source.floor == 'commands': return
  for node in ast.walk(source.tree):
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print': yield node.lineno, 'print below the commands'


def bare_excepts(source, _):
  for node in ast.walk(source.tree):
    if isinstance(node, ast.ExceptHandler) and node.type is None: yield node.lineno, 'bare except'


CHECKS = [wrong_floors, wrong_homes, complex_numbers, long_files, long_functions, many_arguments, undocumented, loud,
          bare_excepts]


@pytest.fixture(scope='module')
def sources():
  return [Source(name, (ROOT / name).read_text(encoding='utf-8')) for name in LIBRARY]


@pytest.mark.parametrize('check', CHECKS, ids=[check.__name__ for check in CHECKS])
def test_library(check, sources):
  documented = documented_methods(sources)
  found = [f'{source.name}:{line}: {what}' for source in sources for line, what in check(source, documented)]
  assert not found, '\n' + '\n'.join(found)


LONG = 'def f():\n  """Doc."""\n' + '  x = 1\n' * BODY
WIDE = f'def f({", ".join("abcde")}):\n  """Doc."""\n'
BAD = [
  (wrong_floors, 'memjax/ops/x.py', 'from memjax.memory.base import Memory'),
  (wrong_floors, 'memjax/ops/x.py', 'def f():\n  from memjax import memory'),
  (wrong_floors, 'memjax/data/x.py', 'import memjax.ops.binding'),
  (wrong_floors, 'memjax/runtime/x.py', 'from memjax.train import main'),
  (wrong_floors, 'memjax/runtime/x.py', 'from . import loop'),
  (wrong_homes, 'memjax/ops/x.py', 'from flax import linen as nn'),
  (wrong_homes, 'memjax/runtime/x.py', 'from absl import logging'),
  (wrong_homes, 'memjax/config/codec.py', 'from ml_collections import config_flags'),
  (complex_numbers, 'memjax/ops/holographic.py', 'x = 1j'),
  (complex_numbers, 'memjax/memory/x.py', 'y = jnp.fft.rfft(x)'),
  (complex_numbers, 'memjax/memory/x.py', 'from jax.numpy import fft'),
  (complex_numbers, 'memjax/runtime/x.py', 'y = lax.complex(a, b)'),
  (long_files, 'memjax/ops/x.py', '\n' * (LINES + 1)),
  (long_functions, 'memjax/ops/x.py', LONG),
  (many_arguments, 'memjax/ops/x.py', WIDE),
  (undocumented, 'memjax/ops/x.py', 'x = 1'),
  (undocumented, 'memjax/ops/x.py', '"""Doc."""\ndef f(): pass'),
  (undocumented, 'memjax/ops/x.py', '"""Doc."""\nclass A:\n  """Doc."""\n  def read(self): pass'),
  (loud, 'memjax/runtime/x.py', 'print(1)'),
  (bare_excepts, 'memjax/train.py', 'try: pass\nexcept: pass'),
]
GOOD = [
  (wrong_floors, 'memjax/runtime/x.py', 'from memjax.models.decoder import Decoder\nfrom memjax import __version__'),
  (wrong_floors, 'memjax/train.py', 'from memjax.evaluate import main'),
  (wrong_homes, 'memjax/memory/x.py', 'from flax import linen as nn'),
  (wrong_homes, 'memjax/train.py', 'from absl import logging'),
  (complex_numbers, COMPLEX_HOME, 'y = jnp.fft.rfft(x) * 1j'),
  (long_files, 'memjax/ops/x.py', '\n' * LINES),
  (long_functions, 'memjax/ops/x.py', LONG.removesuffix('  x = 1\n')),
  (many_arguments, 'memjax/ops/x.py', 'class A:\n  def f(self, a, b, c, d, *, e, f): pass'),
  (undocumented, 'memjax/memory/x.py', '"""Doc."""\nclass A:\n  """D."""\n  def read(self):\n    """D."""\n  def _f(self): pass\n'
   'class B(A):\n  """D."""\nclass C(B):\n  """D."""\n  def read(self): pass\n  def setup(self): pass\n'),
  (loud, 'memjax/train.py', 'print(1)'),
  (bare_excepts, 'memjax/ops/x.py', 'try: pass\nexcept ValueError: pass'),
]


@pytest.mark.parametrize('check, name, text', BAD + GOOD, ids=lambda value: getattr(value, '__name__', None))
def test_checks_can_fail(check, name, text):
  source = Source(name, text)
  assert bool(list(check(source, documented_methods([source])))) == ((check, name, text) in BAD)


def test_config_dataclasses_are_small():
  classes = [cls for module in (schema, mixers) for cls in vars(module).values() if dataclasses.is_dataclass(cls)]
  assert len(classes) > 15
  assert not [cls.__name__ for cls in classes if len(dataclasses.fields(cls)) > FIELDS]


def tracked():
  """Names of the files under version control; outside of a repository, of all files that are not hidden."""
  done = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=False)
  if done.returncode == 0: return [name for name in done.stdout.decode().split('\0') if (ROOT / name).is_file()]
  names = [path.relative_to(ROOT) for path in ROOT.rglob('*') if path.is_file()]
  return [str(name) for name in names if not any(part.startswith('.') for part in name.parts)]


MACHINE = re.compile('|'.join([rf'(?<![\w.-])/{folder}/[\w.-]' for folder in ('work', 'root', 'home', 'Users')]
                              + [r'\b[A-Z]:\\+Users', 'index' + '-url', 'find' + '-links']))


def test_no_paths_of_a_machine_in_tracked_files():
  found = []
  for name in tracked():
    try:
      text = (ROOT / name).read_text(encoding='utf-8')
    except UnicodeDecodeError:
      continue
    found += [f'{name}:{i}: {line.strip()[:100]}' for i, line in enumerate(text.split('\n'), 1) if MACHINE.search(line)]
  assert not found, '\n' + '\n'.join(found)


@pytest.mark.parametrize('text, is_path', [
  ('cd /' + 'home/me/x', True), ("open('/" + "work/a')", True), ('pip install --index' + '-url x', True),
  ('a/work/b', False), ('and/or', False), ('network/root/leaf', False)])
def test_paths_of_a_machine_are_recognised(text, is_path):
  assert bool(MACHINE.search(text)) == is_path
