"""A Hugging Face folder as a decoder: its config, and its tensors moved one at a time onto their sharding."""
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from memjax.adapters.families import EMBED, HEAD, Place, family_config, stored_places
from memjax.adapters.safetensors import HEADER_LIMIT, Checkpoint, parse_json
from memjax.config.errors import UserError, nearest, shown
from memjax.config.schema import ModelConfig
from memjax.layers.axes import spec_for
from memjax.models.decoder import build_decoder, param_shapes

IGNORED = re.compile(r'rotary_emb\.inv_freq$')       # written by old versions; computed here
PARAM_DTYPES = ('float32', 'bfloat16', 'float16')
PIECE = 1 << 24                                      # bytes compared at once


class Tensors(Protocol):
  """What the tensors are read from: a folder of safetensors, or anything else that knows them by their Hugging Face names."""
  folder: str

  @property
  def names(self) -> Iterable[str]:
    """All tensors."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one, [out, in] for matrices."""

  def read(self, name: str) -> np.ndarray:
    """The values of one."""


def load_pretrained(folder: str, *, mesh: Mesh | None = None, dtype: str = 'float32',
                    param_dtype: str = 'float32') -> tuple[ModelConfig, dict]:
  """(config, parameters) of the Llama, Mistral, Qwen2 or Qwen3 checkpoint in a local folder.

  `dtype` is that of computation, `param_dtype` that of the stored parameters, split over `mesh` as in training or on the
  default device without one. Raises UserError for what cannot be read exactly: see `family_config`, `Checkpoint`, `load_params`.
  """
  config, checkpoint = open_pretrained(folder, dtype=dtype)
  return config, load_params(config, checkpoint, mesh=mesh, param_dtype=param_dtype)


def open_pretrained(folder: str, *, dtype: str = 'float32') -> tuple[ModelConfig, Checkpoint]:
  """(config, tensors) of such a folder; no tensor is moved yet."""
  config = family_config(read_json(os.path.join(folder, 'config.json')), path=os.path.join(folder, 'config.json'), dtype=dtype)
  checkpoint = Checkpoint(folder)
  return settle_head(config, checkpoint), checkpoint


def read_json(path: str) -> dict:
  """The JSON object in a file. Raises UserError that begins with the path."""
  try:
    if os.path.getsize(path) > HEADER_LIMIT: raise UserError(f'has {os.path.getsize(path)} bytes; {HEADER_LIMIT} at most')
    with open(path, 'rb') as file: return parse_json(file.read(), 'content')
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except UserError as error:
    raise UserError(f'{path} {error}') from None


def end_tokens(folder: str) -> tuple[int, ...]:
  """Tokens that end a text: `eos_token_id` of generation_config.json where it has one, else of config.json; () for none."""
  for name in ('generation_config.json', 'config.json'):
    path = os.path.join(folder, name)
    value = read_json(path).get('eos_token_id') if os.path.exists(path) else None
    if value is None: continue
    tokens = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in tokens): raise UserError(f'{path}: eos_token_id is no token: {shown(value)}')
    return tuple(dict.fromkeys(tokens))
  return ()


def settle_head(config: ModelConfig, tensors: Tensors) -> ModelConfig:
  """The config with the head tied where there is no tensor for it. Raises UserError for a tied head with a tensor of its own
  that differs from the embedding."""
  has_head = HEAD in set(tensors.names)
  if not config.embedding.tie and has_head: return config
  if has_head and EMBED in set(tensors.names) and not _same(tensors.read(EMBED), tensors.read(HEAD)):
    raise UserError(f'{tensors.folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}')
  return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, tie=True))


def _same(one: np.ndarray, other: np.ndarray) -> bool:
  """Whether two arrays are equal bit for bit, compared piece by piece."""
  if one.shape != other.shape or one.dtype != other.dtype: return False
  one, other = one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)
  return all(np.array_equal(one[at:at + PIECE], other[at:at + PIECE]) for at in range(0, one.size, PIECE))


def load_params(config: ModelConfig, tensors: Tensors, *, mesh: Mesh | None = None, param_dtype: str = 'float32') -> dict:
  """The parameters of the decoder that the tensors hold; those of memories beside its attention are not in the tree.

  Names and shapes are checked before anything is moved. Then each tensor is read, moved, transposed and cast on the device,
  and written into its layer of a scanned parameter, so that the host never holds more than the largest of them. Kernels that the
  config stores in fewer bits keep its type, whatever `param_dtype`; those of integers are tensors of `PackedTensors`.
  Raises UserError for a tensor that is missing, unknown, or of another shape or type.
  """
  if param_dtype not in PARAM_DTYPES: raise UserError(f'param_dtype {shown(param_dtype)} is not one of {", ".join(PARAM_DTYPES)}')
  shapes, axes = param_shapes(build_decoder(config))
  places = stored_places(config)
  check_tensors(places, shapes, tensors)
  params: dict[str, Any] = {}
  for name, place in places.items():
    shape, dtype = (like := _leaf(shapes, place.path)).shape, param_dtype if like.dtype == jnp.float32 else like.dtype.name
    sharding = _sharding(mesh, _leaf(axes, place.path), shape)
    *above, last = place.path
    node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, params)
    if place.repeat >= 0 and last not in node: node[last] = _empty(shape, dtype, sharding)()
    row = jax.device_put(np.array(tensors.read(name)), _row_sharding(sharding, place))
    if place.repeat < 0: node[last] = _whole(place.transposed, dtype, sharding)(row)
    else: node[last] = _layer(place.transposed, sharding)(node[last], row, np.int32(place.repeat))
    jax.block_until_ready(node[last])                        # work that waits would hold its tensor
  return params


def check_tensors(places: dict[str, Place], shapes: dict, tensors: Tensors) -> None:
  """Raises UserError unless there is exactly one tensor of the right shape for each place.

  The head of a tied model and old rotary tables are ignored.
  """
  names = set(tensors.names)
  for name in sorted(set(places) - names): raise UserError(f'{tensors.folder} lacks the tensor {name}')
  for name in sorted(names - set(places)):
    if name == HEAD or IGNORED.search(name): continue
    raise UserError(f'{tensors.folder} has an unknown tensor {shown(name)}{nearest(name, places)}')
  for name, place in places.items():
    wanted = _leaf(shapes, place.path).shape[place.repeat >= 0:]
    if place.transposed: wanted = wanted[::-1]
    if tensors.shape(name) != wanted:
      raise UserError(f'{tensors.folder}: {name} is {list(tensors.shape(name))}; config.json makes it {list(wanted)}')


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
  return functools.reduce(lambda node, key: node[key], path, tree)


def _sharding(mesh: Mesh | None, axes: P, shape: tuple[int, ...]) -> Sharding:
  if mesh is None: return SingleDeviceSharding(jnp.zeros(()).device)
  return NamedSharding(mesh, spec_for(axes, shape, mesh))


def _row_sharding(sharding: Sharding, place: Place) -> Sharding:
  """That of one tensor as it is stored: without the axis of layers, and transposed back."""
  if not isinstance(sharding, NamedSharding): return sharding
  spec = tuple(sharding.spec)[place.repeat >= 0:]
  return NamedSharding(sharding.mesh, P(*(spec[::-1] if place.transposed else spec)))


@functools.cache
def _empty(shape: tuple[int, ...], dtype: str, sharding: Sharding) -> Callable:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _whole(transposed: bool, dtype: str, sharding: Sharding) -> Callable:
  return jax.jit(lambda row: (row.T if transposed else row).astype(dtype), out_shardings=sharding)


@functools.cache
def _layer(transposed: bool, sharding: Sharding) -> Callable:
  def write(stack, row, repeat):
    row = (row.T if transposed else row).astype(stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, row, repeat, 0)
  return jax.jit(write, donate_argnums=0, out_shardings=sharding)
