"""Memories that live long: they stay bounded and alive, recall what was written, and forget it: specification properties 39 to 41."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralProjConfig
from memjax.memory.registry import make_memory
from memjax.ops.neural import Rule, Tokens, Weights, factors
from memjax.ops.neural_nets import Network, Plain
from memjax.ops.neural_scan import mix
from memjax.ops.neural_steps import Gates

D = 16


def keys_of(kind, rng, length):
  """Inputs whose keys are random, all the same, or (kind 'silu', by the projections) all in one corner."""
  x = rng.normal(size=(1, length, D)).astype(np.float32)
  return np.broadcast_to(x[:, :1], x.shape) if kind == 'repeated' else x


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['random', 'repeated', 'silu'])
@pytest.mark.parametrize('chunk', [16, 64, 256])
def test_a_long_text_stays_bounded(chunk, kind):
  """65,536 tokens from the default start: finite, and not far from the learned weights."""
  proj = NeuralProjConfig(conv_width=0, activation='' if kind != 'silu' else 'silu')
  memory = make_memory(NeuralConfig(heads=1, chunk=chunk, proj=proj, exec=NeuralExecConfig(aligned=True)), D)
  state, piece = memory.init_state(1), 8192
  params = nn.unbox(memory.init(jax.random.key(0), jnp.zeros((1, 1, D)), state, position_BxL=jnp.zeros((1, 1), jnp.int32)))
  @jax.jit
  def call(x, state, start):
    y, state, aux = memory.apply(params, x, state, position_BxL=start + jnp.arange(piece)[None])
    return state, (aux['weight_change'], aux['momentum'], aux['inner_loss'], jnp.abs(y).max())
  told, rng = [], np.random.default_rng(0)
  for n in range(65536 // piece):
    state, found = call(keys_of(kind, rng, piece), state, n * piece)
    told.append(jax.device_get(found))
  told = np.array(told)
  assert np.isfinite(told).all() and told[:, 0].max() < 10 and told[:, 2].max() < 100


def gates_of(shape, **given):
  """Gates of constant values."""
  full = {name: jnp.full(shape, given.get(name, 0.0)) for name in ('theta', 'eta', 'alpha')}
  return Gates(**full, write=jnp.ones(shape, bool))


def pairs(rng, count, width, passes):
  """(keys, values, query = keys) of `count` random pairs, each pass in an order of its own, [1, 1, passes count, width]."""
  key, value = rng.normal(size=(2, count, width))
  key /= np.linalg.norm(key, axis=-1, keepdims=True)
  order = np.concatenate([rng.permutation(count) for _ in range(passes)])
  return (key, value), tuple(jnp.asarray(a[order][None, None], jnp.float32) for a in (key, key, value))


@pytest.mark.slow
@pytest.mark.parametrize(('decay', 'lives'), [('init', True), ('zero', False)])
def test_forgetting_to_the_start_keeps_the_gradient_alive(decay, lives):
  """10,240 tokens of alpha .02: the norm of the weight gradient, against that of the first tokens. To zero, two layers die."""
  width, rng = 16, np.random.default_rng(0)
  rule = Rule(Network(width, width, hidden=64, residual=False), decay_to=decay)
  home = {name: jnp.asarray(rng.normal(size=(1, 1, *shape)) * shape[0] ** -.5, jnp.float32) for name, shape in rule.network.fast.items()}
  start, nothing = Weights(home, {}), {name: jnp.zeros((1, 1, 2, *a.shape[2:])) for name, a in home.items()}
  _, tokens = pairs(rng, 10240, width, 1)
  run = jax.jit(lambda memory: mix(rule, start, memory, tokens, gates=gates_of((1, 1, 10240), theta=.001, alpha=.02), chunk=64)[0])
  after = run(nothing)
  one = jnp.ones((1, 1, 64))
  last = Tokens(tokens[1][:, :, -64:], tokens[2][:, :, -64:], one, one)
  norm = lambda memory: float(factors(rule, {name: home[name] + a[:, :, 0] for name, a in memory.items()}, {}, last).norm.mean())
  share = norm(after) / norm(nothing)
  assert share > .1 if lives else share < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'count', 'passes'), [('exact', 12, 40), ('token', 16, 600)])
def test_pairs_are_recalled_and_forgotten(mode, count, passes):
  """Random pairs, read again and again, are recalled to 1 % of the values' variance; after 200 tokens that forget, as before they were
  written. One matrix of width 16, by the online rule, and two layers in chunks of 8."""
  width, rng = 16, np.random.default_rng(1)
  net = Network(width, width, kind='linear', residual=False) if mode == 'exact' else Network(width, width, hidden=64, residual=False)
  rule = Rule(net, mode=mode, momentum='none')
  home = {name: jnp.asarray(rng.normal(size=(1, 1, *shape)) * (shape[0] ** -.5 if len(shape) > 1 else 0), jnp.float32)
          for name, shape in net.fast.items()}
  start, memory = Weights(home, {}), {name: jnp.zeros((1, 1, 1, *a.shape[2:])) for name, a in home.items()}
  (key, value), tokens = pairs(rng, count, width, passes)
  def recall(memory):
    held = {name: home[name] + a[:, :, 0] for name, a in memory.items()}
    y = net(Plain(held, {}, jnp.float32), jnp.asarray(key[None, None], jnp.float32))[0, 0]
    return float(np.mean((y - value) ** 2) / np.mean(value ** 2))
  theta, chunk = (1.0, 16) if mode == 'exact' else (.1, 8)
  learn = jax.jit(lambda memory: mix(rule, start, memory, tokens, gates=gates_of((1, 1, count * passes), theta=theta), chunk=chunk)[0])
  idle = tuple(a[:, :, :200] for a in tokens)
  forget = jax.jit(lambda memory: mix(rule, start, memory, idle, gates=gates_of((1, 1, 200), alpha=.1), chunk=chunk)[0])
  before, learnt = recall(memory), learn(memory)
  assert before > .5 and recall(learnt) < 1e-2
  assert abs(recall(forget(learnt)) - before) < 1e-3
