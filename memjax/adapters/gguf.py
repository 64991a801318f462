"""GGUF files, read strictly: metadata and tensor table at once, tensors from a memory map when asked for.

A file is the magic, a version, two counts, the metadata (key, type, value), the tensor table (name, dimensions with the fastest
first, type, offset), and the data from the next multiple of the alignment on. Everything is checked before it is believed: a
count is compared with the bytes that are left before anything is allocated, and names, ranges and types are whole or the file is
refused in one line. Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""
import itertools
import mmap
import os
import stat
import struct
from typing import Any, NamedTuple

import numpy as np

from memjax.adapters.gguf_types import TYPES, decode, type_of
from memjax.config.errors import UserError, shown

MAGIC = b'GGUF'
VERSIONS = (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, 'general.alignment'
SCALARS = {0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
           10: np.uint64, 11: np.int64, 12: np.float64}
STRING, ARRAY = 8, 9
MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 1 << 14, 1 << 15, 1 << 21       # items: strings in all arrays; an array in an array counts as 64
MAX_NAME, MAX_STRING, MAX_NESTING, MAX_DIMENSIONS = (1 << 16) - 1, 1 << 26, 4, 4
_LENGTH = struct.Struct('<Q')
_DTYPES = {code: np.dtype(kind).newbyteorder('<') for code, kind in SCALARS.items()}


class TensorInfo(NamedTuple):
  """Where a tensor lies: `shape` row-major, `type` a name of `gguf_types.TYPES`, `offset` in the file, `size` in bytes."""
  name: str
  shape: tuple[int, ...]
  type: str
  offset: int
  size: int


class GgufFile:
  """An open GGUF file.

  metadata: key -> Python number, bool, str, numpy array, or list (of strings or of arrays); `typed` is the same with numpy
  scalars, which keep the width that a copy needs. tensors: name -> TensorInfo, in the order of the file. Arrays of the metadata
  and `raw` bytes are read-only views of the file, which stays mapped until the last of them is gone.
  Raises UserError, one line that names the file, the place and the fault, for a file that cannot be read or breaks the format.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = os.fspath(path)
    cursor = _Cursor(self.path, _map(self.path))
    self._data = cursor.data
    self.version, tensors, keys = _read_head(cursor)
    self.typed: dict[str, Any] = _read_metadata(cursor, keys)
    self.metadata = {key: value.item() if isinstance(value, np.generic) else value for key, value in self.typed.items()}
    self.alignment = _alignment(cursor, self.typed)
    self.tensors = _read_table(cursor, tensors, self.alignment)

  def raw(self, name: str) -> np.ndarray:
    """The stored bytes of a tensor, a read-only uint8 view of the file. Raises UserError for an unknown name."""
    if name not in self.tensors: raise UserError(f'{self.path} has no tensor {shown(name)}')
    info = self.tensors[name]
    return np.frombuffer(self._data, np.uint8, info.size, info.offset)

  def read(self, name: str, *, dtype=np.float32) -> np.ndarray:
    """A tensor, decoded into a new array of the float `dtype`. Raises UserError for an unknown name and for numbers too large."""
    raw = self.raw(name)
    info = self.tensors[name]
    try:
      return decode(TYPES[info.type], raw, dtype=dtype).reshape(info.shape)
    except UserError as error:
      raise UserError(f'{self.path}: tensor {shown(name)}: {error}') from None


class _Cursor:
  """A place in the bytes of a file; reads move it, and refuse to pass the end."""

  def __init__(self, path, data):
    self.path, self.data, self.at, self.size, self.items = path, data, 0, len(data), 0

  def fault(self, what, problem):
    """UserError at the present place."""
    return UserError(f'{self.path}: {what} at byte {self.at}: {problem}')

  def need(self, count, width, what):
    """None; raises where fewer than count * width bytes are left."""
    left = self.size - self.at
    if count * width > left: raise self.fault(what, f'{count} x {width} bytes are said to follow, {left} are left in the file')

  def number(self, code, what):
    """The next scalar of a type, as a numpy scalar."""
    dtype = _DTYPES[code]
    self.need(1, dtype.itemsize, what)
    if code == 7 and self.data[self.at] > 1: raise self.fault(what, f'a bool is 0 or 1, not {self.data[self.at]}')
    value = SCALARS[code](np.frombuffer(self.data, dtype, 1, self.at)[0])
    self.at += dtype.itemsize
    return value

  def integer(self, code, what):
    """The next u32 (4) or u64 (10) as a Python integer."""
    return int(self.number(code, what))

  def string(self, what, limit=0):
    """The next string; raises where it is longer than `limit` (0: MAX_STRING) or no UTF-8."""
    length, limit = self.integer(10, f'the length of {what}'), limit or MAX_STRING
    self.need(length, 1, what)
    if length > limit: raise self.fault(what, f'{length} bytes, {limit} at most')
    try:
      text = str(self.data[self.at:self.at + length], 'utf-8')
    except UnicodeDecodeError as error:
      raise self.fault(what, f'no UTF-8 ({error.reason})') from None
    self.at += length
    return text

  def claim(self, count, width, *, what, weight=1):
    """None; counts what becomes Python objects, and raises beyond what the file holds or the limit allows."""
    self.need(count, width, what)
    self.items += count * weight
    if self.items > MAX_ITEMS: raise self.fault(what, f'{self.items} strings (an inner array is 64) in all arrays, {MAX_ITEMS} at most')


def _map(path):
  """A read-only map of a regular file that is not empty."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode): raise UserError(f'{path} is not a file')
    with open(path, 'rb') as file:
      if not os.fstat(file.fileno()).st_size: raise UserError(f'{path} is empty')
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or error}') from None


def _read_head(cursor):
  """(version, tensor count, key count)."""
  magic = bytes(cursor.data[:4])
  if magic != MAGIC: raise UserError(f'{cursor.path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}')
  cursor.at = 4
  version = cursor.integer(4, 'the version')
  if version not in VERSIONS:
    swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big')
    why = f'big-endian GGUF version {swapped}' if swapped in VERSIONS else f'GGUF version {version}'
    raise UserError(f'{cursor.path}: {why} is not read; little-endian versions {" and ".join(map(str, VERSIONS))} are')
  tensors, keys = cursor.integer(10, 'the tensor count'), cursor.integer(10, 'the key count')
  for count, limit, what in ((tensors, MAX_TENSORS, 'tensors'), (keys, MAX_KEYS, 'keys')):
    if count > limit: raise UserError(f'{cursor.path}: the header counts {count} {what}, {limit} at most')
  cursor.need(tensors, 33, 'the tensor table')                       # the least that a record takes
  cursor.need(keys, 14, 'the metadata')
  return version, tensors, keys


# Metadata ---------------------------------------------------------------------------------------------------------------------

def _read_metadata(cursor, count):
  """key -> value; numbers as numpy scalars."""
  values = {}
  for i in range(count):
    key = cursor.string(f'the name of metadata key {i + 1} of {count}', MAX_NAME)
    what = f'metadata {shown(key)}'
    if not key or key in values: raise cursor.fault(what, 'a second key of this name' if key else 'an empty name')
    values[key] = _read_value(cursor, cursor.integer(4, f'the type of {what}'), what)
  return values


def _read_value(cursor, code, what, depth=0):
  if code in SCALARS: return cursor.number(code, what)
  if code == STRING: return cursor.string(what)
  if code != ARRAY: raise cursor.fault(what, f'unknown value type {code}')
  if depth == MAX_NESTING: raise cursor.fault(what, f'arrays nested deeper than {MAX_NESTING}')
  inner, count = cursor.integer(4, f'the element type of {what}'), cursor.integer(10, f'the element count of {what}')
  if inner in SCALARS: return _read_numbers(cursor, inner, count, what)
  if inner == STRING: return _read_strings(cursor, count, what)
  if inner != ARRAY: raise cursor.fault(what, f'unknown element type {inner}')
  cursor.claim(count, 12, what=what, weight=64)
  return [_read_value(cursor, ARRAY, f'{what}[{i}]', depth + 1) for i in range(count)]


def _read_numbers(cursor, code, count, what):
  """A view of an array of numbers."""
  dtype = _DTYPES[code]
  cursor.need(count, dtype.itemsize, what)
  if code == 7:
    stored = np.frombuffer(cursor.data, np.uint8, count, cursor.at)
    if np.any(stored > 1): raise cursor.fault(what, f'bools are 0 or 1, not {stored.max()}')
  value = np.frombuffer(cursor.data, dtype, count, cursor.at) if count else np.empty(0, dtype)
  cursor.at += value.nbytes
  return value


def _read_strings(cursor, count, what):
  """A list of strings; the loop of `_Cursor.string` written out, since a vocabulary has hundreds of thousands."""
  cursor.claim(count, 8, what=what)
  data, at, size, out = cursor.data, cursor.at, cursor.size, []
  for i in range(count):
    cursor.at = at
    if at + 8 > size: raise cursor.fault(f'{what}[{i}]', f'truncated, string {i + 1} of {count}')
    length = _LENGTH.unpack_from(data, at)[0]
    at += 8
    if length > size - at: raise cursor.fault(f'{what}[{i}]', f'{length} bytes are said to follow, {size - at} are left in the file')
    if length > MAX_STRING: raise cursor.fault(f'{what}[{i}]', f'{length} bytes, {MAX_STRING} at most')
    try:
      out.append(str(data[at:at + length], 'utf-8'))
    except UnicodeDecodeError as error:
      raise cursor.fault(f'{what}[{i}]', f'no UTF-8 ({error.reason})') from None
    at += length
  cursor.at = at
  return out


def _alignment(cursor, values):
  """The alignment of the data: a power of two from 8 on."""
  value = values.get(ALIGNMENT_KEY, np.uint32(ALIGNMENT))
  if not isinstance(value, np.uint32): raise UserError(f'{cursor.path}: {ALIGNMENT_KEY} must be a u32, not {type(value).__name__}')
  value = int(value)
  if value < 8 or value & (value - 1): raise UserError(f'{cursor.path}: {ALIGNMENT_KEY} must be a power of two from 8 on, not {value}')
  return value


# Tensor table -----------------------------------------------------------------------------------------------------------------

def _read_table(cursor, count, alignment):
  """name -> TensorInfo; ranges are aligned, inside the file and disjoint."""
  entries = [_read_entry(cursor, i, count, alignment) for i in range(count)]
  start = -(-cursor.at // alignment) * alignment
  tensors = {}
  for name, shape, kind, offset, size in entries:
    if name in tensors: raise UserError(f'{cursor.path}: a second tensor of the name {shown(name)}')
    if start + offset + size > cursor.size:
      raise UserError(f'{cursor.path}: tensor {shown(name)} ends at byte {start + offset + size}, the file at {cursor.size}')
    tensors[name] = TensorInfo(name, shape, kind, start + offset, size)
  order = sorted(tensors.values(), key=lambda info: info.offset)
  for a, b in itertools.pairwise(order):
    if a.offset + a.size <= b.offset: continue
    raise UserError(f'{cursor.path}: tensors {shown(a.name)} and {shown(b.name)} overlap at byte {b.offset}')
  return tensors


def _read_entry(cursor, i, count, alignment):
  """(name, shape, type name, offset from the data start, bytes)."""
  name = cursor.string(f'the name of tensor {i + 1} of {count}', MAX_NAME)
  what = f'tensor {shown(name)}'
  if not name: raise cursor.fault(what, 'an empty name')
  rank = cursor.integer(4, f'the dimension count of {what}')
  if not 1 <= rank <= MAX_DIMENSIONS: raise cursor.fault(what, f'{rank} dimensions, not 1 to {MAX_DIMENSIONS}')
  shape = tuple(cursor.integer(10, f'the dimensions of {what}') for _ in range(rank))[::-1]
  if 0 in shape: raise cursor.fault(what, f'a dimension of 0 in {list(shape)}')
  code, offset = cursor.integer(4, f'the type of {what}'), cursor.integer(10, f'the offset of {what}')
  try:
    kind = type_of(code)
    size = kind.count_bytes(shape)
  except UserError as error:
    raise cursor.fault(what, str(error)) from None
  if size > cursor.size: raise cursor.fault(what, f'{kind.name} {list(shape)} takes {size} bytes, the file has {cursor.size}')
  if offset % alignment: raise cursor.fault(what, f'offset {offset} is no multiple of {alignment}')
  return name, shape, kind.name, offset, size
