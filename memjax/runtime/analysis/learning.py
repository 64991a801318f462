"""What neural memories learned while a text was read; plain lists, ready for JSON."""
import dataclasses
import re
from typing import Any

import numpy as np

from memjax.config.layout import mixer_path
from memjax.layers.tree import named
from memjax.models.decoder import Decoder, build_decoder
from memjax.runtime.analysis.plain import round_list
from memjax.runtime.reading import Run

GATES = re.compile(r'(theta|alpha|eta\d*|c\d+)_BxLxH')
POINTS = 200           # of a curve over tokens


def roomy(model: Decoder, documents: int) -> Decoder:
  """The model whose neural memories have room for that many documents in a row of their chunks, so that figures miss no token."""
  config = model.config
  neural = {name: c for name, c in config.mixers.items() if c.kind == 'neural'}
  if not neural: return model
  roomy = {name: dataclasses.replace(c, exec=dataclasses.replace(c.exec, spare=max(c.exec.spare, documents))) for name, c in neural.items()}
  return build_decoder(dataclasses.replace(config, mixers={**config.mixers, **roomy}))


def start_of(found: Run, place: Any) -> dict[str, np.ndarray]:
  """The learned start of a neural memory, {name: [H, ...]}; {} for other kinds."""
  if found.model.config.mixers[place.mixer].kind != 'neural': return {}
  path = f'{mixer_path(found.model.config, place.part, place.layer, place.mixer)}/start_'
  start = {name.removeprefix(path): np.asarray(a) for name, a in named(found.params).items() if name.startswith(path)}
  return {name: a[place.repeat] for name, a in start.items()} if place.part == 'repeats' else start


def weight_change(state: Any, start: dict[str, np.ndarray]) -> np.ndarray:
  """|W - W_init| / |W_init| of each row and head, [B, H], as of the last complete chunk."""
  size = lambda parts, first: np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum(tuple(range(first, np.ndim(a)))) for a in parts))
  return size([state.fast[name][0] for name in start], 2) / np.maximum(size(start.values(), 1), 1e-12)[None]


def learning_of(seen: dict[str, np.ndarray], mask_BxL: np.ndarray, change_TxBxH: np.ndarray, at: list[int]) -> dict[str, Any]:
  """Means over rows and heads in pieces of the text: 'tokens' read by the end of each, 'surprise' (norm of the gradient), 'inner_loss',
  'clipped' (share of tokens whose gradient was cut) and 'gates'; and 'weight_change' [T][H] after 'weight_tokens'."""
  length = mask_BxL.shape[1]
  edges = np.unique(np.linspace(0, length, min(POINTS, length) + 1).astype(int))
  count = np.add.reduceat(mask_BxL.sum(0), edges[:-1])
  def over_time(a_BxLxH):
    total_L = np.where(mask_BxL, np.asarray(a_BxLxH, np.float64).mean(-1), 0).sum(0)
    return round_list((np.add.reduceat(total_L, edges[:-1]) / np.maximum(count, 1))[count > 0])
  kept = seen['kept_BxLxH']
  gates = {found[1]: over_time(a) for name, a in seen.items() if (found := GATES.fullmatch(name))}
  return {'tokens': edges[1:][count > 0].tolist(), 'surprise': over_time(seen['surprise_BxLxH']),
          'inner_loss': over_time(seen['inner_loss_BxLxH']), 'clipped': over_time((kept < 1) & (kept > 0)), 'gates': gates,
          'weight_tokens': at, 'weight_change': round_list(change_TxBxH.mean(1))}


def most_documents(position_BxL: np.ndarray) -> int:
  """Documents of the row that has most."""
  return int((np.asarray(position_BxL) == 0).sum(1).max())
