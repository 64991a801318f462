"""GGUF files that break the format: each is refused in one line, at once, and before anything is allocated: Q3.3."""
import os
import re
import struct
import time
import tracemalloc

import numpy as np
import pytest

from memjax.adapters.gguf import MAX_ITEMS, MAX_KEYS, MAX_NESTING, MAX_STRING, MAX_TENSORS, GgufFile
from memjax.config.errors import UserError

HUGE = 1 << 62
U32, STRING, ARRAY, BOOL, F32, Q8_0 = 4, 8, 9, 7, 0, 8             # value types, then tensor types


def u32(value): return struct.pack('<I', value)


def u64(value): return struct.pack('<Q', value)


def text(value, length=None):
  """A string, with a length of its own or a false one."""
  value = value if isinstance(value, bytes) else value.encode()
  return u64(len(value) if length is None else length) + value


def key(value, code=U32, name='some.key', **false):
  """A metadata record."""
  return text(name, **false) + u32(code) + value


def array(code, count, data=b''):
  """An array's element type, count and elements."""
  return u32(code) + u64(count) + data


def record(name='t', dims=(32, 2), code=F32, offset=0, rank=None):
  """A tensor record."""
  return text(name) + u32(len(dims) if rank is None else rank) + b''.join(map(u64, dims)) + u32(code) + u64(offset)


def build(keys=(), records=(), size=256, *, version=3, magic=b'GGUF', counts=None, alignment=32):
  """The bytes of a file, right or wrong."""
  tensors, values = counts or (len(records), len(keys))
  head = magic + u32(version) + u64(tensors) + u64(values) + b''.join(keys) + b''.join(records)
  return head + bytes(-len(head) % alignment) + bytes(size)


def nest(depth):
  """Arrays in arrays, `depth` of them around a string."""
  return array(STRING, 1, text('a')) if depth == 1 else array(ARRAY, 1, nest(depth - 1))


GOOD = build([key(u32(7)), key(text('word'), STRING, 'b'), key(array(STRING, 2, text('x') + text('yz')), ARRAY, 'c'),
              key(array(5, 3, bytes(12)), ARRAY, 'd'), key(nest(3), ARRAY, 'e'), key(b'\1', BOOL, 'f')],
             [record('t', (32, 2)), record('s', (64,), Q8_0, 256)], 256 + 68)
MALFORMED = {
  'empty': (b'', 'is empty'),
  'short magic': (b'GG', 'not a GGUF file'),
  'wrong magic': (build(magic=b'GGML'), 'not a GGUF file'),
  'safetensors': (u64(80) + b'{"__metadata__": {}}', 'not a GGUF file'),
  'version 0': (build(version=0), 'version 0 is not read'),
  'version 1': (build(version=1), 'version 1 is not read'),
  'version 4': (build(version=4), 'version 4 is not read'),
  'big-endian': (build(version=3 << 24), 'big-endian'),
  'huge tensor count': (build(counts=(HUGE, 0)), 'counts 4611686018427387904 tensors'),
  'huge key count': (build(counts=(0, HUGE)), 'counts 4611686018427387904 keys'),
  'largest counts': (build(counts=(2**64 - 1, 2**64 - 1)), 'tensors'),
  'tensor count past the end': (build(counts=(MAX_TENSORS, 0)), 'are left in the file'),
  'key count past the end': (build(counts=(0, MAX_KEYS)), 'are left in the file'),
  'one key too many': (build([key(u32(1))], counts=(0, 2)), 'empty name'),
  'one record too many': (build([], [record()], 512, counts=(2, 0)), 'empty name'),
  'huge key length': (build([key(u32(1), length=HUGE)]), 'are left in the file'),
  'key too long': (build([key(u32(1), name='a' * 70_000)]), '65535 at most'),
  'key of bad UTF-8': (build([key(u32(1), name=b'a\xff')]), 'no UTF-8'),
  'empty key': (build([key(u32(1), name='')]), 'empty name'),
  'second key': (build([key(u32(1)), key(u32(1))]), "'some.key'.*second key"),
  'unknown value type': (build([key(u32(1), 13)]), "'some.key'.*unknown value type 13"),
  'huge value type': (build([key(u32(1), 2**32 - 1)]), 'unknown value type'),
  'bool of 2': (build([key(b'\2', BOOL)]), 'a bool is 0 or 1'),
  'bools of 255': (build([key(array(BOOL, 2, b'\1\xff'), ARRAY)]), 'bools are 0 or 1'),
  'huge string': (build([key(text('a', HUGE), STRING)]), "'some.key'.*are left in the file"),
  'largest string': (build([key(text('a', 2**64 - 1), STRING)]), 'are left in the file'),
  'string of bad UTF-8': (build([key(text(b'\xc3('), STRING)]), "'some.key'.*no UTF-8"),
  'surrogate in a string': (build([key(text(b'\xed\xa0\x80'), STRING)]), 'no UTF-8'),
  'unknown element type': (build([key(array(13, 1, u32(1)), ARRAY)]), 'unknown element type 13'),
  'huge number count': (build([key(array(U32, HUGE), ARRAY)]), 'are left in the file'),
  'wrapping number count': (build([key(array(12, 1 << 61), ARRAY)]), 'are left in the file'),
  'huge string count': (build([key(array(STRING, HUGE), ARRAY)]), 'are left in the file'),
  'huge count of arrays': (build([key(array(ARRAY, HUGE), ARRAY)]), 'are left in the file'),
  'string of an array past the end': (build([key(array(STRING, 2, text('a') + text('b', HUGE)), ARRAY)]), r"'some.key'\[1\].*are left"),
  'string of an array of bad UTF-8': (build([key(array(STRING, 2, text('a') + text(b'\xff')), ARRAY)]), r"'some.key'\[1\].*no UTF-8"),
  'strings of an array cut short': (build([key(array(STRING, 3, text(b'a' * 250)), ARRAY)], size=0)[:-240], 'are left'),
  'arrays nested too deep': (build([key(nest(MAX_NESTING + 2), ARRAY)]), 'nested deeper'),
  'arrays nested without end': (build([key(u32(ARRAY) + (u64(1) + u32(ARRAY)) * 50_000, ARRAY)]), 'nested deeper'),
  'alignment 0': (build([key(u32(0), name='general.alignment')]), 'power of two'),
  'alignment 24': (build([key(u32(24), name='general.alignment')]), 'power of two'),
  'alignment of 64 bits': (build([key(u64(32), 10, 'general.alignment')]), 'must be a u32'),
  'alignment in words': (build([key(text('32'), STRING, 'general.alignment')]), 'must be a u32'),
  'alignment past the end': (build([key(u32(1 << 31), name='general.alignment')], [record()]), 'the file at'),
  'empty tensor name': (build([], [record('')]), 'empty name'),
  'tensor name of bad UTF-8': (build([], [record(b'\xfe')]), 'no UTF-8'),
  'second tensor': (build([], [record(), record(offset=256)], 512), "second tensor of the name 't'"),
  'no dimensions': (build([], [record(dims=())]), '0 dimensions'),
  'five dimensions': (build([], [record(dims=(1,) * 5)]), '5 dimensions'),
  'huge dimension count': (build([], [record(rank=2**32 - 1)]), '4294967295 dimensions'),
  'dimension of 0': (build([], [record(dims=(32, 0))]), 'dimension of 0'),
  'huge dimension': (build([], [record(dims=(HUGE, 1))]), 'the file has'),
  'product of 2^64': (build([], [record(dims=(1 << 32, 1 << 32))]), 'the file has'),
  'product of 2^256': (build([], [record(dims=(2**64 - 32,) * 4, code=Q8_0)]), 'the file has'),
  'unknown tensor type': (build([], [record(code=77)]), "'t'.*type 77 is not read"),
  'tensor type that is not read': (build([], [record(code=10)]), r'10 \(Q2_K\) is not read'),
  'removed tensor type': (build([], [record(code=4)]), 'type 4 is not read'),
  'broken blocks': (build([], [record(dims=(48, 2), code=Q8_0)]), 'do not divide'),
  'broken K blocks': (build([], [record(dims=(128, 2), code=12)]), 'do not divide'),
  'unaligned offset': (build([], [record(offset=16)], 512), 'no multiple of 32'),
  'offset past the end': (build([], [record(offset=1 << 40)]), 'the file at'),
  'largest offset': (build([], [record(offset=2**64 - 32)]), 'the file at'),
  'tensor past the end': (build([], [record(offset=32)], 256), 'the file at'),
  'last byte missing': (build([], [record()], 255), 'the file at'),
  'same place': (build([], [record('a'), record('b')]), "'a' and 'b' overlap"),
  'overlap': (build([], [record('b', offset=224), record('a')], 512), "'a' and 'b' overlap"),
  'overlap at 64': (build([key(u32(64), name='general.alignment')], [record('a'), record('b', offset=192)], 512, alignment=64), 'overlap')}


def refusal(path, data):
  """(the line with which a file is refused, '' where it opens; seconds; bytes allocated at the peak)."""
  path.write_bytes(data)
  tracemalloc.start()
  start, line = time.perf_counter(), ''
  try:
    file = GgufFile(path)
    for name in file.tensors: file.read(name)
  except UserError as error:
    line = str(error)
  taken, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return line, taken, peak


def test_the_good_one(tmp_path):
  """The file that is spoiled below opens, in version 2 as well."""
  for data in (GOOD, GOOD.replace(b'GGUF\3', b'GGUF\2')):
    path = tmp_path / 'a.gguf'
    path.write_bytes(data)
    file = GgufFile(path)
    assert {k: v for k, v in file.metadata.items() if k != 'd'} == {'some.key': 7, 'b': 'word', 'c': ['x', 'yz'], 'e': [[['a']]], 'f': True}
    assert file.version == data[4] and np.array_equal(file.metadata['d'], np.zeros(3, np.int32))
    assert [(i.shape, i.type, i.size) for i in file.tensors.values()] == [((2, 32), 'F32', 256), ((64,), 'Q8_0', 68)]
  assert refusal(path, build(size=0))[0] == ''                                                                     # nothing in it at all


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed(case, tmp_path):
  data, words = MALFORMED[case]
  path = tmp_path / 'a.gguf'
  line, taken, peak = refusal(path, data)
  assert str(path) in line and re.search(words, line) and '\n' not in line and len(line) < 300 + len(str(path))
  assert taken < 1 and peak < 1 << 20


def test_truncated_everywhere(tmp_path):
  """A file cut at any byte is refused."""
  for size in range(len(GOOD)):
    line, taken, peak = refusal(tmp_path / 'a.gguf', GOOD[:size])
    assert 'a.gguf' in line and '\n' not in line and taken < 1 and peak < 1 << 20, size


def test_any_byte_may_be_wrong(tmp_path):
  """Every byte of the head, set to others: the file opens or is refused in one line, and nothing large is allocated."""
  head = GOOD.index(text('s')) + 41
  seen = set()
  for place in range(head):
    for value in (0xFF, GOOD[place] ^ 1):
      line, taken, peak = refusal(tmp_path / 'a.gguf', GOOD[:place] + bytes([value]) + GOOD[place + 1:])
      assert '\n' not in line and taken < 1 and peak < 1 << 20, (place, value)
      seen.add(line.split(': ')[-1][:12])
  assert len(seen) > 20 and '' in seen


def test_limits(tmp_path, monkeypatch):
  """Lists and strings are bounded even where the file holds them."""
  monkeypatch.setattr('memjax.adapters.gguf.MAX_ITEMS', 10)
  monkeypatch.setattr('memjax.adapters.gguf.MAX_STRING', 10)
  strings = key(array(STRING, 6, text('a') * 6), ARRAY)
  assert MAX_ITEMS > 1 << 20 and MAX_STRING > 1 << 24
  more, long = key(array(STRING, 6, text('a') * 6), ARRAY, 'b'), text('a' * 11)
  nested = key(array(ARRAY, 1, array(U32, 0)), ARRAY)
  for keys, words in (([strings, more], '12 strings'), ([nested], '64 strings'), ([key(long, STRING)], '10 at most'), ([strings], ''),
                      ([key(array(STRING, 1, long), ARRAY)], '10 at most')):
    line = refusal(tmp_path / 'a.gguf', build(keys))[0]
    assert words in line and bool(line) == bool(words)


def test_not_a_regular_file(tmp_path):
  """Folders, pipes (which would block) and missing files."""
  os.mkfifo(tmp_path / 'pipe')
  for path, words in ((tmp_path, 'is not a file'), (tmp_path / 'pipe', 'is not a file'), (tmp_path / 'none', 'No such file')):
    with pytest.raises(UserError, match=words) as caught: GgufFile(path)
    assert str(path) in str(caught.value)
