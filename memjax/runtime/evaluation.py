"""Loss over a whole split with exact token weighting, in sliding windows or as one stream; used in and after training."""
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memjax.config.schema import Config
from memjax.data.pipeline import eval_batches
from memjax.data.tokens import Tokens
from memjax.runtime import sharding
from memjax.runtime.distributed import data_shard
from memjax.runtime.losses import Totals, scores
from memjax.runtime.scoring import score
from memjax.runtime.state import check_carry
from memjax.runtime.test_time import held

PENDING = 8                            # batches whose totals may wait on the device


def make_evaluator(model: Any, *, stream: bool = False, mesh: Mesh | None = None, test_time: str = 'on') -> Callable:
  """evaluate(params, batches) -> Totals on the host, compiled once for all its calls.

  Without `stream` every row starts with an empty memory; with it row b of a batch continues row b of the one before.
  `test_time` is one of those of `runtime/test_time`. Raises UserError if a streamed model holds full attention, or nothing learns
  that could be held.
  """
  kept = held(model.config, test_time)
  if stream: check_carry(model.config, 'evaluation.stream')
  def call(params, memory, batch):
    totals, _, memory = score(model, params, memory, batch, **kept)
    return totals, memory
  alone = jax.jit(lambda params, batch: call(params, model.init_state(batch['token'].shape[0]), batch)[0])
  carried = jax.jit(call, donate_argnums=1)

  def evaluate(params: Any, batches: Iterable[dict[str, np.ndarray]]) -> Totals:
    total, waiting, memory = Totals(0.0, 0, 0), [], None
    for batch in batches:
      batch = sharding.put_batch(batch, mesh) if mesh else batch
      if stream:
        memory = model.init_state(batch['token'].shape[0]) if memory is None else memory
        part, memory = carried(params, memory, batch)
      else: part = alone(params, batch)
      waiting.append(sharding.settle(part))
      if len(waiting) > PENDING: total = _add(total, waiting.pop(0))
    for part in waiting: total = _add(total, part)
    return total
  return evaluate


def _add(total: Totals, part: Totals) -> Totals:
  nats, tokens, correct = jax.device_get(part)
  return Totals(total.nats + float(nats), total.tokens + int(tokens), total.correct + int(correct))


def evaluate_tokens(model: Any, params: Any, batches: Iterable[dict], *, stream: bool = False,
                    mesh: Mesh | None = None, test_time: str = 'on') -> Totals:
  """Totals of `batches`; keep `make_evaluator`'s result instead to evaluate more than once."""
  return make_evaluator(model, stream=stream, mesh=mesh, test_time=test_time)(params, batches)


def make_scorer(model: Any, config: Config, mesh: Mesh | None = None) -> Callable[..., dict[str, float]]:
  """score(params, tokens, limit=0) -> `scores` of a split, cut as `config.evaluation` says; limit = batches, 0 = all."""
  e = config.evaluation
  evaluate = make_evaluator(model, stream=e.stream, mesh=mesh)
  index, count = data_shard(mesh) if mesh else (0, 1)
  def score(params: Any, tokens: Tokens, limit: int = 0) -> dict[str, float]:
    batches = eval_batches(tokens, batch=e.batch, length=e.length or config.training.length, context=e.context,
                           stream=e.stream, process_index=index, process_count=count)
    totals = evaluate(params, itertools.islice(batches, limit or None))
    return scores(totals, tokens.bytes_per_token)
  return score
