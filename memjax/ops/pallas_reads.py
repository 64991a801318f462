"""The reads of a neural memory as one Pallas kernel through the Triton lowering, and two of their gradient.

Equal to `neural_reads.read_prepared`. The gradient keeps what was read, outputs before their norm and one product of tokens with
tokens; hidden channels are computed again. On a CPU the kernels run by interpretation.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops import pallas_reads_kernels as kernels
from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_reads import Prepared
from memjax.ops.neural_steps import Coefficients
from memjax.ops.pallas_chunk import wide
from memjax.ops.pallas_reads_kernels import Plan

ACTIVATIONS = ('silu', 'relu', 'tanh')            # those that Triton has
WEIGHTS = ('hidden', 'up', 'down')                # whose cotangents the last kernel writes, with those of the learned start
HIDDEN = {**dict.fromkeys(('hidden', 'h', 'dz', 'up', 'home_up'), -1), **dict.fromkeys(('down', 'home_down'), -2)}      # axes of F channels

READS = {name: names.split() for name, names in {
  'read_kernel': 'query key up hidden down d gain pushed reach weigh home_up home_down home_gain',
  'norm_kernel': 'made met dy d gain pushed reach weigh home_gain',
  'token_kernel': 'query key up hidden down reach weigh home_up home_down dmade dmet some_weigh some_reach dy',
  'weight_kernel': 'query reach h dz seen dmade dmet'}.items()}


class Launch(NamedTuple):
  """(warps, hidden channels at a time, stages of the loop's loads) of each kernel; chunks of a program of the last one."""
  read_kernel: tuple[int, int, int] = (4, 32, 3)
  norm_kernel: tuple[int, int, int] = (4, 32, 1)
  token_kernel: tuple[int, int, int] = (4, 32, 2)
  weight_kernel: tuple[int, int, int] = (4, 64, 2)
  chunks: int = 8


# Measured on an H200 with chunks of 64 tokens, keys of 64 and 256 hidden channels in bf16: four warps, because eight share the rows of one
# product and repeat each other; two stages or three, because loads then pass by the registers.
LAUNCH = Launch()
LARGEST = 64                                      # tokens and channels of keys: of more, kernels spill and XLA is faster


def _call(kernel, static, arrays, outputs, *, grid, spec):
  """Runs a kernel; arrays and outputs (shapes) by name, of which `spec` tells the blocks."""
  plan, launch = static
  warps, _, stages = getattr(launch, kernel.__name__)
  arrays = {n: arrays[n] for n in READS[kernel.__name__] if n in arrays}
  specs = lambda given: {n: spec(n, x.shape) for n, x in given.items()}
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=grid, name=kernel.__name__, in_specs=[specs(arrays)],
      out_specs=specs(outputs), interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))(arrays)


def _planned(kernel, static, F):
  """The plan of a kernel with its blocks of hidden channels."""
  plan, launch = static
  block = min(F, getattr(launch, kernel.__name__)[1])
  return plan._replace(block=block, blocks=F // block), launch


def _over_tokens(kernel, static, arrays, outputs):
  """Runs a kernel over heads and rows; arrays of fewer rows are repeated. Matrices of the learned start become operands. Reads and their
  cotangents lie as their readers want them, [B, L, E]."""
  (NB, H, C), B = arrays['weigh'].shape[:3], static[0].rows
  arrays = {n: x.astype(static[0].dtype) if n in ('home_up', 'home_down') else x for n, x in arrays.items()}
  def spec(name, shape):
    if name in ('y', 'dy'): return pl.BlockSpec((None, C, shape[2] // H), lambda h, b: (b % B, b // B, h))
    rows, inner = shape[0], (0,) * (len(shape) - 2)
    return pl.BlockSpec((None, None, *shape[2:]), lambda h, b: (b if rows == NB else b % rows, h, *inner))
  return _call(kernel, _planned(kernel, static, arrays['hidden'].shape[-1]), arrays, outputs, grid=(H, NB), spec=spec)


def _over_weights(static, arrays, outputs, rows):
  """Runs `weight_kernel` over blocks of hidden channels, heads and groups of chunks; every `rows` arrays have the same learned start, whose
  cotangents become sums over the chunks of a group."""
  NB, H, _, F = arrays['h'].shape
  plan, launch = _planned(kernels.weight_kernel, static, F)
  size = math.gcd(NB // rows, launch.chunks)
  groups = NB // (rows * size)
  def spec(name, shape):
    inner = [plan.block if axis - len(shape) == HIDDEN.get(name) else size for axis, size in enumerate(shape)]
    lead = (None, None, None) if name.startswith('home') else (None, size, None, None)
    def at(j, h, g):
      own = [j if axis - len(shape) == HIDDEN.get(name) else 0 for axis in range(len(lead), len(shape))]
      return (g // rows, g % rows, h, *own) if name.startswith('home') else (g // rows, 0, g % rows, h, *own)
    return pl.BlockSpec((*lead, *inner[len(lead):]), at)
  cut = lambda shape: (groups, size, rows, *shape[1:])
  shapes = {n: jax.ShapeDtypeStruct((groups, *x.shape) if n.startswith('home') else cut(x.shape), x.dtype) for n, x in outputs.items()}
  arrays = {n: arrays[n].reshape(cut(arrays[n].shape)) for n in READS['weight_kernel']}
  got = _call(kernels.weight_kernel, (plan, launch), arrays, shapes, grid=(plan.blocks, H, groups * rows), spec=spec)
  return {n: jnp.sum(x, 0) if n.startswith('home') else x.reshape(outputs[n].shape) for n, x in got.items()}


def _reads(static, query):
  (NB, H, C, V), B = query.shape, static[0].rows
  return {'y': jax.ShapeDtypeStruct((B, NB // B * C, H * V), query.dtype)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(static, arrays):
  return _over_tokens(kernels.read_kernel, static, arrays, _reads(static, arrays['query']))['y']


def _read_forward(static, arrays):
  dtype = static[0].dtype
  shapes = _reads(static, arrays['query']) | {'made': jax.ShapeDtypeStruct(arrays['d'].shape, dtype),
                                              'met': jax.ShapeDtypeStruct(arrays['weigh'].shape, dtype)}
  out = _over_tokens(kernels.read_kernel, static, arrays, shapes)
  return out.pop('y'), (arrays, out)


def _read_backward(static, kept, dy):
  dtype, (arrays, made) = static[0].dtype, kept
  like = lambda name, dtype: jax.ShapeDtypeStruct(arrays[name].shape, dtype)
  same = lambda *names: {n: like(n, arrays[n].dtype) for n in names}
  shapes = {**same('d'), 'dmade': like('d', dtype), 'dmet': like('weigh', dtype), 'some_weigh': like('weigh', dtype)}
  if 'gain' in arrays: shapes |= {**same('gain', 'pushed'), 'some_reach': like('reach', wide(dtype))}
  if 'home_gain' in arrays:
    shapes['home_gain'] = jax.ShapeDtypeStruct((arrays['weigh'].shape[0], *arrays['home_gain'].shape[1:]), wide(dtype))
  got = _over_tokens(kernels.norm_kernel, static, {**arrays, **made, 'dy': dy}, shapes)
  shared = {n: got.pop(n) for n in ('dmade', 'dmet', 'some_weigh', 'some_reach') if n in got}
  shapes = {**same('query', 'key', 'reach', 'weigh'), 'h': like('hidden', dtype), 'dz': like('hidden', dtype), 'seen': like('weigh', dtype)}
  got |= _over_tokens(kernels.token_kernel, static, {**arrays, **shared, 'dy': dy}, shapes)
  shared |= {n: got.pop(n) for n in ('h', 'dz', 'seen')}
  home = {n: like(n, wide(dtype)) for n in ('home_up', 'home_down') if n in arrays}
  got |= _over_weights(static, {**arrays, **shared}, same(*WEIGHTS) | home, arrays['home_up'].shape[0] if home else 1)
  if 'home_gain' in got: got['home_gain'] = jnp.sum(got['home_gain'].reshape(-1, *arrays['home_gain'].shape), 0)
  return ({n: got[n].astype(x.dtype) for n, x in arrays.items()},)


_read.defvjp(_read_forward, _read_backward)


def supports(rule: Rule, weigh: jax.Array) -> bool:
  """Whether the kernels can read chunks with these coefficients [.., C, C]: two layers, residual, one gradient a
  token, sizes that are powers of two."""
  net, (C, P) = rule.network, weigh.shape[-2:]
  K, V, F = net.key_width, net.value_width, net.widths[0][1]
  mlp = net.kind == 'mlp' and net.depth == 2 and net.residual and not net.bias
  fits = rule.dtype == jnp.bfloat16 or jax.default_backend() == 'cpu'         # wider tiles need more shared memory than there is
  return (mlp and fits and net.activation in ACTIVATIONS and K == V < F and C == P
          and all(size >= 16 and size & (size - 1) == 0 for size in (K, F, C)) and max(K, C) <= LARGEST)


def read_prepared_fused(rule: Rule, start: Weights, seen: Prepared, query: jax.Array, *, coefficients: Coefficients,
                        rows: int | None = None, launch: Launch | None = None) -> jax.Array:
  """y [N B, H, C, V] in the dtype of `query`: `read_prepared` of what `supports` tells of. `start` may have fewer rows, also one.

  rows: B, None = all: y lies as [B, N C, H V] in memory, so that putting chunks of a text together moves nothing."""
  arrays = {'query': query, 'key': seen.a['w_0'], 'hidden': seen.a['w_1'], 'up': seen.parts['w_0'][0], 'down': seen.parts['w_1'][0],
            'd': seen.parts['w_1'][1], 'reach': coefficients.reach, 'weigh': coefficients.weigh}
  has_home, is_slow = rule.decay_to == 'init', rule.network.slow_gain
  if has_home: arrays |= {'home_up': start.fast['w_0'], 'home_down': start.fast['w_1']}
  if is_slow: arrays['home_gain'] = start.slow['gain'][None]
  else: arrays |= dict(zip(('gain', 'pushed'), seen.parts['gain'], strict=True)) | ({'home_gain': start.fast['gain']} if has_home else {})
  (NB, H, C, V), rows = query.shape, rows or query.shape[0]
  plan = Plan(rows, rule.levels, 0, 0, rule.network.activation, rule.dtype, jax.default_backend() != 'cpu')
  y = _read((plan, launch or LAUNCH), arrays).reshape(rows, NB // rows, C, H, V)
  return y.transpose(1, 0, 3, 2, 4).reshape(query.shape)
