"""The neural memory in use: reading without writing, what a call may be cut into, how it starts, and what it needs."""
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.banks import for_inference
from memjax.config.neural import (
  NeuralConfig,
  NeuralExecConfig,
  NeuralGatesConfig,
  NeuralLocalsConfig,
  NeuralNetConfig,
  NeuralProjConfig,
  NeuralRuleConfig,
  NeuralWriteConfig,
)
from memjax.memory.registry import make_memory
from memjax.ops.neural import Rule
from memjax.ops.neural_nets import Network
from memjax.ops.neural_scan import mix
from memjax.ops.neural_steps import Gates
from tests.laws.test_laws import close, parameters
from tests.ops.neural_cases import start_of

B, L, D, C = 2, 19, 8, 4
BASE = NeuralConfig(heads=2, chunk=C, net=NeuralNetConfig(kind='linear'), exec=NeuralExecConfig(group=-1))
X = np.asarray(jax.random.normal(jax.random.key(1), (B, L, D)))
POSITION = np.broadcast_to(np.arange(L)[None], (B, L))


@pytest.fixture(scope='module')
def memory():
  """(module, parameters, jitted call) of the tests below."""
  module = make_memory(BASE, D)
  params = parameters(module, X[:, :1], module.init_state(B), POSITION[:, :1])
  return module, params, jax.jit(lambda x, state, position, **flow: module.apply(params, x, state, position_BxL=position, **flow))


@pytest.mark.slow
def test_reading_alone_leaves_the_state_bit_equal(memory):
  """No token may write: all read the same memory, pending tokens included, as they would one by one."""
  module, _, call = memory
  _, state, _ = call(X[:, :6], module.init_state(B), POSITION[:, :6])
  flow = dict(write_mask_BxL=np.zeros((B, 13), bool))
  y, after, _ = call(X[:, 6:], state, POSITION[:, 6:], **flow)
  chex.assert_trees_all_equal(after, state)
  for t in (6, 18):
    alone, _, _ = call(X[:, t:t + 1], state, POSITION[:, t:t + 1], write_mask_BxL=np.zeros((B, 1), bool))
    close(y[:, t - 6:t - 5], alone)
  fresh, emptied, _ = call(X[:, 6:], state, POSITION[:, :13], **flow)                # documents that start, and are not learned from
  chex.assert_trees_all_equal(emptied, module.init_state(B))
  close(fresh, call(X[:, 6:], module.init_state(B), POSITION[:, :13], **flow)[0])


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['token', 'exact', 'block', 'muon', 'omega', 'gram', 'attention', 'chunk_gates', 'tnt', 'surprise',
                                  'cascade'])
def test_every_prefix_then_steps(mode):
  """A prompt of any length, then token by token, is one call: outputs and final state, ragged rows, in float64."""
  length = 4 * C + 3
  with jax.enable_x64():
    own = {'muon': 'block', 'attention': 'block', 'omega': 'token', 'gram': 'token', 'surprise': 'token',
           'cascade': 'token'}.get(mode, mode)
    rule = NeuralRuleConfig(mode=own, momentum=mode if mode in ('muon', 'cascade') else 'first')
    more = {'omega': dict(write=NeuralWriteConfig(window=3, pairs=2, per_tensor=True)),
            'gram': dict(gates=NeuralGatesConfig(theta_norm='gram')),
            'chunk_gates': dict(gates=NeuralGatesConfig(theta_raw=True, theta_base=.1), write=NeuralWriteConfig(refresh=2)),
            'surprise': dict(gates=NeuralGatesConfig(surprise='z')),
            'cascade': dict(gates=NeuralGatesConfig(order=3), write=NeuralWriteConfig(persistent=2),
                            proj=NeuralProjConfig(features='polynomial', rope='chunk')),
            'tnt': dict(locals=NeuralLocalsConfig(chunks=(2, 4), shard=8))}.get(mode, {})
    kind = {'exact': 'linear', 'attention': 'attention'}.get(mode, 'mlp')
    net = NeuralNetConfig(kind=kind, residual='off' if mode == 'cascade' else '')
    config = dataclasses.replace(BASE, rule=rule, net=net, **more)
    module = make_memory(config, D, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (B, length, D), jnp.float64)
    position = jnp.broadcast_to(jnp.arange(length)[None], (B, length))
    params = parameters(module, x[:, :1], module.init_state(B), position[:, :1])
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    call = jax.jit(lambda x, state, position, mask: module.apply(params, x, state, position_BxL=position, mask_BxL=mask)[:2])
    real = jnp.ones((B, length), bool)
    y, end = call(x, module.init_state(B), position, real)
    states = [module.init_state(B)]
    for t in range(length):
      out, state = call(x[:, t:t + 1], states[-1], position[:, t:t + 1], real[:, :1])
      close(out[:, 0], y[:, t], 1e-10)
      states.append(state)
    close(states[-1], end, 1e-10)
    for n in range(1, length):                                                       # row 1 is a token shorter
      mask = jnp.arange(length)[None] < jnp.array([[n], [n - 1]])
      _, state = call(x, module.init_state(B), position, mask)
      close(jax.tree.map(lambda a: a[0], state), jax.tree.map(lambda a: a[0], states[n]), 1e-10)
      close(jax.tree.map(lambda a: a[1], state), jax.tree.map(lambda a: a[1], states[n - 1]), 1e-10)


def ttt_run(config):
  """((reads, parameters) of X in float64, (unit queries and keys, values [B, L, H, K], step sizes [B, L, H], factors of rows))."""
  module, x = make_memory(config, D, dtype=jnp.float64), jnp.asarray(X, jnp.float64)
  params = jax.tree.map(lambda a: a.astype(jnp.float64), parameters(module, x[:, :1], module.init_state(B), POSITION[:, :1]))
  got = jax.jit(lambda x: module.apply(params, x, module.init_state(B), position_BxL=POSITION, method='mix')[0])(x)
  inputs, p = module.apply(params, x, POSITION, method='project'), params['params']
  query, key, value = (a.reshape(B, L, 2, D // 2) for a in map(np.asarray, inputs.streams))
  query, key = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (query, key))
  return (got, p), (query, key, value, np.asarray(inputs.gate_BxLxGxH)[:, :, 0], np.asarray(p['row']))


@pytest.mark.slow
def test_ttt_by_hand():
  """One matrix, no momentum, no forgetting: inside a chunk W_t = W - r_t sum_i theta_i k_i (k_i W - v_i), r_t = max(0, 1/t + learned)."""
  config = dataclasses.replace(BASE, rule=NeuralRuleConfig(momentum='none', forget=False), gates=NeuralGatesConfig(row_factor=True),
                               proj=NeuralProjConfig(conv_width=0, activation=''))
  with jax.enable_x64():
    (got, p), (query, key, value, theta, row) = ttt_run(config)
  (_, _, H, K), want = query.shape, np.zeros(query.shape)
  for b, h in np.ndindex(B, H):
    w = np.asarray(p['start_w_0'])[h]
    for t in range(L):
      if t % C == 0: held, total = w, np.zeros((K, K))
      total = total + theta[b, t, h] * np.outer(key[b, t, h], key[b, t, h] @ held - value[b, t, h])
      w = held - max(0, 1 / (t % C + 1) + row[h, t % C]) * total
      want[b, t, h] = query[b, t, h] @ w
  np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=1e-12)


@pytest.mark.slow
def test_ttt_of_two_layers_by_hand():
  """As above with a layer norm whose gain is an ordinary parameter and fast biases: the target of the network is v - k."""
  net = NeuralNetConfig(expansion=1, activation='gelu', bias=True, gain='slow')
  config = dataclasses.replace(BASE, rule=NeuralRuleConfig(momentum='none', forget=False), gates=NeuralGatesConfig(row_factor=True),
                               proj=NeuralProjConfig(conv_width=0, activation=''), net=net)
  def layer(w, gain, k):
    z = jax.nn.gelu(k @ w['w_0'] + w['b_0'], approximate=False) @ w['w_1'] + w['b_1']
    z = z - z.mean()
    return (1 + gain) * z / jnp.sqrt(jnp.mean(z * z) + 1e-5)
  with jax.enable_x64():
    (got, p), (query, key, value, theta, row) = ttt_run(config)
    (_, _, H, _), want = query.shape, np.zeros(query.shape)
    slope = jax.jit(jax.grad(lambda w, gain, k, v: jnp.sum((layer(w, gain, k) - (v - k)) ** 2) / 2))
    read = jax.jit(lambda w, gain, q: q + layer(w, gain, q))
    for b, h in np.ndindex(B, H):
      w = {name.removeprefix('start_'): np.asarray(a[h]) for name, a in p.items() if name.startswith('start_')}
      for t in range(L):
        if t % C == 0: held, total = w, jax.tree.map(np.zeros_like, w)
        g = slope(held, p['slow_gain'][h], key[b, t, h], value[b, t, h])
        total = jax.tree.map(lambda a, one, b=b, t=t, h=h: a + theta[b, t, h] * np.asarray(one), total, g)
        w = jax.tree.map(lambda a, one, h=h, t=t: a - max(0, 1 / (t % C + 1) + row[h, t % C]) * one, held, total)
        want[b, t, h] = read(w, p['slow_gain'][h], query[b, t, h])
  np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=1e-11)


@pytest.mark.slow
def test_detached_chunks():
  """No outer gradient from a chunk into the chunks before it; values as without."""
  alone = make_memory(dataclasses.replace(BASE, write=NeuralWriteConfig(detach=1), proj=NeuralProjConfig(conv_width=0)), D)
  linked = make_memory(dataclasses.replace(BASE, proj=NeuralProjConfig(conv_width=0)), D)
  params = parameters(alone, X[:, :1], alone.init_state(B), POSITION[:, :1])
  def run(module): return jax.jit(jax.value_and_grad(
      lambda x: module.apply(params, x, module.init_state(B), position_BxL=POSITION)[0][:, C:2 * C].sum()))(X)
  (value, grad), (want, flows) = run(alone), run(linked)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert not np.asarray(grad[:, :C]).any() and np.asarray(grad[:, C:2 * C]).any() and np.asarray(flows[:, :C]).any()


def test_the_start(memory):
  """Gates at initialisation: momentum .9, horizons from 55 to 3,000 tokens, step sizes that the chunk divides; convolution off."""
  module = memory[0]
  init = jax.jit(lambda key: module.init(key, X[:, :1], module.init_state(B), position_BxL=POSITION[:, :1]))
  params = nn.unbox(init(jax.random.key(0)))
  gate = module.apply(params, X, POSITION, method='project').gate_BxLxGxH
  theta, eta, alpha, write = np.moveaxis(np.asarray(gate), 2, 0)
  np.testing.assert_allclose(eta, .9, atol=1e-3)
  np.testing.assert_allclose(1 / alpha[0, 0], [55.6, 2982], rtol=1e-3)
  np.testing.assert_allclose(theta, .5 * .1 / C, rtol=1e-2)
  assert (write == 1).all()
  taps = np.asarray(params['params']['projections']['taps'])
  assert (taps[0] == 1).all() and not taps[1:].any()


@pytest.mark.slow
def test_what_is_told(memory):
  """Surprise falls for what was seen before, and rises with what is new."""
  module, _, call = memory
  same = np.broadcast_to(X[:, :1], (B, 40, D))
  told = [call(same, module.init_state(B), np.broadcast_to(np.arange(40)[None], (B, 40)))[2]]
  state = call(same, module.init_state(B), np.broadcast_to(np.arange(40)[None], (B, 40)))[1]
  other = np.broadcast_to(-3 * X[:, 1:2], (B, 40, D))
  told.append(call(other, state, np.broadcast_to(np.arange(40, 80)[None], (B, 40)))[2])
  assert all(np.isfinite(value) for one in told for value in one.values())
  assert told[1]['surprise'] > told[0]['surprise'] and 0 < told[0]['eta'] < 1 and told[1]['weight_change'] > 0


@pytest.mark.slow
def test_long_stream_stays_bounded():
  """65,536 tokens from the default start: finite, and not far from the learned weights."""
  module = make_memory(NeuralConfig(heads=1, chunk=64, net=NeuralNetConfig(expansion=1)), 16)
  state, key = module.init_state(1), jax.random.key(0)
  params = nn.unbox(module.init(key, jnp.zeros((1, 1, 16)), state, position_BxL=jnp.zeros((1, 1), jnp.int32)))
  call = jax.jit(lambda x, state, start: module.apply(params, x, state, position_BxL=start + jnp.arange(8192)[None])[1:])
  sizes = []
  for n in range(8):
    x = jax.random.normal(jax.random.fold_in(key, n), (1, 8192, 16)) if n % 2 else jnp.ones((1, 8192, 16))
    state, aux = call(x, state, 8192 * n)
    sizes.append(float(aux['weight_change']))
  assert np.isfinite(sizes).all() and max(sizes) < 30


@pytest.mark.slow
@pytest.mark.parametrize(('decay', 'most'), [('init', 5.0), ('zero', 4.2)])
def test_temporaries_of_training(decay, most):
  """Forward and backward of 128 heads over 8,192 tokens need at most so many GiB beside inputs and gradients; nothing is T x T or T x P."""
  rows, heads, length, width = 8, 16, 8192, 64
  rule = Rule(Network(width, width, hidden=256), dtype=jnp.bfloat16, decay_to=decay)
  shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
  fast = {name: shape(heads, *dims) for name, dims in rule.network.fast.items()}
  tokens = tuple(shape(rows, heads, length, width, dtype=jnp.bfloat16) for _ in range(3))
  def loss(fast, tokens, theta, eta, alpha):
    memory = {name: jnp.zeros((rows, heads, rule.levels, *dims)) for name, dims in rule.network.fast.items()}
    found = Gates(theta, eta, alpha, jnp.ones((rows, heads, length), bool))
    return jnp.sum(jnp.square(mix(rule, start_of(fast, {}, rows), memory, tokens, gates=found, chunk=64)[1].astype(jnp.float32)))
  compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(fast, tokens, *[shape(rows, heads, length)] * 3).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= most * 2 ** 30
  text = compiled.as_text()
  assert f'{length},{length}]' not in text and f'{length},{width},256]' not in text


def test_aligned_rows_are_the_same_and_others_read_nan():
  """A promise of training, which inference does not make: what does not fit is not silently something else."""
  module = make_memory(dataclasses.replace(BASE, exec=dataclasses.replace(BASE.exec, aligned=True)), D)
  params = parameters(module, X[:, :1], module.init_state(B), POSITION[:, :1])
  run = jax.jit(lambda module, x, position: module.apply(params, x, module.init_state(B), position_BxL=position)[0], static_argnums=0)
  x, position = X[:, :2 * C], POSITION[:, :2 * C]
  close(run(module, x, position), run(make_memory(BASE, D), x, position))
  inside = position.copy()
  inside[1, 2:] -= 2
  assert np.isnan(run(module, x, inside)).all() and np.isfinite(run(make_memory(BASE, D), x, inside)).all()
  assert not for_inference({'memory': module.config})['memory'].exec.aligned
