"""The writes of a neural memory as Pallas kernels through the Triton lowering: three a chunk, and three a chunk of their gradient.

Equal to `factors`, `commit` and `prepare` of one chunk after the other. Arrays of all chunks are rewritten in place, a chunk at a time,
so that nothing is copied, and only what reads need is kept for the gradient. On a CPU the kernels run by interpretation.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops import pallas_neural_kernels as kernels
from memjax.ops.neural import Rule, Tokens, Weights, squared_norms
from memjax.ops.neural_reads import Prepared
from memjax.ops.neural_steps import Coefficients
from memjax.ops.pallas_neural_kernels import Plan


class Shape(NamedTuple):
  """Warps of a program; its hidden channels, of which it holds a tile at a time; tiles of which loads are under way together."""
  warps: int = 4
  block: int = 128
  tile: int = 32
  stages: int = 2


class Launch(NamedTuple):
  """How each kernel runs; tokens of a program that judges."""
  write_kernel: Shape = Shape(tile=16, stages=3)
  judge_kernel: Shape = Shape()
  push_back_kernel: Shape = Shape(block=256, stages=3)
  judge_back_kernel: Shape = Shape()
  find_back_kernel: Shape = Shape(block=256, tile=64)
  rows: int = 16

  def plan(self, plan, kernel, hidden):
    """The plan of a kernel where there are so many hidden channels."""
    shape = getattr(self, kernel)
    block = min(hidden, shape.block)
    return plan._replace(blocks=hidden // block, block=block, tile=min(block, shape.tile))


class Arrays(NamedTuple):
  """What a kernel reads, and what it rewrites in place ('up' and 'down' are all levels of these; a gain that is not fast has no arrays)."""
  reads: tuple[str, ...]
  rewrites: tuple[str, ...]


class Call(NamedTuple):
  """A kernel, its programs for each block of hidden channels (0: for tokens), what it does of what it can."""
  kernel: str
  arrays: Arrays
  programs: int = 0
  does: tuple[tuple[str, bool], ...] = ()


SHORT = Launch()                                                     # for chunks of up to 64 tokens; LONG: for longer ones
LONG = Launch(write_kernel=Shape(8, tile=16, stages=3), push_back_kernel=Shape(8, block=256, stages=3),
              find_back_kernel=Shape(8, block=64, tile=64))
TOKENS = ('at', 'key', 'value', 'weight', 'push', 'turn')
WRITE, MEET = (
  Arrays(('at', 'hold', 'key', 'push', 'turn', 'init_up', 'init_down', 'd'), ('h', 'slope', 'up', 'down', 'seen_up', 'seen_down')),
  Arrays(('at', 'hold', 'key', 'init_up', 'init_down'), ('up', 'down', 'h', 'slope', 'bend', 'part')))
JUDGE = Call('judge_kernel', Arrays((*TOKENS, 'hold', 'init_gain', 'part'), ('gain', 'out', 'd', 'read', 'loss')))
FIRST, LAST = Call('write_kernel', MEET, 1, (('writes', False),)), Call('write_kernel', WRITE, 1, (('meets', False),))
NEXT = Call('write_kernel', Arrays(*(tuple(dict.fromkeys((*one, *two))) for one, two in zip(WRITE, MEET, strict=True))), 1)
BACKWARD = (
  Call('push_back_kernel', Arrays(
      ('at', 'flow', 'key', 'push', 'turn', 'init_down', 'h', 'slope', 'bend', 'seen_up', 'seen_down', 'd', 'ct_h', 'ct_seen_up',
       'ct_seen_down'), ('up', 'down', 'dh', 'bent', 'raised', 'part', 'dpush', 'dturn', 'dkey_push')), 2),
  Call('judge_back_kernel', Arrays(
      (*TOKENS, 'hold', 'flow', 'init_gain', 'part', 'out', 'old_gain', 'ct_d', 'ct_read', 'ct_loss', 'ct_gain'),
      ('gain', 'dkey', 'dvalue', 'dweight', 'dgain', 'gpush', 'gturn', 'dout'))),
  Call('find_back_kernel', Arrays(
      ('at', 'flow', 'key', 'turn', 'init_up', 'init_down', 'h', 'slope', 'seen_up', 'seen_down', 'd', 'ct_seen_up', 'ct_seen_down', 'dh',
       'bent', 'raised', 'dout'), ('up0', 'down0', 'dup', 'ddown', 'dkey_find')), 2))
# Axes of arrays: N chunks, B rows, H heads, f hidden channels of a program, G all programs of a head, g one of them, c tokens of a program
# that judges (all of them elsewhere); the rest is whole.
AXES = {axes: names.split() for axes, names in {
  'A': 'at', 'NB': 'hold flow', 'NBHcK': 'key dkey', 'NBHcV': 'value d out read dvalue', 'NBHc': 'weight loss dweight',
  'NBHQC': 'push gpush', 'NBHQP': 'turn gturn',
  'BHKf': 'init_up up0 up1', 'BHfV': 'init_down down0 down1', 'BHV': 'init_gain', 'NBHQV': 'gain old_gain',
  'NBHCf': 'h slope bend', 'NBHRf': 'seen_up', 'NBHfW': 'seen_down', 'BHGcV': 'part', 'BHcV': 'dout', 'BHCf': 'dh bent raised',
  'NBHGQC': 'dpush', 'NBHGQP': 'dturn', 'NBHGV': 'dgain', 'NBHKf': 'dup', 'NBHfV': 'ddown', 'NBHgCK': 'dkey_push dkey_find'}.items()}
AXES = {name: axes for axes, names in AXES.items() for name in names}


def _spec(plan, name, shape, programs):
  """The block of an array on the grid (heads, rows, programs of a head); `programs` share hidden channels, 0: they share out tokens."""
  axes = AXES[name.removeprefix('ct_')]
  size = {'B': None, 'H': None, **({'g': None, 'f': plan.block} if programs else {'c': plan.rows})}
  block = tuple(size.get(axis, whole) for axis, whole in zip(axes, shape, strict=True))
  one_row = 'B' in axes and shape[axes.index('B')] == 1
  def place(h, b, g):
    at = {'B': 0 if one_row else b, 'H': h} | ({'g': g % plan.blocks, 'f': g % plan.blocks} if programs else {'c': g})
    return tuple(at.get(axis, 0) for axis in axes)
  return pl.BlockSpec(block, place)


def _call(call, static, arrays):
  """The arrays that a kernel rewrites."""
  plan, launch = static
  plan, shape = launch.plan(plan, call.kernel, arrays['init_up'].shape[-1]), getattr(launch, call.kernel)
  each = lambda names: [f'{n}{q}' for n in names if n in ('up', 'down') for q in range(plan.levels)] + [
      n for n in names if n in arrays]
  rewrites = each(call.arrays.rewrites)
  inputs = sorted({*each(call.arrays.reads), *rewrites})
  shapes = {n: jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in rewrites}
  spec = lambda n: _spec(plan, n, arrays[n].shape, call.programs)
  grid = (*arrays['turn'].shape[2:0:-1], call.programs * plan.blocks or arrays['key'].shape[3] // plan.rows)
  return pl.pallas_call(
      functools.partial(getattr(kernels, call.kernel), plan, **dict(call.does)), out_shape=shapes, grid=grid,
      in_specs=[{n: spec(n) for n in inputs}], out_specs={n: spec(n) for n in shapes}, name=call.kernel,
      input_output_aliases={inputs.index(n): sorted(shapes).index(n) for n in rewrites}, interpret=not plan.is_compiled,
      compiler_params=plgpu.CompilerParams(num_warps=shape.warps, num_stages=shape.stages))(
          {n: arrays[n] for n in inputs})


def _run(static, calls, arrays, *, at):
  """What of `carry` is left by kernels of chunk `at` (backwards: from the last one), one after the other; arrays = (fixed, carry)."""
  fixed, carry = arrays
  for call in calls: carry = carry | _call(call, static, {**fixed, **carry, 'at': jnp.reshape(at, (1,))})      # that launches nothing
  return carry


def _select(arrays, *names):
  return {name: arrays[name] for name in names}


def _levels(plan):
  return [f'{side}{q}' for side in ('up', 'down') for q in range(plan.levels)]


def _gain_stack(count, memory, at):
  """Gains before every chunk and after the last one, of which one is known; nothing where they are not fast."""
  gain = memory.get('gain')
  return {} if gain is None else {'gain': jax.lax.empty((count + 1, *gain.shape), gain.dtype).at[at].set(gain)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _write(static, start, memory, tokens):
  """(memory after all chunks, what reads need)."""
  return _write_forward(static, start, memory, tokens)[0]


def _write_forward(static, start, memory, tokens):
  (plan, launch), high, F = static, tokens['weight'].dtype, start['init_up'].shape[-1]
  (N, B, H, C, K), Q, V, G = tokens['key'].shape, plan.levels, tokens['value'].shape[-1], launch.plan(plan, 'write_kernel', F).blocks
  empty = lambda dtype, *shape: jax.lax.empty((N, B, H, *shape), dtype)
  shapes = {**dict.fromkeys(('h', 'slope', 'bend'), (C, F)), 'seen_up': (Q * K + C, F), 'seen_down': (F, Q * V), 'd': (C, V), 'out': (C, V)}
  carry = {name: empty(plan.dtype, *shape) for name, shape in shapes.items()}
  carry |= {**memory, **_gain_stack(N, memory, 0), 'loss': empty(high, C), 'part': jax.lax.empty((B, H, G, C, V), high)}
  if 'gain' in memory: carry['read'] = empty(high, C, V)
  run = lambda carry, at, *calls: _run(static, calls, ({**tokens, **start}, carry), at=at)
  out = jax.lax.fori_loop(0, N - 1, lambda n, carry: run(carry, n.astype(jnp.int32), JUDGE, NEXT), run(carry, jnp.int32(0), FIRST))
  out = run(out, jnp.int32(N - 1), JUDGE, LAST)
  new, seen = _select(out, *_levels(plan)), _select(out, *({'h', 'seen_up', 'seen_down', 'd', 'read', 'loss'} & set(out)))
  if 'gain' in memory: new['gain'], seen['gain'] = out['gain'][-1], out['gain'][:-1]
  kept = {name: out[name] for name in (*shapes, 'gain') if name in out}
  return (new, seen), (start, tokens, kept)


def _write_backward(static, saved, cotangents):
  (plan, launch), (start, tokens, kept), (dmemory, dseen) = static, saved, cotangents
  (N, B, H, C, K), Q, V, F = tokens['key'].shape, plan.levels, tokens['value'].shape[-1], start['init_up'].shape[-1]
  high, own, (G, finders) = tokens['weight'].dtype, tokens['key'].dtype, (
      launch.plan(plan, name, F).blocks for name in ('push_back_kernel', 'find_back_kernel'))
  empty = lambda dtype, *shape: jax.lax.empty((N, B, H, *shape), dtype)
  zeros = lambda *shape: jnp.zeros((N, B, H, *shape), high)
  one = lambda *shape, dtype=plan.dtype: jax.lax.empty((B, H, *shape), dtype)
  carry = {**dmemory, 'dpush': empty(high, 2 * G, Q, C), 'dturn': zeros(2 * G, Q, Q), 'dkey': empty(own, C, K), 'dout': one(C, V),
           **{name: one(C, F) for name in ('dh', 'bent', 'raised')}, 'part': one(2 * G, C, V, dtype=high),
           'dkey_push': empty(own, G, C, K), 'dkey_find': empty(own, finders, C, K), 'dvalue': empty(tokens['value'].dtype, C, V),
           'dweight': empty(high, C), 'dgain': empty(high, C // plan.rows, V), 'dup': empty(plan.dtype, K, F),
           'ddown': empty(plan.dtype, F, V)}
  dseen['loss'] = jax.lax.optimization_barrier(dseen['loss'])          # often zeros, which XLA would make anew in every step of the loop
  fixed = {**tokens, **start, **kept, **{f'ct_{name}': x for name, x in dseen.items()}}
  fixed |= {name: start[name].astype(plan.dtype) for name in ('init_up', 'init_down')}       # half the loads; anchors are rounded anyway
  if 'gain' in dmemory:
    fixed['old_gain'] = fixed.pop('gain')
    carry |= {**_gain_stack(N, dmemory, N), 'gpush': empty(high, Q, C), 'gturn': zeros(Q, Q)}
  got = jax.lax.fori_loop(0, N, lambda n, carry: _run(static, BACKWARD, (fixed, carry), at=n.astype(jnp.int32)), carry)
  over = lambda name, axes: jnp.sum(got[name], axes, dtype=high)
  rows = lambda name, like: over(name, 0) if like.shape[0] == B else over(name, (0, 1))[None]
  keys = got['dkey'].astype(high) + over('dkey_push', 3) + over('dkey_find', 3)
  got['dgain'] = over('dgain', 3)
  dtokens = {'key': keys.astype(own), **{name: got[f'd{name}'] for name in ('value', 'weight')},
             **{name: over(f'd{name}', 3) + got.get(f'g{name}', 0) for name in ('push', 'turn')},
             **{name: jnp.zeros_like(tokens[name]) for name in ('hold', 'flow')}}
  dold = _select(got, *_levels(plan)) | ({'gain': got['gain'][0]} if 'gain' in got else {})
  return {f'init_{side}': rows(f'd{side}', start[f'init_{side}']) for side in ('up', 'down', 'gain')}, dold, dtokens


_write.defvjp(_write_forward, _write_backward)


def supports(rule: Rule, chunk: int) -> bool:
  """Whether the kernels can write chunks of so many tokens: two layers, silu, residual, l2."""
  net = rule.network
  (K, F), *_ = net.widths if net.kind == 'mlp' else [(0, 0)]
  plain = not (rule.clip or rule.gram or rule.first_order or net.bias) and rule.pairs == 1
  chosen = (rule.mode, rule.loss, rule.decay_to, net.kind, net.depth, net.activation, net.residual, net.value_width)
  fitting = all(16 <= size <= most and not size & (size - 1) for size, most in ((K, 128), (F, 1 << 16), (chunk, 128)))
  return (plain and fitting and F > K and rule.momentum in ('none', 'first', 'nesterov')
          and chosen == ('token', 'l2', 'init', 'mlp', 2, 'silu', True, K))


def write_chunks(rule: Rule, start: Weights, memory: dict, tokens: Tokens, *, coefficients: Coefficients, fresh: jax.Array,
                 flow: jax.Array | None = None, launch: Launch | None = None) -> tuple[dict, tuple]:
  """(memory, (what the reads of every chunk need, (loss, norm) of its tokens)) after N chunks, whose arrays lead with N: `factors`,
  `commit` and `prepare` one chunk after the other.

  fresh [N, B]: the chunk starts from an empty memory; flow [N, B]: whether a gradient goes through the memory before the chunk.
  `start` may have one row for all.
  """
  launch = launch or (SHORT if tokens.key.shape[3] <= 64 else LONG)
  Q, high, dtype = rule.levels, tokens.weight.dtype, rule.dtype
  fast = 'gain' in memory
  rows = tokens.key.shape[3] if fast else min(launch.rows, tokens.key.shape[3])
  plan = Plan(Q, rows=rows, scale=rule.scale, dtype=dtype, is_compiled=jax.default_backend() != 'cpu')
  sides = {f'{side}{q}': memory[name][q] for side, name in (('up', 'w_0'), ('down', 'w_1')) for q in range(Q)}
  hold = 1 - fresh.astype(high)
  given = {'key': tokens.key, 'value': tokens.value, 'weight': tokens.weight, 'push': coefficients.push, 'turn': coefficients.turn,
           'hold': hold, 'flow': hold if flow is None else hold * flow}
  gain = start.fast['gain'] if fast else start.slow['gain'][None]
  first = {'init_up': start.fast['w_0'], 'init_down': start.fast['w_1'], 'init_gain': gain}
  new, seen = _write((plan, launch), first, sides | ({'gain': jnp.stack(memory['gain'], 2)} if fast else {}), given)
  out = {name: tuple(new[f'{side}{q}'] for q in range(Q)) for side, name in (('up', 'w_0'), ('down', 'w_1'))}
  ready = Prepared({'w_0': tokens.key.astype(dtype), 'w_1': seen['h']}, {'w_0': (seen['seen_up'],), 'w_1': (seen['seen_down'], seen['d'])})
  if fast:
    out['gain'] = tuple(new['gain'][:, :, q] for q in range(Q))
    ready.parts['gain'] = seen['gain'], seen['read']
  return out, (ready, (seen['loss'], _norm(tokens, seen)))


def _norm(tokens, seen):
  """The norm of each token's gradient, without its weight."""
  C = tokens.key.shape[3]
  a = {'w_0': tokens.key.astype(tokens.weight.dtype), 'w_1': seen['h']}
  d = {'w_0': seen['seen_up'][..., -C:, :], 'w_1': seen['d']}
  if 'read' in seen: a['gain'], d['gain'] = seen['read'], jnp.ones_like(seen['read'])
  norm = jnp.sqrt(jnp.maximum(squared_norms(a, d), 1e-24))
  return norm / jnp.where(tokens.weight > 0, tokens.weight, 1)
