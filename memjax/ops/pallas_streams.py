"""From a projection to what a memory reads in chunks, in one Pallas kernel through the Triton lowering, and two of its gradient.

    u_t = sum_w taps_w (.) x_{t-w}        y = silu(u), or silu(u) / |silu(u)| over the channels of a head

A program takes some tokens of one head, and writes them where the chunks of a memory lie, [N, B, H, C, K]: what is shifted is loaded
again, nothing is stored in between or turned around. Taps that would reach into another document are 0. On a CPU the kernels run by
interpretation.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.pallas_chunk import wide

EPSILON = 1e-6
ROWS = 32              # tokens of a program: few, so that several share a multiprocessor


class Plan(NamedTuple):
  """What is fixed while tracing: tokens of a chunk and of a program, channels of a head, whether these become unit vectors."""
  chunk: int
  rows: int
  width: int
  has_norm: bool
  dtype: Any
  is_compiled: bool = True


def _tokens(plan):
  return pl.program_id(1) * plan.rows + jax.lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)


def _shifted(plan, refs, w):
  """x_{t-w} of the program's tokens, from `before` where that lies before the call; 0 in another document."""
  t = _tokens(plan)
  row, last, same = t - w, refs['before'].shape[0], refs['segment'][t]
  x, segment = refs['x'][jnp.maximum(row, 0)], refs['segment'][jnp.maximum(row, 0)]
  if w:
    is_here = row >= 0
    x = jnp.where(is_here[:, None], x, refs['before'][jnp.clip(last + row, 0, last - 1)])
    x = jnp.where((jnp.where(is_here, segment, 0) == same)[:, None], x, jnp.zeros_like(x))
  return x.astype(wide(plan.dtype))


def _mixed(plan, refs):
  """(u, the shifted x by tap)."""
  shifted = [_shifted(plan, refs, w) for w in range(refs['taps'].shape[0])]
  return sum(refs['taps'][w].astype(x.dtype)[None] * x for w, x in enumerate(shifted)), shifted


def _scale(s):
  return jax.lax.rsqrt(jnp.sum(s * s, 1) + EPSILON)[:, None]


def stream_kernel(plan, refs, out):
  """y."""
  u, _ = _mixed(plan, refs)
  s = u * jax.nn.sigmoid(u)
  out['y'][...] = (s * _scale(s) if plan.has_norm else s).astype(plan.dtype)


def mixed_back_kernel(plan, refs, out):
  """The cotangent of u, rounded, and these tokens' share of those of the taps."""
  (u, shifted), ds = _mixed(plan, refs), refs['dy'][...].astype(wide(plan.dtype))
  gate = jax.nn.sigmoid(u)
  if plan.has_norm:
    s = u * gate
    size = _scale(s)
    ds = size * (ds - s * (size * size * jnp.sum(ds * s, 1)[:, None]))
  du = (ds * gate * (1 + u * (1 - gate))).astype(plan.dtype)
  out['du'][_tokens(plan)] = du
  for w, x in enumerate(shifted): out['dtaps'][w] = jnp.sum(du.astype(x.dtype) * x, 0)


def shifted_back_kernel(plan, refs, out):
  """The cotangent of x: what the tokens after each one took of it."""
  t, L, dx = _tokens(plan), refs['du'].shape[0], 0
  for w in range(refs['taps'].shape[0]):
    row = jnp.minimum(t + w, L - 1)
    du = refs['du'][row].astype(wide(plan.dtype))
    takes = (t + w < L) & (refs['segment'][row] == refs['segment'][t])
    dx += jnp.where(takes[:, None], refs['taps'][w].astype(du.dtype)[None] * du, jnp.zeros_like(du))
  out['dx'][t] = dx.astype(plan.dtype)


def _call(kernel, plan, arrays, outputs):
  """Runs a kernel over heads, chunks and rows; arrays and outputs (shapes) by name."""
  K, (B, L, E) = plan.width, arrays.get('x', arrays.get('du')).shape
  tokens, row = pl.BlockSpec((None, L, K), lambda h, n, b: (b, 0, h)), pl.BlockSpec((None, L), lambda h, n, b: (b, 0))
  each = plan.chunk // plan.rows
  chunks = pl.BlockSpec((None, None, None, plan.rows, K), lambda h, n, b: (n // each, b, h, n % each, 0))
  specs = {**dict.fromkeys(('x', 'du', 'dx'), tokens), 'segment': row, **dict.fromkeys(('y', 'dy'), chunks)}
  def spec(name, shape):
    if name == 'taps': return pl.BlockSpec((shape[0], K), lambda h, n, b: (0, h))
    if name == 'before': return pl.BlockSpec((None, shape[1], K), lambda h, n, b: (b, 0, h))
    if name == 'dtaps': return pl.BlockSpec((None, None, shape[2], K), lambda h, n, b: (b, n, 0, h))
    return specs[name]
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=(E // K, L // plan.rows, B), name=kernel.__name__,
      in_specs=[{n: spec(n, x.shape) for n, x in arrays.items()}], out_specs={n: spec(n, x.shape) for n, x in outputs.items()},
      interpret=not plan.is_compiled, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1))(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(plan, arrays, segment):
  (B, L, E), C, K = arrays['x'].shape, plan.chunk, plan.width
  shape = jax.ShapeDtypeStruct((L // C, B, E // K, C, K), plan.dtype)
  return _call(stream_kernel, plan, {**arrays, 'segment': segment}, {'y': shape})['y']


def _stream_backward(plan, kept, dy):
  arrays, segment = kept
  (B, L, E), W, high = arrays['x'].shape, arrays['taps'].shape[0], wide(plan.dtype)
  shapes = {'du': jax.ShapeDtypeStruct((B, L, E), plan.dtype), 'dtaps': jax.ShapeDtypeStruct((B, L // plan.rows, W, E), high)}
  got = _call(mixed_back_kernel, plan, {**arrays, 'segment': segment, 'dy': dy}, shapes)
  given = {'taps': arrays['taps'], 'du': got['du'], 'segment': segment}
  dx = _call(shifted_back_kernel, plan, given, {'dx': jax.ShapeDtypeStruct((B, L, E), plan.dtype)})['dx']
  first = jnp.where((segment[:, :W - 1] == 0)[..., None], got['du'][:, :W - 1].astype(high), 0)
  taken = lambda back: sum(arrays['taps'][w].astype(high)[None] * first[:, w - back] for w in range(back, W))
  dbefore = jnp.stack([taken(W - 1 - place) for place in range(W - 1)], 1)
  cotangents = {'x': dx, 'taps': jnp.sum(got['dtaps'], (0, 1)), 'before': dbefore}
  return {name: a.astype(arrays[name].dtype) for name, a in cotangents.items()}, None


_stream.defvjp(lambda plan, arrays, segment: (_stream(plan, arrays, segment), (arrays, segment)), _stream_backward)


def stream(x_BxLxE: jax.Array, taps_WxE: jax.Array, before_BxTxE: jax.Array, segment_BxL: jax.Array, *, chunk: int, width: int,
           has_norm: bool) -> jax.Array:
  """y [N, B, H, chunk, width] in the dtype of x, heads of `width` channels side by side in x; L = N chunk tokens.

  `before`: the last W - 1 tokens before the call, which belong to segment 0; W >= 2. Equal to `short_conv`, silu and the norm of heads,
  with the gradient of u rounded to the dtype of x.
  """
  plan = Plan(chunk, min(chunk, ROWS), width, has_norm, x_BxLxE.dtype, jax.default_backend() != 'cpu')
  return _stream(plan, {'x': x_BxLxE, 'taps': taps_WxE, 'before': before_BxTxE.astype(x_BxLxE.dtype)}, segment_BxL)


def supports(length: int, chunk: int, width: int) -> bool:
  """Whether the kernels can take heads of so many channels in whole chunks of so many tokens."""
  return length > 0 and length % chunk == 0 and all(16 <= size <= 128 and not size & (size - 1) for size in (chunk, width))
