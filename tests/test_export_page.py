"""docs/export.md on a tiny host: its commands and its code run as they stand."""
import re
import shlex
from pathlib import Path

import pytest

from memjax import export
from memjax.adapters.graft import adapter_of
from memjax.config.flags import call
from tests.adapters.export_runs import run_config, run_params, write_host, write_run

PAGE = (Path(__file__).parent.parent / 'docs' / 'export.md').read_text(encoding='utf-8')
COMMANDS = [shlex.split(line, comments=True)[3:] for line in re.findall(r'^(python -m memjax\.export .*)$', PAGE, re.M)]
[CODE] = re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S)


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch, capsys):
  config = run_config(write_host(tmp_path / 'HOST'))
  write_run(tmp_path / 'W', config, run_params(config))
  monkeypatch.chdir(tmp_path)
  for words in COMMANDS: assert call(export.main, flags=export.FLAGS, takes_config=False, argv=words) == 0, words
  assert len(COMMANDS) == 6 and 'of them packed' in capsys.readouterr().err
  names = {}
  exec(compile(CODE, 'docs/export.md', 'exec'), names)
  assert adapter_of(names['params'], names['config'])
  assert {path.name for path in tmp_path.iterdir()} == {
      'HOST', 'W', 'merged', 'merged.gguf', 'merged-memory', 'changes', 'memory', 'small', 'again', 'half.gguf', 'half-memory'}


def test_the_page_names_every_flag_that_it_uses():
  known = {flag.name for flag in export.FLAGS}
  said = set(re.findall(r'--([a-z_]+)', PAGE)) - {'dry_run'}
  assert said <= known and {'to', 'output', 'workdir', 'model', 'adapter', 'host', 'dtype', 'type', 'quantize', 'report'} <= said
  targets = next(flag for flag in export.FLAGS if flag.name == 'to').choices
  assert set(re.findall(r'^\| `(\w+)` \|', PAGE, re.M)) == set(targets)
