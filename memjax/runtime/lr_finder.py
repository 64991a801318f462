"""The learning-rate range test (Smith 2017): one sweep of rising rates, and the rate where the loss falls fastest."""
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memjax.config.errors import UserError
from memjax.runtime import sharding
from memjax.runtime.state import TrainState

logger = logging.getLogger(__name__)
LOW, HIGH, STEPS, SMOOTH, BLOWN = 1e-6, 1.0, 100, 0.9, 4.0


def sweep(count: jax.Array) -> jax.Array:
  """The rate of update `count`: LOW (HIGH / LOW) ** (count / (STEPS - 1))."""
  return jnp.exp(math.log(LOW) + (math.log(HIGH) - math.log(LOW)) * jnp.asarray(count, jnp.float32) / (STEPS - 1))


def find_rate(step: Callable, state: TrainState, batches: Iterator[dict], mesh: Mesh) -> dict[str, Any]:
  """{'rate': [...], 'loss': [...], 'smoothed': [...], 'suggestion': float}, ending early once the loss has blown up.

  `step` must be compiled with an optimiser whose schedule is `sweep`. The loss is smoothed exponentially (bias-corrected);
  the suggestion is the rate of its steepest fall over the logarithm of the rate, before its minimum.
  Raises UserError if the loss never falls.
  """
  rates, losses, smoothed, mean = [], [], [], 0.0
  for n in range(STEPS):
    state, metrics = step(state, sharding.put_batch(next(batches), mesh))
    loss = float(metrics['loss'])
    if not math.isfinite(loss) or int(metrics['skipped']): break
    mean = SMOOTH * mean + (1 - SMOOTH) * loss
    rates.append(float(sweep(n)))
    losses.append(loss)
    smoothed.append(mean / (1 - SMOOTH ** (n + 1)))
    if smoothed[-1] > BLOWN * min(smoothed): break
  return {'rate': rates, 'loss': losses, 'smoothed': smoothed, 'suggestion': suggest(rates, smoothed)}


def suggest(rates: list[float], smoothed: list[float]) -> float:
  """The rate at which the smoothed loss falls fastest per unit of log rate, over windows of five steps."""
  lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
  slopes = [(smoothed[n + 2] - smoothed[n - 2], n) for n in range(2, min(lowest + 1, len(smoothed) - 2))]
  if not slopes or min(slopes)[0] >= 0: raise UserError('the loss does not fall at any rate of the sweep; is anything trained?')
  return rates[min(slopes)[1]]


def write(workdir: str, result: dict[str, Any]) -> str:
  """Path of W/lr_finder.json, written together with a figure where matplotlib is installed."""
  path = os.path.join(workdir, 'lr_finder.json')
  with open(path, 'w', encoding='utf-8') as file: json.dump(result, file)
  try:
    from matplotlib.figure import Figure
  except ImportError:
    logger.info("no figure: the extra 'plot' is not installed")
    return path
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  axes.semilogx(result['rate'], result['loss'], color='0.75', label='loss')
  axes.semilogx(result['rate'], result['smoothed'], label='smoothed')
  axes.axvline(result['suggestion'], color='C3', linestyle='--', label=f"suggestion {result['suggestion']:.2g}")
  axes.set(xlabel='learning rate', ylabel='nats a token')
  axes.legend()
  figure.savefig(os.path.join(workdir, 'lr_finder.png'), dpi=120)
  return path
