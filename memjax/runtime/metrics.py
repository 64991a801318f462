"""What a run tells: rows of metrics.jsonl (the truth), a TensorBoard mirror, and progress on stderr."""
import json
import logging
import math
import os
import sys
import time
from typing import Any

logger = logging.getLogger(__name__)
FILE = 'metrics.jsonl'
SECONDS = 5.0                          # between two lines of progress where there is no terminal


def read_rows(workdir: str) -> list[dict[str, Any]]:
  """All whole rows of metrics.jsonl in order; a last line torn by a kill is left out, an absent file is empty."""
  try:
    with open(os.path.join(workdir, FILE), encoding='utf-8') as file: lines = file.read().splitlines()
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    try: row = json.loads(line)
    except ValueError: continue
    if isinstance(row, dict) and isinstance(row.get('step'), int): rows.append(row)
  return rows


class MetricsLog:
  """Writes rows to metrics.jsonl, flushed one by one, and to TensorBoard where tensorboardX is installed.

  `tags` are written into every row. What an earlier run wrote after step `after`, and its final test scores, are cut away
  first: they will come again.
  """

  def __init__(self, workdir: str, name: str, after: int, tags: dict[str, Any] | None = None):
    self.name, self.tags, path = name, tags or {}, os.path.join(workdir, FILE)
    kept = [row for row in read_rows(workdir) if row['step'] <= after and 'test/loss' not in row]
    with open(f'{path}.tmp', 'w', encoding='utf-8') as file: file.writelines(json.dumps(row) + '\n' for row in kept)
    os.replace(f'{path}.tmp', path)
    self.file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 closed by close()
    self.board = _board(os.path.join(workdir, 'tensorboard'), after)

  def write(self, step: int, row: dict[str, float]) -> dict[str, Any]:
    """The row as written: step, configuration, values; what is not finite becomes null."""
    row = {'step': step, 'config': self.name, **self.tags, **{k: _plain(v) for k, v in row.items()}}
    self.file.write(json.dumps(row) + '\n')
    self.file.flush()
    if self.board:
      for key, value in row.items():
        if isinstance(value, int | float) and key != 'step': self.board.add_scalar(key, value, step)
      self.board.flush()
    return row

  def text(self, step: int, name: str, text: str) -> None:
    """Shows a text (a sample) in TensorBoard only."""
    if self.board: self.board.add_text(name, text, step)

  def close(self) -> None:
    """Closes both files."""
    self.file.close()
    if self.board: self.board.close()

  def __enter__(self): return self

  def __exit__(self, *_): self.close()


def _plain(value: Any) -> int | float | None:
  value = value.item() if hasattr(value, 'item') else value
  if isinstance(value, float): return value if math.isfinite(value) else None
  return value


def _board(folder: str, after: int):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    logger.info("no TensorBoard events: the extra 'tb' is not installed")
    return None
  return SummaryWriter(folder, purge_step=after + 1)


class Progress:
  """A bar on a terminal; elsewhere a log line now and then. Use as a context manager."""

  def __init__(self, steps: int, done: int):
    self.steps, self.first, self.shown, self.started, self.bar = steps, -1, -SECONDS, 0.0, None
    if not sys.stderr.isatty(): return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    self.bar = Bar(TextColumn('step'), MofNCompleteColumn(), BarColumn(), TextColumn('{task.description}'),
                   TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn(), console=Console(stderr=True))
    self.task = self.bar.add_task('', total=steps, completed=done)

  def update(self, step: int, loss: float, speed: float) -> None:
    """Shows loss and tokens a second at a step."""
    if self.bar: return self.bar.update(self.task, completed=step, description=f'loss {loss:.4f}  {speed:,.0f} tokens/s')
    now = time.monotonic()
    if self.first < 0: self.first, self.started = step, now     # what came before is compilation
    if now - self.shown < SECONDS and step != self.steps: return None
    self.shown = now
    if step > self.first: left = f'  {_clock((now - self.started) / (step - self.first) * (self.steps - step))} left'
    else: left = ''
    return logger.info('step %d/%d  loss %.4f  %s tokens/s%s', step, self.steps, loss, f'{speed:,.0f}', left)

  def note(self, text: str) -> None:
    """Shows a line beside the bar."""
    if self.bar: self.bar.console.print(text, highlight=False, markup=False)
    else: logger.info('%s', text)

  def __enter__(self):
    if self.bar: self.bar.start()
    return self

  def __exit__(self, *_):
    if self.bar: self.bar.stop()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}' if minutes >= 60 else f'{minutes}:{seconds:02}'
