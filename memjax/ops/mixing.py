"""Bind, mix slots, unbind: all of holographic memory between its projections, in XLA (the reference) or in fused Pallas kernels."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.binding import bind, from_spectrum, inverse, resolve_transform, spectrum_scale, to_spectrum, unbind
from memjax.ops.chunked import EXPONENT
from memjax.ops.pallas_mixing import choose_chunk, pallas_mix
from memjax.ops.recurrence import clean, slot_mix
from memjax.ops.sequence import has_whole_rows

BACKENDS = ('auto', 'xla', 'pallas')
MATRIX, WIDEST = 16, 128           # the least side of a block that matrix units take; the widest that compiles
TIMED = 64                         # the most slots and channels a head at which the kernels were timed; wider ones spill registers


def holographic_mix(state_BxHxSxK, vectors, address_BxLxHxS, pick_BxLxGxHxS, *, binding: str, transform: str = 'folded',
                    backend: str = 'auto', **options):
  """(final state, reads [B, L, G, H, K]): unbind(query, slot_mix(bind(key, value))) for `vectors` (key, value, query).

  key, value [B, L, H, K] and query [B, L, G, H, K] are in the space of the state; hrr and unitary may leave `transform` dft or fft to
  this op, which then takes them (keys not scaled) and returns the reads in the time domain. backend: xla | pallas (GPUs; a CPU
  interprets) | auto = pallas for bfloat16 on a GPU, up to 64 slots and channels a head, wherever it can be had. Other options are
  those of `slot_mix`, and equal results to rounding. Raises UserError where pallas cannot be had, for the reason that `obstacle` names.
  """
  key, value, query = vectors
  way = resolve_transform(binding, transform)
  if is_fused(backend, query, address_BxLxHxS, binding=binding, transform=way, **options):
    return _fused(state_BxHxSxK, vectors, (address_BxLxHxS, pick_BxLxGxHxS), (binding, way), **options)
  if way != 'folded':
    scaled = lambda x: to_spectrum(x, way) * spectrum_scale(x.shape[-1], x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    key, value, query = scaled(key), to_spectrum(value, way), scaled(query)
  state, mixed = slot_mix(state_BxHxSxK, bind(binding, key, value), address_BxLxHxS, pick_BxLxGxHxS, **options)
  return state, from_spectrum(unbind(binding, query, mixed), way)


def is_fused(backend: str, query_BxLxGxHxK, address_BxLxHxS, **options) -> bool:
  """Whether the kernels compute this mixing. Raises UserError where backend='pallas' asks for what they cannot compute."""
  if backend not in BACKENDS: raise UserError(f'unknown backend {backend!r}; one of {", ".join(BACKENDS)}')
  if backend == 'xla': return False
  reason = obstacle(query_BxLxGxHxK.shape, address_BxLxHxS.shape[-1], **options)
  if backend == 'pallas' and reason: raise UserError(f"backend='pallas' {reason}; use xla or auto")
  if backend == 'pallas': return True
  is_timed = query_BxLxGxHxK.dtype == jnp.bfloat16 and max(query_BxLxGxHxK.shape[-1], address_BxLxHxS.shape[-1]) <= TIMED
  return not reason and is_timed and jax.default_backend() == 'gpu'


def kernel_chunk(slots: int, width: int, *, log_keep=None, chunk: int = 0, floor: float = -20.0, **_) -> int:
  """Tokens a chunk in the kernels: `chunk`, or the fastest, shortened until decay of keeps per slot can be factored above `floor`."""
  size = chunk or choose_chunk(slots, width)
  is_slot = log_keep is not None and log_keep.shape[-1] > 1
  while not chunk and is_slot and size > MATRIX and size * -floor > EXPONENT: size //= 2
  return size


def obstacle(query_shape: tuple[int, ...], slots: int, *, binding: str, transform: str = 'folded', log_keep=None, form: str = 'chunk',
             chunk: int = 0, decay: str = 'auto', floor: float = -20.0, axis: str = '', **_) -> str:
  """Why the kernels cannot compute this mixing, or ''."""
  groups, width = query_shape[2], query_shape[4]
  is_slot = log_keep is not None and log_keep.shape[-1] > 1
  size = kernel_chunk(slots, width, log_keep=log_keep, chunk=chunk, floor=floor)
  block = width // (1 if binding in ('bipolar', 'hlb') else 2)
  power = lambda n: n & (n - 1) == 0
  reasons = {
    'has no binding none': binding == 'none', 'has no fft': transform == 'fft', 'takes one read group': groups > 1,
    'computes the chunked form': form != 'chunk' or (log_keep is not None and log_keep.ndim == 5),
    f'needs factored decay, chunk x |floor| <= {EXPONENT:g}': is_slot and (decay == 'exact' or size * -floor > EXPONENT),
    'takes no pieces of a sequence': bool(axis),
    'runs on one device, or on the rows of each': not has_whole_rows(),
    f'needs chunks, widths and halves of pairs that are powers of two from {MATRIX} to {WIDEST}':
        jax.default_backend() != 'cpu' and not all(power(n) and MATRIX <= n <= WIDEST for n in (size, block)),
    f'takes at most {WIDEST} slots': slots > WIDEST,
  }
  return next((text for text, holds in reasons.items() if holds), '')


def _fused(state, vectors, slots, how, *, log_keep=None, order='after', reset_BxL=None, mask_BxL=None, **options):
  (key, value, query), (binding, transform) = vectors, how
  if binding == 'hlb': query = inverse('hlb', query)               # unbinding is a product with it
  size = kernel_chunk(slots[0].shape[-1], value.shape[-1], log_keep=log_keep, **options)
  value, address, pick, log_keep, reset = clean(value, *slots, log_keep=log_keep, reset_BxL=reset_BxL, mask_BxL=mask_BxL)
  only = lambda x: x if mask_BxL is None else jnp.where(mask_BxL[:, :, None, None], x, jnp.zeros((), x.dtype))
  state = state.astype(jnp.promote_types(jnp.float32, state.dtype))
  state, y = pallas_mix(state, (only(key), value, only(query[:, :, 0])), address, pick[:, :, 0], binding=binding, transform=transform,
                        log_keep=log_keep, order=order, reset_BxL=reset, chunk=size)
  return state, y[:, :, None]
