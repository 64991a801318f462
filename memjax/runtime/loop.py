"""The training loop: one step ahead of its metrics, evaluation, checkpoints, early stopping, signals, exact resume."""
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memjax.config.codec import to_json
from memjax.config.schema import Config
from memjax.runtime import sharding
from memjax.runtime.checkpoint import Checkpoints
from memjax.runtime.distributed import asked_to_stop, is_leader
from memjax.runtime.metrics import MetricsLog, Progress
from memjax.runtime.state import TrainState

logger = logging.getLogger(__name__)
DONE, DIVERGED, STOPPED = 0, 1, 75


@dataclasses.dataclass
class Early:
  """Counters of early stopping; saved with every checkpoint."""
  best: float = math.inf
  best_step: int = 0
  waited: int = 0

  def update(self, step: int, loss: float, min_delta: float) -> bool:
    """Whether this loss is an improvement by at least `min_delta`; counts the evaluations since the last one."""
    if not loss < self.best - min_delta and not (math.isinf(self.best) and math.isfinite(loss)):
      self.waited += 1
      return False
    self.best, self.best_step, self.waited = loss, step, 0
    return True

  def to_json(self) -> dict[str, Any]:
    """The counters as JSON values; no evaluation yet is null."""
    return {**vars(self), 'best': self.best if math.isfinite(self.best) else None}

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> 'Early':
    """The counters that `to_json` wrote."""
    return cls(**{**values, 'best': math.inf if values['best'] is None else values['best']})


class Stop:
  """Context in which SIGTERM only sets `asked`; a second one ends the process at once. In a job of several processes the signal is
  left to jax."""

  def __init__(self): self.asked, self.before = False, None

  def _ask(self, number, frame):
    self.asked = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def __enter__(self):
    is_ours = threading.current_thread() is threading.main_thread() and not jax.distributed.is_initialized()
    if is_ours: self.before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_):
    if self.before is not None: signal.signal(signal.SIGTERM, self.before)


@dataclasses.dataclass
class Trainer:
  """The parts of a run: compiled step and scorer, data, and where results go."""
  config: Config
  mesh: Mesh
  step: Callable                       # (state, batch) -> (state, metrics)
  evaluate: Callable                   # (params) -> scores
  checkpoints: Checkpoints
  log: MetricsLog | None               # of process 0
  data: dict[str, Any]                 # JSON: what the data are; checkpoints carry it
  early: Early = dataclasses.field(default_factory=Early)
  share: float = 0.0                   # of a second of all devices that a token costs; 0 = not known

  def run(self, state: TrainState, batches: Iterator[dict[str, np.ndarray]]) -> tuple[TrainState, int]:
    """(state, DONE, DIVERGED or STOPPED) after training from `state` to the configured steps; the state is saved.

    While step n runs, the metrics of step n - 1 are fetched: the step itself never waits for the host.
    """
    first, training, waiting = int(state.step), self.config.training, None
    if self._tired(): return state, DONE
    self.clock, self.counted = time.monotonic(), first
    with Stop() as stop, Progress(training.steps, first) as self.progress:
      for done in range(first + 1, training.steps + 1):
        state, metrics = self.step(state, sharding.put_batch(next(batches), self.mesh))
        sharding.settle(metrics)
        diverged = waiting is not None and self._report(*waiting)
        waiting = done, metrics
        asked = asked_to_stop(done, stop.asked)
        if not (asked or diverged or self._pauses(done)): continue
        diverged, waiting = self._report(*waiting) or diverged, None
        status = self._pause(done, state, asked, diverged)
        if status is not None: return state, status
    return state, DONE

  def _pauses(self, done: int) -> bool:
    c = self.config
    return done == c.training.steps or any(every and done % every == 0 for every in (c.evaluation.every, c.checkpoint.every))

  def _report(self, step: int, metrics: dict[str, jax.Array]) -> bool:
    """Writes the row of a step if one is due; whether too many steps in a row were not finite."""
    training = self.config.training
    skipped = int(metrics['skipped'])
    if skipped: logger.warning('step %d: loss or gradient is not finite; the update was left out', step)
    if skipped < training.nan_limit and step != 1 and step % training.log_every and step != training.steps: return False
    row = jax.device_get(metrics)
    now = time.monotonic()
    speed = (step - self.counted) * training.batch * training.length / max(now - self.clock, 1e-9)
    self.clock, self.counted = now, step
    if is_leader():
      used = {'mfu': round(speed * self.share, 4)} if self.share else {}
      self.log.write(step, {'loss': row.pop('loss'), 'tokens_per_second': round(speed, 1), **used, **row})
      self.progress.update(step, float(metrics['loss']), speed)
    return skipped >= training.nan_limit

  def _pause(self, done: int, state: TrainState, asked: bool, diverged: bool) -> int | None:
    """Evaluates and saves as due; the status to end with, or None to go on."""
    c, loss, improved, over = self.config, None, False, done == self.config.training.steps
    if not (asked or diverged) and (over or (c.evaluation.every and done % c.evaluation.every == 0)):
      loss = self._evaluate(done, state)
      improved = self.early.update(done, loss, c.evaluation.min_delta)
    tired = self._tired()
    due = c.checkpoint.every and done % c.checkpoint.every == 0
    if over or asked or diverged or tired or due or (improved and c.evaluation.patience):
      self.checkpoints.save(done, state, self._record(done), loss)
    self.clock, self.counted = time.monotonic(), done
    if diverged:
      self.progress.note(f'{c.training.nan_limit} steps in a row were not finite; stopped at step {done} with the last good state')
    elif asked: self.progress.note(f'stopped by SIGTERM at step {done}, saved')
    elif tired and not over:
      self.progress.note(f'stopped early at step {done}: best {self.early.best:.4f} at step {self.early.best_step}')
    if not (over or asked or diverged or tired): return None
    self.checkpoints.wait()
    return DIVERGED if diverged else STOPPED if asked else DONE

  def _record(self, done: int) -> dict[str, Any]:
    return {'data': {**self.data, 'step': done}, 'config': to_json(self.config), 'early': self.early.to_json()}

  def _tired(self) -> bool:
    return 0 < self.config.evaluation.patience <= self.early.waited

  def _evaluate(self, done: int, state: TrainState) -> float:
    scores = self.evaluate(state.params)
    if is_leader(): self.log.write(done, {f'eval/{name}': value for name, value in scores.items()})
    self.progress.note(f"step {done}: {self.config.evaluation.split} loss {scores['loss']:.4f}, "
                       f"{scores['bits_per_byte']:.4f} bits per byte, perplexity {scores['perplexity']:.3f}")
    return scores['loss']
