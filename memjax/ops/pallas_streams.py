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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.pallas_chunk import KEPT, wide

EPSILON = 1e-6
SHAPES = {'stream_kernel': (64, 4), 'mixed_back_kernel': (32, 4), 'shifted_back_kernel': (32, 1)}    # tokens of 64 channels, warps


class Plan(NamedTuple):
  """What is fixed while tracing: tokens of a chunk, channels of a head, whether these become unit vectors; tokens of a program."""
  chunk: int
  width: int
  has_norm: bool
  dtype: Any
  is_compiled: bool = True
  rows: int = 0

  def of(self, kernel):
    """The plan of a kernel."""
    return self._replace(rows=min(self.chunk, SHAPES[kernel.__name__][0] * 64 // self.width))


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


def _scale(s):
  return jax.lax.rsqrt(jnp.sum(s * s, 1) + EPSILON)[:, None]


def _gate(u):
  return 1 / (1 + jnp.exp2(u * -1.4426950408889634))          # to base 2: one instruction raises it


def stream_kernel(plan, refs, out):
  """y, and u where its gradient is wanted."""
  u = sum(refs['taps'][w].astype(wide(plan.dtype))[None] * _shifted(plan, refs, w) for w in range(refs['taps'].shape[0]))
  if 'u' in out: out['u'][_tokens(plan)] = u.astype(plan.dtype)
  s = u * _gate(u)
  out['y'][...] = (s * _scale(s) if plan.has_norm else s).astype(plan.dtype)


def mixed_back_kernel(plan, refs, out):
  """The cotangent of u, rounded."""
  t = _tokens(plan)
  u, ds = refs['u'][t].astype(wide(plan.dtype)), refs['dy'][...].astype(wide(plan.dtype))
  gate = _gate(u)
  s = u * gate
  if plan.has_norm:
    size = _scale(s)
    ds = size * (ds - s * (size * size * jnp.sum(ds * s, 1)[:, None]))
  out['du'][t] = (ds * (gate + s * (1 - gate))).astype(plan.dtype)


def shifted_back_kernel(plan, refs, out):
  """The cotangent of x, from what the tokens after each one took of it, and the share of these x in those of the taps."""
  t, L, dx, x = _tokens(plan), refs['du'].shape[0], 0, refs['x'][_tokens(plan)].astype(wide(plan.dtype))
  for w in range(refs['taps'].shape[0]):
    row = jnp.minimum(t + w, L - 1)
    takes = (t + w < L) & (refs['segment'][row] == refs['segment'][t])
    du = jnp.where(takes[:, None], refs['du'][row], jnp.zeros((), plan.dtype)).astype(x.dtype)
    dx += refs['taps'][w].astype(x.dtype)[None] * du
    out['dtaps'][w] = jnp.sum(du * x, 0)
  out['dx'][t] = dx.astype(plan.dtype)


def _call(kernel, plan, arrays, outputs):
  """Runs a kernel over heads, chunks and rows; arrays and outputs (shapes) by name."""
  plan, K, (B, L, E) = plan.of(kernel), plan.width, arrays.get('x', arrays.get('u')).shape
  tokens, row = pl.BlockSpec((None, L, K), lambda h, n, b: (b, 0, h)), pl.BlockSpec((None, L), lambda h, n, b: (b, 0))
  each = plan.chunk // plan.rows
  chunks = pl.BlockSpec((None, None, None, plan.rows, K), lambda h, n, b: (n // each, b, h, n % each, 0))
  specs = {**dict.fromkeys(('x', 'u', 'du', 'dx'), tokens), 'segment': row, **dict.fromkeys(('y', 'dy'), chunks)}
  def spec(name, shape):
    if name == 'taps': return pl.BlockSpec((shape[0], K), lambda h, n, b: (0, h))
    if name == 'before': return pl.BlockSpec((None, shape[1], K), lambda h, n, b: (b, 0, h))
    if name == 'dtaps': return pl.BlockSpec((None, None, shape[2], K), lambda h, n, b: (b, n, 0, h))
    return specs[name]
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=(E // K, L // plan.rows, B), name=kernel.__name__,
      in_specs=[{n: spec(n, x.shape) for n, x in arrays.items()}], out_specs={n: spec(n, x.shape) for n, x in outputs.items()},
      interpret=not plan.is_compiled, compiler_params=plgpu.CompilerParams(num_warps=SHAPES[kernel.__name__][1], num_stages=1))(arrays)


def _forward(plan, arrays, segment, *, keeps):
  (B, L, E), C, K = arrays['x'].shape, plan.chunk, plan.width
  shapes = {'y': (L // C, B, E // K, C, K)} | ({'u': (B, L, E)} if keeps else {})
  return _call(stream_kernel, plan, {**arrays, 'segment': segment}, {n: jax.ShapeDtypeStruct(x, plan.dtype) for n, x in shapes.items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(plan, arrays, segment):
  return _forward(plan, arrays, segment, keeps=False)['y']


def _stream_forward(plan, arrays, segment):
  made = _forward(plan, arrays, segment, keeps=True)
  return made['y'], (arrays, segment, checkpoint_name(made['u'], KEPT))


def _stream_backward(plan, saved, dy):
  arrays, segment, u = saved
  (B, L, E), W, high = arrays['x'].shape, arrays['taps'].shape[0], wide(plan.dtype)
  shape = jax.ShapeDtypeStruct((B, L, E), plan.dtype)
  given = {'du': _call(mixed_back_kernel, plan, {'u': u, 'dy': dy}, {'du': shape})['du'], **arrays, 'segment': segment}
  before = given.pop('before').astype(high)
  many = L // plan.of(shifted_back_kernel).rows
  got = _call(shifted_back_kernel, plan, given, {'dx': shape, 'dtaps': jax.ShapeDtypeStruct((B, many, W, E), high)})
  first = jnp.where((segment[:, :W - 1] == 0)[..., None], given['du'][:, :W - 1].astype(high), 0)      # tokens that reach into `before`
  taken = lambda back: sum(arrays['taps'][w].astype(high)[None] * first[:, w - back] for w in range(back, W))
  from_before = lambda w: sum((jnp.sum(first[:, t] * before[:, W - 1 + t - w], 0) for t in range(w)), jnp.zeros((E,), high))
  dtaps = jnp.sum(got['dtaps'], (0, 1)) + jnp.stack([from_before(w) for w in range(W)])
  cotangents = {'x': got['dx'], 'taps': dtaps, 'before': jnp.stack([taken(W - 1 - place) for place in range(W - 1)], 1)}
  return {name: a.astype(arrays[name].dtype) for name, a in cotangents.items()}, None


_stream.defvjp(_stream_forward, _stream_backward)


def stream(x_BxLxE: jax.Array, taps_WxE: jax.Array, before_BxTxE: jax.Array, segment_BxL: jax.Array, *, chunk: int, width: int,
           has_norm: bool) -> jax.Array:
  """y [N, B, H, chunk, width] in the dtype of x, heads of `width` channels side by side in x; L = N chunk tokens.

  `before`: the last W - 1 tokens before the call, which belong to segment 0; W >= 2. Equal to `short_conv`, silu and the norm of heads,
  with u and its gradient rounded to the dtype of x for the gradient.
  """
  plan = Plan(chunk, width, has_norm, x_BxLxE.dtype, jax.default_backend() != 'cpu')
  return _stream(plan, {'x': x_BxLxE, 'taps': taps_WxE, 'before': before_BxTxE.astype(x_BxLxE.dtype)}, segment_BxL)


def supports(length: int, chunk: int, width: int) -> bool:
  """Whether the kernels can take heads of so many channels in whole chunks of so many tokens."""
  return length > 0 and length % chunk == 0 and all(16 <= size <= 128 and not size & (size - 1) for size in (chunk, width))
