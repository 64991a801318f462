"""The analysis of a run: everything observed and measured as one JSON file, and its figures beside it."""
import json
import logging
import math
import pathlib
from typing import Any

from memjax.config.errors import UserError
from memjax.data.tokens import Tokens
from memjax.runtime.analysis.banks import ROUTER
from memjax.runtime.analysis.figures import draw, has_plot
from memjax.runtime.analysis.measure import measure_capacity, measure_cost
from memjax.runtime.analysis.observe import observe
from memjax.runtime.flops import bank_flops
from memjax.runtime.footprint import bank_footprint
from memjax.runtime.metrics import read_rows
from memjax.runtime.reading import Run

logger = logging.getLogger(__name__)
FOLDER, FILE = 'analysis', 'analysis.json'
NO_PLOT = "figures need matplotlib; pip install 'memjax[plot]'"


def write_analysis(found: Run, tokens: Tokens, *, rows: int = 4, length: int = 512,
                   lengths: tuple[int, ...] = (128, 512, 1024)) -> tuple[pathlib.Path, dict[str, Any]]:
  """(folder, report): W/analysis with analysis.json and, where matplotlib is installed, the figures as PNG.

  `rows` pieces of `length` tokens of the text are read; the cost is measured at `lengths`, () = not at all. Figures that
  do not apply are listed under 'skipped' with the reason. Raises UserError where the folder cannot be written.
  """
  table = found.model.config.embedding.max_position
  if table: length, lengths = min(length, table), tuple(n for n in lengths if n <= table)
  seen, arrays = observe(found, tokens, rows=rows, length=length)
  report = {'workdir': found.workdir, 'step': found.step, 'config': found.name, 'name': found.config.name, **seen,
            'training': training_of(found)}
  by_label = {layer['label']: layer for layer in report['layers']}
  report['capacity'] = {label: measure_capacity(
      found.model.config.mixers[by_label[label]['mixer']].binding.kind, arrays[label],
      effective=sum(by_label[label]['effective_slots']) / by_label[label]['heads']) for label in arrays}
  if report['banks']: report['banks']['footprint'] = {**bank_footprint(found.model), 'flops': bank_flops(found.model, length)}
  report['cost'] = measure_cost(found.config, list(lengths)) if lengths else {}
  folder = pathlib.Path(found.workdir) / FOLDER
  try:
    folder.mkdir(exist_ok=True)
    report['figures'], report['skipped'] = draw(report, folder) if has_plot() else ({}, {'all': NO_PLOT})
    (folder / FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
  except OSError as error:
    raise UserError(f'cannot write {folder}: {error.strerror or error}') from error
  for name, reason in report['skipped'].items(): logger.info('%s: left out, %s', name, reason)
  return folder, report


def training_of(found: Run) -> dict[str, Any]:
  """{'loss', 'eval', 'effective_slots': {'step', 'value'}, 'router': {monitor: {'step', 'value'}}, 'test', 'guess', 'foreign'} of
  metrics.jsonl.

  Rows of another configuration are counted in 'foreign' and left out: a curve shows one model.
  """
  rows = read_rows(found.workdir)
  own = [row for row in rows if row.get('config', found.name) == found.name]
  def series(key: str) -> dict[str, list]:
    points = [(row['step'], row[key]) for row in own if isinstance(row.get(key), int | float)]
    return {'step': [step for step, _ in points], 'value': [value for _, value in points]}
  tests = series('test/loss')['value']
  router = {key: points for key in ROUTER if (points := series(key))['value']}
  return {'router': router, 'loss': series('loss'), 'eval': series('eval/loss'), 'effective_slots': series('effective_slots'),
          'test': tests[-1] if tests else None, 'guess': math.log(found.model.config.vocabulary), 'foreign': len(rows) - len(own)}
