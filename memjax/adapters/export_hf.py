"""The weights of a decoder under their Hugging Face names: one file, or shards with an index. One tensor is held at a time."""
import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from memjax.adapters.families import Place, tensor_places
from memjax.adapters.safetensors import FLOATS, INDEX, SINGLE, write_json, write_safetensors
from memjax.config.errors import UserError, shown
from memjax.config.schema import ModelConfig

DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}
SHARD = 5 * 10 ** 9                # bytes of a file; the default of transformers


class Row:
  """One tensor of a checkpoint, [out, in], taken from the parameters and cast when it is asked for (`numpy.asarray`)."""

  def __init__(self, params: Mapping[str, Any], place: Place, dtype: str):
    self.leaf = functools.reduce(lambda node, key: node[key], place.path, params)
    self.place, self.dtype = place, DTYPES[dtype]
    shape = tuple(self.leaf.shape)[place.repeat >= 0:]
    self.shape = shape[::-1] if place.transposed else shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy                                 # always a new array
    x = np.asarray(self.leaf if self.place.repeat < 0 else self.leaf[self.place.repeat])
    with np.errstate(over='ignore'): stored = np.array(x.T if self.place.transposed else x, self.dtype, order='C')
    if self.dtype.itemsize < x.dtype.itemsize and not np.isfinite(stored).all() and np.isfinite(x).all():
      raise UserError(f'{"/".join(self.place.path)} holds numbers that do not fit {self.dtype.name}')
    return stored if dtype is None else stored.astype(dtype)


def hf_rows(config: ModelConfig, params: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Row]:
  """{name: Row} of all tensors of a decoder without memories and low-rank changes, in the order of its layers.

  `dtypes` says how each is stored, by its name; those that it lacks are float32.
  """
  return {name: Row(params, place, dtypes.get(name, 'float32')) for name, place in tensor_places(config).items()}


def nbytes_of(rows: Mapping[str, Any]) -> int:
  """Bytes of the tensors as they are stored."""
  return sum(math.prod(row.shape) * row.dtype.itemsize for row in rows.values())


def write_weights(folder: str, rows: Mapping[str, Any], *, limit: int = SHARD) -> list[str]:
  """The names of the files written: model.safetensors, or shards of at most `limit` bytes of data and their index.

  Each file is read back and compared before it takes its name. Raises UserError for a tensor larger than the limit and where
  the machine refuses.
  """
  shards = list(_shards(rows, limit))
  if len(shards) == 1:
    write_safetensors(os.path.join(folder, SINGLE), rows)
    return [SINGLE]
  files = [f'model-{number:05}-of-{len(shards):05}.safetensors' for number in range(1, len(shards) + 1)]
  for file, names in zip(files, shards, strict=True): write_safetensors(os.path.join(folder, file), {name: rows[name] for name in names})
  homes = {name: file for file, names in zip(files, shards, strict=True) for name in names}
  write_json(os.path.join(folder, INDEX), {'metadata': {'total_size': nbytes_of(rows)}, 'weight_map': dict(sorted(homes.items()))})
  return [*files, INDEX]


def _shards(rows: Mapping[str, Any], limit: int) -> Iterator[list[str]]:
  """The names of each file, in order."""
  names, total = [], 0
  for name, row in rows.items():
    size = nbytes_of({name: row})
    if size > limit: raise UserError(f'{shown(name)} takes {size:,} bytes, more than a file may hold ({limit:,})')
    if names and total + size > limit:
      yield names
      names, total = [], 0
    names, total = [*names, name], total + size
  yield names
