"""Safetensors: one file or shards with an index, read memory-mapped, one tensor at a time. Strict, and bounded by the file.

Layout: u64 little-endian length of the header, JSON header {name: {dtype, shape, data_offsets}}, then the data. A file that
breaks a rule is one UserError that begins with its path: nothing of it is read.
"""
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError, nearest, shown

FLOATS = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}
SIZES = {'F64': 8, 'I64': 8, 'U64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2, 'I8': 1, 'U8': 1, 'BOOL': 1, 'F8_E4M3': 1,
         'F8_E5M2': 1, 'F8_E8M0': 1} | {name: dtype.itemsize for name, dtype in FLOATS.items()}
INTEGERS = {'I8': np.dtype(np.int8), 'U8': np.dtype(np.uint8)}
HEADER_LIMIT = 32 << 20          # bytes of a header or an index: room for 200,000 tensors
LARGEST = 1 << 48                # no tensor has as many numbers
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Entry(NamedTuple):
  """Where one tensor lies: type, shape, first byte and the byte after the last one, counted from the start of the file."""
  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int


class SafeTensors:
  """One file: `entries` {name: Entry} after all checks, `read(name)` for the values. Raises UserError for a bad file."""

  def __init__(self, path: str, types: Mapping[str, np.dtype] = FLOATS):
    self.path, self.types = path, types
    try:
      with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8: raise UserError(f'{path} is cut short: {size} bytes, not even the length of a header')
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
      raise UserError(f'{path} cannot be read: {error.strerror}') from None
    try:
      self.entries = _entries(self._map, size)
    except UserError as error:
      raise UserError(f'{path} {error}') from None

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor as a read-only view of the file. Raises UserError for a type other than `types`."""
    entry = self.entries[name]
    if entry.dtype not in self.types: raise UserError(f'{self.path}: {shown(name)} is {entry.dtype}; weights are {", ".join(self.types)}')
    flat = np.frombuffer(self._map, self.types[entry.dtype], math.prod(entry.shape), entry.begin)
    return flat.reshape(entry.shape)


def _entries(data: Any, size: int) -> dict[str, Entry]:
  """The checked header of a file of `size` bytes."""
  length = int.from_bytes(data[:8], 'little')
  if length > HEADER_LIMIT: raise UserError(f'has a header of {length} bytes; {HEADER_LIMIT} at most')
  if length > size - 8: raise UserError(f'is cut short: its header has {length} bytes, the file {size - 8}')
  header = parse_json(data[8:8 + length], 'a header')
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise UserError('has a __metadata__ that is not a table of texts')
  entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
  last, before = 8 + length, 'the header'
  for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
    if entry.begin < last: raise UserError(f'has overlapping tensors: {shown(name)} begins inside {before}')
    if entry.begin > last: raise UserError(f'has {entry.begin - last} bytes between {before} and {shown(name)} that belong to no tensor')
    last, before = entry.end, shown(name)
  if last > size: raise UserError(f'is cut short: {before} ends at byte {last}, the file at {size}')
  if last < size: raise UserError(f'has {size - last} bytes after {before} that belong to no tensor')
  return entries


def parse_json(text: bytes, what: str) -> dict:
  """The JSON object in `text`. Raises UserError, 'has WHAT ...', for anything else and for a name given twice."""
  def unique(pairs):
    found: dict[str, Any] = {}
    for name, value in pairs:
      if name in found: raise UserError(f'has {what} that names {shown(name)} twice')
      found[name] = value
    return found
  try:
    tree = json.loads(text.decode('utf-8'), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise UserError(f'has {what} that is not JSON: {shown(str(error))[1:-1]}') from None
  if not isinstance(tree, dict): raise UserError(f'has {what} that is not a JSON object')
  return tree


def _entry(name: str, value: Any, start: int) -> Entry:
  """One checked line of the header; `start` is where the data begins."""
  where = f'has a bad entry {shown(name)}:'
  if not isinstance(value, dict) or set(value) != {'dtype', 'shape', 'data_offsets'}:
    raise UserError(f'{where} it wants dtype, shape and data_offsets')
  dtype, shape, offsets = value['dtype'], value['shape'], value['data_offsets']
  if not isinstance(dtype, str) or dtype not in SIZES: raise UserError(f'{where} unknown dtype {shown(dtype)}{nearest(dtype, SIZES)}')
  for key, numbers in (('shape', shape), ('data_offsets', offsets)):
    if not isinstance(numbers, list) or len(numbers) > 16 or not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
      raise UserError(f'{where} {key} {shown(numbers)} is no list of sizes')
  if math.prod(shape) >= LARGEST: raise UserError(f'{where} shape {shown(shape)} is too large')
  if len(offsets) != 2: raise UserError(f'{where} data_offsets {shown(offsets)} are not two')
  begin, end = offsets
  if end - begin != math.prod(shape) * SIZES[dtype]:
    raise UserError(f'{where} {dtype} {shown(shape)} takes {math.prod(shape) * SIZES[dtype]} bytes, its offsets span {end - begin}')
  return Entry(dtype, tuple(shape), start + begin, start + end)


def write_safetensors(path: str, tensors: Mapping[str, Any], types: Mapping[str, np.dtype] = FLOATS) -> None:
  """Leaves the file whole or not at all: the tensors in the order of their names, fetched from their devices one at a time.

  What was written is read back and compared before it takes its name. Raises UserError for a type other than `types` and
  where the machine refuses.
  """
  names, header, end = {dtype: name for name, dtype in types.items()}, {'__metadata__': {'format': 'pt'}}, 0
  for name, value in sorted(tensors.items()):
    dtype = np.dtype(value.dtype)
    if dtype not in names: raise UserError(f'{path}: {shown(name)} is {dtype}; weights are {", ".join(types)}')
    begin, end = end, end + math.prod(value.shape) * dtype.itemsize
    header[name] = {'dtype': names[dtype], 'shape': list(value.shape), 'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)                       # the data begin at a multiple of eight bytes
  sums = {}
  try:
    with open(f'{path}.tmp', 'wb') as file:
      file.write(len(text).to_bytes(8, 'little') + text)
      for name, value in sorted(tensors.items()):
        raw = np.ascontiguousarray(value).tobytes()
        sums[name] = (tuple(value.shape), zlib.crc32(raw))
        file.write(raw)
      file.flush()
      os.fsync(file.fileno())
    found = SafeTensors(f'{path}.tmp', types)
    if sums != {name: (entry.shape, zlib.crc32(found.read(name).tobytes())) for name, entry in found.entries.items()}:
      raise UserError(f'{path}.tmp does not hold what was written')
    os.replace(f'{path}.tmp', path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from None


class Checkpoint:
  """The tensors of a folder by name, whatever file they are in: `model.safetensors`, or the shards that its index lists.

  Raises UserError for a folder without them, a bad file, and shards that do not hold exactly what the index says.
  """

  def __init__(self, folder: str):
    self.folder = folder
    if os.path.isfile(os.path.join(folder, SINGLE)): homes = dict.fromkeys([SINGLE], None)
    elif os.path.isfile(os.path.join(folder, INDEX)): homes = _shards(os.path.join(folder, INDEX))
    else: raise UserError(_nothing(folder))
    self._home: dict[str, SafeTensors] = {}
    for shard, wanted in homes.items():
      file = SafeTensors(os.path.join(folder, shard))
      if wanted is not None: _compare(file, wanted)
      self._home |= dict.fromkeys(file.entries, file)

  @property
  def names(self) -> list[str]:
    """All tensors."""
    return list(self._home)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return self._home[name].entries[name].shape

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor as a read-only view of its file."""
    return self._home[name].read(name)


def _shards(path: str) -> dict[str, set[str]]:
  """{file: names} of an index."""
  try:
    if os.path.getsize(path) > HEADER_LIMIT: raise UserError(f'has {os.path.getsize(path)} bytes; {HEADER_LIMIT} at most')
    with open(path, 'rb') as file: table = parse_json(file.read(), 'content').get('weight_map')
    if not isinstance(table, dict) or not table: raise UserError('has no weight_map')
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except UserError as error:
    raise UserError(f'{path} {error}') from None
  homes: dict[str, set[str]] = {}
  for name, shard in table.items():
    if not isinstance(shard, str) or not shard.endswith('.safetensors') or os.path.basename(shard) != shard:
      raise UserError(f'{path} puts {shown(name)} into {shown(shard)}, which is no safetensors file of its folder')
    homes.setdefault(shard, set()).add(name)
  return homes


def _compare(file: SafeTensors, wanted: set[str]) -> None:
  """Raises unless the shard holds exactly the tensors that the index puts there."""
  for name in sorted(wanted - set(file.entries)): raise UserError(f'{file.path} lacks {shown(name)}, which the index puts there')
  for name in sorted(set(file.entries) - wanted): raise UserError(f'{file.path} holds {shown(name)}, which the index does not put there')


def _nothing(folder: str) -> str:
  if not os.path.isdir(folder): return f'no such folder: {folder}'
  other = [name for name in sorted(os.listdir(folder)) if name.endswith(('.bin', '.pt', '.pth', '.gguf'))]
  return f'{folder} has neither {SINGLE} nor {INDEX}' + (f'; {other[0]} is of another format' if other else '')


def write_json(path: str, tree: Any) -> None:
  """Leaves the file whole or not at all. Raises UserError where the machine refuses."""
  try:
    _put_json(path, tree)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from None


def _put_json(path: str, tree: Any) -> None:
  with open(f'{path}.tmp', 'w', encoding='utf-8') as file: file.write(json.dumps(tree, indent=2, ensure_ascii=False) + '\n')
  os.replace(f'{path}.tmp', path)


def write_described(folder: str, tensors: tuple[str, Mapping[str, Any]], description: tuple[str, Any],
                    types: Mapping[str, Any] = FLOATS) -> None:
  """Leaves two files in a folder, which is made where it is missing: (name, tensors) and then (name, what they are).

  Raises UserError as `write_safetensors`, and where the machine refuses.
  """
  try:
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, tensors[0]), tensors[1], types)
    _put_json(os.path.join(folder, description[0]), description[1])
  except OSError as error:
    raise UserError(f'{folder} cannot be written: {error.strerror}') from None
