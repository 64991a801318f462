"""The kernels of one token of a neural memory, interpreted, against a loop and against the step in XLA; decoding by them against chunks."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.neural import (
  NeuralConfig,
  NeuralExecConfig,
  NeuralGatesConfig,
  NeuralNetConfig,
  NeuralProjConfig,
  NeuralRuleConfig,
  NeuralWriteConfig,
)
from memjax.memory.neural_fused import has_kernels
from memjax.memory.registry import make_memory
from memjax.ops import pallas_step_neural
from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import EPSILON, Network
from memjax.ops.neural_steps import Coefficients
from memjax.ops.pallas_step_neural import Token, neural_step
from tests.laws.test_laws import parameters
from tests.ops.inputs import gpu_text, quick
from tests.ops.neural_cases import furthest

B, D, C, L = 4, 16, 16, 20
MARKS = np.array([[0, 1, 0], [5, 0, 0], [C - 1, 0, 1], [C, 0, 0]])      # a document starts; inside a chunk; its last token; not written
RINGS = {'a_w_0': (1, 'K'), 'a_w_1': (1, 'F'), 'd_w_0': (1, 'F'), 'd_w_1': (1, 'K'), 'key': (0, 'K'), 'value': (0, 'K'), 'gate': (2, 'G')}


def problem(given: Rule, H=2):
  """Arguments of `neural_step` in float64, with H heads and four gates."""
  rng, (K, F), Q = np.random.default_rng(0), given.network.widths[0], given.levels
  draw = lambda *shape: .5 * rng.normal(size=shape)
  size = {'K': K, 'F': F, 'G': 4}
  shape = {0: lambda n: (B, C, H, n), 1: lambda n: (B, H, C, n), 2: lambda n: (B, C, n, H)}
  memory = {name: tuple(draw(B, H, *edge) for _ in range(Q)) for name, edge in given.network.fast.items()}
  rings = {name: draw(*shape[kind](size[width])) for name, (kind, width) in RINGS.items()}
  start = Weights({name: draw(1, H, *edge) for name, edge in given.network.fast.items()}, {'gain': draw(H, K)})
  token = Token(draw(B, H, K), draw(B, H, K), draw(B, H, K), np.abs(draw(B, H, 1)), draw(B, 4, H))
  return start, (memory, rings), token, Coefficients(draw(B, H, 1, C), draw(B, H, Q, 1), np.triu(draw(B, H, Q, Q)), draw(B, H, Q, C))


def silu(z):
  """(silu, its derivative)."""
  s = 1 / (1 + np.exp(-z))
  return z * s, s + z * s * (1 - s)


def normed(made):
  """(layer norm, its derivative)."""
  V, y = made.size, made - made.mean()
  size = 1 / np.sqrt((y * y).mean() + EPSILON)
  return y * size, size * (np.eye(V) - 1 / V - np.outer(y, y) * size ** 2 / V)


def one_head(given, home, gain, memory, rings, token, made, marks):
  """(memory, rings, y, loss, norm) of one row and head, with weights formed as they are; rewrites rings."""
  (slot, is_fresh, is_full), (query, key, value, rate, gate) = marks, token
  if is_fresh: memory = {name: [0 * m for m in levels] for name, levels in memory.items()}
  if is_fresh: rings = {name: 0 * ring for name, ring in rings.items()}
  anchor = {name: home[name] + memory[name][0] for name in home}
  h, slope = silu(key @ anchor['w_0'])
  unit, turned = normed(h @ anchor['w_1'])
  error = key + (1 + gain) * unit - value
  d = turned @ ((1 + gain) * 2 * given.scale * rate * error)
  dup = slope * (anchor['w_1'] @ d)
  pairs = {'a_w_0': key, 'a_w_1': h, 'd_w_0': dup, 'd_w_1': d, 'key': key, 'value': value, 'gate': gate}
  rings = {name: np.array([pairs[name] if i == slot else ring[i] for i in range(C)]) for name, ring in rings.items()}
  moved = lambda name, share: np.einsum('c,ci,co->io', share, rings[f'a_{name}'], rings[f'd_{name}'])
  seen = {name: home[name] + sum(r * m for r, m in zip(made.reach[:, 0], memory[name], strict=True)) - moved(name, made.weigh[0])
          for name in home}
  y = query + (1 + gain) * normed(silu(query @ seen['w_0'])[0] @ seen['w_1'])[0]
  if is_full:
    memory = {name: [sum(made.turn[p, q] * m for q, m in enumerate(levels)) - moved(name, made.push[p]) for p in range(len(levels))]
              for name, levels in memory.items()}
    rings = {name: 0 * ring for name, ring in rings.items()}
  norm = np.sqrt(sum(np.sum(np.outer(a, b) ** 2) for a, b in ((key, dup), (h, d)))) / rate
  return memory, rings, y, given.scale * np.sum(error ** 2), norm


def loop(given, start, held, token, made):
  """What `neural_step` gives, row by row and head by head."""
  (memory, rings), H = held, token.key.shape[1]
  memory, rings = jax.tree.map(np.array, memory), {name: np.array(ring) for name, ring in rings.items()}
  y, told = np.zeros_like(token.query), np.zeros((2, B, H, 1))
  cut = lambda name, b, h: {0: (b, slice(None), h), 1: (b, h), 2: (b, slice(None), slice(None), h)}[RINGS[name][0]]
  for b in range(B):
    for h in range(H):
      pick = lambda a, b=b, h=h: a[b, h]
      one = token.query[b, h], token.key[b, h], token.value[b, h], token.weight[b, h, 0], token.gate[b, :, h]
      old = {name: [m[b, h] for m in levels] for name, levels in memory.items()}
      home = {name: a[0, h] for name, a in start.fast.items()}
      new, kept, y[b, h], told[0, b, h], told[1, b, h] = one_head(
          given, home, start.slow['gain'][h], old, {n: a[cut(n, b, h)] for n, a in rings.items()}, one, jax.tree.map(pick, made), MARKS[b])
      for name, a in rings.items(): a[cut(name, b, h)] = kept[name]
      for name, levels in memory.items():
        for m, x in zip(levels, new[name], strict=True): m[b, h] = x
  return memory, rings, y, told


@pytest.mark.parametrize('momentum', [pytest.param('none', marks=pytest.mark.slow), 'first'])
def test_kernels_equal_the_loop(momentum, monkeypatch):
  """State, reads, losses and norms of rows at different slots; two blocks of hidden channels."""
  monkeypatch.setattr(pallas_step_neural, 'BLOCK', 16)
  given = Rule(Network(16, 16, hidden=32, slow_gain=True), momentum=momentum, dtype=jnp.float64)
  with jax.enable_x64():
    arguments = problem(given)
    marks = jnp.asarray(MARKS, jnp.int32)
    step = lambda start, held, token, made: neural_step(given, start, held, token, coefficients=made, marks_Bx3=marks)
    (memory, rings), y, told = quick(step)(*arguments)
  assert furthest((memory, rings, y, jnp.stack([told.loss, told.norm])), loop(given, *arguments)) <= 1e-12


BASE = NeuralConfig(heads=1, chunk=C, net=NeuralNetConfig(expansion=2), proj=NeuralProjConfig(conv_width=2))
X, POSITION = np.random.default_rng(0).normal(size=(B, L, D)), np.tile(np.arange(L), (B, 1))
POSITION[1, 3:] -= 3                                                     # a second document
MASK, WRITE = np.ones((B, L), bool), np.ones((B, L), bool)
MASK[2, :4], WRITE[3, 9] = False, False


def memory(backend='pallas', *, dtype=jnp.float64, width=D, **changes):
  """The memory of BASE with this backend and these parts."""
  return make_memory(dataclasses.replace(BASE, exec=NeuralExecConfig(backend=backend, aligned=True), **changes), width, dtype=dtype)


def weights(module, dtype=jnp.float64):
  """Its parameters."""
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), parameters(module, X[:, :1], module.init_state(B), POSITION[:, :1]))


def decode(module, params, x, state=None, *, first=0):
  """(state, reads) token by token from the token `first` on."""
  def token(state, item):
    x, position, mask, write = (a[:, None] for a in item)
    y, state, _ = module.apply(params, x, state, position_BxL=position, mask_BxL=mask, write_mask_BxL=write, method='mix')
    return state, y[:, 0]
  turned = jax.tree.map(lambda a: jnp.swapaxes(jnp.asarray(a)[:, first:], 0, 1), (x, POSITION, MASK, WRITE))
  state, y = jax.lax.scan(token, module.init_state(B) if state is None else state, turned)
  return state, jnp.swapaxes(y, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize('rule', [{}, {'momentum': 'nesterov', 'read': 'before'}], ids=['first', 'nesterov-before'])
def test_decoding_equals_xla(rule):
  """State, reads and gradients over a chunk's end, rows at different slots: documents, padding, a token that does not write."""
  with jax.enable_x64():
    modules = [memory(backend, rule=NeuralRuleConfig(**rule)) for backend in ('pallas', 'xla')]
    params = weights(modules[1])
    def loss(params, x, module):
      state, y = decode(module, params, x)
      return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(state.fast)), (state, y)
    found, want = (quick(lambda *given, m=m: jax.value_and_grad(loss, (0, 1), has_aux=True)(*given, m))(params, X) for m in modules)
  assert furthest(found, want) <= 1e-10


@pytest.mark.slow
def test_decoding_equals_chunks_at_every_prefix(monkeypatch):
  """Reads and state of decoding from prefixes that end inside a chunk and with it are those of one call, all by kernels."""
  monkeypatch.setitem(globals(), 'MASK', np.ones((B, L), bool))
  monkeypatch.setitem(globals(), 'WRITE', np.ones((B, L), bool))
  with jax.enable_x64():
    module, position = memory(), np.tile(np.arange(L), (B, 1))
    monkeypatch.setitem(globals(), 'POSITION', position)
    params = weights(module)
    def prefix(params, x):
      y, state, _ = module.apply(params, x, module.init_state(B), position_BxL=position[:, :x.shape[1]], method='mix')
      return state, y
    end, want = quick(prefix)(params, X)
    for first in (5, C):
      state = quick(prefix)(params, X[:, :first])[0]
      found, y = quick(lambda *given, first=first: decode(module, *given, first=first))(params, X, state)
      assert furthest(y, want[:, first:]) <= 1e-11 and furthest((found.fast, found.pending), (end.fast, end.pending)) <= 1e-11


@pytest.mark.slow
def test_narrow_operands():
  """Not further from float64 than XLA is, in bfloat16; reads in the compute dtype, state in float32."""
  with jax.enable_x64():
    module = memory('xla')
    params = weights(module)
    want = np.asarray(quick(lambda params: decode(module, params, X))(params)[1])
  low = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
  wrong = {}
  for backend in ('pallas', 'xla'):
    state, y = jax.jit(lambda params, m=memory(backend, dtype=jnp.bfloat16): decode(m, params, X.astype(np.float32)))(low)
    assert y.dtype == jnp.bfloat16 and all(a.dtype in (jnp.float32, jnp.int32) for a in jax.tree.leaves(state))
    wrong[backend] = np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2) / np.mean(np.square(want)))
  assert wrong['pallas'] <= 1.2 * wrong['xla'] + 1e-3


def test_what_kernels_take(monkeypatch):
  """What they do not compute goes through XLA, as do rows that lie on several devices, and all that is not asked for."""
  takes = lambda backend='pallas', *, many=128, **changes: has_kernels(memory(backend, **changes), many)
  assert takes() and takes(rule=NeuralRuleConfig(momentum='none')) and takes(write=NeuralWriteConfig(persistent=2))
  assert not takes('xla') and not takes('auto')
  monkeypatch.setattr('memjax.ops.backend.is_hopper', lambda: True)
  assert takes('auto', dtype=jnp.bfloat16) and not takes('auto', dtype=jnp.bfloat16, many=129) and takes(many=129) and not takes('auto')
  assert not takes('auto', dtype=jnp.bfloat16, rule=NeuralRuleConfig(mode='block'))
  net, write = NeuralNetConfig, NeuralWriteConfig
  for changes in ({'net': net(expansion=2, gain='fast')}, {'net': net(kind='swiglu')}, {'chunk': 12}, {'width': 24},
                  {'write': write(window=2)}, {'write': write(per_tensor=True)}, {'rule': NeuralRuleConfig(clip=1.0)},
                  {'gates': NeuralGatesConfig(row_factor=True), 'rule': NeuralRuleConfig(momentum='none', forget=False)}):
    assert not takes(**changes)
  with jax.set_mesh(jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))): assert not takes()


@pytest.mark.slow
@pytest.mark.parametrize('width', [64, 128])
def test_kernels_lower_for_a_gpu(monkeypatch, width):
  """To Triton at the sizes of the benchmark: every operation exists there."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  given, H, Q, chunk = Rule(Network(width, width, hidden=4 * width, slow_gain=True), dtype=jnp.bfloat16), 8, 2, 64
  shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct((B, *size), dtype)
  edges = given.network.fast
  start = Weights({n: jax.ShapeDtypeStruct((1, H, *edge), jnp.float32) for n, edge in edges.items()},
                  {'gain': jax.ShapeDtypeStruct((H, width), jnp.float32)})
  rings = {**{f'{side}_{n}': shape(H, chunk, edge[side == 'd']) for side in 'ad' for n, edge in edges.items()},
           **dict.fromkeys(('key', 'value'), shape(chunk, H, width)), 'gate': shape(chunk, 4, H)}
  token = Token(*[shape(H, width, dtype=jnp.bfloat16)] * 3, shape(H, 1), shape(4, H))
  made = Coefficients(shape(H, 1, chunk), shape(H, Q, 1), shape(H, Q, Q), shape(H, Q, chunk))
  step = lambda *inputs: neural_step(given, *inputs[:3], coefficients=inputs[3], marks_Bx3=inputs[4])
  memory = {n: (shape(H, *edge),) * Q for n, edge in edges.items()}
  text = gpu_text(step, start, (memory, rings), token, made, shape(3, dtype=jnp.int32))
  assert all(name in text for name in pallas_step_neural.KERNELS)
