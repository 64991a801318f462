"""Keys that come from a seed: a counter hash in uint32 arithmetic, position codes and permutations.

Everything here is a pure function of (seed, stream name, position, channel), the same in every call, layer, jax
version and device count, without a table: the platform's random streams are not (they change between jax versions).
"""
import zlib

import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.ops.binding import real_bins

_GOLDEN, _TURN = 0x9E3779B9, 2.0 ** 32
RANDOM_KINDS = ('bipolar', 'phasor', 'unitary', 'gaussian')


def _mix(h):
  """A well-mixing bijection of uint32 (constants of lowbias32, C. Wellons 2018), numpy and jax arrays alike."""
  h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
  return h ^ (h >> 16)


def _stream_words(seed, stream):
  """Two uint32 words of (seed, stream name), each a numpy array of one element so that wrapping is silent."""
  words, parts = [], (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, zlib.crc32(stream.encode()))
  for salt in (1, 2):
    h = np.full((1,), salt * _GOLDEN & 0xFFFFFFFF, np.uint32)
    for word in parts: h = _mix(h ^ np.uint32(word)) + h
    words.append(h)
  return words


def counter_bits(seed: int, stream: str, position, width: int):
  """Hash bits uint32 [*position.shape, width]: channel c at an integer position; numpy in, numpy out, else a jax array.

  Two hashed words of the position enter every channel, so that no two positions share a shifted key.
  """
  np_or_jnp = np if isinstance(position, np.ndarray | int) else jnp
  position = np_or_jnp.asarray(position).astype(np.uint32)[..., None]
  first, second = (word.reshape((1,) * position.ndim) for word in _stream_words(seed, stream))
  channel = (np.arange(width, dtype=np.uint32) * np.uint32(_GOLDEN)).reshape((1,) * (position.ndim - 1) + (-1,))
  return _mix(_mix(_mix(position ^ first) + channel) ^ _mix(position + second))


def counter_uniform(seed: int, stream: str, position, width: int):
  """Uniform numbers in (0, 1), fp32 [*position.shape, width], from the upper 24 bits of the hash; never 0 nor 1."""
  bits = counter_bits(seed, stream, position, width)
  return ((bits >> 8).astype(np.float32) + np.float32(0.5)) * np.float32(2.0 ** -24)


def counter_normal(seed: int, stream: str, position, width: int):
  """Standard normal numbers, fp32 [*position.shape, width], by Box and Muller 1958 from two streams."""
  u, v = (counter_uniform(seed, f'{stream}/{part}', position, width) for part in ('radius', 'angle'))
  return jnp.sqrt(-2 * jnp.log(u)) * jnp.cos(2 * np.pi * v)


def random_keys(seed: int, stream: str, position, width: int, *, kind: str = 'bipolar'):
  """Independent keys, fp32 [*position.shape, width], one for each integer position.

  bipolar: +1 or -1; phasor: uniform phases as [cos | sin]; unitary: the packed spectrum of a real signal, real bins
  +1 or -1, other bins uniform phases; gaussian: normal, of unit length (time domain). They are constants: no
  gradient, no parameters. Raises UserError for an unknown kind or an odd width of phasors.
  """
  if kind not in RANDOM_KINDS:
    raise UserError(f'unknown kind of random keys {kind!r}; one of {", ".join(RANDOM_KINDS)}')
  position = jnp.asarray(position)
  if kind == 'gaussian':
    x = counter_normal(seed, stream, position, width)
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
  if kind == 'bipolar':
    return 1 - 2 * (counter_bits(seed, stream, position, width) >> 31).astype(jnp.float32)
  real = real_bins(kind, width)
  half = (width - real) // 2
  angle = (2 * counter_uniform(seed, stream, position, half) - 1) * np.float32(np.pi)
  signs = [random_keys(seed, f'{stream}/real', position, real)] if real else []
  return jnp.concatenate([*signs, jnp.cos(angle), jnp.sin(angle)], -1)


def fingerprint(seed: int, stream: str = 'position', width: int = 64) -> str:
  """Eight hexadecimal digits that identify the first eight keys of a stream; stored in checkpoints."""
  return f'{zlib.crc32(counter_bits(seed, stream, np.arange(8), width).astype("<u4").tobytes()):08x}'


def check_fingerprint(seed: int, stored: str) -> None:
  """Nothing; raises UserError where the keys of `seed` are not the ones the stored fingerprint was taken of."""
  if (now := fingerprint(seed)) != stored:
    raise UserError(f'random keys differ: fingerprint {now} of seed {seed}, but {stored} was stored; use the stored seed')


# Position codes -----------------------------------------------------------------------------------------------------

def fractional_phases(kind: str, width: int, *, seed: int = 0, frequencies: str = 'uniform', base: float = 10_000.0):
  """One phase step theta per pair, float64 numpy: uniform in (-pi, pi), or base^(-2 f / width).

  The mean kernel of uniform phases over distance x is sin(pi x) / (pi x) (Plate 1995, Frady et al. 2021).
  """
  if kind not in ('phasor', 'hrr', 'unitary'):
    raise UserError(f'fractional codes need phases; binding kind {kind} has none')
  pairs = (width - real_bins(kind, width)) // 2
  if frequencies == 'geometric': return float(base) ** (-2 * np.arange(pairs) / width)
  if frequencies != 'uniform': raise UserError(f"unknown frequencies {frequencies!r}; 'uniform' or 'geometric'")
  return (2 * counter_uniform(seed, 'fractional', np.zeros((), np.int32), pairs).astype(np.float64) - 1) * np.pi


def turn(position, theta):
  """Angles position * theta modulo 2 pi, fp32 [*position.shape, *theta.shape], exact to 1e-6 at any integer position.

  Integer positions multiply a 32-bit fraction of a full turn in wrapping uint32 arithmetic, so that a million tokens
  lose nothing; real positions multiply in fp32.
  """
  theta, shape = np.asarray(theta, np.float64), (1,) * position.ndim + (-1,)
  if not jnp.issubdtype(position.dtype, jnp.integer):
    wide = jnp.promote_types(jnp.float32, position.dtype)
    return position[..., None].astype(wide) * jnp.asarray(theta.reshape(shape), wide)
  fraction = np.round(theta / (2 * np.pi) * _TURN).astype(np.int64).astype(np.uint32).reshape(shape)
  turned = (position.astype(jnp.uint32)[..., None] * fraction).astype(jnp.int32)
  return turned.astype(jnp.float32) * np.float32(2 * np.pi / _TURN)


def fractional_code(kind: str, width: int, position, theta):
  """Unit keys p^t = exp(i theta t) in the layout of `kind`, fp32 [*position.shape, width]; real bins are 1.

  (p^a)(p^b) = p^(a+b). Bind it to a key: an item stored at t is then found under the key moved to t, and by nothing
  else.
  """
  angle, real = turn(position, theta), real_bins(kind, width)
  bins = [jnp.ones((*angle.shape[:-1], real), angle.dtype)] if real else []
  return jnp.concatenate([*bins, jnp.cos(angle), jnp.sin(angle)], -1)


# Permutations -------------------------------------------------------------------------------------------------------

def permutation(seed: int, width: int, kind: str, *, stream: str = 'permutation'):
  """A fixed permutation of the channels, int numpy [width], that keeps the layout of `kind`: pairs move together.

  Real bins of packed spectra stay in place. Undo it with `np.argsort(index)`.
  """
  real = real_bins(kind, width)
  free = width if real == width else (width - real) // 2
  order = np.argsort(counter_bits(seed, stream, np.zeros((), np.int64), free), kind='stable')
  if real == width: return order
  return np.concatenate([np.arange(real), real + order, real + free + order])


def permute(x, index):
  """x with its last axis reordered, y_k = x_{index_k}; index [S, K] gives S permuted copies (Danihelka 2016)."""
  return jnp.take(x, jnp.asarray(index), axis=-1)
