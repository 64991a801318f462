"""What the README and the docs say is so: links lead somewhere, commands and code run, numbers are those of the measurements."""
import ast
import functools
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from memjax import analyze, doctor, evaluate, export, generate, train
from memjax.config.banks import BankConfig, BankShapeConfig
from memjax.config.errors import UserError
from memjax.config.flags import call, parse
from memjax.config.mixers import MIXERS
from memjax.config.schema import Config
from memjax.runtime import flops
from tests.adapters.gguf_files import write_case
from tests.pieces import make_workdir, small_config, write_plays

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
COMMANDS = {'train': train, 'evaluate': evaluate, 'generate': generate, 'analyze': analyze, 'doctor': doctor, 'export': export}
SMALL = {
  'train': ('--config.training.steps=4', '--config.training.length=32', '--config.training.batch=2', '--config.evaluation.batches=1',
            '--config.evaluation.sample=0', '--config.mesh.data=1', '--config.data.source=path', '--nofigures'),
  'generate': ('--max_new_tokens=8',), 'evaluate': (), 'analyze': ('--tokens=32', '--rows=2', '--nocost'), 'export': (),
  'doctor': ()}
ROWS = {'cuDNN attention': 'attention', 'holographic mixing, elementwise binding': 'elementwise chunk',
        'holographic mixing, circular convolution (real DFT matmul)': 'convolution dft chunk'}


def blocks(language, text=README):
  """The fenced blocks of a language."""
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def commands(text):
  """[(command, words)] of the lines `python -m memjax.COMMAND ...`, comments left out."""
  lines = re.findall(r'^(?:\.venv/bin/)?python -m memjax\.(\w+) (.+)$', text, re.M)
  return [(name, shlex.split(re.split(r'\s{2,}(?=[#(])', rest)[0])) for name, rest in lines]


IN_README = commands('\n'.join(blocks('bash')))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(workdir, its text): the README's first training command, made small, run once for all."""
  folder = tmp_path_factory.mktemp('readme')
  text = write_plays(folder / 'plays')
  name, words = next((name, words) for name, words in IN_README if name == 'train' and '--workdir' in words)
  words = [*words, *SMALL['train'], f'--config.data.path={text}', f'--config.data.cache={folder}/cache']
  words[words.index('--workdir') + 1] = f'{folder}/run'
  previous = os.getcwd()
  os.chdir(ROOT)
  try: assert call(COMMANDS[name].main, flags=COMMANDS[name].FLAGS, argv=words) == 0
  finally: os.chdir(previous)
  return folder / 'run', text


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', page.read_text(encoding='utf-8'))
  local = [link for link in links if not re.match('[a-z]+:', link)]
  assert [link for link in local if not (page.parent / link).exists()] == []


def with_bank(folder):
  """A run with a bank, which the first command of the README does not train."""
  bank = BankConfig(heads=1, shape=BankShapeConfig(entries=16))
  config = small_config(write_plays(folder / 'plays'), mixers={'bank': bank}, pattern=('bank',))
  return str(make_workdir(folder / 'bank', config))


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'words'), [(n, w) for n, w in IN_README if n != 'train' or '--dry_run' in w],
                         ids=lambda part: part if isinstance(part, str) else '')
def test_commands_of_the_readme_run(name, words, trained, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  words = [str(trained[0]) if word.startswith('runs/') else word for word in words]
  if '--quantize' in words: words[words.index('--workdir') + 1] = with_bank(trained[0].parent)
  if name == 'export':                 # of the tiny host itself: runs that began with one are exported by tests/test_export.py
    at = words.index('--workdir')
    words[at:at + 2] = ['--model', write_case(trained[0].parent / 'm.gguf', 'llama_plain')]
    words[words.index('--output') + 1] = str(trained[0].parent / 'merged')
  if 'MODEL.gguf' in words: words[words.index('MODEL.gguf')] = write_case(trained[0].parent / 'm.gguf', 'llama_plain')
  small = SMALL[name] if name != 'train' else ()
  assert call(COMMANDS[name].main, flags=COMMANDS[name].FLAGS, takes_config=name == 'train', argv=[*words, *small]) == 0
  out = capsys.readouterr().out
  if name == 'evaluate': assert json.loads(out.splitlines()[-1])['split'] == 'test'
  if name == 'generate' and '--chat' in words: assert len(out) > 1
  elif name == 'generate': assert out.startswith('ROMEO:') and len(out) > len('ROMEO:\n')
  if name == 'analyze': assert (trained[0] / 'analysis' / 'analysis.json').exists()


def test_every_command_is_shown():
  assert {name for name, _ in IN_README} == set(COMMANDS)


@pytest.mark.slow
def test_python_of_the_readme_runs(monkeypatch):
  monkeypatch.chdir(ROOT)
  [code] = blocks('python')
  names = {}
  exec(compile(code, 'README.md', 'exec'), names)
  assert names['logits'].shape == (1, 5, 256)


def in_docstrings():
  """(file, words) of every training command in the docstring of a config file."""
  for path in sorted((ROOT / 'configs').glob('*.py')):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    found = [words for name, words in commands(doc) if name == 'train']
    assert found, f'{path.name} shows no command'
    for words in found: yield pytest.param(words, id=f'{path.stem}-{len(" ".join(words))}')


@pytest.mark.slow
@pytest.mark.parametrize('words', list(in_docstrings()))
def test_commands_of_config_files(words, trained, tmp_path, monkeypatch, capsys):
  """They parse and pass a dry run (the gradient's FLOPs left out: tracing it is slow); what needs the hub is only parsed."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(flops, 'training_flops', lambda *_: 0.0)
  for split in ('train', 'valid', 'test'):
    (tmp_path / f'{split}.tokens').write_text(' = Plays = \n \n A rose by any other name . \n' * 9, encoding='utf-8')
  (tmp_path / 'seed.yaml').write_text('{training: {dataset_name: shakespeare}, model: {tokenizer_name: bytes, hidden_dim: 48}}')
  places = {'W/config.json': f'{trained[0]}/config.json', 'FOLDER': str(tmp_path), 'FILE.yaml': f'{tmp_path}/seed.yaml',
            'HOST': write_case(tmp_path / 'm.gguf', 'llama_plain')}
  for name, place in places.items(): words = [word.replace(name, place) for word in words]
  config, _ = parse(words, train.FLAGS)
  if config.data.source == 'hub': return
  more = ['--dry_run', *([f'--config.data.cache={tmp_path}/cache'] if config.data.source == 'path' else [])]
  assert call(train.main, flags=train.FLAGS, argv=[*words, *more]) == 0
  assert 'parameters' in capsys.readouterr().out


def test_flags_and_fields_in_the_text_exist():
  """Flags `--config.a.b=value` anywhere in the pages, and the configs and extras of the README."""
  fields = set(re.findall(r'--config\.([a-z_.]+)=', ''.join(page.read_text(encoding='utf-8') for page in PAGES)))
  assert len(fields) >= 5
  reach = lambda value, parts: functools.reduce(lambda value, part: getattr(value, part, None), parts, value)
  for field in fields:
    _, _, *inner = field.split('.')
    is_mixer = field.startswith('model.mixers.')
    values = [reach(kind(), inner[1:]) for kind in MIXERS.values()] if is_mixer else [reach(Config(), field.split('.'))]
    assert any(value is not None for value in values), field
  for names in re.findall(r'^\| (`.*?) \|', README, re.M):
    for name in re.findall(r'`(\w+)`', names): assert (ROOT / 'configs' / f'{name}.py').exists(), name
  extras = (ROOT / 'pyproject.toml').read_text(encoding='utf-8').partition('[project.optional-dependencies]')[2].partition('\n[')[0]
  line = re.search(r'with the extras you need: (.*?)\.\n', README, re.S)[1]
  assert set(re.findall(r'`(\w+)`', line)) == set(re.findall(r'^(\w+) =', extras, re.M))


def test_variants_in_the_readme_exist(monkeypatch):
  monkeypatch.chdir(ROOT)
  variants = re.search(r'`hamt_seed`.*', README)[0]
  for variant in re.findall(r'`:(\w+)`', variants): assert parse(['--config', f'configs/hamt_seed.py:{variant}'], train.FLAGS)[0].name
  with pytest.raises(UserError): parse(['--config', 'configs/hamt_seed.py:nonsense'], train.FLAGS)


def measured(name):
  return report.read_results(ROOT / 'benchmarks' / 'results')[name]


def test_numbers_of_the_readme_are_those_measured():
  head, _, *rows = [line.strip('| ').split(' | ') for line in re.findall(r'^\|.*\|$', README, re.M) if 'ms |' in line or 'L = ' in line
                    or line.startswith('|---|---|---|---|')]
  lengths = [int(re.sub(r'\D', '', cell)) for cell in head[1:]]
  result = measured('holographic-h200')
  rows, fused = rows[:len(ROWS)], rows[len(ROWS):]
  assert len(rows) == len(ROWS) and lengths == sorted({row['L'] for row in result['rows']})
  for label, *cells in rows:
    for length, cell in zip(lengths, cells, strict=True):
      [ms] = [r['ms'] for r in result['rows'] if r['L'] == length and r['pass'] == 'both'
              and (r['row'] == ROWS[label] or (r['automatic'] and r['row'].startswith(ROWS[label])))]
      assert cell.strip() == f'{report.cell(ms)} ms', (label, length)
  kernels = {(row['row'], row['L']): f'{report.cell(row["ms"])} ms' for row in measured('holographic-kernels-h200')['rows']}
  for name, (label, *cells) in zip(('elementwise fused', 'convolution dft fused'), fused, strict=True):
    assert name.split()[0] in label
    assert [cell.strip() for cell in cells] == [kernels[name, length] for length in lengths]
  first = result['rows'][0]
  assert f'{first["B"] * first["L"]:,} tokens, {first["H"]} heads x {first["K"]}, {first["S"]} slots' in head[0]


def test_training_and_batches_of_the_readme_are_those_measured():
  read = lambda name: measured(f'{name}-h200')['rows']
  speed = {(row['model'], row['length']): row for row in read('hybrid')}
  rate = {row['row']: row['tokens_per_second'] for row in read('decode-batch64')}
  fast, near = (speed['hybrid', length]['tokens_per_second'] for length in (32_768, 4096))
  times = [own / speed['attention', length]['tokens_per_second'] for own, length in ((fast, 32_768), (near, 4096))]
  peer = max(value for name, value in rate.items() if name.startswith('attention'))
  mfu = f'{speed["hybrid", 4096]["mfu"]:.3f}'.removeprefix('0')
  wanted = (f'{round(fast, -3):,.0f} tokens/s', f'{times[0]:.2f}x an attention transformer',
            f'decodes {rate["holographic"] / peer:.0f}x as fast', f'{round(near, -3):,.0f} ({times[1]:.2f}x, MFU {mfu})')
  assert not [text for text in wanted if text not in ' '.join(README.split())]


def test_times_of_a_neural_layer_in_the_readme_are_those_measured():
  peer = next(row for row in measured('neural_memory-h200')['rows'] if row['mode'] == 'refreshed')
  named = ('mode', 'chunk', 'length', 'dtype', 'depth')
  rows = {tuple(row[name] for name in named): row for row in measured('neural_memory-fused-h200')['rows']}
  row = rows['token', 64, 2048, 'bfloat16', 2]
  wanted = (f'takes {row["in_a_row_ms"]:.1f} ms forward and backward', f'{row["ms"]:.1f} where the host', f'took {peer["ms"]:.0f} ms')
  assert not [text for text in wanted if text not in ' '.join(README.split())]


def test_scores_of_the_readme_are_those_measured():
  names = ('language-wikitext2-h200', 'language-wikitext2-holographic-h200')
  rows = {row['model']: row for name in names for row in measured(name)['rows']}
  text = ' '.join(re.search(r'Where attention wins:.*?\n\n', README, re.S)[0].split())
  scores = {model: report.cell(rows[model]['perplexity']) for model in ('attention', 'hybrid', 'holographic')}
  assert f'perplexity {scores["attention"]} against {scores["hybrid"]} for the hybrid and {scores["holographic"]} for holographic' in text
  layers = {(row['row'], row['L']): f'{row["times_attention"]:.2f}x' for row in measured('holographic-h200')['layers']}
  found = re.findall(r'\d\.\d\dx', text)
  assert found == [layers['layer: holographic S=K', length] for length in (2048, 8192, 32768)]


def test_memories_learning_at_test_time_score_as_the_readme_says():
  text = ' '.join(re.search(r'Trained on rows of 256 tokens.*?\n\n', README, re.S)[0].split())
  at = {(r['model'], t['length'] // 256): f'{t["accuracy"]:.2f}'.lstrip('0') for r in measured('needle-h200')['rows'] for t in r['tests']
        if t['test_time'] == 'on'}
  models = ('window + linear exact', 'MAC, input', 'MAL', 'LMM', 'MAG', 'attention', 'window')
  needles, scores = text.partition('On text')[::2]
  found = re.findall(r'\.\d\d', needles)
  assert found == [*(at[model, 4] for model in models), at[models[0], 64], at[models[1], 64], at['MAC', 4]]
  rows = [{r['model']: r for r in measured(f'titans-{name}-h200')['rows']} for name in ('sotu', 'wikitext2')]
  bits = [f'{r[model]["bits_per_byte"]:.2f}' for model in ('window', 'window + linear exact', 'window + holographic', 'MAC') for r in rows]
  worth = [(np.mean(r[model]['test_nll']['frozen']) - np.mean(r[model]['test_nll']['carried'])) / np.log(2) for r in rows
           for model in ('MAC', 'MAC, input', 'MAG', 'MAL')]
  assert re.findall(r'\d?\.\d\d', scores) == [*bits, f'{max(worth):.2f}'.lstrip('0')]


def test_page_of_numbers_is_up_to_date():
  """`python -m benchmarks.report` was run after the last change of a result or of what is said of it."""
  figures = [path.stem for path in (ROOT / 'docs' / 'figures').glob('*.png')]
  assert (ROOT / 'docs' / 'numbers.md').read_text(encoding='utf-8') == report.page(report.read_results(report.RESULTS), figures)


def test_page_of_any_machine():
  """Sections of capacity and resume, a machine without a reading, an interrupted stamp, and nothing where there is no result."""
  machine = {'platform': 'cpu', 'device': 'cpu', 'processor': 'Some CPU', 'cores': 2, 'commit': 'abc', 'date': 'D', 'jax': '0.10'}
  row = {'memory': 'phasor', 'floats': 512.0, 'pairs': [16], 'recall': [0.98765], 'theory': [0.99], 'worst_points': 3.5}
  capacity = {'benchmark': 'capacity', 'arguments': ['--small'], 'machine': machine | {'modified': True}, 'width': 512, 'items': 1000,
              'trials': 200, 'seeds': [0], 'keyed': [row], 'variants': [row], 'slotted': [row],
              'targets': [{'what': 'w', 'value': -0.5, 'target': 0.0}, {'what': 'never run', 'value': None, 'target': 0.0}]}
  resume = {'benchmark': 'resume', 'equal': False, 'step': 60, 'kills': [{'while_saving': True}, {'while_saving': False}]}
  text = report.page({'capacity-cpu': capacity, 'resume-cpu': resume})
  assert '### Capacity: cpu' in text and 'python -m benchmarks.capacity --small' in text
  assert 'CPU, Some CPU, 2 cores, commit `abc` with changes' in text
  assert '| phasor | 512 | 0.988 | 3.50 |' in text and '| w | 0 | -0.500 | **no** |' in text and 'never run' not in text
  assert '2 kills, 1 of them while saving' in text and '**different from**' in text and '## Mixing' not in text


@pytest.mark.parametrize(('value', 'text'), [(0.00026957, '0.000270'), (0.99997, '1.00'), (28376.0, '28,400'), (161792, '161,792'),
                                             (97.84, '97.8'), (103.33, '103'), (None, ''), (0.0, '0'), (2.5e-6, '2.50e-06'),
                                             (999.7, '1,000')])
def test_three_digits(value, text):
  assert report.cell(value) == text
