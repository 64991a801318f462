"""Holographic mixing as four Pallas kernels through the Triton lowering: bind, mix slots by chunks and unbind, all in registers.

Two passes over a sequence: what every segment alone leaves, then (after a small recurrence over segments in XLA) its reads from
the right start; backwards, the gradients of what reads, then (after the same recurrence, reversed) those of what writes. Where rows
times heads fill the card, one segment takes the row and the first pass is dropped. Only the starts of segments are saved for the
backward pass. On a CPU the kernels run by interpretation.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops import pallas_kernels as kernels
from memjax.ops.binding import PACKED, dft_matrix
from memjax.ops.carry import carry
from memjax.ops.chunked import Chunks
from memjax.ops.pallas_chunk import Plan


class Launch(NamedTuple):
  """(warps, stages of the loop's loads) of each kernel, and the programs that fill a card."""
  write_kernel: tuple[int, int]
  read_kernel: tuple[int, int]
  read_back_kernel: tuple[int, int]
  write_back_kernel: tuple[int, int]
  programs: int


# Measured on an H200 (docs/performance.md): few slots go fastest through chunks of 16 tokens in one warp, without a barrier and with
# eight programs a multiprocessor; states of more slots cost too much a chunk for that. SPECTRA is for vectors that a matrix transforms.
SMALL, LARGE = Launch((1, 1), (1, 2), (1, 1), (1, 2), 2048), Launch((4, 2), (4, 2), (4, 1), (4, 1), 512)
SPECTRA = SMALL._replace(read_back_kernel=(1, 2), write_back_kernel=(1, 1))


def choose_chunk(slots: int, width: int) -> int:
  """Tokens a chunk that are fastest for so many slots and channels."""
  return 16 if slots <= 16 and width <= 64 else 64


def _halves(width):
  """Channels of a packed spectrum as [dc, re.. | nyquist, im..]."""
  half = width // 2
  return np.r_[0, 2:half + 1, 1, half + 1:width]


def basis_of(binding, transform, width, dtype):
  """The matrix from given vectors to parts, by name; none for reals and phasors."""
  if binding not in PACKED: return {}
  matrix = dft_matrix(width, jnp.promote_types(jnp.float32, dtype)) if transform == 'dft' else jnp.eye(width)
  return {'basis': matrix[:, _halves(width)].astype(dtype)}


def _specs(plan, width):
  """The block of each array, by name, on the grid (head, segment, row)."""
  T, S = plan.chunk * plan.chunks, plan.padded
  token = lambda last: pl.BlockSpec((None, T, None, last), lambda h, g, b: (b, g, h, 0))
  state = pl.BlockSpec((None, None, None, S, width), lambda h, g, b: (b, h, g, 0, 0))
  return {
    **dict.fromkeys(('key', 'value', 'query', 'dy', 'y'), token(width)), **dict.fromkeys(('address', 'pick'), token(S)),
    **dict.fromkeys(('log', 'picked'), token(S) if plan.keep == 'slot' else pl.BlockSpec((None, T, None), lambda h, g, b: (b, g, h))),
    'segment': pl.BlockSpec((None, T), lambda h, g, b: (b, g)),
    'entering': pl.BlockSpec((None, plan.chunks), lambda h, g, b: (b, g)),
    'basis': pl.BlockSpec((width, width), lambda h, g, b: (0, 0)), **dict.fromkeys(('start', 'dend', 'state'), state),
    'states': pl.BlockSpec((None, None, plan.chunks, S, width), lambda h, g, b: (b, h, g, 0, 0)),
  }


def call_kernel(kernel, static, arrays, outputs):
  """Runs a kernel over heads, segments and rows; arrays and outputs (shapes) by name."""
  B, L, H, K = arrays['query' if 'query' in arrays else 'value'].shape
  plan, launch = static
  specs, (warps, stages) = _specs(plan, K), getattr(launch, kernel.__name__)
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=(H, L // (plan.chunk * plan.chunks), B), name=kernel.__name__,
      in_specs=[{n: specs[n] for n in arrays}], out_specs={n: specs[n] for n in outputs},
      interpret=jax.default_backend() == 'cpu', compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))(arrays)


def select(arrays, *names):
  """The named arrays, and those of decay, documents and layout that there are."""
  return {n: arrays[n] for n in (*names, 'log', 'segment', 'entering', 'basis') if n in arrays}


def state_shape(plan, tokens, chunks=0):
  """The shape of one state a segment in the accumulation dtype, or of one every `chunks` chunks in the compute dtype."""
  B, L, H, K = tokens['value'].shape
  dtype = tokens['value'].dtype
  shape = (B, H, L // (plan.chunk * (chunks or plan.chunks)), plan.slots if chunks else plan.padded, K)
  return jax.ShapeDtypeStruct(shape, dtype if chunks else jnp.promote_types(jnp.float32, dtype))


def _segments(plan, tokens, fixed) -> Chunks:
  """The decay over whole segments, as that of chunks of one token."""
  T, total, last, entering = plan.chunk * plan.chunks, None, None, None
  if plan.keep:
    log = tokens['log'] if plan.keep == 'slot' else tokens['log'][..., None]
    total = log.reshape(log.shape[0], -1, T, *log.shape[2:]).sum(2)
    total = jnp.swapaxes(total, 1, 2)[:, :, :, None]
    if plan.keep == 'slot': total = jnp.pad(total, ((0, 0),) * 4 + ((0, plan.padded - plan.slots),))
  if 'segment' in fixed: last, entering = fixed['segment'][:, None, T - 1::T, None], fixed['entering'][:, None, ::plan.chunks, None]
  return Chunks(None, total, last, entering, False, plan.is_before)


def shapes_like(tokens, *names):
  """Shapes of the named tokens that there are."""
  return {n: jax.ShapeDtypeStruct(tokens[n].shape, tokens[n].dtype) for n in names if n in tokens}


def _forward(static, state, tokens, fixed):
  plan, arrays, segment = static[0], {**tokens, **fixed}, state_shape(static[0], tokens)
  start = state[:, :, None]
  if segment.shape[2] > 1:
    write = call_kernel(kernels.write_kernel, static, select(arrays, 'key', 'value', 'address'), {'state': segment})['state']
    start = carry(_segments(plan, tokens, fixed), state, write)[0]
  inputs = {**select(arrays, 'key', 'value', 'query', 'address', 'pick'), 'start': start}
  out = call_kernel(kernels.read_kernel, static, inputs, {'y': shapes_like(tokens, 'value')['value'], 'state': segment})
  return (out['state'][:, :, -1], out['y']), start


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(static, state, tokens, fixed):
  """(final state, reads); `tokens` take gradients, `fixed` (document numbers and a matrix) do not."""
  return _forward(static, state, tokens, fixed)[0]


def _mix_forward(static, state, tokens, fixed):
  out, start = _forward(static, state, tokens, fixed)
  return out, (tokens, fixed, start)


def _mix_backward(static, kept, cotangents):
  plan, (tokens, fixed, start), (dfinal, dy) = static[0], kept, cotangents
  segment, arrays = state_shape(plan, tokens), {**tokens, **fixed, 'dy': dy}
  inputs = select(arrays, 'key', 'value', 'query', 'address', 'pick', 'dy')
  outputs = {**shapes_like(tokens, 'query', 'pick'), 'state': segment}
  if plan.keep: outputs |= {'states': state_shape(plan, tokens, chunks=1), 'picked': shapes_like(tokens, 'log')['log']}
  readers = call_kernel(kernels.read_back_kernel, static, {**inputs, 'start': start}, outputs)
  dstart, dend = readers.pop('state'), dfinal[:, :, None]
  if segment.shape[2] > 1:
    c = _segments(plan, tokens, fixed)
    back = jax.vjp(lambda write: carry(c, jnp.zeros_like(dfinal), write), jnp.zeros_like(dstart))[1]      # linear: the point is any
    dend = back((dstart, dfinal))[0]
  inputs |= {'dend': dend, **{n: readers.pop(n) for n in ('states', 'picked') if n in readers}}
  outputs = {**shapes_like(tokens, 'key', 'value', 'address', 'log'), 'state': segment}
  writers = call_kernel(kernels.write_back_kernel, static, inputs, outputs)
  return writers.pop('state')[:, :, 0], readers | writers, None


_mix.defvjp(_mix_forward, _mix_backward)


def _chunks_a_segment(rows, chunks, programs):
  """Chunks of a program: as many as leave enough programs; a power of two."""
  size = 1
  while size < chunks and rows * -(-chunks // (2 * size)) >= programs: size *= 2
  return size


def _fixed(plan, reset_BxL, basis):
  if reset_BxL is None: return basis
  segment = jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
  return {**basis, 'segment': segment, 'entering': jnp.pad(segment[:, plan.chunk - 1:-1:plan.chunk], ((0, 0), (1, 0)))}


def pallas_mix(state_BxHxSxK, vectors, address_BxLxHxS, pick_BxLxHxS, *, binding: str, transform: str = '', log_keep=None,
               order: str = 'after', reset_BxL=None, chunk: int = 0, segment: int = 0, launch: Launch | None = None):
  """(final state, reads [B, L, H, K]): unbind(query, slot_mix(bind(key, value))) for `vectors` (key, value, query), each [B, L, H, K].

  With transform dft the vectors and reads of hrr and unitary are in the time domain, else in the packed spectrum; the state always
  is. Inputs as `recurrence.clean` leaves them; chunk and segment count tokens and chunks, 0 = automatic.
  """
  B, L, H, K = vectors[0].shape
  S, dtype = address_BxLxHxS.shape[-1], vectors[1].dtype
  chunk = chunk or choose_chunk(S, K)
  launch = launch or (LARGE if chunk > 16 else SPECTRA if binding in PACKED else SMALL)
  segment = segment or _chunks_a_segment(B * H, -(-L // chunk), launch.programs)
  keep = '' if log_keep is None else 'head' if log_keep.shape[-1] == 1 else 'slot'
  plan = Plan(chunk, segment, S, 1 + (binding in (*PACKED, 'phasor')), binding in PACKED, keep, order == 'before', transform == 'dft')
  tokens: dict[str, Any] = dict(zip(('key', 'value', 'query'), (x.astype(dtype) for x in vectors), strict=True))
  tokens |= {'address': address_BxLxHxS, 'pick': pick_BxLxHxS}
  if log_keep is not None:
    log = jnp.broadcast_to(log_keep, (B, L, *log_keep.shape[2:]))
    if reset_BxL is not None: log = jnp.where(reset_BxL[..., None, None], 0, log)        # acts on nothing: its gradient is exactly 0
    tokens['log'] = log if plan.keep == 'slot' else log[..., 0]
  behind = -L % (chunk * plan.chunks)
  pad = lambda x, **how: jnp.pad(x, ((0, 0), (0, behind)) + ((0, 0),) * (x.ndim - 2), **how) if behind else x
  tokens = {n: pad(x) for n, x in tokens.items()}
  fixed = _fixed(plan, None if reset_BxL is None else pad(reset_BxL), basis_of(binding, transform, K, dtype))
  channels = _halves(K) if plan.has_real else np.arange(K)
  state = jnp.pad(state_BxHxSxK[..., channels], ((0, 0), (0, 0), (0, plan.padded - S), (0, 0)))
  final, y = _mix((plan, launch), state, tokens, fixed)
  return final[:, :, :S, np.argsort(channels)], y[:, :L]
