"""Persistent tokens of the neural memory: every document reads the weights that a loop with `jax.grad` leaves after them."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig, NeuralWriteConfig
from memjax.memory.registry import make_memory
from memjax.ops.neural import Weights
from memjax.ops.neural_reference import reference
from tests.laws.test_laws import close, parameters

B, L, D, C, N = 2, 9, 8, 4, 3
BASE = NeuralConfig(heads=2, chunk=C, net=NeuralNetConfig(expansion=1), exec=NeuralExecConfig(spare=9),
                    write=NeuralWriteConfig(persistent=N, pairs=2), proj=NeuralProjConfig(rope='full'))
RULES = {'token': NeuralRuleConfig(clip=.05), 'block': NeuralRuleConfig(mode='block', momentum='muon', decay_to='zero'),
         'exact': NeuralRuleConfig(mode='exact', momentum='nesterov')}
POSITION = jnp.broadcast_to(jnp.arange(L)[None], (B, L))


def written(module, params):
  """The start [H, ...] by name after the persistent tokens, by the reference."""
  def inside(module):
    prefix, home = module.prefix[None], Weights({name: a[None] for name, a in module.fast.items()}, module.slow)
    tail = {name: jnp.zeros((1, *shape), jnp.float64) for name, shape in module.parts.tails.items()}
    items, _ = module.projections.items(module.project(prefix, jnp.arange(N)[None]), tail)
    gates, tokens = module.tokens(items)
    memory = {name: jnp.zeros((1, a.shape[1], module.rule.levels, *a.shape[2:])) for name, a in home.fast.items()}
    query = jnp.swapaxes(items.query, 1, 2)
    return reference(module.rule, home, memory, (query, tokens.key, tokens.value), gates=gates, chunk=C)[0]
  left = module.apply(params, method=inside)
  return {name: params['params'][f'start_{name}'] + leaf[0, :, 0] for name, leaf in left.items()}


@pytest.mark.slow
@pytest.mark.parametrize('mode', RULES)
def test_documents_begin_after_them(mode):
  """In float64: outputs and all outer gradients are those of a memory without them whose start was written by the reference; a document
  inside a row begins so too, and streaming equals the whole."""
  net = NeuralNetConfig(kind='linear') if mode == 'exact' else BASE.net
  config = dataclasses.replace(BASE, rule=RULES[mode], net=net)
  with jax.enable_x64():
    module = make_memory(config, D, dtype=jnp.float64)
    plain = make_memory(dataclasses.replace(config, write=dataclasses.replace(config.write, persistent=0)), D, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (B, L, D), jnp.float64)
    params = parameters(module, x[:, :1], module.init_state(B), POSITION[:, :1])
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    at = POSITION.at[1, 5:].add(-5)
    def ours(params): return module.apply(params, x, module.init_state(B), position_BxL=at)[0]
    def theirs(params):
      start = {f'start_{name}': a for name, a in written(module, params).items()}
      own = {name: a for name, a in params['params'].items() if name != 'persistent'}
      return plain.apply({'params': own | start}, x, plain.init_state(B), position_BxL=at)[0]
    run = lambda f: jax.jit(jax.value_and_grad(lambda params: (lambda y: (jnp.sum(jnp.sin(y)), y))(f(params)), has_aux=True))(params)
    ((_, y), grads), ((_, want), want_grads) = run(ours), run(theirs)
    close(y, want, 1e-12)
    close(grads, want_grads, 1e-10)
    assert np.abs(grads['params']['persistent']).min() > 0
    step = jax.jit(lambda x, state, at: module.apply(params, x, state, position_BxL=at)[:2])
    state = module.init_state(B)
    for t in range(L):
      out, state = step(x[:, t:t + 1], state, at[:, t:t + 1])
      close(out[:, 0], y[:, t], 1e-10)


@pytest.mark.slow
def test_rotated_products_follow_distance():
  """Queries and keys of one token turn with its position, modulo the chunk for 'chunk'; the state knows nothing of positions."""
  x = jax.random.normal(jax.random.key(0), (1, 1, D))
  found = {}
  for rope in ('full', 'chunk'):
    config = NeuralConfig(heads=2, chunk=C, proj=NeuralProjConfig(rope=rope, conv_width=0))
    module = make_memory(config, D)
    params = parameters(module, x, module.init_state(1), POSITION[:1, :1])
    def keys(module, t):
      return module.projections.items(module.project(x, jnp.array([[t]])), {'stream': jnp.zeros((1, 0, 3 * D))})[0]
    found[rope] = [module.apply(params, t, method=keys) for t in (1, 2, C + 1, C + 2)]
  inner = lambda one, other: np.asarray(jnp.sum(one.query * other.key, -1))
  one, two, five, six = found['full']
  np.testing.assert_allclose(inner(two, one), inner(six, five), atol=1e-6)
  assert np.abs(inner(two, one) - inner(five, one)).max() > 1e-2
  np.testing.assert_array_equal(found['chunk'][0].key, found['chunk'][2].key)
  assert np.abs(found['chunk'][0].key - found['full'][2].key).max() > 1e-2
