"""The tensor types of GGUF as numpy arrays: blocks of bytes to numbers and back, and the row order of Llama's q and k.

A quantised row is cut into blocks of 32 or 256 numbers, each with its own scales (fp16). Decoding is exact: every product fits
in fp32, so that a value is rounded at most once, and equals the reference decoder bit for bit.
"""
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from memjax.config.errors import UserError, shown

CHUNK = 1 << 16                      # numbers decoded or encoded at once: bounds what is held beside the result
FLOATS = tuple(np.dtype(name) for name in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


class TensorType(NamedTuple):
  """How a type is stored: `block` numbers in `size` bytes; `error` bounds encoding, as a part of the block's range."""
  name: str
  code: int
  block: int
  size: int
  decode: Callable                   # uint8 [n, size] -> float32 [n, block]
  encode: Callable | None = None     # float32 [n, block] -> uint8 [n, size]
  error: float = 0.0

  def count_bytes(self, shape) -> int:
    """The bytes of an array of this type; a Python integer, so that no product overflows. Raises UserError for broken blocks."""
    count = 1
    for size in shape: count *= size
    if shape[-1] % self.block: raise UserError(f'rows of {shape[-1]} do not divide into {self.name} blocks of {self.block}')
    return count // self.block * self.size


# Decoders: uint8 [n, size] -> float32 [n, block] ------------------------------------------------------------------------------

def _half(blocks, at):
  """The fp16 number at byte `at` of each block, as float32 [n, 1]."""
  return blocks[:, at:at + 2].view('<f2').astype(np.float32)


def _nibbles(packed):
  """Low nibbles, then high nibbles, along the last axis."""
  return np.concatenate([packed & 15, packed >> 4], -1)


def _fifth_bits(packed, at):
  """16 in each of 32 places whose bit is set in the u32 at byte `at` of each block, else 0."""
  return np.unpackbits(packed[:, at:at + 4], axis=-1, bitorder='little') << 4


def _decode_f32(blocks):
  return blocks.view('<f4')


def _decode_f16(blocks):
  return blocks.view('<f2').astype(np.float32)


def _decode_bf16(blocks):
  return (blocks.view('<u2').astype(np.uint32) << 16).view(np.float32)


def _decode_q8_0(blocks):
  return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _decode_q4_0(blocks):
  return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _decode_q4_1(blocks):
  return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _decode_q5_0(blocks):
  codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
  return _half(blocks, 0) * (codes.view(np.int8) - np.int8(16))


def _decode_q5_1(blocks):
  return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _six_bits(packed):
  """(scales, minima) of the 8 groups of a K block, uint8 [n, 8], from 12 bytes a[4], b[4], c[4] (see `_k_blocks`).

  Scales 0-3 are a & 63, minima 0-3 b & 63; scales 4-7 (c & 15) | (a >> 6) << 4, minima 4-7 (c >> 4) | (b >> 6) << 4.
  """
  a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
  return (np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], 1), np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], 1))


def _k_blocks(blocks, codes):
  """d scale_g q - dm minimum_g over 8 groups of 32; codes [n, 8, 32]; d and dm are the first two fp16 numbers."""
  scale, minimum = _six_bits(blocks[:, 4:16])
  out = (_half(blocks, 0) * scale)[:, :, None] * codes - (_half(blocks, 2) * minimum)[:, :, None]
  return out.reshape(len(blocks), 256)


def _k_nibbles(packed):
  """[n, 8, 32] codes of 128 bytes: of each run of 32 bytes first the low, then the high nibbles."""
  runs = packed.reshape(-1, 4, 32)
  return np.stack([runs & 15, runs >> 4], 2).reshape(-1, 8, 32)


def _decode_q4_k(blocks):
  return _k_blocks(blocks, _k_nibbles(blocks[:, 16:]))


def _decode_q5_k(blocks):
  shift = np.arange(8, dtype=np.uint8)[None, :, None]
  fifth = (blocks[:, None, 16:48] >> shift & 1) << 4
  return _k_blocks(blocks, _k_nibbles(blocks[:, 48:]) | fifth)


def _decode_q6_k(blocks):
  low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
  shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
  high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
  codes = (low | high << 4).view(np.int8) - np.int8(32)
  scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
  return (scale[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


# Encoders: float32 [n, block] -> uint8 [n, size] ------------------------------------------------------------------------------

def _encode_f32(x):
  return x.astype('<f4').view(np.uint8)


def _encode_f16(x):
  return _checked(x, x.astype('<f2')).view(np.uint8)


def _encode_bf16(x):
  return _checked(x, x.astype(ml_dtypes.bfloat16)).view('u2').astype('<u2').view(np.uint8)


def _checked(x, narrow):
  """`narrow`, x in fewer bits; raises UserError where a finite number became infinite."""
  if np.any(np.isinf(narrow) & np.isfinite(x)): raise UserError(f'holds {np.abs(x).max():.4g}, too large for {narrow.dtype.name}')
  return narrow


def _scale_bytes(*columns):
  """fp16 columns side by side as bytes; raises UserError where one does not fit."""
  scale = np.concatenate(columns, 1)
  stored = scale.astype('<f2')
  if not np.isfinite(stored).all(): raise UserError(f'holds numbers too large for an fp16 scale ({np.abs(scale).max():.4g})')
  return stored.view(np.uint8)


def _inverse(d):
  """1 / d, and 0 where d is 0 or so small that 1 / d is no number."""
  return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > 1e-38)


def _pack(codes):
  """[n, 16] bytes of 32 codes: the low nibbles hold the first 16, the high ones the rest."""
  codes = codes & 15
  return codes[:, :16] | codes[:, 16:] << 4


def _pack_fifth(codes):
  """[n, 4] bytes: the fifth bits of 32 codes, lowest first."""
  return np.packbits(codes >> 4, axis=-1, bitorder='little')


def _encode_q8_0(x):
  d = np.abs(x).max(1, keepdims=True) / np.float32(127)
  z = x * _inverse(d)
  below = np.floor(np.abs(z))
  codes = np.copysign(below + (np.abs(z) - below >= 0.5), z).astype(np.int8)          # halves go away from zero
  return np.concatenate([_scale_bytes(d), codes.view(np.uint8)], 1)


def _symmetric(x, half):
  """(d, codes 0 to 2 half - 1): d = e / -half for the signed number e of largest magnitude, code = floor(x / d + half + .5)."""
  d = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1) / np.float32(-half)
  codes = np.trunc((x.astype(np.float64) * _inverse(d) + (half + 0.5)).astype(np.float32))        # rounded before cut, as `gguf` does
  return d, np.clip(codes, 0, 2 * half - 1).astype(np.uint8)


def _offset(x, most):
  """(d, m, codes 0 to most): m = min, d = (max - min) / most, code = floor((x - m) / d + .5)."""
  m = x.min(1, keepdims=True)
  d = (x.max(1, keepdims=True) - m) / np.float32(most)
  codes = np.trunc((x - m) * _inverse(d) + np.float32(0.5))
  return d, m, np.clip(codes, 0, most).astype(np.uint8)


def _encode_q4_0(x):
  d, codes = _symmetric(x, 8)
  return np.concatenate([_scale_bytes(d), _pack(codes)], 1)


def _encode_q4_1(x):
  d, m, codes = _offset(x, 15)
  return np.concatenate([_scale_bytes(d, m), _pack(codes)], 1)


def _encode_q5_0(x):
  d, codes = _symmetric(x, 16)
  return np.concatenate([_scale_bytes(d), _pack_fifth(codes), _pack(codes)], 1)


def _encode_q5_1(x):
  d, m, codes = _offset(x, 31)
  return np.concatenate([_scale_bytes(d, m), _pack_fifth(codes), _pack(codes)], 1)


TYPES = {kind.name: kind for kind in (
  TensorType('F32', 0, 1, 4, _decode_f32, _encode_f32), TensorType('F16', 1, 1, 2, _decode_f16, _encode_f16),
  TensorType('BF16', 30, 1, 2, _decode_bf16, _encode_bf16),
  TensorType('Q4_0', 2, 32, 18, _decode_q4_0, _encode_q4_0, 1 / 8), TensorType('Q4_1', 3, 32, 20, _decode_q4_1, _encode_q4_1, 0.5 / 15),
  TensorType('Q5_0', 6, 32, 22, _decode_q5_0, _encode_q5_0, 1 / 16), TensorType('Q5_1', 7, 32, 24, _decode_q5_1, _encode_q5_1, 0.5 / 31),
  TensorType('Q8_0', 8, 32, 34, _decode_q8_0, _encode_q8_0, 0.5 / 127), TensorType('Q4_K', 12, 256, 144, _decode_q4_k),
  TensorType('Q5_K', 13, 256, 176, _decode_q5_k), TensorType('Q6_K', 14, 256, 210, _decode_q6_k))}
BY_CODE = {kind.code: kind for kind in TYPES.values()}
UNREAD = {9: 'Q8_1', 10: 'Q2_K', 11: 'Q3_K', 15: 'Q8_K', 16: 'IQ2_XXS', 17: 'IQ2_XS', 18: 'IQ3_XXS', 19: 'IQ1_S', 20: 'IQ4_NL',
          21: 'IQ3_S', 22: 'IQ2_S', 23: 'IQ4_XS', 24: 'I8', 25: 'I16', 26: 'I32', 27: 'I64', 28: 'F64', 29: 'IQ1_M', 34: 'TQ1_0',
          35: 'TQ2_0', 39: 'MXFP4'}


def type_of(code: int) -> TensorType:
  """The tensor type of a number in a file. Raises UserError, by name where the type is known but not read."""
  if code in BY_CODE: return BY_CODE[code]
  raise UserError(f'tensor type {code}{f" ({UNREAD[code]})" if code in UNREAD else ""} is not read; {", ".join(TYPES)} are')


def type_named(name: str) -> TensorType:
  """The tensor type of a name such as 'Q8_0'. Raises UserError for another."""
  if name in TYPES: return TYPES[name]
  raise UserError(f'unknown tensor type {shown(name)}; one of {", ".join(TYPES)}')


def decode(kind: TensorType, raw, *, dtype=np.float32) -> np.ndarray:
  """The numbers in the bytes `raw` (uint8, whole blocks), flat, as float32 or another float `dtype`; chunk by chunk.

  Raises UserError where a number does not fit the dtype.
  """
  dtype = np.dtype(dtype)
  if dtype not in FLOATS: raise UserError(f'tensors are read as {", ".join(d.name for d in FLOATS)}, not {dtype.name}')
  blocks = raw.reshape(-1, kind.size)
  out = np.empty((len(blocks), kind.block), dtype)
  step = CHUNK // kind.block
  with np.errstate(over='ignore', invalid='ignore'):               # infinite scales give what they give
    for start in range(0, len(blocks), step):
      part = kind.decode(blocks[start:start + step])
      out[start:start + step] = part
      if dtype.itemsize < 4: _checked(part, out[start:start + step])
  return out.reshape(-1)


def encode(kind: TensorType, x) -> np.ndarray:
  """The bytes (uint8, flat) of the float array x, whose last axis is a multiple of the block; chunk by chunk.

  Equal to the `gguf` package bit for bit: codes come from the unrounded scale, which is then stored in fp16. Raises UserError
  for a type that is read only, for numbers that do not fit, and for quantised numbers that are not finite.
  """
  if kind.encode is None: raise UserError(f'{kind.name} is read, not written; {", ".join(k.name for k in TYPES.values() if k.encode)} are')
  out = np.empty((kind.count_bytes(x.shape) // kind.size, kind.size), np.uint8)
  blocks, step = x.reshape(-1, kind.block), CHUNK // kind.block
  with np.errstate(over='ignore', invalid='ignore'):
    for start in range(0, len(blocks), step):
      part = blocks[start:start + step].astype(np.float32)
      if kind.block > 1 and not np.isfinite(part).all(): raise UserError(f'holds numbers that are not finite, which {kind.name} cannot')
      out[start:start + step] = kind.encode(part)
  return out.reshape(-1)


# Llama rows -------------------------------------------------------------------------------------------------------------------

def interleave_rows(x, heads: int):
  """q or k rows (weight [heads K, D] or bias) with rotation pairs (i, i + K/2) of each head made neighbours, as GGUF's `llama`.

  `heads` counts the heads of x itself: the kv heads for k. Raises UserError where the rows do not divide.
  """
  return _swap(x, heads, (2, -1))


def split_rows(x, heads: int):
  """q or k rows of GGUF's `llama` in the half-split order of Hugging Face: the inverse of `interleave_rows`."""
  return _swap(x, heads, (-1, 2))


def _swap(x, heads, pair):
  if heads < 1 or x.shape[0] % (2 * heads): raise UserError(f'{x.shape[0]} rows do not divide into pairs of {heads} heads')
  return x.reshape(heads, *pair, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
