"""What each memory costs from a thousand to a million tokens: predicted by the FLOP counter, and measured.

One layer, projections included, one row of text, by part:

- predicted: operations a token of reading (forward), of training (forward + backward) and of one more token after so many, and bytes
  of the state then; from shapes alone, so that any machine gives the same numbers
- read: seconds to read so many tokens. A memory of fixed size reads the text in pieces and carries its state, with one program for
  every length; full attention reads it in one call (through cuDNN on a GPU) and keeps its keys and values
- train: milliseconds and temporaries of forward + backward over the whole row, up to what the machine holds

  python -m benchmarks.context --small --parts predicted,read,train      two CPU cores, two minutes
  python -m benchmarks.context --parts read,train                        one H200, under two minutes, compilation included
"""
import concurrent.futures
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import common
from benchmarks.holographic import attend
from memjax.config.banks import BankConfig, BankShapeConfig, ProductKeyConfig
from memjax.config.context import ContextConfig
from memjax.config.mixers import AttentionConfig, HolographicConfig, HolographicSeedConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.layers.tree import nbytes
from memjax.memory.registry import make_memory
from memjax.runtime.flops import count_flops

PARTS = ('predicted', 'read', 'train')
LENGTHS = tuple(1024 * 4 ** n for n in range(6))                   # 1,024 to 1,048,576
FULL = 'attention'
TRAINED = (FULL, 'window', 'holographic', 'neural')


def mixers(heads: int) -> dict[str, Any]:
  """Row -> mixer: every registered memory as it is by default, with as many heads; the holographic and neural ones also made small."""
  exact = NeuralConfig(heads=heads, net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'))
  return {FULL: AttentionConfig(heads=heads), 'window': WindowConfig(heads=heads), 'holographic': HolographicConfig(heads=heads),
          'holographic, 8 slots': HolographicConfig(heads=heads, slots=8), 'holographic_seed': HolographicSeedConfig(),
          'neural': NeuralConfig(heads=heads), 'neural, one matrix': exact, 'context': ContextConfig(heads=heads),
          'bank': BankConfig(heads=heads, shape=BankShapeConfig(entries=4096)), 'product_key': ProductKeyConfig(heads=heads)}


class Layer:
  """One memory with its parameters as shapes, and the functions that are counted and measured."""

  def __init__(self, config: Any, width: int, dtype: Any):
    self.config, self.width, self.dtype = config, width, jnp.dtype(dtype)
    self.memory = make_memory(config, width, dtype=self.dtype, parent=None)
    self.params = jax.eval_shape(self.init)

  def init(self) -> Any:
    """Parameters; traceable."""
    text = jnp.zeros((1, 2, self.width), self.dtype)
    return nn.unbox(self.memory.init(jax.random.key(0), text, self.memory.init_state(1, 2), position_BxL=jnp.arange(2)[None]))

  def text(self, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of the input and its positions."""
    return jax.ShapeDtypeStruct((1, length, self.width), self.dtype), jax.ShapeDtypeStruct((1, length), jnp.int32)

  def state(self, length: int) -> Any:
    """Shapes of the state that holds so many tokens."""
    return jax.eval_shape(lambda: self.memory.init_state(1, length))

  def prepare(self, params) -> Any:
    """Keys and values of a bank, made once for all calls of a text; None for other memories."""
    return self.memory.apply(params, method='prepare')

  def read(self, params, x_BxLxD, position_BxL, state, prepared=None) -> tuple:
    """(outputs, state) of one call that goes on from a state; the program that reads a text in pieces."""
    return self.memory.apply(params, x_BxLxD, state, position_BxL=position_BxL, prepared=prepared)[:2]

  def whole(self, params, x_BxLxD, position_BxL) -> jax.Array:
    """Outputs of one call from an empty memory."""
    return self.read(params, x_BxLxD, position_BxL, self.memory.init_state(1))[0]

  def flash(self, params, x_BxLxD, position_BxL) -> tuple:
    """(outputs, keys, values) of attention through cuDNN."""
    def call(module, x_BxLxD):
      inputs = module.project(x_BxLxD, position_BxL)
      y_BxLxHxK = attend('cudnn', inputs.q_BxLxHxK, inputs.k_BxLxGxK, inputs.v_BxLxGxK)
      return module.readout(x_BxLxD, y_BxLxHxK.reshape(*x_BxLxD.shape[:2], -1)), inputs.k_BxLxGxK, inputs.v_BxLxGxK
    return self.memory.apply(params, x_BxLxD, method=call)

  def gradient(self, params, x_BxLxD, position_BxL) -> Any:
    """Gradients of parameters and input: forward + backward."""
    run = (lambda *args: self.flash(*args)[0]) if self.config.kind == FULL and common.on_gpu() else self.whole
    floats, rest = split(params)
    loss = lambda floats, x: jnp.sum(jnp.square(run(join(floats, rest), x, position_BxL).astype(jnp.float32)))
    return jax.grad(loss, argnums=(0, 1))(floats, x_BxLxD)


def split(params: Any) -> tuple[list, tuple]:
  """(the leaves that have gradients, what `join` needs to put them back)."""
  leaves, tree = jax.tree.flatten(params)
  learned = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
  return [leaf for leaf, is_learned in zip(leaves, learned, strict=True) if is_learned], (leaves, learned, tree)


def join(floats: list, rest: tuple) -> Any:
  """The parameters with these leaves."""
  (leaves, learned, tree), floats = rest, iter(floats)
  return tree.unflatten([next(floats) if is_learned else leaf for leaf, is_learned in zip(leaves, learned, strict=True)])


# Predicted ------------------------------------------------------------------------------------------------------------

def predict(layers: dict[str, Layer], lengths: list[int]) -> Iterator[dict[str, Any]]:
  """A row each memory and length, from shapes alone. Calls of a neural memory are aligned, and take the cheap branch."""
  for name, layer in layers.items():
    for length in lengths:
      params, text, branch = layer.params, layer.text(length), min if layer.config.kind == 'neural' else max
      yield {'memory': name, 'tokens': length, 'read_flops': count_flops(layer.whole, params, *text, branch=branch) / length,
             'train_flops': count_flops(layer.gradient, params, *text, branch=branch) / length,
             'step_flops': step_flops(layer, length), 'state_bytes': nbytes(layer.state(length))}


def step_flops(layer: Layer, length: int) -> float:
  """Operations of one token after `length` others: what every token does, and its share of what the last one of a chunk does."""
  state, prepared = layer.state(length), jax.eval_shape(layer.prepare, layer.params)
  often, seldom = (count_flops(layer.read, layer.params, *layer.text(1), state, prepared, branch=branch) for branch in (min, max))
  return often + (seldom - often) / (getattr(layer.config, 'chunk', 0) or getattr(layer.config, 'ratio', 1))


# Measured -------------------------------------------------------------------------------------------------------------

def jobs_of(layers: dict[str, Layer], a: Any) -> dict[tuple, tuple[Callable, tuple]]:
  """{(part, memory, tokens of a call): (function, shapes of its arguments)}; what reads in pieces has one program."""
  jobs = {}
  for name, layer in layers.items():
    full = name == FULL
    pieces = (layer.params, *layer.text(a.piece), layer.state(0), jax.eval_shape(layer.prepare, layer.params))
    if 'read' in a.parts and not full: jobs['read', name, a.piece] = layer.read, pieces
    if 'read' in a.parts and full:
      call = layer.flash if common.on_gpu() else layer.whole
      jobs |= {('read', name, n): (call, (layer.params, *layer.text(n))) for n in a.lengths}
    if 'train' in a.parts and name in TRAINED:
      jobs |= {('train', name, n): (layer.gradient, (layer.params, *layer.text(n))) for n in a.train_lengths}
  return jobs


def compile_jobs(jobs: dict[tuple, tuple]) -> dict[tuple, common.Case]:
  """The compiled programs, several at once on an accelerator, a line for each; the state is donated. What the compiler refuses is named
  and left out."""
  def one(job):
    (part, name, tokens), (call, shapes) = job
    try: case = common.compile_case(job[0], call, shapes, **({'donate_argnums': (3,)} if len(shapes) == 5 else {}))
    except jax.errors.JaxRuntimeError as error: return print(f'left out {part} {name} {tokens:,}: {str(error).splitlines()[0]}', flush=True)
    print(f'compiled {part} {name} {tokens:,}: {case.compile_s:.1f} s, {case.temporary_mib:,.0f} MiB of temporaries', flush=True)
    return case
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1) if common.on_gpu() else 1) as pool:
    return {case.name: case for case in pool.map(one, jobs.items()) if case}


def timed(call: Callable, *args: Any) -> float:
  """Seconds of one call, its results thrown away."""
  started = time.perf_counter()
  jax.block_until_ready(call(*args))
  return time.perf_counter() - started


def inputs_of(layer: Layer, length: int, begin: int = 0) -> tuple[jax.Array, jax.Array]:
  """Random tokens and their positions."""
  return jax.random.normal(jax.random.key(1), (1, length, layer.width), layer.dtype), begin + jnp.arange(length)[None]


def run_pieces(layer: Layer, case: common.Case, lengths: list[int], *, piece: int, patience: float) -> Iterator[tuple[int, float, str]]:
  """(tokens, seconds since the first, '') at each length, while the next one is due within patience. A first call warms up."""
  params, (x, position), empty = jax.jit(layer.init)(), inputs_of(layer, piece), lambda: layer.memory.init_state(1)
  prepared, positions = jax.jit(layer.prepare)(params), [jnp.int32(begin) + position for begin in range(0, max(lengths), piece)]
  jax.block_until_ready(case.call(params, x, position, empty(), prepared))
  state, spent, started = jax.block_until_ready((empty(), positions))[0], 0.0, time.perf_counter()
  following = dict(itertools.pairwise(sorted(lengths)))
  for tokens, position in zip(range(piece, max(lengths) + 1, piece), positions, strict=True):
    y, state = case.call(params, x, position, state, prepared)
    if tokens not in lengths: continue
    jax.block_until_ready((y, state))
    spent += time.perf_counter() - started
    yield tokens, spent, ''
    if spent * following.get(tokens, tokens) / tokens > patience: return
    started = time.perf_counter()                             # what was done with the row meanwhile does not count


def run_whole(layer: Layer, cases: dict[int, common.Case], *, patience: float) -> Iterator[tuple[int, float | None, str]]:
  """(tokens, seconds of one call, '') from the shortest on; (tokens, None, why) for what does not fit or would outlast patience."""
  params, last, why = jax.jit(layer.init)(), (0, 0.0), ''
  room = (jax.devices()[0].memory_stats() or {}).get('bytes_limit', float('inf'))
  for tokens, case in sorted(cases.items()):
    due = last[1] * (tokens / max(last[0], 1)) ** (2 if layer.config.kind == FULL else 1)
    if 2 * due > patience: why = why or 'too slow'
    if case.temporary_mib * common.MEBI + 3 * tokens * layer.width * layer.dtype.itemsize > room: why = why or 'does not fit'
    try:
      if not why:
        arguments = (params, *inputs_of(layer, tokens))
        timed(case.call, *arguments)
        last = tokens, min(timed(case.call, *arguments) for _ in range(3 if due < 1 else 1))
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error): raise
      why = 'does not fit'
    yield (tokens, None, why) if why else (*last, '')


def measure(layers: dict[str, Layer], cases: dict[tuple, common.Case], a: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """(part, row) of everything that was compiled."""
  for part in ('read', 'train'):
    for name, layer in layers.items():
      mine = {tokens: case for (p, n, tokens), case in cases.items() if (p, n) == (part, name)}
      if not mine: continue
      pieces = part == 'read' and name != FULL
      timed_lengths = run_pieces(layer, mine[a.piece], a.lengths, piece=a.piece, patience=a.patience) if pieces else \
          run_whole(layer, mine, patience=a.patience)
      for tokens, seconds, why in timed_lengths:
        case = mine[a.piece if pieces else tokens]
        held = nbytes(layer.state(0)) if name != FULL else 2 * tokens * layer.width * layer.dtype.itemsize
        yield part, {'memory': name, 'tokens': tokens, 'seconds': seconds, 'why': why, 'tokens_per_second': seconds and tokens / seconds,
                     'piece': a.piece if pieces else tokens, 'temporary_mib': case.temporary_mib, 'compile_s': case.compile_s,
                     'state_bytes': held}


def options(argv: list[str] | None) -> Any:
  """The command line, with sizes for the machine."""
  make = common.parser('context', __doc__)
  make.add_argument('--parts', type=common.words, default=list(PARTS), help='any of predicted,read,train')
  make.add_argument('--rows', type=lambda text: text.split(';'), default=[], help='names of memories, separated by ;')
  make.add_argument('--lengths', type=common.numbers, default=[], help='tokens that are read')
  make.add_argument('--train_lengths', type=common.numbers, default=[], help='tokens of a row that is trained')
  make.add_argument('--predict_lengths', type=common.numbers, default=list(LENGTHS), help='tokens of the predictions')
  make.add_argument('--piece', type=int, default=0, help='tokens of a piece')
  make.add_argument('--patience', type=float, default=6.0, help='seconds that a memory may take to read the next length')
  make.add_argument('--width', type=int, default=0, help='channels of the layer, 64 a head')
  a = make.parse_args(argv)
  large = common.on_gpu() and not a.small
  a.lengths = a.lengths or ([16_384 * 4 ** n for n in range(4)] if large else [1024, 4096, 16_384])
  a.train_lengths = a.train_lengths or ([4096, 65_536, 262_144, 1_048_576] if large else [512, 2048])
  a.piece, a.width = a.piece or (16_384 if large else 512), a.width or (1024 if large else 256)
  a.dtype = 'bfloat16' if common.on_gpu() else 'float32'
  return a


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints a line for each number, saves after each memory; returns the result."""
  a = options(argv)
  result = {'width': a.width, 'dtype': a.dtype, 'piece': a.piece, 'predicted_width': 1024, **{part: [] for part in PARTS}}
  def keep(part, row):
    result[part].append(row)
    common.save('context', a.output, result, commit=a.commit)
    values = {key: value for key, value in row.items() if key not in ('memory', 'tokens')}
    print(f'{part} {row["memory"]} {row["tokens"]:,}: ' + ', '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
                                                                    for key, value in values.items()), flush=True)
  chosen = lambda width: {name: mixer for name, mixer in mixers(width // 64).items() if not a.rows or name in a.rows}
  if 'predicted' in a.parts:
    layers = {name: Layer(mixer, 1024, 'bfloat16') for name, mixer in chosen(1024).items()}
    for row in predict(layers, a.predict_lengths): keep('predicted', row)
  layers = {name: Layer(mixer, a.width, a.dtype) for name, mixer in chosen(a.width).items()}
  for part, row in measure(layers, compile_jobs(jobs_of(layers, a)), a): keep(part, row)
  return result


if __name__ == '__main__':
  main()
