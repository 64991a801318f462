"""Binding: how a value is tied to its key and untied again. The only file of the library that touches complex numbers.

Every binding is a map `bind(key, value)` that is linear in the value and (nearly) undone by `unbind(query, memory)`
at query = key.

kind     representation of a width-K vector                       bind            source
phasor   K / 2 complex numbers as [re | im]                       complex product FHRR, Plate 2003
bipolar  K reals                                                  product         MAP, Gayler 1998
hrr      packed spectrum [dc, nyquist, re.., im..] (odd: no ny.)  as phasor       Plate 1995
unitary  as hrr, every bin of the key of modulus one              as phasor       Plate 1995; Ganesan et al. 2021
hlb      K reals                                                  product         Alam et al. 2024
none     the value itself (control)                               value           -

Circular convolution needs no complex number: keys live in the unnormalised packed spectrum (modulus one for
`unitary`), values and memories in the orthonormal one, so that one packed product is exactly the convolution and
norms of values are kept (Parseval). `to_spectrum` leads in, `key_map` puts keys on their scale, `from_spectrum` leads
out; in between the state stays in the spectrum.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.ops.probe import works

KINDS = ('phasor', 'bipolar', 'hrr', 'unitary', 'hlb', 'none')
PACKED = ('hrr', 'unitary')
TRANSFORMS = ('dft', 'fft', 'folded')
HLB_FLOOR = 0.25


def check_kind(kind: str, width: int) -> None:
  """Nothing; raises UserError for an unknown binding kind or an odd width of phasors."""
  if kind not in KINDS: raise UserError(f'unknown binding kind {kind!r}; one of {", ".join(KINDS)}')
  if kind == 'phasor' and width % 2: raise UserError(f'binding kind phasor needs an even width, not {width}')


def real_bins(kind: str, width: int) -> int:
  """The number of leading real channels: 0 for phasors, 1 or 2 (odd or even K) for packed spectra, else all."""
  check_kind(kind, width)
  if kind == 'phasor': return 0
  return (2 - width % 2) if kind in PACKED else width


def _parts(x, real):
  half = (x.shape[-1] - real) // 2
  return x[..., :real], x[..., real:real + half], x[..., real + half:]


def _product(x, y, real, conjugate=False):
  """The packed product x * y, or conj(x) * y: real bins multiply, the others multiply as complex pairs."""
  x0, xr, xi = _parts(x, real)
  y0, yr, yi = _parts(y, real)
  if conjugate: xi = -xi
  pairs = [xr * yr - xi * yi, xr * yi + xi * yr]
  return jnp.concatenate([x0 * y0, *pairs] if real else pairs, -1)


def bind(kind: str, key, value):
  """The bound pair, of the width of its parts; commutative and associative for every kind but `none`.

  Shapes broadcast at equal rank. For hrr and unitary the key is an unnormalised packed spectrum (what `key_map`
  returns), the value an orthonormal one. Raises UserError for an unknown kind.
  """
  real = real_bins(kind, value.shape[-1])
  if kind == 'none': return value
  return key * value if kind in ('bipolar', 'hlb') else _product(key, value, real)


def unbind(kind: str, query, memory):
  """What the memory holds under the query: the value, where query = key and nothing else is stored.

  phasor and packed spectra: conj(query) * memory (circular correlation); bipolar: product; hlb: memory * q / max(q^2,
  1/4), which is division with a floor because gradients of a division grow as 1 / q^2; none: the memory.
  """
  real = real_bins(kind, memory.shape[-1])
  if kind == 'none': return memory
  if kind == 'hlb': return memory * inverse('hlb', query)
  return query * memory if kind == 'bipolar' else _product(query, memory, real, conjugate=True)


def identity(kind: str, width: int, dtype=jnp.float32):
  """The key that changes nothing: (1, 0) per phasor, the spectrum of delta_0, ones elsewhere."""
  real = real_bins(kind, width)
  half = (width - real) // 2
  return jnp.concatenate([jnp.ones((real + half,), dtype), jnp.zeros((half,), dtype)])


def inverse(kind: str, key):
  """The key that undoes `key`: its conjugate (index reversal in time), itself (bipolar), 1 / key with a floor (hlb)."""
  real = real_bins(kind, key.shape[-1])
  if kind == 'hlb': return key / jnp.maximum(key * key, HLB_FLOOR)
  if kind in ('bipolar', 'none'): return key
  x0, xr, xi = _parts(key, real)
  return jnp.concatenate([x0, xr, -xi], -1)


# Spectra ------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=32)
def _dft(width):
  n, f = np.arange(width)[:, None], np.arange(1, (width + 1) // 2)[None, :]
  angle = 2 * np.pi * ((n * f) % width) / width
  columns = [np.full((width, 1), width ** -0.5)]
  if width % 2 == 0: columns.append((-1.0) ** n * width ** -0.5)
  return np.concatenate([*columns, np.sqrt(2 / width) * np.cos(angle), -np.sqrt(2 / width) * np.sin(angle)], 1)


def dft_matrix(width: int, dtype=jnp.float32):
  """The orthonormal real DFT matrix F [K, K]: x @ F is the packed spectrum of x, its transpose leads back."""
  return jnp.asarray(_dft(width), dtype)


def spectrum_scale(width: int, dtype=jnp.float32):
  """The unnormalised packed spectrum over the orthonormal one, [K]: sqrt(K) on real bins, else sqrt(K / 2)."""
  real = 2 - width % 2
  return jnp.asarray(np.sqrt(np.where(np.arange(width) < real, width, width / 2)), dtype)


def resolve_transform(kind: str, transform: str = '') -> str:
  """The transform in force: '' means dft for hrr and unitary; every other kind needs none, which is 'folded'."""
  if kind not in PACKED: return 'folded'
  if transform not in ('', *TRANSFORMS):
    raise UserError(f'unknown transform {transform!r}; one of {", ".join(TRANSFORMS)}')
  return transform or 'dft'


@functools.cache
def has_fft() -> bool:
  """Whether the default device computes FFTs and complex numbers; without them `fft` is computed as `dft`."""
  return works('FFT', try_fft)


def try_fft() -> bool:
  """Whether a convolution by FFT comes out right; raises whatever a device without FFT or complex numbers raises."""
  z = jnp.fft.rfft(jnp.arange(4, dtype=jnp.float32))
  return bool(jnp.abs(jnp.fft.irfft(jax.lax.complex(z.real, z.imag) * z, n=4) - np.array([10, 12, 10, 4])).max() < 1e-4)


def multiply_complex(x, y):
  """The products of phasors [re | im] by complex arithmetic: what `bind('phasor', x, y)` is without it."""
  z = jax.lax.complex(*jnp.split(x, 2, -1)) * jax.lax.complex(*jnp.split(y, 2, -1))
  return jnp.concatenate([z.real, z.imag], -1)


def to_spectrum(x, transform: str):
  """The packed orthonormal spectrum of x over its last axis, in the dtype of x; 'folded' says that x already is one."""
  if resolve_transform('hrr', transform) == 'folded': return x
  width = x.shape[-1]
  if transform == 'fft' and has_fft():
    z = jnp.fft.rfft(x.astype(jnp.promote_types(jnp.float32, x.dtype)), norm='ortho')
    real, pairs = 2 - width % 2, z[..., 1:(width + 1) // 2] * np.sqrt(2).astype(z.real.dtype)
    bins = [z.real[..., :1], z.real[..., -1:]][:real]
    return jnp.concatenate([*bins, pairs.real, pairs.imag], -1).astype(x.dtype)
  return jnp.einsum('...k,kf->...f', x, dft_matrix(width, x.dtype))


def from_spectrum(x, transform: str):
  """The signal whose packed orthonormal spectrum is x; the inverse of `to_spectrum`."""
  if resolve_transform('hrr', transform) == 'folded': return x
  width = x.shape[-1]
  if transform == 'fft' and has_fft():
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    bins, re, im = _parts(wide, 2 - width % 2)
    pairs = jax.lax.complex(re, im) * np.sqrt(0.5).astype(wide.dtype)
    bins = jax.lax.complex(bins, jnp.zeros_like(bins))
    spectrum = jnp.concatenate([bins[..., :1], pairs, bins[..., 1:]], -1)
    return jnp.fft.irfft(spectrum, n=width, norm='ortho').astype(x.dtype)
  return jnp.einsum('...f,kf->...k', x, dft_matrix(width, x.dtype))


def circular_convolution(x, y, transform: str = 'dft'):
  """(x * y)_j = sum_i x_i y_{j - i mod K}, in the time domain; x and y of equal rank."""
  key = to_spectrum(x, transform) * spectrum_scale(x.shape[-1], x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return from_spectrum(bind('hrr', key, to_spectrum(y, transform)), transform)


def circular_correlation(x, y, transform: str = 'dft'):
  """(x # y)_j = sum_i x_i y_{i + j mod K}, in the time domain: convolution with the index-reversed x."""
  key = to_spectrum(x, transform) * spectrum_scale(x.shape[-1], x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return from_spectrum(unbind('hrr', key, to_spectrum(y, transform)), transform)


# Keys from raw projections ------------------------------------------------------------------------------------------

def straight_through_sign(z):
  """+1 or -1 (0 counts as +1), with the gradient of the identity where |z| <= 1 and zero outside (Bengio et al. 2013)."""
  soft = jnp.clip(z, -1, 1)
  return soft + jax.lax.stop_gradient(jnp.where(z >= 0, 1, -1).astype(z.dtype) - soft)


def _unit_modulus(z, real, bias, eps):
  """Pairs divided by sqrt(|z|^2 + eps): finite gradients everywhere, unlike |z| and angle."""
  z0, zr, zi = _parts(z, real)
  z0, zr = z0 + bias, zr + bias
  scale = jax.lax.rsqrt(zr * zr + zi * zi + eps)
  pairs = [zr * scale, zi * scale]
  return jnp.concatenate([z0 * jax.lax.rsqrt(z0 * z0 + eps), *pairs] if real else pairs, -1)


def key_map(kind: str, z, *, eps: float = 1e-6, squash: str = 'tanh', identity_bias: float = 0.0):
  """Keys (or queries) from raw projections z: computed in fp32, returned in the dtype of z.

  phasor, unitary: unit modulus per pair (real bins: z / sqrt(z^2 + eps)), after adding `identity_bias` to the real
  parts, so that binding starts near the identity; bipolar: tanh or straight-through sign of z + identity_bias / 2;
  hrr: z / max(|z|, 1e-12) on the unnormalised scale; hlb: sign(z) + z / sqrt(K). hrr, hlb and none ignore the bias.
  For hrr and unitary z is the packed orthonormal spectrum (`to_spectrum`). Raises UserError for unknown names.
  """
  width, wide = z.shape[-1], z.astype(jnp.promote_types(jnp.float32, z.dtype))
  real = real_bins(kind, width)
  if kind == 'none': return z
  if kind in ('phasor', 'unitary'): key = _unit_modulus(wide, real, identity_bias, eps)
  elif kind == 'hrr':
    norm = jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, -1, keepdims=True), 1e-24))
    key = wide / norm * spectrum_scale(width, wide.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
  elif kind == 'hlb': key = straight_through_sign(wide) + wide * width ** -0.5
  elif squash == 'tanh': key = jnp.tanh(wide + identity_bias / 2)
  elif squash == 'sign': key = straight_through_sign(wide + identity_bias / 2)
  else: raise UserError(f"unknown squash {squash!r}; 'tanh' or 'sign'")
  return key.astype(z.dtype)
