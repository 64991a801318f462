"""One token of a holographic memory as one Pallas kernel through the Triton lowering: bind, forget, write, read, unbind, in place.

A program takes all slots of a few channels of one head, so that all its loads are under way at once. Nothing is rounded before the end.
The gradient is that of the plain form. On a CPU the kernel runs by interpretation.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.binding import PACKED, bind, inverse, unbind
from memjax.ops.recurrence import slot_read, slot_write

TILE = 8192                          # numbers of state that a program of four warps holds in registers


class Plan(NamedTuple):
  """What is fixed while tracing: a program takes `block` channels of each of `parts` (halves of complex pairs, or all)."""
  binding: str
  is_before: bool
  block: int
  parts: int
  is_compiled: bool


def plan_step(binding: str, slots: int, width: int, *, order: str) -> Plan | None:
  """How the kernel takes a head; None where it cannot: binding none, halves that are no whole numbers, slots that are no power of two."""
  parts = 1 if binding in ('bipolar', 'hlb') else 2
  if binding == 'none' or width % parts or slots & (slots - 1): return None
  block = math.gcd(width // parts, 32)
  while block > 1 and block * parts * slots > TILE: block //= 2
  return Plan(binding, order == 'before', block, parts, jax.default_backend() != 'cpu')


def _channels(plan, width):
  """The channels [block] of each part that this program takes, and whether they are real bins: dc and nyquist lead packed spectra."""
  at = pl.program_id(0) * plan.block + jnp.arange(plan.block, dtype=jnp.int32)
  if plan.parts == 1: return (at,), None
  half = width // 2
  if plan.binding not in PACKED: return (at, half + at), None
  return (jnp.where(at == 0, 0, at + 1), jnp.where(at == 0, 1, half + at)), at == 0


def _product(x, y, is_real, sign=1):
  """The products of parts; sign -1: x conjugate."""
  if len(x) == 1: return (x[0] * y[0],)
  (xr, xi), (yr, yi) = x, y
  real, imaginary = xr * yr - sign * xi * yi, xr * yi + sign * xi * yr
  if is_real is None: return real, imaginary
  return jnp.where(is_real, xr * yr, real), jnp.where(is_real, xi * yi, imaginary)


def step_kernel(plan, refs, out):
  """Slots after one token, and what it reads."""
  (S, K), dtype = refs['state'].shape, refs['state'].dtype
  channels, is_real = _channels(plan, K)
  key, value, query = (tuple(refs[name][c].astype(dtype) for c in channels) for name in ('key', 'value', 'query'))
  address, pick = (refs[name][...].astype(dtype)[:, None] for name in ('address', 'pick'))
  places = [(jnp.arange(S, dtype=jnp.int32)[:, None], c[None]) for c in channels]
  old = [plgpu.load(refs['state'].at[place]) for place in places]
  if 'fresh' in refs: old = [jnp.where(refs['fresh'][0] > 0, jnp.zeros_like(m), m) for m in old]
  keep = jnp.exp(refs['log'][...])[:, None] if 'log' in refs else 1
  new = [keep * m + address * x[None] for m, x in zip(old, _product(key, value, is_real), strict=True)]
  if 'written' in refs: new = [jnp.where(refs['written'][0] > 0, x, m) for x, m in zip(new, old, strict=True)]
  if plan.is_compiled: plgpu.debug_barrier()                     # every load in place comes before every store
  for place, m in zip(places, new, strict=True): plgpu.store(out['state'].at[place], m)
  mixed = tuple(jnp.sum(pick * m, 0) for m in (old if plan.is_before else new))
  for c, y in zip(channels, _product(query, mixed, is_real, sign=-1), strict=True): out['y'][c] = y.astype(out['y'].dtype)


def _call(plan, arrays):
  B, H, _, K = arrays['state'].shape
  if plan.binding == 'hlb': arrays = {**arrays, 'query': inverse('hlb', arrays['query'])}           # unbinding is a product with it
  def spec(shape):
    if len(shape) == 1: return pl.BlockSpec((1,), lambda j, h, b: (b,))
    one_row, inner = shape[0] < B, shape[2:]
    return pl.BlockSpec((None, None, *inner), lambda j, h, b: (0 if one_row else b, h, *(0,) * len(inner)))
  like = lambda name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
  shapes = {'state': like('state'), 'y': like('query')}
  return pl.pallas_call(
      functools.partial(step_kernel, plan), out_shape=shapes, grid=(K // (plan.parts * plan.block), H, B), name='step_kernel',
      in_specs=[{n: spec(x.shape) for n, x in arrays.items()}], out_specs={n: spec(s.shape) for n, s in shapes.items()},
      input_output_aliases={sorted(arrays).index('state'): 0}, interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1))(arrays)


def _plain(plan, arrays, flags):
  """The same in XLA."""
  row = lambda flag: flags[flag].reshape(-1, 1, 1, 1) > 0
  a, m = arrays, arrays['state']
  if 'fresh' in flags: m = jnp.where(row('fresh'), 0, m)
  new = slot_write(m, bind(plan.binding, a['key'], a['value']), a['address'], a.get('log'))
  if 'written' in flags: new = jnp.where(row('written'), new, m)
  mixed = slot_read(m if plan.is_before else new, a['pick'][:, None])[:, 0]
  return {'state': new, 'y': unbind(plan.binding, a['query'], mixed.astype(a['query'].dtype))}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(plan, arrays, flags):
  return _call(plan, {**arrays, **flags})


def _step_backward(plan, kept, cotangents):
  arrays, flags = kept
  return jax.vjp(lambda arrays: _plain(plan, arrays, flags), arrays)[1](cotangents)[0], None


_step.defvjp(lambda plan, arrays, flags: (_call(plan, {**arrays, **flags}), (arrays, flags)), _step_backward)


def pallas_step(plan: Plan, state_BxHxSxK, vectors, slots, *, log_keep=None, fresh_B=None, written_B=None):
  """(slots after one token, its reads [B, H, K] in the dtype of its query): unbind(query, sum_s pick_s m_s) with the slots m_s <- keep_s
  m_s + address_s bind(key, value).

  `vectors` (key, value, query), each [B, H, K], in the space of the state; `slots` (address, pick), each [B, H, S]; log keep [B or 1, H,
  S or 1]. Rows are emptied before where fresh, and keep their slots where not written.
  """
  arrays = {'state': state_BxHxSxK, **dict(zip(('key', 'value', 'query', 'address', 'pick'), (*vectors, *slots), strict=True))}
  if log_keep is not None: arrays['log'] = log_keep.astype(state_BxHxSxK.dtype)
  flags = {name: x.astype(jnp.int32) for name, x in (('fresh', fresh_B), ('written', written_B)) if x is not None}
  out = _step(plan, arrays, flags)
  return out['state'], out['y']
