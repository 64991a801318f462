"""One token of a neural memory as three Pallas kernels through the Triton lowering: all that is large in its state is rewritten in place.

A program takes one row, one head and a block of hidden channels, which meet twice: in what the network makes of the key, and of the query.
There a kernel ends, and what blocks then add up lies in `made` and `read`. Weights are read once, those of the second layer at the anchor
twice. Products are not rounded to the compute dtype, but for those that move a complete chunk into the weights. Refs by name:

    up, down by level; home_*: the learned start; key_ring, hidden_ring, dup_ring, ddown_ring: factors of pending tokens; keys, values,
    gates: those tokens; z, asked [F]: hidden channels of the key at the anchor, and of the query without pending tokens, before silu
    marks: slot of the token (chunk: it does not write), whether it starts a document, whether it completes its chunk
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.neural import Factors, Rule, Weights
from memjax.ops.neural_nets import EPSILON
from memjax.ops.neural_steps import Coefficients
from memjax.ops.pallas_chunk import dot, wide
from memjax.ops.pallas_neural import supports as can_write
from memjax.ops.pallas_neural_kernels import Plan
from memjax.ops.pallas_neural_rows import judge, silu

BLOCK = 64                           # hidden channels of a program


class Token(NamedTuple):
  """One token: query, key, value [B, H, K], weight [B, H, 1], gates as the state keeps them [B, G, H]."""
  query: jax.Array
  key: jax.Array
  value: jax.Array
  weight: jax.Array
  gate: jax.Array


# What a kernel reads, rewrites in place and makes; 'up' and 'down' are all levels of these.
KERNELS = {name: [part.split() for part in parts] for name, parts in {
  'meet_kernel': ('marks key query reach home_up home_down', 'up down key_ring hidden_ring dup_ring ddown_ring keys values gates',
                  'z asked made'),
  'learn_kernel': ('marks key value query weight weigh reach push turn home_down home_gain z asked made',
                   'up down key_ring hidden_ring dup_ring ddown_ring', 'dup read met'),
  'end_kernel': ('marks key value query weight gate weigh home_gain z dup made read met', 'key_ring ddown_ring keys values gates',
                 'y loss norm')}.items()}
# Axes: B rows, H heads, f hidden channels of a program, g programs of a head (one where it is made), the rest whole.
AXES = {name: axes for axes, names in {
  'BX': 'marks', 'BHV': 'key value query home_gain y', 'BHX': 'weight loss norm', 'BHC': 'weigh', 'BHQ': 'reach', 'BHQC': 'push',
  'BHQP': 'turn', 'BYH': 'gate', 'BHKf': 'home_up up0 up1', 'BHfV': 'home_down down0 down1', 'BHf': 'z asked dup', 'BHgV': 'made read',
  'BHgC': 'met', 'BHCK': 'key_ring', 'BHCf': 'hidden_ring dup_ring', 'BHCV': 'ddown_ring', 'BCHV': 'keys values', 'BCYH': 'gates',
  }.items() for name in names.split()}


def _spec(plan, name, shape, *, is_own, is_split):
  """The block of an array on the grid (blocks of hidden channels, heads, rows); is_own: one of what all blocks make."""
  axes = AXES[name].replace('g', 'g' if is_own else 'G').replace('f', 'f' if is_split else 'F')
  block = tuple({'B': None, 'H': None, 'g': None, 'f': plan.block}.get(axis, size) for axis, size in zip(axes, shape, strict=True))
  one_row = shape[0] == 1
  return pl.BlockSpec(block, lambda g, h, b: tuple({'B': 0 if one_row else b, 'H': h, 'g': g, 'f': g}.get(axis, 0) for axis in axes))


def _call(name, plan, arrays):
  """The arrays, with those that a kernel rewrites and makes."""
  each = lambda names: [f'{n}{q}' for n in names if n in ('up', 'down') for q in range(plan.levels)] + [
      n for n in names if n not in ('up', 'down')]
  reads, rewrites, makes = map(each, KERNELS[name])
  (B, H, C, F), V, is_split = arrays['hidden_ring'].shape, arrays['value'].shape[-1], name != 'end_kernel'
  sizes = {'X': (1,), 'V': (V,), 'f': (F,), 'gV': (plan.blocks, V), 'gC': (plan.blocks, C)}
  dtype = arrays['hidden_ring'].dtype
  shapes = {n: jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in rewrites}
  shapes |= {n: jax.ShapeDtypeStruct((B, H, *sizes[AXES[n][2:]]), dtype) for n in makes}
  inputs, outputs = sorted({*reads, *rewrites}), sorted(shapes)
  spec = lambda n, shape: _spec(plan, n, shape, is_own=n in makes, is_split=is_split)
  return arrays | pl.pallas_call(
      functools.partial(globals()[name], plan), out_shape=shapes, grid=(plan.blocks if is_split else 1, H, B), name=name,
      in_specs=[{n: spec(n, arrays[n].shape) for n in inputs}], out_specs={n: spec(n, s.shape) for n, s in shapes.items()},
      input_output_aliases={inputs.index(n): outputs.index(n) for n in rewrites}, interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=4 if V <= 64 else 8, num_stages=1))({n: arrays[n] for n in inputs})


def _fence(plan):
  """All loads of a program in place come before its stores."""
  if plan.is_compiled: plgpu.debug_barrier()


def _clear(out, names):
  for name in names: out[name][...] = jnp.zeros(out[name].shape, out[name].dtype)


def _clear_tokens(out):
  """Forgets what all blocks of hidden channels share."""
  _clear(out, ('key_ring', 'ddown_ring', 'keys', 'values'))
  for y in range(out['gates'].shape[1]): out['gates'][:, y] = jnp.zeros(out['gates'].shape[:1], out['gates'].dtype)


def _vector(refs, name):
  x = refs[name][...]
  return x.astype(wide(x.dtype))


def _levels(plan, refs, side):
  return [refs[f'{side}{q}'][...] for q in range(plan.levels)]


def _as_read(plan, refs, home, levels):
  """The weights that the token reads, without pending tokens."""
  return home + sum(refs['reach'][q] * levels[q] for q in range(plan.levels))


def _judge(plan, refs):
  """(d of the second layer [V], loss [1]) of the token at the anchor."""
  rows = [_vector(refs, name)[None] for name in ('key', 'value')]
  made = jnp.sum(refs['made'][...], 0)[None]
  d, _, loss = judge(plan.scale, made, (*rows, refs['weight'][...], refs['home_gain'][...]))
  return jnp.sum(d, 0), loss


def meet_kernel(plan, refs, out):
  """Hidden channels of the key and the query, and what the network makes of the key; forgets all where a document starts."""
  is_fresh, key, query = refs['marks'][1] > 0, _vector(refs, 'key'), _vector(refs, 'query')
  held = lambda levels: [jnp.where(is_fresh, jnp.zeros_like(m), m) for m in levels]
  home, levels = refs['home_up'][...], held(_levels(plan, refs, 'up'))
  z = jnp.sum(key[:, None] * (home + levels[0]), 0)
  out['z'][...] = z
  out['asked'][...] = jnp.sum(query[:, None] * _as_read(plan, refs, home, levels), 0)
  anchor = refs['home_down'][...] + held([refs['down0'][...]])[0]
  out['made'][...] = jnp.sum(silu(z)[0][:, None] * anchor, 0)
  _fence(plan)

  @pl.when(is_fresh)
  def _(): _clear(out, ('hidden_ring', 'dup_ring', *(f'{side}{q}' for side in ('up', 'down') for q in range(plan.levels))))

  @pl.when(is_fresh & (pl.program_id(0) == 0))
  def _(): _clear_tokens(out)


def learn_kernel(plan, refs, out):
  """The factors of the token among those of its chunk, what the network makes of the query, and the weights where the chunk is complete."""
  slot, C = refs['marks'][0], refs['key_ring'].shape[0]
  is_here = (jnp.arange(C, dtype=jnp.int32) == slot)[:, None]
  ring = lambda name, x: jnp.where(is_here, x[None], refs[name][...])
  d, _ = _judge(plan, refs)
  h, slope, _ = silu(refs['z'][...])
  home, levels = refs['home_down'][...], _levels(plan, refs, 'down')
  dup = slope * jnp.sum((home + levels[0]) * d[None], 1)
  out['dup'][...] = dup
  key = _vector(refs, 'key')
  keys, hidden, dups = ring('key_ring', key), ring('hidden_ring', h), ring('dup_ring', dup)
  seen = -refs['weigh'][...] * jnp.sum(keys * _vector(refs, 'query')[None], 1)
  asked = silu(refs['asked'][...] + jnp.sum(seen[:, None] * dups, 0))[0]
  out['read'][...] = jnp.sum(asked[:, None] * _as_read(plan, refs, home, levels), 0)
  out['met'][...] = jnp.sum(hidden * asked[None], 1)
  ddowns = ring('ddown_ring', d)
  _fence(plan)

  @pl.when(slot < C)
  def _():
    out['hidden_ring'][slot, :], out['dup_ring'][slot, :] = h, dup

  @pl.when((slot < C) & (pl.program_id(0) == 0))
  def _():
    out['key_ring'][slot, :], out['ddown_ring'][slot, :] = key, d

  @pl.when(refs['marks'][2] > 0)
  def _():
    _commit(plan, (refs, out), 'up', (keys, dups))
    _commit(plan, (refs, out), 'down', (hidden, ddowns))
    _fence(plan)
    _clear(out, ('hidden_ring', 'dup_ring'))


def _commit(plan, given, side, factors):
  """Levels after the chunk: turn M - push (A, D)."""
  (refs, out), (a, d), levels = given, factors, range(plan.levels)
  old = _levels(plan, refs, side)
  _fence(plan)
  for p in levels:
    pushed = dot(a, refs['push'][p][:, None] * d, plan.dtype, left=0)
    out[f'{side}{p}'][...] = sum(refs['turn'][p, q] * old[q] for q in levels if q >= p) - pushed


def end_kernel(plan, refs, out):
  """What the token reads, its loss and the norm of its gradient; the token among those of its chunk, which go where it is complete."""
  slot, C, gain = refs['marks'][0], refs['keys'].shape[0], 1 + refs['home_gain'][...]
  seen = -refs['weigh'][...] * jnp.sum(refs['met'][...], 0)
  made = jnp.sum(refs['read'][...], 0) + jnp.sum(seen[:, None] * refs['ddown_ring'][...], 0)
  made -= jnp.sum(made) / made.shape[0]
  unit = made * jax.lax.rsqrt(jnp.sum(made * made) / made.shape[0] + EPSILON)
  out['y'][...] = _vector(refs, 'query') + gain * unit
  d, out['loss'][...] = _judge(plan, refs)
  square = lambda x: jnp.sum(x * x)
  key, weight = _vector(refs, 'key'), refs['weight'][...]
  both = square(key) * square(refs['dup'][...]) + square(silu(refs['z'][...])[0]) * square(d)
  out['norm'][...] = jnp.sqrt(jnp.maximum(both, 1e-24)) / jnp.where(weight > 0, weight, 1)
  _fence(plan)

  @pl.when(slot < C)
  def _():
    out['keys'][slot, :], out['values'][slot, :] = key.astype(out['keys'].dtype), _vector(refs, 'value').astype(out['values'].dtype)
    for y in range(out['gates'].shape[1]): out['gates'][slot, y] = refs['gate'][y]

  @pl.when(refs['marks'][2] > 0)
  def _():
    _fence(plan)
    _clear_tokens(out)


def supports(rule: Rule, chunk: int) -> bool:
  """Whether the kernels can take one token: what can be written in chunks, with a slow gain."""
  return can_write(rule, chunk) and rule.network.slow_gain


def neural_step(rule: Rule, start: Weights, held: tuple, token: Token, *, coefficients: Coefficients, marks_Bx3: jax.Array) -> tuple:
  """((memory, rings), y [B, H, V], factors of the token without a and d) after one token.

  `held`: (memory by name and level, rings: a_w_0, a_w_1, d_w_0, d_w_1, key, value, gate as in `Pending`). coefficients: weigh [B, H, 1, C]
  and reach [B, H, Q, 1] of its read; push and turn of its chunk with it. marks: its slot (C: it does not write), whether it starts a
  document, whether it completes its chunk. `start` may have one row for all.
  """
  memory, rings = held
  sides, names = {'up': 'w_0', 'down': 'w_1'}, {'key_ring': 'a_w_0', 'hidden_ring': 'a_w_1', 'dup_ring': 'd_w_0', 'ddown_ring': 'd_w_1',
                                                'keys': 'key', 'values': 'value', 'gates': 'gate'}
  F, Q = rule.network.widths[0][1], rule.levels
  block = min(F, BLOCK)
  plan = Plan(Q, 1, rule.scale, rule.dtype, jax.default_backend() != 'cpu', blocks=F // block, block=block, tile=block)
  arrays = {f'{side}{q}': memory[name][q] for side, name in sides.items() for q in range(Q)} | {n: rings[r] for n, r in names.items()}
  arrays |= {'home_up': start.fast['w_0'], 'home_down': start.fast['w_1'], 'home_gain': start.slow['gain'][None], 'marks': marks_Bx3}
  arrays |= {**token._asdict(), 'weigh': coefficients.weigh[:, :, 0], 'reach': coefficients.reach[..., 0]}
  arrays |= {'gate': token.gate.astype(rings['gate'].dtype), 'push': coefficients.push, 'turn': coefficients.turn}
  for name in KERNELS: arrays = _call(name, plan, arrays)
  memory = {name: tuple(arrays[f'{side}{q}'] for q in range(Q)) for side, name in sides.items()}
  told = Factors(None, None, arrays['loss'], arrays['norm'], jnp.ones_like(arrays['norm']))
  return (memory, {r: arrays[n] for n, r in names.items()}), arrays['y'], told
