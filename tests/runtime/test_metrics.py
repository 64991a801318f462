"""Rows, cutting back, the mirror, progress, counters and signals of the loop; suggestions of the rate finder."""
import json
import logging
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.runtime import lr_finder, metrics
from memjax.runtime.loop import Early, Stop


def test_rows_are_flushed_plain_and_finite(tmp_path):
  with metrics.MetricsLog(str(tmp_path), 'abc', 0) as log:
    log.write(1, {'loss': np.float32(0.5), 'tokens': np.int32(7), 'bad': float('nan')})
    text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text) == {'step': 1, 'config': 'abc', 'loss': 0.5, 'tokens': 7, 'bad': None} and text.endswith('\n')
  assert any(name.startswith('events') for name in os.listdir(tmp_path / 'tensorboard'))


def test_rows_after_the_restored_step_and_torn_ones_are_cut(tmp_path):
  rows = [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 2.0}, {'step': 2, 'eval/loss': 2.0}, {'step': 2, 'test/loss': 1.0},
          {'step': 3, 'loss': 3.0}]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"step": 2, "lo')
  assert metrics.read_rows(str(tmp_path)) == rows
  metrics.MetricsLog(str(tmp_path), 'abc', 2).close()
  assert metrics.read_rows(str(tmp_path)) == rows[:3]
  metrics.MetricsLog(str(tmp_path), 'abc', 0).close()
  assert metrics.read_rows(str(tmp_path)) == [] == metrics.read_rows(str(tmp_path / 'none'))


def test_without_the_extra_one_line_is_said(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with caplog.at_level(logging.INFO), metrics.MetricsLog(str(tmp_path), 'abc', 0) as log: log.write(1, {'loss': 1.0})
  assert caplog.messages == ["no TensorBoard events: the extra 'tb' is not installed"]
  assert len(metrics.read_rows(str(tmp_path))) == 1


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog, monkeypatch):
  clock = iter([0.0, 1.0, 6.0, 7.0, 8.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  with caplog.at_level(logging.INFO), metrics.Progress(5, 0) as progress:
    for step in range(1, 6): progress.update(step, 2.0, 1234.4)
    progress.note('noted')
  assert caplog.messages == ['step 1/5  loss 2.0000  1,234 tokens/s', 'step 3/5  loss 2.0000  1,234 tokens/s  0:06 left',
                             'step 5/5  loss 2.0000  1,234 tokens/s  0:00 left', 'noted']


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  with metrics.Progress(5, 2) as progress:
    progress.update(3, 2.0, 1234.4)
    progress.note('noted [x]')
  err = capsys.readouterr().err
  assert 'noted [x]' in err and '3/5' in err and '1,234 tokens/s' in err


def test_early_stopping_counts_evaluations_without_improvement():
  early, flags = Early(), []
  for step, loss in enumerate([3.0, 2.95, 2.8, math.nan, 2.9, 2.0], 1): flags.append(early.update(step, loss, 0.1))
  assert flags == [True, False, True, False, False, True] and (early.best_step, early.waited) == (6, 0)
  for counters in (early, Early()): assert Early.from_json(json.loads(json.dumps(counters.to_json()))) == counters


def test_sigterm_is_only_noted_and_the_handler_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with Stop() as stop:
    assert not stop.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigterm_ends_at_once():
  code = ('import os, signal\nfrom memjax.runtime.loop import Stop\n'
          'with Stop():\n  for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\nprint("alive")')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGTERM and done.stdout == ''


def test_the_rate_of_the_steepest_fall_is_suggested():
  rates = list(np.logspace(-6, 0, 61))
  smoothed = [5 - 2 / (1 + math.exp(-(math.log10(r) + 3) * 6)) + 10 * max(0, math.log10(r) + 1) for r in rates]
  assert lr_finder.suggest(rates, smoothed) == pytest.approx(1e-3, rel=0.3)
  for flat in ([], [1.0] * 20, list(range(20))):
    with pytest.raises(UserError, match='does not fall'): lr_finder.suggest(rates[:len(flat)], flat)
