"""docs/titans.md: its commands parse, and what they switch off is gone."""
import re
from pathlib import Path

import pytest

from memjax import train
from memjax.config.flags import call, parse
from memjax.runtime import flops
from tests.test_readme import ROOT, blocks, commands

PAGE = (Path(__file__).parent.parent / 'docs' / 'titans.md').read_text(encoding='utf-8')
COMMANDS = [words for _, words in commands('\n'.join(blocks('bash', PAGE)))]


def test_every_command_parses(monkeypatch):
  monkeypatch.chdir(ROOT)
  configs = [parse(words, train.FLAGS)[0] for words in COMMANDS]
  assert len(configs) == 12 and all(config.name == 'titans_tiny' for config in configs)
  assert len({str(config.model) for config in configs}) == 12, 'two commands train the same model'
  wirings = set(re.findall(r'^\| `([^`]+)` \|', PAGE, re.M))
  assert wirings == {layer for config in configs for layer in config.model.pattern} - {'near'}


@pytest.mark.slow
@pytest.mark.parametrize('words', [words for words in COMMANDS if '--dry_run' in words], ids=lambda words: words[-1])
def test_commands_of_the_page_run(words, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(flops, 'training_flops', lambda *_: 0.0)
  assert call(train.main, flags=train.FLAGS, argv=words) == 0 and 'parameters' in capsys.readouterr().out
