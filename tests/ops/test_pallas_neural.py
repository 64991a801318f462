"""The kernels that write into a neural memory, interpreted: values and gradients against chunks written by XLA one after the other."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import pallas_neural
from memjax.ops.neural import Rule, Tokens, Weights
from memjax.ops.neural_nets import Network
from memjax.ops.neural_scan import Chunk, only_full, write_chunk
from memjax.ops.neural_steps import Coefficients
from tests.ops.inputs import quick
from tests.ops.oracle import relative, rms

CASES = {          # momentum, chunks, tokens a chunk, width, hidden channels, rows of the start, is the gain slow, channels of a program
    'first': ('first', 6, 16, 16, 32, 1, True, 16), 'fast-gain': ('first', 2, 16, 16, 32, 1, False, 16),
    'one-chunk': ('none', 1, 16, 16, 32, 2, False, 32), 'nesterov': ('nesterov', 3, 32, 16, 64, 2, True, 16)}


def inputs(name, *, dtype=np.float64, seed=0):
  """(rule, (start, memory, tokens, coefficients), full, fresh) with steps, coefficients and decays of exactly 0."""
  momentum, N, C, K, F, rows, is_slow, _ = CASES[name]
  rng, B, H = np.random.default_rng(seed), 2, 2 if rows == 1 else 1
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  rule = Rule(Network(K, K, hidden=F, slow_gain=is_slow), momentum=momentum, dtype=jnp.float64 if dtype == np.float64 else jnp.bfloat16)
  start = Weights({name: draw(rows, H, *shape) * 0.3 for name, shape in rule.network.fast.items()},
                  {name: draw(H, *shape) for name, shape in rule.network.slow.items()})
  memory = {name: tuple(draw(B, H, *shape) * 0.1 for _ in range(rule.levels)) for name, shape in rule.network.fast.items()}
  theta = rng.random((N, B, H, C)).astype(dtype) * (rng.random((N, B, H, C)) < 0.8)
  turn = np.triu(rng.random((N, B, H, rule.levels, rule.levels))).astype(dtype)
  turn[0, 0, 0, 0, 0], turn[-1, 1, 0] = 0, np.eye(rule.levels)
  push = rng.random((N, B, H, rule.levels, C)).astype(dtype) * (np.arange(C) != 3)
  full, fresh = np.ones((N, B), bool), np.zeros((N, B), bool)
  full[-1, 0], fresh[N // 2, 1] = False, True
  tokens = Tokens(draw(N, B, H, C, K), draw(N, B, H, C, K), theta, np.ones_like(theta))
  return rule, (start, memory, tokens, Coefficients(None, np.zeros_like(push), turn, push)), full, fresh


def launch(block):
  """Programs of so many hidden channels, 16 at a time; those that find gradients take half as many."""
  shape = pallas_neural.Shape(block=block, tile=16)
  return pallas_neural.Launch(*[shape] * 4, shape._replace(block=max(16, block // 2)))


def run(name, given, *, detach=None, compiled=quick, has_gradients=True):
  """[(outputs, gradients of a random functional of them) of XLA, of the kernels]."""
  rule, arguments, full, fresh = given
  def by_xla(start, memory, chunks):
    start = Weights({name: jnp.broadcast_to(a, (2, *a.shape[1:])) for name, a in start.fast.items()}, start.slow)
    def write(memory, item):
      if detach is not None: memory = jax.tree.map(lambda a: jnp.where(item[0] == detach, jax.lax.stop_gradient(a), a), memory)
      return write_chunk(rule, start, memory, item[1])
    memory, (seen, told) = jax.lax.scan(write, memory, (jnp.arange(len(full)), chunks))
    return memory, (seen, told[:2])
  def by_kernels(start, memory, chunks):
    flow = None if detach is None else jnp.broadcast_to(jnp.arange(len(full))[:, None] != detach, full.shape)
    return pallas_neural.write_chunks(rule, start, memory, chunks.tokens, coefficients=chunks.coefficients, fresh=chunks.fresh, flow=flow,
                                      launch=launch(CASES[name][-1]))
  def loss(arguments, write):
    start, memory, tokens, coefficients = arguments
    out = write(start, memory, only_full(Chunk(tokens.key, tokens, coefficients, full, fresh)))
    wide = [x.astype(jnp.promote_types(jnp.float32, x.dtype)) for x in jax.tree.leaves(out)]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in wide), out
  def both(arguments):
    if not has_gradients: return [(loss(arguments, write)[1], ()) for write in (by_xla, by_kernels)]
    results = [jax.value_and_grad(loss, has_aux=True)(arguments, write) for write in (by_xla, by_kernels)]
    return [(out, grads) for (_, out), grads in results]
  return compiled(both)(arguments)


def test_kernels_write_what_xla_writes():
  """What is left in the memory, what reads see, loss and norm, with fresh and incomplete chunks and zeros."""
  with jax.enable_x64():
    (want, _), (got, _) = run('first', inputs('first'), has_gradients=False)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True): assert x.dtype == y.dtype and relative(x, y) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_gradients_equal_those_of_xla(name):
  """The same, and all gradients."""
  with jax.enable_x64():
    (want, right), (got, grads) = run(name, inputs(name))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True): assert x.dtype == y.dtype and relative(x, y) <= 1e-12
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True): assert relative(x, y) <= 1e-10
  assert all(np.any(x) for x in jax.tree.leaves((grads[0], grads[1], grads[2].key, grads[2].value, grads[2].weight)))


@pytest.mark.slow
def test_gradients_stop_where_they_are_told_to():
  """Before chunk 1 nothing flows into the memory."""
  given = inputs('fast-gain')
  with jax.enable_x64():
    (_, right), (_, grads) = run('nesterov', given, detach=1)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True): assert relative(x, y) <= 1e-10


@pytest.mark.slow
def test_bf16():
  """bf16 operands, fp32 state: as near to XLA as XLA is to float64."""
  (want, right), (got, grads) = run('nesterov', inputs('nesterov', dtype=np.float32), compiled=jax.jit)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True): assert x.dtype == y.dtype and rms(x, y) <= 2e-2
  for x, y in zip(grads[:2], right[:2], strict=True): assert rms(flat(x), flat(y)) <= 2e-2


def flat(tree):
  """All numbers of a tree."""
  return np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)])


def test_what_the_kernels_take():
  """Every other choice stays with XLA."""
  rule, *_ = inputs('first', dtype=np.float32)
  assert all(pallas_neural.supports(inputs(name, dtype=np.float32)[0], 64) for name in CASES)
  rules = [{'mode': 'exact'}, {'loss': 'huber'}, {'momentum': 'muon'}, {'decay_to': 'zero'}, {'clip': 1.0}, {'first_order': True},
           {'gram': True}, {'pairs': 2}]
  networks = [{'depth': 1}, {'depth': 3}, {'kind': 'swiglu'}, {'kind': 'linear'}, {'bias': True}, {'residual': False},
              {'activation': 'gelu'}, {'hidden': 48}, {'hidden': 16}, {'key_width': 8}]
  other = [*rules, *({'network': dataclasses.replace(rule.network, **changes)} for changes in networks)]
  for changes in other: assert not pallas_neural.supports(dataclasses.replace(rule, **changes), 64), changes
  assert not any(pallas_neural.supports(rule, chunk) for chunk in (8, 48, 256))
