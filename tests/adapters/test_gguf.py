"""GGUF: every tensor type against scalar loops and stored sums, and files there and back: Q3.1, Q3.2, Q3.5, Q7.2."""
import hashlib
import os
import struct
import tracemalloc
import zlib

import ml_dtypes
import numpy as np
import pytest

from memjax.adapters import gguf_write
from memjax.adapters.gguf import GgufFile
from memjax.adapters.gguf_types import TYPES, decode, encode, interleave_rows, split_rows
from memjax.adapters.gguf_write import TensorSource, check_gguf, fitting_type, source, write_gguf
from memjax.config.errors import UserError

# Tensor types -----------------------------------------------------------------------------------------------------------------

# where the fp16 numbers of a block are
HALVES = {'F16': (0,), 'Q4_0': (0,), 'Q4_1': (0, 2), 'Q5_0': (0,), 'Q5_1': (0, 2), 'Q8_0': (0,), 'Q4_K': (0, 2), 'Q5_K': (0, 2),
          'Q6_K': (208,)}
# CRC-32 of what gguf 0.19.0 decodes from `blocks(name, 64)`, and of the bytes it encodes from `numbers()`
DECODED = {'F32': 611553751, 'F16': 1588873308, 'BF16': 144028065, 'Q4_0': 3771222161, 'Q4_1': 2327394132, 'Q5_0': 4006554126,
           'Q5_1': 1061723760, 'Q8_0': 692973202, 'Q4_K': 843352909, 'Q5_K': 2449678809, 'Q6_K': 3242903681}
ENCODED = {'F32': 428608283, 'F16': 2658961284, 'BF16': 1287033992, 'Q4_0': 1367977074, 'Q4_1': 1271885007, 'Q5_0': 3334107755,
           'Q5_1': 1129806549, 'Q8_0': 2551288140}


def noise(seed, count):
  """Bytes that are the same for ever."""
  return np.frombuffer(hashlib.shake_256(seed.encode()).digest(count), np.uint8)


def blocks(name, count):
  """Random blocks of a type, uint8 [count, size], all of their numbers finite."""
  raw = noise(name, count * TYPES[name].size).reshape(count, -1).copy()
  for at in HALVES.get(name, ()): raw[:, at + 1] &= 0xBB
  if name in ('F32', 'BF16'): raw[:, -1] &= 0xBF
  return raw


def numbers():
  """Rows to be encoded, float32 [128, 64]: noise, zeros, constants, a ramp, ties, large and tiny numbers."""
  x = noise('numbers', 128 * 64 * 2).view('<i2').reshape(128, 64).astype(np.float32) * np.float32(2e-6)
  x[0] = 0
  x[1] = 0.003
  x[2], x[3] = np.arange(64) - 20, 20 - np.arange(64)
  x[4] = np.round(x[4] * 1000) / 8
  x[5:8] *= np.array([[1e5], [1e-4], [1e-30]], np.float32)
  return x


def half(raw, at):
  return struct.unpack_from('<e', raw, at)[0]


def nibble(raw, at, i, run):
  """Code i of runs of `run` bytes from `at`: the low nibbles of a run come first, then its high ones."""
  byte = raw[at + i // (2 * run) * run + i % run]
  return byte >> 4 if i // run % 2 else byte & 15


def bit(raw, at, i):
  return raw[at + i // 8] >> (i % 8) & 1


def six(raw, group):
  """(scale, minimum) of a group of a K block."""
  a = raw[4:16]
  if group < 4: return a[group] & 63, a[4 + group] & 63
  return a[4 + group] & 15 | (a[group - 4] >> 6) << 4, a[4 + group] >> 4 | (a[group] >> 6) << 4


def slow_k(raw, i, code):
  scale, minimum = six(raw, i // 32)
  return half(raw, 0) * scale * code - half(raw, 2) * minimum


def slow_q6_k(raw, i):
  part, place = divmod(i, 128)
  low = raw[64 * part + place % 64] >> (4 * (place // 64)) & 15
  high = raw[128 + 32 * part + place % 32] >> (2 * (place // 32)) & 3
  scale = struct.unpack_from('b', raw, 192 + i // 16)[0]
  return half(raw, 208) * scale * ((low | high << 4) - 32)


SLOW = {
  'F32': lambda raw, i: struct.unpack('<f', raw)[0], 'F16': lambda raw, i: half(raw, 0),
  'BF16': lambda raw, i: struct.unpack('<f', b'\0\0' + raw)[0],
  'Q8_0': lambda raw, i: half(raw, 0) * struct.unpack_from('b', raw, 2 + i)[0],
  'Q4_0': lambda raw, i: half(raw, 0) * (nibble(raw, 2, i, 16) - 8),
  'Q4_1': lambda raw, i: half(raw, 0) * nibble(raw, 4, i, 16) + half(raw, 2),
  'Q5_0': lambda raw, i: half(raw, 0) * (nibble(raw, 6, i, 16) + 16 * bit(raw, 2, i) - 16),
  'Q5_1': lambda raw, i: half(raw, 0) * (nibble(raw, 8, i, 16) + 16 * bit(raw, 4, i)) + half(raw, 2),
  'Q4_K': lambda raw, i: slow_k(raw, i, nibble(raw, 16, i, 32)),
  'Q5_K': lambda raw, i: slow_k(raw, i, nibble(raw, 48, i, 32) + 16 * (raw[16 + i % 32] >> (i // 32) & 1)),
  'Q6_K': slow_q6_k}


@pytest.mark.parametrize('name', TYPES)
def test_decoding(name):
  """Q3.1: float64 holds every value exactly, so that one rounding to float32 must give the same bits."""
  kind, raw = TYPES[name], blocks(name, 64)
  y = decode(kind, raw.reshape(-1))
  assert y.dtype == np.float32 and np.isfinite(y).all()
  slow = [SLOW[name](block.tobytes(), i) for block in raw[:6] for i in range(kind.block)]
  assert np.array(slow, np.float32).tobytes() == y[:len(slow)].tobytes()
  assert zlib.crc32(y.astype('<f4').tobytes()) == DECODED[name]


@pytest.mark.parametrize('name', ENCODED)
def test_encoding(name):
  """Q7.2: the bytes of the reference, and errors as measured on normal rows."""
  kind = TYPES[name]
  assert zlib.crc32(encode(kind, numbers()).tobytes()) == ENCODED[name]
  most = {'Q8_0': 0.006, 'Q4_0': 0.09, 'Q4_1': 0.082, 'Q5_0': 0.046, 'Q5_1': 0.042}.get(name, {'BF16': 0.003, 'F16': 0.0003}.get(name, 0))
  x = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
  y = decode(kind, encode(kind, x)).reshape(x.shape)
  assert 0.5 * most <= np.linalg.norm(y - x) / np.linalg.norm(x) <= most
  assert np.array_equal(encode(kind, x[:2].astype(np.float64)), encode(kind, x[:2]))


def test_chunks_join(monkeypatch):
  monkeypatch.setattr('memjax.adapters.gguf_types.CHUNK', 512)
  for name, total in DECODED.items(): assert zlib.crc32(decode(TYPES[name], blocks(name, 64)).tobytes()) == total
  for name, total in ENCODED.items(): assert zlib.crc32(encode(TYPES[name], numbers()).tobytes()) == total


def test_memory_of_decoding():
  """No more than the result and a few chunks are held."""
  raw = np.zeros(18 << 16, np.uint8)
  tracemalloc.start()
  y = decode(TYPES['Q4_0'], raw, dtype=np.float16)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert y.nbytes == 4 << 20 and peak < y.nbytes + (2 << 20)


@pytest.mark.parametrize('heads, rows', [(9, 576), (3, 192), (1, 2), (2, 8)])
def test_llama_rows(heads, rows):
  """Q3.2: rows 2i and 2i + 1 of a head are rows i and i + K/2 of Hugging Face; the head count matters."""
  x = np.random.default_rng(1).normal(size=(rows, 5))
  y, width = interleave_rows(x, heads), rows // heads
  for row in range(rows):
    head, place = divmod(row, width)
    assert np.array_equal(y[row], x[head * width + place // 2 + place % 2 * (width // 2)])
  assert np.array_equal(split_rows(y, heads), x)
  assert np.array_equal(split_rows(interleave_rows(x[:, 0], heads), heads), x[:, 0])                           # a bias
  if heads == 3: assert not np.array_equal(split_rows(interleave_rows(x, 3), 6), x)
  for permute in (interleave_rows, split_rows):
    with pytest.raises(UserError, match='do not divide'): permute(x, 5)


# There and back ---------------------------------------------------------------------------------------------------------------

NUMBERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.bool_, np.uint64, np.int64, np.float64)
METADATA = {
  'a.bool': True, 'a.int': 7, 'a.minus': -7, 'a.large': 1 << 40, 'a.small': -(1 << 40), 'a.float': 1e-5, 'a.text': 'naïve 日本 \n',
  'a.empty': '', **{f'n.{kind.__name__}': kind(3) for kind in NUMBERS},
  **{f'r.{kind.__name__}': np.arange(5).astype(kind) for kind in NUMBERS},
  'l.text': ['a', '', 'Ġthe'], 'l.int': [1, 2], 'l.mixed': [-1, 1 << 31], 'l.float': [0.5, 1.0], 'l.bool': [True, False], 'l.empty': [],
  'l.deep': [['a', 'b'], [1, 2], np.array([0.5], np.float64), [['c'], []]], 'l.none': np.zeros(0, np.int32)}
KINDS = {'a.bool': np.bool_, 'a.int': np.uint32, 'a.minus': np.int32, 'a.large': np.uint64, 'a.small': np.int64, 'a.float': np.float32}


def plain(value):
  """Numbers, strings and lists."""
  if isinstance(value, list): return [plain(v) for v in value]
  return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def tensors():
  x = np.random.default_rng(2).normal(0, 0.02, (6, 64)).astype(np.float32)
  return {f't.{name}': source(x * (i + 1), name) for i, name in enumerate(ENCODED)} | {
    **{f'n.{name}': source(numbers(), name) for name in ENCODED},
    'bias': source(x[0], 'F32'), 'cube': source(x.reshape(2, 3, 2, 32).astype(ml_dtypes.bfloat16), 'BF16')}


def test_round_trip(tmp_path):
  path = tmp_path / 'a.gguf'
  errors = write_gguf(path, METADATA, tensors())
  file = GgufFile(path)
  assert (file.version, file.alignment, os.listdir(tmp_path)) == (3, 32, ['a.gguf'])
  assert list(file.metadata) == list(METADATA)
  for key, value in METADATA.items():
    want = np.float32(1e-5).item() if key == 'a.float' else plain(value)
    assert plain(file.metadata[key]) == want and type(plain(file.metadata[key])) is type(want), key
    if key in KINDS or key[0] == 'n': assert type(file.typed[key]) is KINDS.get(key, type(value))
    if key[0] == 'r': assert file.typed[key].dtype == value.dtype and not file.typed[key].flags.writeable
  assert [file.typed[f'l.{key}'].dtype for key in ('int', 'mixed', 'float')] == [np.int32, np.int64, np.float32]
  assert list(file.tensors) == list(tensors()) and file.tensors['cube'].shape == (2, 3, 2, 32)
  for name, tensor in tensors().items():
    x, kind = tensor.load(), TYPES[tensor.type]
    y = file.read(name)
    assert y.shape == x.shape and y.flags.writeable and file.tensors[name].offset % 32 == 0
    assert np.array_equal(y, decode(kind, encode(kind, x)).reshape(x.shape)) and np.array_equal(file.read(name, dtype=np.float64), y)
    assert (name in errors) == (kind.block > 1)
  assert np.array_equal(file.read('bias'), tensors()['bias'].load()) and 0.004 < errors['t.Q8_0'] < 0.006
  assert file.read('cube', dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
  assert write_gguf(tmp_path / 'b.gguf', file.typed, tensors()) == errors           # a copy is the same file
  assert (tmp_path / 'b.gguf').read_bytes() == path.read_bytes()


@pytest.mark.parametrize('alignment', [8, 64, 4096])
def test_alignment(tmp_path, alignment):
  path = tmp_path / 'a.gguf'
  write_gguf(path, {'general.alignment': alignment}, {'a': source(np.ones(3, np.float32), 'F32'), 'b': source(np.full((2, 5), 2.0), 'F16')})
  file = GgufFile(path)
  assert file.alignment == alignment and all(info.offset % alignment == 0 for info in file.tensors.values())
  assert path.stat().st_size % alignment == 0 and np.array_equal(file.read('b'), np.full((2, 5), 2))


def test_types_that_fit():
  assert [fitting_type('Q8_0', shape) for shape in [(64,), (2, 64), (2, 60)]] == ['F32', 'Q8_0', 'F16']
  assert fitting_type('BF16', (3, 5)) == 'BF16'


def test_reading_refuses(tmp_path):
  path = str(tmp_path / 'a.gguf')
  write_gguf(path, {}, {'a': source(np.array([[1e5]]), 'F32')})
  file = GgufFile(path)
  for name, dtype, words in (('b', np.float32, "no tensor 'b'"), ('a', np.float16, 'too large'), ('a', int, 'read as')):
    with pytest.raises(UserError, match=words) as caught: file.read(name, dtype=dtype)
    assert path in str(caught.value)


# Writing refused, writing spoiled ---------------------------------------------------------------------------------------------

ONE = np.ones((2, 64), np.float32)
UNWRITTEN = {                                                      # a tensor or a dictionary of metadata, and the words of the refusal
  'unknown type': (source(ONE, 'Q9'), 'unknown tensor type'), 'read only': (source(ONE, 'Q4_K'), 'not written'),
  'broken block': (source(ONE[:, :60], 'Q8_0'), 'do not divide'), 'no numbers': (source(ONE[:0], 'F32'), 'dimensions'),
  'scalar': (source(ONE[0, 0], 'F32'), 'dimensions'), 'five axes': (source(ONE.reshape(2, 4, 4, 2, 2), 'F32'), 'dimensions'),
  'surrogate': ({'k': 'a\ud800'}, 'UTF-8'), 'no key': ({'': 1}, 'no name'), 'wide': ({'k': 1 << 64}, '64 bits'),
  'wide list': ({'k': [-1, (1 << 63)]}, '64 bits'), 'huge': ({'k': 1e39}, 'too large'), 'mixed': ({'k': [1, 'a']}, 'one kind'),
  'matrix': ({'k': np.eye(2)}, 'no value'), 'none': ({'k': None}, 'no value'), 'complex': ({'k': [np.ones(2, 'c8')]}, 'no value'),
  'alignment': ({'general.alignment': 24}, 'power of two'), 'alignment in words': ({'general.alignment': '32'}, 'power of two'),
  'overflow': (source(ONE * 1e5, 'F16'), 'too large'), 'scale': (source(ONE * 1e8, 'Q8_0'), 'too large'),
  'range': (source(ONE * np.where(np.arange(64) % 2, 3e38, -3e38), 'Q4_1'), 'too large'),
  'nan': (source(ONE * np.nan, 'Q4_0'), 'not finite'), 'shape': (TensorSource('F32', (3,), lambda: ONE), 'announced')}


@pytest.mark.parametrize('case', UNWRITTEN)
def test_writing_refuses(case, tmp_path):
  given, words = UNWRITTEN[case]
  metadata, entries = (given, {}) if isinstance(given, dict) else ({}, {'t': given})
  path = tmp_path / 'a.gguf'
  path.write_text('the good one')
  with pytest.raises(UserError, match=words) as caught: write_gguf(path, metadata, entries)
  assert str(path) in str(caught.value) and '\n' not in str(caught.value)
  assert os.listdir(tmp_path) == ['a.gguf'] and path.read_text() == 'the good one'


def test_tensors_need_names(tmp_path):
  with pytest.raises(UserError, match='no name'): write_gguf(tmp_path / 'a.gguf', {}, {'': source(ONE, 'F32')})


def test_places_that_cannot_be_written(tmp_path):
  for path in (tmp_path, tmp_path / 'none' / 'a.gguf'):
    with pytest.raises(UserError, match='cannot be written'): write_gguf(path, {}, {})


@pytest.mark.parametrize('at', [16, 36, 40, 60, 72, 87, 161, 200, 400])
def test_self_check_sees_a_flipped_bit(at, tmp_path, monkeypatch):
  """In the counts, a key, its type, its value, a name, a dimension, a scale, a code, a float; the file that was there stays."""
  path, fsync = tmp_path / 'a.gguf', os.fsync
  entries = {'first': source(ONE, 'Q8_0'), 'other': source(ONE, 'F32')}
  write_gguf(path, {'some.key': 'some value'}, entries)
  good = path.read_bytes()

  def flip(handle):
    os.pwrite(handle, bytes([good[at] ^ 1]), at)
    fsync(handle)

  monkeypatch.setattr(gguf_write.os, 'fsync', flip)
  with pytest.raises(UserError) as caught: write_gguf(path, {'some.key': 'some value'}, entries)
  assert f'{path}.failed' in str(caught.value) and '\n' not in str(caught.value)
  assert path.read_bytes() == good and sorted(os.listdir(tmp_path)) == ['a.gguf', 'a.gguf.failed']


def test_check_sees_a_wrong_encoder(tmp_path, monkeypatch):
  """Bytes that are as they were written, but do not decode to the numbers."""
  x = numbers()[8:]
  monkeypatch.setattr(gguf_write, 'encode', lambda kind, x: encode(kind, x[::-1]))
  for kind in ('Q8_0', 'Q4_0', 'Q5_1'):
    with pytest.raises(UserError, match='further off'): write_gguf(tmp_path / 'a.gguf', {}, {'t': source(x, kind)})


def test_check_sees_other_sources(tmp_path):
  path = tmp_path / 'a.gguf'
  write_gguf(path, {'k': 1}, {'t': source(ONE, 'Q8_0')})
  check_gguf(path, {'k': 1}, {'t': source(ONE, 'Q8_0')})
  same = source(ONE, 'Q8_0')
  for metadata, tensor in (({'k': 2}, same), ({'k': 1.0}, same), ({}, same), ({'k': 1}, None), ({'k': 1}, source(ONE, 'Q4_0')),
                           ({'k': 1}, source(ONE * 1.01, 'Q8_0')), ({'k': 1}, source(ONE.reshape(1, 128), 'Q8_0'))):
    with pytest.raises(UserError, match='differ'): check_gguf(path, metadata, {'t': tensor} if tensor else {})
