"""RMS norm of what a memory read, head by head, and its gate: out = y / rms(y) (.) scale (.) act(gate).

The plain form; one Pallas kernel through the Triton lowering with one of its gradient, which load every array once where XLA takes two
passes there and four back. On a CPU the kernels run by interpretation.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.backend import uses_kernels
from memjax.ops.pallas_chunk import wide

EPSILON = 1e-6
GATES = {'silu': jax.nn.silu, 'sigmoid': jax.nn.sigmoid}
SHAPES = {'head_norm_kernel': (32, 4), 'head_norm_back_kernel': (32, 4)}           # tokens of 64 channels a program takes, warps


def head_norm(y_BxLxE: jax.Array, scale_E: jax.Array, gate_BxLxE: jax.Array | None = None, *, width: int, activation: str = 'silu',
              dtype: Any, backend: str = 'auto') -> jax.Array:
  """out [B, L, E] in `dtype`: heads of `width` channels, gate None = 1; computed in float32, or in float64 where that is the dtype.
  backend: xla | pallas | auto = pallas where it was timed; shapes that kernels cannot take are XLA's."""
  if uses_kernels(backend, dtype) and supports(y_BxLxE.shape, width):
    return _fused(y_BxLxE, scale_E, gate_BxLxE, width=width, activation=activation, dtype=dtype)
  y = y_BxLxE.astype(wide(dtype)).reshape(*y_BxLxE.shape[:2], -1, width)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPSILON)
  y_BxLxE = (y.reshape(y_BxLxE.shape) * scale_E.astype(y.dtype).reshape(1, 1, -1)).astype(dtype)
  return y_BxLxE if gate_BxLxE is None else y_BxLxE * GATES[activation](gate_BxLxE)


class Plan(NamedTuple):
  """What is fixed while tracing: channels of a head, the gate's activation, the dtype of all large arrays."""
  width: int
  activation: str
  dtype: Any
  is_compiled: bool = True


def _normed(plan, refs):
  """(y / rms(y), 1 / rms(y), scale)."""
  y = refs['y'][...].astype(wide(plan.dtype))
  size = jax.lax.rsqrt(jnp.sum(y * y, 1) / plan.width + EPSILON)[:, None]
  return y * size, size, refs['scale'][...].astype(y.dtype)[None]


def _gated(plan, refs):
  """(act(gate), its slope); (1, None) without a gate."""
  if 'gate' not in refs: return 1, None
  x = refs['gate'][...].astype(wide(plan.dtype))
  gate = 1 / (1 + jnp.exp2(x * -1.4426950408889634))          # to base 2: one instruction raises it
  return (gate, gate * (1 - gate)) if plan.activation == 'sigmoid' else (x * gate, gate * (1 + x * (1 - gate)))


def head_norm_kernel(plan, refs, out):
  """out."""
  unit, _, scale = _normed(plan, refs)
  out['out'][...] = (unit * scale * _gated(plan, refs)[0]).astype(plan.dtype)


def head_norm_back_kernel(plan, refs, out):
  """The cotangents of y and gate, and the program's share in that of the scale."""
  (unit, size, scale), (gate, slope) = _normed(plan, refs), _gated(plan, refs)
  dout = refs['dout'][...].astype(unit.dtype)
  if 'gate' in refs: out['dgate'][...] = (dout * unit * scale * slope).astype(plan.dtype)
  dnormed = dout * gate
  out['dscale'][...] = jnp.sum(dnormed * unit, 0)
  dunit = dnormed * scale
  out['dy'][...] = (size * (dunit - unit * (jnp.sum(dunit * unit, 1)[:, None] / plan.width))).astype(plan.dtype)


def _rows(kernel, plan):
  return max(1, SHAPES[kernel.__name__][0] * 64 // plan.width)


def _call(kernel, plan, arrays, outputs):
  """Runs a kernel over heads and tokens; arrays and outputs (shapes) by name."""
  (M, E), rows = arrays['y'].shape, _rows(kernel, plan)
  head = pl.BlockSpec((plan.width,), lambda h, m: (h,))
  specs = {'scale': head, 'dscale': pl.BlockSpec((None, plan.width), lambda h, m: (m, h))}
  spec = lambda name: specs.get(name, pl.BlockSpec((rows, plan.width), lambda h, m: (m, h)))
  return pl.pallas_call(
      functools.partial(kernel, plan), out_shape=outputs, grid=(E // plan.width, M // rows), name=kernel.__name__,
      in_specs=[{name: spec(name) for name in arrays}], out_specs={name: spec(name) for name in outputs}, interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=SHAPES[kernel.__name__][1], num_stages=1))(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_norm(plan, arrays):
  return _call(head_norm_kernel, plan, arrays, {'out': jax.ShapeDtypeStruct(arrays['y'].shape, plan.dtype)})['out']


def _backward(plan, arrays, dout):
  (M, E), high = dout.shape, wide(plan.dtype)
  shapes = {**{f'd{n}': jax.ShapeDtypeStruct((M, E), plan.dtype) for n in arrays if n != 'scale'},
            'dscale': jax.ShapeDtypeStruct((M // _rows(head_norm_back_kernel, plan), E), high)}
  got = _call(head_norm_back_kernel, plan, {**arrays, 'dout': dout}, shapes)
  got['dscale'] = jnp.sum(got['dscale'], 0)
  return ({name: got[f'd{name}'].astype(a.dtype) for name, a in arrays.items()},)


_head_norm.defvjp(lambda plan, arrays: (_head_norm(plan, arrays), arrays), _backward)


def _fused(y_BxLxE, scale_E, gate_BxLxE, *, width, activation, dtype):
  flat = lambda a: a.astype(dtype).reshape(-1, a.shape[-1])
  plan = Plan(width, activation, jnp.dtype(dtype), jax.default_backend() != 'cpu')
  arrays = {'y': flat(y_BxLxE), 'scale': scale_E} | ({} if gate_BxLxE is None else {'gate': flat(gate_BxLxE)})
  return _head_norm(plan, arrays).reshape(y_BxLxE.shape)


def supports(shape: tuple[int, int, int], width: int) -> bool:
  """Whether the kernels can take reads of this shape [B, L, E] in heads of so many channels: tokens in whole programs."""
  tokens = shape[0] * shape[1]
  return tokens > 0 and tokens % 128 == 0 and shape[2] % width == 0 and 16 <= width <= 128 and not width & (width - 1)
