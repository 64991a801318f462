"""GGUF files, written beside and renamed when they have been read back and found equal to what was meant.

The self-check is part of writing: a file that differs from its sources never takes the place of a good one.
"""
import contextlib
import os
import struct
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from memjax.adapters.gguf import ALIGNMENT, ALIGNMENT_KEY, ARRAY, MAGIC, MAX_DIMENSIONS, SCALARS, STRING, VERSIONS, GgufFile
from memjax.adapters.gguf_types import CHUNK, TYPES, TensorType, decode, encode, type_named
from memjax.config.errors import UserError, shown

CODES = {np.dtype(kind): code for code, kind in SCALARS.items()}


class TensorSource(NamedTuple):
  """A tensor to be written: the type on disk, the shape (row-major), and what loads it (called twice: to write and to check)."""
  type: str
  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]


def source(x: np.ndarray, kind: str) -> TensorSource:
  """The TensorSource of an array at hand."""
  return TensorSource(kind, tuple(x.shape), lambda: x)


def fitting_type(kind: str, shape: tuple[int, ...]) -> str:
  """`kind`, but F32 for vectors, and F16 where rows do not divide into the blocks of `kind`; as llama.cpp stores them."""
  if len(shape) < 2: return 'F32'
  return 'F16' if shape[-1] % type_named(kind).block else kind


def write_gguf(path: str | os.PathLike, metadata: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, float]:
  """Relative RMS errors of the quantised tensors; writes a GGUF file of version 3, checks it, and puts it at `path` in one step.

  Metadata values: bool, str, int (u32, i32, u64 or i64, the first that fits), float (f32), numpy scalars and one-dimensional
  arrays (as they are), lists of one of these (integers: i32, u32, i64 or u64), nested lists; an empty list is one of strings.
  'general.alignment' is obeyed. Holds one tensor at a time. Raises UserError for what cannot be written; then `path` is as it
  was. Where the check fails, what was written stays as `path`.failed.
  """
  path = os.fspath(path)
  if os.path.isdir(path): raise UserError(f'{path} cannot be written: it is a folder')
  head, alignment = _head(path, metadata, tensors)
  temporary = f'{path}.{uuid.uuid4().hex[:8]}.tmp'
  try:
    with open(temporary, 'xb') as file:
      _write(file, path, (head, alignment), tensors)
      file.flush()
      os.fsync(file.fileno())
    try:
      errors = check_gguf(temporary, metadata, tensors)
    except UserError as error:
      os.replace(temporary, f'{path}.failed')
      raise UserError(str(error).replace(temporary, f'{path}.failed')) from None
    os.replace(temporary, path)
    _sync_folder(path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None
  finally:
    with contextlib.suppress(FileNotFoundError): os.remove(temporary)
  return errors


def check_gguf(path: str | os.PathLike, metadata: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, float]:
  """Relative RMS errors of the quantised tensors of a file that holds exactly this; raises UserError naming the first difference.

  Metadata and stored bytes must be equal; quantised numbers must also decode to within the error of their type.
  """
  file = GgufFile(path)
  for what, have, want in (('metadata', file.typed, metadata), ('tensors', file.tensors, tensors)):
    if list(have) != list(want): raise UserError(f'{file.path}: {what} differ: {shown(sorted(set(have) ^ set(want)) or "their order")}')
  for key, value in metadata.items():
    if _value(file.typed[key]) != _value(value): raise UserError(f'{file.path}: metadata {shown(key)} differs after writing')
  errors = {}
  for name, want in tensors.items():
    info, kind = file.tensors[name], type_named(want.type)
    x = want.load()
    is_same = (info.shape, info.type) == (tuple(want.shape), want.type)
    if not (is_same and np.array_equal(file.raw(name), encode(kind, x))):
      raise UserError(f'{file.path}: tensor {shown(name)} differs after writing')
    if kind.block == 1: continue
    errors[name], within = _errors(kind, file.raw(name), x)
    if not within: raise UserError(f'{file.path}: tensor {shown(name)} is further off than {kind.name} may be')
  return errors


def _errors(kind: TensorType, raw, x):
  """(relative RMS error, whether every number lies within the error of its type); chunk by chunk."""
  blocks, raw = x.reshape(-1, kind.block), raw.reshape(-1, kind.size)
  squares, total, within, step = 0.0, 0.0, True, CHUNK // kind.block
  for start in range(0, len(blocks), step):
    part = blocks[start:start + step].astype(np.float64)
    off = np.abs(decode(kind, raw[start:start + step]).reshape(part.shape) - part)
    most = np.abs(part).max(1, keepdims=True)
    spread = most if kind.name.endswith('_0') else np.ptp(part, 1, keepdims=True)
    # fp16 rounds scales and minima by 2^-11 of their size, by 2^-25 at least, times at most 127
    within &= bool(np.all(off <= kind.error * spread + most * 2 ** -9 + 2 ** -17))
    squares, total = squares + float(np.sum(off ** 2)), total + float(np.sum(part ** 2))
  return (squares / total) ** 0.5 if total else 0.0, within


# Bytes ------------------------------------------------------------------------------------------------------------------------

def _head(path, metadata, tensors):
  """(all bytes before the data, padded; alignment). Raises UserError for names, shapes and values that GGUF cannot hold."""
  alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
  parts = [MAGIC, struct.pack('<IQQ', VERSIONS[-1], len(tensors), len(metadata))]
  for key, value in metadata.items():
    try:
      code, packed = _value(value)
      parts += [_string(key), struct.pack('<I', code), packed]
    except UserError as error:
      raise UserError(f'{path}: metadata {shown(key)}: {error}') from None
  if not isinstance(alignment, int | np.uint32) or alignment < 8 or alignment & (alignment - 1):
    raise UserError(f'{path}: {ALIGNMENT_KEY} must be a power of two from 8 on, not {shown(alignment)}')
  offset = 0
  for name, tensor in tensors.items():
    try:
      size = _stored_bytes(tensor)
      rank, code = len(tensor.shape), TYPES[tensor.type].code
      parts += [_string(name), struct.pack(f'<I{rank}QIQ', rank, *tensor.shape[::-1], code, offset)]
    except UserError as error:
      raise UserError(f'{path}: tensor {shown(name)}: {error}') from None
    offset += size + -size % alignment
  head = b''.join(parts)
  return head + bytes(-len(head) % alignment), int(alignment)


def _stored_bytes(tensor):
  """The bytes of a tensor; raises UserError for a shape or a type that cannot be written."""
  kind = type_named(tensor.type)
  if kind.encode is None: raise UserError(f'{kind.name} is read, not written')
  if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
    raise UserError(f'shape {list(tensor.shape)} does not have 1 to {MAX_DIMENSIONS} dimensions from 1 on')
  return kind.count_bytes(tensor.shape)


def _write(file, path, head, tensors):
  """None; the head, then one tensor after the other, each padded to the alignment."""
  start, alignment = head
  file.write(start)
  for name, tensor in tensors.items():
    x = tensor.load()
    if tuple(x.shape) != tuple(tensor.shape):
      raise UserError(f'{path}: tensor {shown(name)} was announced as {list(tensor.shape)} and is {list(x.shape)}')
    try:
      stored = encode(TYPES[tensor.type], x)
    except UserError as error:
      raise UserError(f'{path}: tensor {shown(name)} {error}') from None
    file.write(stored.data)
    file.write(bytes(-stored.nbytes % alignment))


def _string(text):
  if not isinstance(text, str) or not text: raise UserError(f'{shown(text)} is no name')
  return _text(text)


def _text(text):
  """The length, then UTF-8."""
  try:
    stored = text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{shown(text)} is no UTF-8 ({error.reason})') from None
  return struct.pack('<Q', len(stored)) + stored


def _value(value):
  """(type, bytes) of a metadata value."""
  if isinstance(value, str): return STRING, _text(value)
  if isinstance(value, list | tuple): return ARRAY, _list(value)
  if isinstance(value, bool): value = np.bool_(value)
  if isinstance(value, int): value = SCALARS[_integer_code([value], (4, 5, 10, 11))](value)
  if isinstance(value, float) and not isinstance(value, np.generic): value = _float(value)
  dtype = np.dtype(getattr(value, 'dtype', object)).newbyteorder('=')
  if dtype not in CODES or np.ndim(value) > 1: raise UserError(f'{shown(value)} is no value of GGUF')
  stored = np.asarray(value).astype(dtype.newbyteorder('<')).tobytes()
  if isinstance(value, np.generic): return CODES[dtype], stored
  if value.ndim != 1: raise UserError('arrays have one dimension')
  return ARRAY, struct.pack('<IQ', CODES[dtype], len(value)) + stored


def _list(values):
  """The bytes of a list: element type, count, elements of one kind."""
  kinds = {list if isinstance(value, list | tuple | np.ndarray) else type(value) for value in values}
  if kinds <= {str}: return struct.pack('<IQ', STRING, len(values)) + b''.join(map(_text, values))
  if kinds == {list}: return struct.pack('<IQ', ARRAY, len(values)) + b''.join(_value(value)[1] for value in values)
  if kinds == {bool}: return _value(np.array(values, bool))[1]
  if kinds == {int}: return _value(np.array(values, SCALARS[_integer_code(values, (5, 4, 11, 10))]))[1]
  if kinds == {float}: return _value(np.array([_float(value) for value in values]))[1]
  raise UserError(f'a list holds values of one kind, not {shown(values)}')


def _integer_code(values, codes):
  """The first of the integer types that holds all values. Numbers prefer u32, lists i32: what llama.cpp expects of each."""
  for code in codes:
    limits = np.iinfo(SCALARS[code])
    if limits.min <= min(values) and max(values) <= limits.max: return code
  raise UserError(f'{max(values, key=abs)} takes more than 64 bits')


def _float(value):
  """float32; raises UserError where a finite number does not fit."""
  with np.errstate(over='ignore'): stored = np.float32(value)
  if np.isinf(stored) and not np.isinf(value): raise UserError(f'{value} is too large for f32; give it as float64')
  return stored


def _sync_folder(path):
  """None; makes the rename last. Where folders cannot be opened (Windows) there is nothing to do."""
  with contextlib.suppress(OSError):
    handle = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)
