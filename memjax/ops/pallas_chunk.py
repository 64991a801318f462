"""One chunk of the slot recurrence inside a Pallas kernel: its decay, its binding, and the products that chunk and gradient need.

The mathematics of `ops/chunked.py`, on blocks that a program holds in registers. A vector of K channels is a tuple of parts: one
part where binding is a product of reals, [real, imaginary] halves where it is one of complex pairs. Spectra with real bins keep dc
as the first real part and nyquist as the first imaginary one; `basis` matrices lead into that layout and back.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

KEPT = 'kept for a gradient by kernels'          # the name of what jax.checkpoint should not compute again


class Plan(NamedTuple):
  """What is fixed while tracing. A program takes `chunks` chunks of `chunk` tokens; `keep` is '', head or slot."""
  chunk: int
  chunks: int
  slots: int                   # as given; blocks hold `padded`, which matrix units can multiply
  parts: int
  has_real: bool
  keep: str
  is_before: bool
  is_time: bool = False        # vectors are signals: `basis` is the Fourier matrix, and keys and queries take the unnormalised scale

  @property
  def padded(self) -> int:
    """Slots of a block: a power of two of at least 16."""
    return max(16, 1 << (self.slots - 1).bit_length())


class Decay(NamedTuple):
  """Decays of one chunk: pairs [C, C]; enter and stay [C, 1 or S]; reading, writing (slot keep) [C, S]; over it a scalar or [S, 1]."""
  pairs: Any
  enter: Any
  stay: Any
  reading: Any
  writing: Any
  over: Any
  same: Any                    # token pairs of one document, or None


def wide(dtype):
  """The accumulation dtype."""
  return jnp.promote_types(jnp.float32, dtype)


def dot(x, y, dtype, *, left=1, right=0):
  """x . y over axis `left` of x and `right` of y: operands in `dtype`, the result wide; fp32 operands are not rounded."""
  precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), (((left,), (right,)), ((), ())), precision=precision,
                             preferred_element_type=wide(dtype))


def early(x, dtype):
  """x, exactly and wide, through a product with ones on the diagonal: what feeds a product, Triton copies asynchronously, tiles ahead."""
  at = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis)
  return dot(x, (at(0) == at(1)).astype(dtype), dtype)


def put(plan, ref, at, x, *, stays=False):
  """ref[at] = x, which the second-level cache keeps while it can (`stays`: the next kernel reads it) or gives up first."""
  if not plan.is_compiled: ref[at] = x                        # where jax has 64 bits it cannot interpret the other
  else: plgpu.store(ref.at[at], x, eviction_policy='evict_last' if stays else 'evict_first')


def product(plan, x, y, *, conjugate=False):
  """The packed product x y, or conj(x) y, of parts."""
  if plan.parts == 1: return (x[0] * y[0],)
  (xr, xi), (yr, yi) = x, y
  sign = -1 if conjugate else 1
  real, imaginary = xr * yr - sign * xi * yi, xr * yi + sign * xi * yr
  if not plan.has_real: return real, imaginary
  first = jax.lax.broadcasted_iota(jnp.int32, real.shape, 1) == 0
  return jnp.where(first, xr * yr, real), jnp.where(first, xi * yi, imaginary)


VECTORS, SLOTS = ('key', 'value', 'query', 'dy'), ('address', 'pick')


def load(plan, refs, n):
  """All that chunk n of a program reads, by name: first of all, so that one wait covers them. Vectors are tuples of parts or one [C, K]."""
  rows, out = pl.ds(n * plan.chunk, plan.chunk), {}
  for name in VECTORS:
    if name in refs: out[name] = load_vectors(plan, refs, name, n)
  for name in SLOTS:
    if name in refs: out[name] = load_slots(plan, refs[name], rows)
  for name in ('log', 'picked'):
    if name in refs: out[name] = load_slots(plan, refs[name], rows) if plan.keep == 'slot' else refs[name][rows]
  if 'states' in refs: out['states'] = load_states(plan, refs['states'], n)
  if 'segment' in refs:
    out['segment'], out['entering'] = refs['segment'][rows], refs['entering'][n]
    out['last'] = refs['segment'][n * plan.chunk + plan.chunk - 1]
  return out


def load_vectors(plan, refs, name, n):
  """The vectors `name` of chunk n: one [C, K] where a matrix leads to their parts, else the parts."""
  ref, rows = refs[name], pl.ds(n * plan.chunk, plan.chunk)
  return ref[rows, :] if 'basis' in refs else tuple(ref[rows, c] for c in columns(plan, ref))


def _is_row(plan, width):
  return None if plan.padded == plan.slots else jax.lax.broadcasted_iota(jnp.int32, (plan.padded, width), 0) < plan.slots


def load_states(plan, ref, n):
  """The state before chunk n, without the slots that pad, by parts."""
  mask = _is_row(plan, ref.shape[-1] // plan.parts)
  return tuple(plgpu.load(ref.at[n, :, c], mask=mask, other=None if mask is None else 0) for c in columns(plan, ref))


def store_states(plan, ref, n, state):
  """Writes the state before chunk n."""
  mask = _is_row(plan, ref.shape[-1] // plan.parts)
  for x, c in zip(state, columns(plan, ref), strict=True): plgpu.store(ref.at[n, :, c], x.astype(ref.dtype), mask=mask)


def columns(plan, ref):
  """The channels of each part."""
  half = ref.shape[-1] // plan.parts
  return [pl.ds(n * half, half) for n in range(plan.parts)]


def load_basis(plan, refs):
  """The columns of the matrix into the layout of parts, or None."""
  return tuple(refs['basis'][:, c] for c in columns(plan, refs['basis'])) if 'basis' in refs else None


def into(plan, x, basis, *, is_key=False):
  """The parts of loaded vectors, wide; keys and queries on the unnormalised scale of spectra."""
  if basis is None: return tuple(part.astype(wide(part.dtype)) for part in x)
  parts = tuple(dot(x, part, x.dtype) for part in basis)
  return _rescaled(plan, parts) if is_key else parts


def _rescaled(plan, parts):
  if not plan.is_time: return parts
  width = 2 * parts[0].shape[1]
  first = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1) == 0
  return tuple(x * jnp.where(first, width ** 0.5, (width / 2) ** 0.5).astype(x.dtype) for x in parts)


def store(plan, ref, n, parts, *, basis, is_key=False):
  """Writes parts (gradients of what `into` gave) as the vectors of chunk n."""
  rows, dtype = pl.ds(n * plan.chunk, plan.chunk), ref.dtype
  if basis is None:
    for x, c in zip(parts, columns(plan, ref), strict=True): ref[rows, c] = x.astype(dtype)
  else:
    parts = _rescaled(plan, parts) if is_key else parts
    ref[rows, :] = functools.reduce(jnp.add, (dot(x, part, dtype, right=1) for x, part in zip(parts, basis, strict=True))).astype(dtype)


def _is_slot(plan, shape):
  return None if plan.padded == plan.slots else jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < plan.slots


def load_slots(plan, ref, rows):
  """[C, S] of tokens, zero in the slots that pad."""
  mask = _is_slot(plan, (plan.chunk, plan.padded))
  return plgpu.load(ref.at[rows, :], mask=mask, other=None if mask is None else 0)


def store_slots(plan, ref, n, x):
  """Writes [C, S] of chunk n, without the slots that pad; one keep a head is [C]."""
  rows = pl.ds(n * plan.chunk, plan.chunk)
  if x.ndim == 1: ref[rows] = x
  else: plgpu.store(ref.at[rows, :], x.astype(ref.dtype), mask=_is_slot(plan, (plan.chunk, plan.padded)))


def _grid(plan):
  shape = (plan.chunk, plan.chunk)
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _sums(plan, log):
  """(sum of log keeps up to each token, at the read of each token, over the chunk), to base 2: one instruction raises it."""
  log = log * 1.4426950408889634
  total = jax.lax.cumsum(log, 0)
  return total, total - log if plan.is_before else total, jnp.sum(log, 0)


def decay(plan, items, dtype) -> Decay:
  """The decay of a chunk of loaded `items`; every exponent is masked before it is raised."""
  t, i = _grid(plan)
  allowed = i < t if plan.is_before else i <= t
  enter = stay = same = None
  over = jnp.ones((), wide(dtype))
  if 'segment' in items:
    segment, entering, leaving = items['segment'], items['entering'], items['last']
    same = segment[:, None] == segment[None, :]
    allowed &= same
    enter, stay = ((segment == other).astype(over.dtype)[:, None] for other in (entering, leaving))
    over = over * (entering == leaving).astype(over.dtype)
  if not plan.keep: return Decay(allowed.astype(over.dtype), enter, stay, None, None, over, same)
  pairs, reading, writing = None, None, None
  total, read, end = _sums(plan, items['log'])
  if plan.keep == 'head':
    pairs = jnp.exp2(jnp.where(allowed, read[:, None] - total[None, :], -jnp.inf))
    total, read = total[:, None], read[:, None]
  else:
    pairs, reading, writing = allowed.astype(over.dtype), jnp.exp2(read - end[None] / 2), jnp.exp2(end[None] / 2 - total)
  last = end if plan.keep == 'head' else end[None]
  scale = lambda mask, x: jnp.exp2(x) if mask is None else mask * jnp.exp2(x)
  enter, stay = scale(enter, read), scale(stay, last - total)
  end = jnp.exp2(end)
  return Decay(pairs, enter, stay, reading, writing, over * (end if plan.keep == 'head' else end[:, None]), same)


def scaled(x, scale):
  """x * scale; scale None is 1."""
  return x if scale is None else x * scale


def decayed_pairs(d: Decay, x):
  """A C x C product with the decay between its tokens: factors of keeps per slot may overflow where masked, so they are selected away."""
  return x * d.pairs if d.reading is None else jnp.where(d.pairs > 0, x, 0)


def keep_gradient(plan, d: Decay, terms):
  """d log keep, [C] or [C, S]. With L the running sum of log keeps: what read at or after t, less what read so and was written
  then, plus what was written before t and what entered, where they leave the chunk. No token of another document is added."""
  from_pick, from_address, leaving, crossing = terms
  inside = from_pick - from_address
  if d.same is None: own = crossing + jnp.sum(inside, 0)[None] + _sum_before(leaving - inside)
  else:
    t, i = _grid(plan)
    after, before = (i >= t) & d.same, (i < t) & d.same
    total = lambda mask, x: dot(mask.astype(x.dtype), x, x.dtype) if plan.keep == 'slot' else jnp.sum(jnp.where(mask, x[None, :], 0), 1)
    own = total(after, inside) + total(before, leaving) + crossing
  return own - from_pick if plan.is_before else own


def _sum_before(x):
  return jax.lax.cumsum(x, 0) - x
