"""Hosts whose kernels are stored in fewer bits: packed while a checkpoint is read, and a folder that holds the packed ones alone.

The folder has `quantized.safetensors`, tensors by their Hugging Face names (a kernel of integers is NAME_codes and NAME_scale, rows
of outputs), and `quantization.json`, which says what model they are. No float copy of a kernel is written, read or kept.
"""
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import memjax
from memjax.adapters.families import Place, stored_places, tensor_places
from memjax.adapters.pretrained import Tensors, load_params, read_json
from memjax.adapters.safetensors import FLOATS, INTEGERS, SafeTensors, write_described
from memjax.config.codec import freeze, to_json
from memjax.config.errors import ConfigError, UserError, shown
from memjax.config.lora import LoraConfig
from memjax.config.quant import PACKED, storage_of
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.models.quantized import pack_rows
from memjax.ops.quantize import Quantized, dequantize

FILE, DESCRIPTION, VERSION = 'quantized.safetensors', 'quantization.json', 1
TYPES = FLOATS | INTEGERS


class PackedTensors:
  """The tensors of a float checkpoint as `config` stores them: kernels are quantised one at a time, as they are read.

  `error` is the relative error of each kernel that was read, by its name.
  """

  def __init__(self, tensors: Tensors, config: ModelConfig):
    self.tensors, self.folder, self.error = tensors, tensors.folder, {}
    own, self._storage = set(stored_places(config)), {}
    for name, place in tensor_places(config).items():
      if name not in own: self._storage[name] = storage_of(config.block.quant, '/'.join(place.path))
    self._last: tuple[str, Any] = ('', None)

  @property
  def names(self) -> list[str]:
    """All tensors; a kernel of integers is two."""
    return [part for name in self.tensors.names for part in ([f'{name}_codes', f'{name}_scale'] if name in self._storage else [name])]

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one, found without reading it."""
    owner, part = self._split(name)
    if not part: return self.tensors.shape(name)
    like = jax.ShapeDtypeStruct(self.tensors.shape(owner), jnp.float32)
    return getattr(jax.eval_shape(functools.partial(pack_rows, storage=self._storage[owner]), like), part).shape

  def read(self, name: str) -> np.ndarray:
    """The values of one."""
    owner, part = self._split(name)
    if not part: return self.tensors.read(name)
    if self._last[0] != owner: self._last = owner, self._pack(owner)
    return np.asarray(getattr(self._last[1], part))

  def _split(self, name: str) -> tuple[str, str]:
    """(kernel, 'codes' or 'scale'), or (name, '') for all else."""
    owner, _, part = name.rpartition('_')
    return (owner, part) if owner in self._storage else (name, '')

  def _pack(self, name: str) -> Quantized:
    stored, error = _measured(np.asarray(self.tensors.read(name)), self._storage[name])
    self.error[name] = float(error)
    return stored


@functools.partial(jax.jit, static_argnums=1)
def _measured(x_ExD: jax.Array, storage: str) -> tuple[Quantized, jax.Array]:
  """(codes, relative error)."""
  stored, wide = pack_rows(x_ExD.astype(jnp.float32), storage), x_ExD.astype(jnp.float32)
  return stored, jnp.linalg.norm(dequantize(stored) - wide) / jnp.maximum(jnp.linalg.norm(wide), 1e-30)


class QuantizedTensors:
  """The tensors of a quantised folder for `load_params`; `config` is the model that they are of, computed in `dtype`.

  Raises UserError for files that are missing or damaged, and for tensors of other types than the config stores.
  """

  def __init__(self, folder: str, *, dtype: str = 'float32'):
    self.config = _described(os.path.join(folder, DESCRIPTION), dtype)
    self._file = SafeTensors(os.path.join(folder, FILE), TYPES)
    self.folder = self._file.path
    shapes = named(param_shapes(build_decoder(self.config))[0])
    for name, place in stored_places(self.config).items():
      wanted, entry = shapes['/'.join(place.path)].dtype, self._file.entries.get(name)
      if entry is None: continue                         # `load_params` says which is missing
      is_exact = place.path[-1] in ('kernel_codes', 'kernel_scale')
      if TYPES.get(entry.dtype) != wanted if is_exact else entry.dtype not in FLOATS:
        raise UserError(f'{self.folder}: {shown(name)} is {entry.dtype}; {self.config.block.quant.storage} wants {wanted}')

  @property
  def names(self) -> list[str]:
    """All tensors."""
    return list(self._file.entries)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one."""
    return self._file.entries[name].shape

  def read(self, name: str) -> np.ndarray:
    """The values of one as a read-only view of the file. Raises UserError for a scale that is not finite."""
    value = self._file.read(name)
    if name.endswith('_scale') and not np.isfinite(value).all(): raise UserError(f'{self.folder}: {shown(name)} holds NaN or infinity')
    return value


def _described(path: str, dtype: str) -> ModelConfig:
  """The model of a description."""
  tree = read_json(path)
  if tree.get('version') != VERSION: raise UserError(f'{path} is not the description of a quantised model of version {VERSION}')
  try:
    config = freeze({**_table(tree.get('model'), path), 'dtype': dtype}, path='model', cls=ModelConfig)
  except ConfigError as error:
    raise UserError(f'{path}: {error}') from None
  if not config.block.quant.storage: raise UserError(f'{path}: model.block.quant.storage is missing; nothing is stored in fewer bits')
  if config.block.lora.rank: raise UserError(f'{path}: model.block.lora.rank is set; a quantised folder holds no low-rank changes')
  return config


def _table(value: Any, path: str) -> dict:
  if not isinstance(value, dict): raise UserError(f'{path}: model is no table: {shown(value)}')
  return value


def packed(tensors: Tensors, config: ModelConfig) -> Tensors:
  """The tensors of a checkpoint as `config` stores them; the same object where nothing is to be done.

  Raises UserError for tensors that are packed already, in another way.
  """
  if not isinstance(tensors, QuantizedTensors): return PackedTensors(tensors, config) if config.block.quant.storage in PACKED else tensors
  if tensors.config.block.quant == config.block.quant: return tensors
  raise UserError(f'{tensors.folder} is stored as {tensors.config.block.quant.storage}; config.model.block.quant must say what it says')


def is_quantized(folder: str) -> bool:
  """Whether a folder holds a host as `save_quantized` writes it."""
  return os.path.isfile(os.path.join(folder, DESCRIPTION))


def load_quantized(folder: str, *, mesh: Mesh | None = None, dtype: str = 'float32',
                   param_dtype: str = 'float32') -> tuple[ModelConfig, dict]:
  """(config, parameters) of the host in such a folder, kernels bit for bit as they were saved; computed in `dtype`, the rest
  stored in `param_dtype`.

  Raises UserError for files that are missing, damaged, or do not fit each other.
  """
  tensors = QuantizedTensors(folder, dtype=dtype)
  return tensors.config, load_params(tensors.config, tensors, mesh=mesh, param_dtype=param_dtype)


class _Row:
  """One tensor [out, in] as it is stored, fetched when it is asked for."""

  def __init__(self, params: Mapping[str, Any], place: Place):
    self.leaf, self.place = functools.reduce(lambda node, key: node[key], place.path, params), place
    shape = tuple(self.leaf.shape)[place.repeat >= 0:]
    self.dtype, self.shape = np.dtype(self.leaf.dtype), shape[::-1] if place.transposed else shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy                                             # always a new array
    x = np.asarray(self.leaf if self.place.repeat < 0 else self.leaf[self.place.repeat])
    return np.array(x.T if self.place.transposed else x, dtype, order='C')


def save_quantized(folder: str, config: ModelConfig, params: Mapping[str, Any]) -> list[str]:
  """The names of the two files written: the packed tensors of a host of the families of `family_config`, and what they are.

  `config` and `params` are what `quantize_host` gave. config.json and the tokenizer, which commands want beside them, are written
  by others. Raises UserError for a host that is not quantised, for memories and low-rank changes (merge them, or save them in files of
  their own), and where the machine refuses.
  """
  if not config.block.quant.storage: raise UserError('the host is not quantised; quantize_host comes first')
  if config.block.lora != LoraConfig(): raise UserError('the parameters hold low-rank changes; merge or strip them first')
  places = stored_places(config)
  for path in sorted(set(named(params)) - {'/'.join(place.path) for place in places.values()}):
    raise UserError(f'{path} belongs to no checkpoint of a host; save the memories in files of their own')
  rows = {name: _Row(params, place) for name, place in places.items()}
  text = {'version': VERSION, 'memjax': memjax.__version__, 'storage': config.block.quant.storage,
          'tensors': {name: {'dtype': row.dtype.name, 'shape': list(row.shape)} for name, row in rows.items() if row.dtype != np.float32},
          'model': to_json(config)}
  write_described(folder, (FILE, rows), (DESCRIPTION, text), TYPES)
  return [FILE, DESCRIPTION]
