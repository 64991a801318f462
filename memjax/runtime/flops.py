"""What a model costs before it is run: floating point operations, parameters by group, bytes of state."""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from memjax.config.banks import BankFormConfig
from memjax.config.schema import Config, ModelConfig
from memjax.layers.tree import nbytes
from memjax.memory.registry import make_memory
from memjax.models.block import compute_dtype
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime import optim
from memjax.runtime.footprint import bank_footprint, bank_layers, parts_footprint, unshared
from memjax.runtime.state import make_gradient, make_init

# One operation an output element. XLA counts exp, log, tanh and their like apart (as transcendentals), and so do we.
ELEMENTWISE = frozenset((
    'add', 'add_any', 'sub', 'mul', 'div', 'neg', 'max', 'min', 'abs', 'sign', 'floor', 'ceil', 'round', 'rem', 'square', 'integer_pow',
    'and', 'or', 'not', 'xor', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'select_n', 'clamp', 'convert_element_type', 'is_finite'))
REDUCE = frozenset((
    'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'argmax', 'argmin', 'cumsum', 'cummax', 'cumprod'))


def count_flops(function: Callable, *args: Any, branch: Callable = max) -> int:
  """Operations of one call of `function`, from its jaxpr alone (arguments may be shapes; nothing is compiled or run).

  Multiply-add = 2. A scan counts its length times, a `while` (unknown length) once, a `cond` its dearest branch, as XLA does, or
  with `branch=min` its cheapest: that of the aligned call, where the other one goes token by token. As in a compiled program, what
  does not reach the results counts nothing and what is computed twice from the same values counts once.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], branch)


def _count(jaxpr: Jaxpr, branch: Callable) -> int:
  """The operations of a program; an equation whose operands and parameters are those of an earlier one is that one."""
  same, seen, total = {}, {}, 0
  for eqn in jaxpr.eqns:
    operands = tuple((str(x.aval), str(x.val)) if isinstance(x, Literal) else same.get(x, x) for x in eqn.invars)
    try:
      first = None if eqn.effects else seen.setdefault((eqn.primitive, operands, tuple(sorted(eqn.params.items()))), eqn)
    except TypeError: first = None                     # parameters that cannot be compared
    if first is None or first is eqn: total += _operations(eqn, branch)
    else: same |= zip(eqn.outvars, (same.get(x, x) for x in first.outvars), strict=True)
  return total


def _operations(eqn: Any, branch: Callable) -> int:
  name, out = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
  if name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return 2 * out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params['dimension_numbers'].rhs_spec
    return 2 * out * math.prod(kernel[axis] for axis in numbers[1:])
  if name == 'fft': return round(5 * max(out, 1) * math.log2(max(math.prod(eqn.params['fft_lengths']), 2)))
  if name in ELEMENTWISE: return out
  if name in REDUCE: return math.prod(eqn.invars[0].aval.shape)
  inner = [_count(part, branch) for part in _inner(eqn.params)]
  if name == 'cond': return branch(inner)
  if name == 'shard_map': return sum(inner) * eqn.params['mesh'].size             # the program of one device
  return sum(inner) * (eqn.params['length'] if name == 'scan' else 1)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
  """The programs that an operation holds."""
  values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
  return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]


def countable(config: ModelConfig) -> ModelConfig:
  """The config with routed attention in the form whose operations can be read off: keys and values gathered for each token.

  The products are those of tiles, capacity and cudnn, which loop over as many tiles as the tokens need; what these compute
  again in their backward pass, and their padding, is not counted. The forms scan and dense, which read all chapters, stay.
  Fused kernels of holographic and neural memory and flash attention are counted as the forms in XLA, which they equal.
  Neural memories count as the chunks that rows are made for, not as the form token by token.
  """
  def one(mixer):
    if mixer.kind == 'neural': return dataclasses.replace(mixer, exec=dataclasses.replace(mixer.exec, aligned=True, backend='xla'))
    if mixer.kind == 'holographic': return dataclasses.replace(mixer, form=dataclasses.replace(mixer.form, backend='xla'))
    if mixer.kind in ('attention', 'window'): return dataclasses.replace(mixer, backend='xla')
    if mixer.kind != 'bank' or mixer.form.kind in ('scan', 'dense'): return mixer
    return dataclasses.replace(mixer, form=BankFormConfig(kind='gather', token_chunk=1 << 40, axis=mixer.form.axis))
  return dataclasses.replace(config, mixers={name: one(mixer) for name, mixer in config.mixers.items()})


def forward_flops(model: Any, length: int) -> float:
  """Operations a token of one call of `length` tokens from an empty memory; banks as `countable` says."""
  model = build_decoder(countable(model.config))
  row = jax.ShapeDtypeStruct((1, length), jnp.int32)
  def call(params, token_BxL, position_BxL):
    return model.apply({'params': params}, token_BxL, model.init_state(1), position_BxL=position_BxL)[0]
  return count_flops(call, param_shapes(model)[0], row, row) / length


def training_flops(model: Any, optimizer: optim.Optimizer, config: Config) -> float:
  """Operations a token of the gradient as it is trained: segments, micro-batches and recomputation included; banks as
  `countable` says."""
  model = build_decoder(countable(model.config))
  shape = (config.training.batch, config.training.length)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ('token', 'target', 'position')}
  batch['weight'] = jax.ShapeDtypeStruct(shape, jnp.bool_)
  state = jax.eval_shape(make_init(model, optimizer, config))
  gradient = make_gradient(model, optimizer, config)
  call = lambda params, memory, batch: gradient(params, memory, batch, jax.random.key(0))
  return count_flops(call, state.params, state.memory, batch) / math.prod(shape)


def bank_flops(model: Any, length: int) -> dict[str, dict[str, float]]:
  """{mixer: {'token', 'call'}} of one layer of each bank: operations a token in a call of `length` tokens (projections, router
  and routed attention, as `countable` says), and operations a call, of keys and values alone."""
  config, found = countable(model.config), {}
  for name in bank_layers(config):
    memory = make_memory(unshared(config.mixers[name]), config.width, dtype=compute_dtype(config), parent=None)
    x_BxLxD = jax.ShapeDtypeStruct((1, length, config.width), memory.dtype)
    def call(params, x_BxLxD, prepared, memory=memory):
      return memory.apply(params, x_BxLxD, memory.init_state(1), position_BxL=jnp.arange(length)[None], prepared=prepared)[0]
    def init(x_BxLxD, memory=memory):
      return memory.init(jax.random.key(0), x_BxLxD, memory.init_state(1), position_BxL=jnp.arange(length)[None])
    prepare = functools.partial(memory.apply, method='prepare')
    params = jax.eval_shape(init, x_BxLxD)
    prepared = jax.eval_shape(prepare, params)
    found[name] = {'token': count_flops(call, params, x_BxLxD, prepared) / length, 'call': count_flops(prepare, params)}
  return found


def state_bytes(model: Any, tokens: int) -> tuple[int, int]:
  """Bytes of memory state a row: (that do not grow with the text, that hold `tokens` tokens of full attention)."""
  fixed, grown = (nbytes(jax.eval_shape(lambda n=n: model.init_state(1, n))) for n in (0, tokens))
  return fixed, grown - fixed


def bank_facts(model: Any) -> dict[str, str]:
  """The lines of `--dry_run` about banks; none for a model without."""
  found = bank_footprint(model)
  if not found: return {}
  size = ', '.join(f'{found["bytes"][name]:,} {name}' for name in ('float32', 'bfloat16', 'int8', 'int4') if name in found['bytes'])
  once = sum(flops['call'] * found['layers'][name]['layers'] for name, flops in bank_flops(model, 2).items())
  tables, layers = (sum(part[key] for part in found[name].values()) for name, key in (('tables', 'copies'), ('layers', 'layers')))
  return {'bank entries': f'{found["entries"]:,} in {tables} {"table" if tables == 1 else "tables"}',
          'entries read a token': f'{found["active_entries"]:,} in {layers} {"layer" if layers == 1 else "layers"}',
          'bank bytes': size, 'bank keys and values': f'{found["prepared_bytes"]:,} bytes and {once:,} FLOPs, once a call'}


def cost_table(model: Any, optimizer: optim.Optimizer, config: Config) -> str:
  """The lines of `--dry_run`: parameters by group, optimiser and state bytes, operations a token."""
  shapes = param_shapes(model)[0]
  rows = optim.group_table(optimizer, config.optimizer, shapes)
  width = max(len('total'), *(len(row['group']) for row in rows))
  line = lambda name, *cells: f'{name:{width}}  {cells[0]:>10}  {cells[1]:>8}  {cells[2]:>14}'
  table = [line('group', 'rate', 'arrays', 'parameters')]
  table += [line(r['group'], 'frozen' if r['frozen'] else f"{r['rate']:g}", r['arrays'], f"{r['parameters']:,}") for r in rows]
  table += [line('total', '', sum(r['arrays'] for r in rows), f"{sum(r['parameters'] for r in rows):,}"), '']
  fixed, grown = state_bytes(model, config.training.length)
  optimiser = nbytes(jax.eval_shape(optimizer.init, shapes))
  parts = ', '.join(f'{part} {counts["bytes"]:,}' for part, counts in parts_footprint(config.model, shapes).items())
  facts = {'layers': f'{config.model.depth}', 'parameter bytes': f'{nbytes(shapes):,}', 'of them': parts,
           'optimiser bytes': f'{optimiser:,}', 'gradient bytes': f'{nbytes(optimizer.split(shapes)[0]):,}',
           'state bytes a row': f'{fixed:,}' + (f' + {grown:,} for {config.training.length} tokens of attention' if grown else ''),
           'FLOPs a token, forward': f'{forward_flops(model, config.training.length):,.0f}',
           'FLOPs a token, training': f'{training_flops(model, optimizer, config):,.0f}',
           'tokens a step': f'{config.training.batch * config.training.length:,}'} | bank_facts(model)
  return '\n'.join(table + [f'{name + ":":26}{value}' for name, value in facts.items()])
