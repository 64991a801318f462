"""Arrays in 8 or 4 bits: scales per row or group, two 4-bit codes to a byte, products, and training that sees the rounding."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError

SCHEMES = ('absmax', 'absmax7', 'nf4')
FLOOR = 1e-8
HALF_MAX = 65504.0
FEW = 16                # tokens of a product that are decoded, not read at once
# 16 quantiles of the normal distribution with an exact zero at code 7 (Dettmers et al. 2023, QLoRA, appendix E)
NF4 = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=('codes', 'scale'), meta_fields=('bits', 'scheme', 'group', 'width'))
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A quantised array [.., width]: a pytree of codes and scales; leading axes index, slice and shard as in the array.

  codes: int8 [.., width], or uint8 [.., width / 2] with the even index in the low nibble; scale: [.., groups], fp16 for 4 bits
  in groups, else fp32. group 0 = one scale for the row. A gradient with respect to it is an error: its codes are integers.
  """
  codes: jax.Array
  scale: jax.Array
  bits: int
  scheme: str
  group: int
  width: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array it stands for."""
    return (*self.codes.shape[:-1], self.width)

  @property
  def ndim(self) -> int:
    """The number of axes of the array it stands for."""
    return self.codes.ndim


def _wide(x):
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _levels(bits: int) -> tuple[int, int]:
  """(Q_n, Q_p): codes lie in -Q_n .. Q_p."""
  if bits not in (4, 8): raise UserError(f'bits={bits}: arrays are quantised to 4 or 8 bits')
  return 2 ** (bits - 1), 2 ** (bits - 1) - 1


def _check(width: int, *, bits: int, group: int, scheme: str = 'absmax') -> None:
  _levels(bits)
  if scheme not in SCHEMES: raise UserError(f'unknown quantisation scheme {scheme!r}; one of {", ".join(SCHEMES)}')
  if scheme != 'absmax' and bits != 4: raise UserError(f'the scheme {scheme} needs 4 bits, not {bits}')
  if group < 0 or (group and width % group): raise UserError(f'quantisation groups of {group} do not divide rows of {width}')
  if bits == 4 and width % 2: raise UserError(f'4-bit rows need an even width, not {width}')


def pack_nibbles(n):
  """uint8 [.., W / 2] of 4-bit codes [.., W], signed or not: low nibble = even index, high nibble = odd index."""
  n = n.astype(jnp.uint8) & 15
  return n[..., ::2] | (n[..., 1::2] << 4)


def unpack_nibbles(codes, *, is_signed: bool = True):
  """int8 [.., W] from packed uint8 [.., W / 2]: two's complement -8 .. 7, or 0 .. 15 where not `is_signed`."""
  n = jnp.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(jnp.int8)
  return (n ^ 8) - 8 if is_signed else n


def packed_shapes(shape, *, bits: int, group: int):
  """(codes, scale) as jax.ShapeDtypeStruct for an array of `shape`; nothing is computed. Raises UserError as `quantize`."""
  *lead, width = shape
  _check(width, bits=bits, group=group)
  code_width, code_dtype = (width, jnp.int8) if bits == 8 else (width // 2, jnp.uint8)
  scale_dtype = jnp.float16 if bits == 4 and group else jnp.float32
  return jax.ShapeDtypeStruct((*lead, code_width), code_dtype), jax.ShapeDtypeStruct((*lead, width // group if group else 1), scale_dtype)


def stored_bytes(q: Quantized) -> int:
  """Bytes of codes and scales, also of a Quantized of shapes alone."""
  return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in (q.codes, q.scale))


def _stored_scale(scale, dtype):
  """The scale above its floor in the stored dtype; fp16 is rounded up: no value leaves the range of its codes, none becomes 0."""
  scale = jnp.maximum(scale, FLOOR)
  if dtype != jnp.float16: return scale.astype(dtype)
  scale = jnp.minimum(scale, HALF_MAX)
  half = scale.astype(dtype)
  bits = jax.lax.bitcast_convert_type(half, jnp.uint16)
  return jax.lax.bitcast_convert_type(bits + (half.astype(scale.dtype) < scale).astype(jnp.uint16), dtype)


def quantize(x, *, bits: int, scheme: str = 'absmax', group: int = 32) -> Quantized:
  """The array [.., W] as codes with one scale for each `group` neighbours of the last axis (0: for the row); no gradient.

  absmax: scale absmax / 127 (8 bits) or absmax / 7.5 (4 bits, the convention of qwix), codes round(x / scale) clipped to
  -2^(b-1) .. 2^(b-1) - 1, error at most scale / 2. absmax7: absmax / 7 (4 bits). nf4: absmax, the nearest of `NF4` (4 bits).
  Scales have a floor of 1e-8 (2^-24 in fp16) and saturate at the fp16 maximum; zeros stay zero.
  Raises UserError for other bits or schemes, groups that do not divide W, an odd W in 4 bits.
  """
  _check(x.shape[-1], bits=bits, group=group, scheme=scheme)
  like = packed_shapes(x.shape, bits=bits, group=group)[1]
  wide = _wide(jax.lax.stop_gradient(x)).reshape(*like.shape, -1)
  divisor = {'absmax': 127 if bits == 8 else 7.5, 'absmax7': 7, 'nf4': 1}[scheme]
  scale = _stored_scale(jnp.max(jnp.abs(wide), -1) / divisor, like.dtype)
  ratio = (wide / scale.astype(wide.dtype)[..., None]).reshape(x.shape)
  low, high = _levels(bits)
  if scheme == 'nf4':
    codes = jnp.searchsorted(jnp.asarray((NF4[1:] + NF4[:-1]) / 2, ratio.dtype), ratio, method='compare_all')
  else: codes = jnp.clip(jnp.round(ratio), -low, high)
  codes = codes.astype(jnp.int8)
  return Quantized(codes if bits == 8 else pack_nibbles(codes), scale, bits=bits, scheme=scheme, group=group, width=x.shape[-1])


def _codes(q: Quantized):
  """int8 codes [.., width]."""
  return q.codes if q.bits == 8 else unpack_nibbles(q.codes, is_signed=q.scheme != 'nf4')


def dequantize(q: Quantized, dtype=jnp.float32):
  """The array [.., W] of a Quantized: code * scale, computed in fp32 or wider, in `dtype`."""
  return _scaled(_codes(q), q, jnp.promote_types(jnp.float32, dtype)).astype(dtype)


def _scaled(codes, q: Quantized, wide=jnp.float32):
  """code * scale of all codes, or of every second one."""
  levels = jnp.asarray(NF4, wide)[codes] if q.scheme == 'nf4' else codes.astype(wide)
  return (levels.reshape(*q.scale.shape, -1) * q.scale.astype(wide)[..., None]).reshape(codes.shape)


def _signed(n, q: Quantized):
  """int8 codes from nibbles."""
  n = n.astype(jnp.int8)
  return n if q.scheme == 'nf4' else (n ^ 8) - 8


@jax.custom_vjp
def quantized_dot(x, q: Quantized):
  """x W [.., E] in the dtype of x, from x [.., D] and W^T [E, D] as codes: what is stored is read, W is no argument.

  W is written out for this product alone. In less than float32, with one scale for each output, the product is that of the codes,
  which are exact there, scaled before it is rounded. (Not in float32: a compiler may join the scale with a sum that follows, and equal
  models would differ in their last bit.) The gradient reaches x; codes and scales get none, and nothing else is kept for it.
  """
  wide = jnp.promote_types(jnp.float32, x.dtype)
  if q.bits == 4 and q.group % 2 == 0 and x.size <= FEW * q.width:       # two products instead of joining the halves of each byte
    low, high = (_scaled(part, q, wide).astype(x.dtype) for part in (_signed(q.codes & 15, q), _signed(q.codes >> 4, q)))
    dot = lambda x, w: jnp.einsum('...d,ed->...e', x, w, preferred_element_type=wide)
    return (dot(x[..., ::2], low) + dot(x[..., 1::2], high)).astype(x.dtype)
  if q.group or q.scheme == 'nf4' or x.dtype == wide: return jnp.einsum('...d,ed->...e', x, dequantize(q, x.dtype))
  y = jnp.einsum('...d,ed->...e', x, _codes(q).astype(x.dtype), preferred_element_type=wide)
  return (y * q.scale.astype(wide).reshape(*(1,) * (y.ndim - 1), -1)).astype(x.dtype)


def _quantized_dot_backward(q, dy):
  wide = jnp.promote_types(jnp.float32, dy.dtype)
  if q.group or q.scheme == 'nf4' or dy.dtype == wide: return jnp.einsum('...e,ed->...d', dy, dequantize(q, dy.dtype)), None
  scaled = (dy * q.scale.astype(wide).reshape(*(1,) * (dy.ndim - 1), -1)).astype(dy.dtype)
  return jnp.einsum('...e,ed->...d', scaled, _codes(q).astype(dy.dtype)), None


quantized_dot.defvjp(lambda x, q: (quantized_dot(x, q), q), _quantized_dot_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(x, options):
  bits, scheme, group = options
  return dequantize(quantize(x, bits=bits, scheme=scheme, group=group), x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(options, primals, tangents):
  return _straight_through(*primals, options), tangents[0]


def fake_quantize(x, *, bits: int, scheme: str = 'absmax', group: int = 32):
  """dequantize(quantize(x)), bit for bit, with the identity as gradient (straight-through: absmax leaves nothing out of range)."""
  return _straight_through(x, (bits, scheme, group))


def _rounded(x, scale, bits: int):
  """(wide x / scale, its clipped rounding, scale above the floor)."""
  low, high = _levels(bits)
  scale = jnp.maximum(_wide(jnp.asarray(scale)), FLOOR)
  ratio = _wide(x) / scale
  return ratio, jnp.clip(jnp.round(ratio), -low, high), scale


def fake_quantize_fixed(x, scale, *, bits: int):
  """scale * clip(round(x / scale), -Q_n, Q_p); gradient identity for x in [-Q_n scale, Q_p scale], zero outside and for scale.

  scale: a scalar or an array of as many axes as x, e.g. [.., 1]; Q_n = 2^(bits-1), Q_p = Q_n - 1.
  """
  low, high = _levels(bits)
  ratio, code, scale = _rounded(jax.lax.stop_gradient(x), jax.lax.stop_gradient(scale), bits)
  inside = jnp.where((ratio >= -low) & (ratio <= high), x, jax.lax.stop_gradient(x))
  # a term that is exactly zero carries the gradient, the value stays exact
  return (code * scale).astype(x.dtype) + (inside - jax.lax.stop_gradient(inside))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lsq(x, step, bits):
  _, code, step = _rounded(x, step, bits)
  return (code * step).astype(x.dtype)


def _lsq_forward(x, step, bits):
  return _lsq(x, step, bits), (x, step)


def _lsq_backward(bits, kept, dy):
  x, step = kept
  low, high = _levels(bits)
  ratio, code, _ = _rounded(x, step, bits)
  inside = (ratio > -low) & (ratio < high)
  slope = _wide(dy) * jnp.where(inside, code - ratio, jnp.clip(ratio, -low, high))
  axes = tuple(i for i in range(x.ndim) if not step.ndim or step.shape[i] == 1)
  factor = (x.size // step.size * high) ** -0.5
  return jnp.where(inside, dy, 0), (jnp.sum(slope, axes).reshape(step.shape) * factor).astype(step.dtype)


_lsq.defvjp(_lsq_forward, _lsq_backward)


def lsq(x, step, *, bits: int):
  """step * clip(round(x / step), -Q_n, Q_p) with a learned step (Esser et al. 2020, LSQ); step a scalar or of as many axes as x.

  d/dx is 1 inside (-Q_n step, Q_p step) and 0 outside; d/dstep is round(x / step) - x / step inside, -Q_n or Q_p outside,
  times 1 / sqrt(n Q_p), n the values that share a step.
  """
  return _lsq(x, jnp.asarray(step), bits)
