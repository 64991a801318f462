"""The notebooks: stripped, guarded, and their cells run in order."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
both = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path):
  """The sources of the code cells."""
  return [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']


def test_there_are_two(): assert [path.stem for path in NOTEBOOKS] == ['colab', 'tpu']


@both
def test_is_stripped_and_says_where_to_open_it(path):
  book = json.loads(path.read_text(encoding='utf-8'))
  assert book['nbformat'] == 4 and len({cell['id'] for cell in book['cells']}) == len(book['cells'])
  assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in book['cells'] if cell['cell_type'] == 'code')
  assert book['cells'][0]['source'][0].startswith('[![Open in Colab](') and f'notebooks/{path.name})' in book['cells'][0]['source'][0]


@both
def test_installs_only_on_colab_and_never_another_jax(path):
  """jax is held at the version of the runtime while the rest is installed; cells are plain Python."""
  install, *rest = code_of(path)
  [guard] = [node for node in ast.parse(install).body if isinstance(node, ast.If)]
  assert ast.unparse(guard.test) == 'COLAB' and "COLAB = 'google.colab' in sys.modules" in install
  inside = '\n'.join(ast.unparse(node) for node in guard.body)
  assert "'pip', 'install', '-q', '-c', 'constraints.txt'" in inside and 'jaxlib' in inside
  elsewhere = install.replace(ast.get_source_segment(install, guard), '') + '\n'.join(rest)
  assert not [word for word in ("'pip'", 'jax.tools', "'git'") if word in elsewhere] and "'jax[" not in install
  for cell in rest: ast.parse(cell)


@pytest.mark.slow
@both
def test_cells_run_in_order(path, tmp_path):
  """In one process, at toy sizes, with two devices."""
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (tmp_path / 'cells.py').write_text('\n\n'.join(code_of(path)), encoding='utf-8')
  environment = {**os.environ, 'MEMJAX_NOTEBOOK_FAST': '1', 'JAX_NUM_CPU_DEVICES': '2', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-W', 'error', '-W', 'ignore:the load_module:DeprecationWarning', 'cells.py'], cwd=tmp_path,
                        env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  said = {'colab': 'bytes of state:', 'tpu': "sequence_parallel {'data': 1, 'fsdp': 1, 'model': 1, 'sequence': 2}"}
  assert said[path.stem] in done.stdout and 'ROMEO:' in done.stdout and '"bits_per_byte"' in done.stdout
  if path.stem == 'colab': assert float(done.stdout.split('largest difference: ')[1].split()[0]) < 1e-4
