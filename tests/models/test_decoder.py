"""The decoder: scanned layers, wirings, blocks, heads, grafts, statistics, causality, decoding at constant memory."""
import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.flags import load
from memjax.config.layout import stages
from memjax.config.mixers import AttentionConfig, HolographicConfig, MemoryLossConfig, WindowConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig
from memjax.memory.registry import make_memory
from memjax.models.decoder import build_decoder, init_params

B, L, D, A = 2, 6, 8, 11
MIXERS = {'near': WindowConfig(heads=2, window=3), 'mem': HolographicConfig(heads=2, slots=2), 'att': AttentionConfig(heads=2)}
BASE = ModelConfig(width=D, hidden=8, vocabulary=A, mixers=MIXERS, pattern=('near', 'mem'), repeats=2)
TOKEN_BxL = jnp.asarray(np.random.default_rng(0).integers(0, A, (B, L)), jnp.int32)
POSITION_BxL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))


def make(config=BASE, **changes):
  """(model, random parameters of the size of trained ones, zeros and ones included)."""
  model = build_decoder(dataclasses.replace(config, **changes))
  shapes, rng = jax.eval_shape(lambda: init_params(model, jax.random.key(0))[0]), np.random.default_rng(1)
  return model, jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), shapes)


def run(model, params, token=TOKEN_BxL, state=None, position=None, **context):
  """(logits, state, aux) of one compiled call."""
  state = model.init_state(token.shape[0], context.pop('max_len', 0)) if state is None else state
  position = jnp.broadcast_to(jnp.arange(token.shape[1])[None], token.shape) if position is None else position
  call = jax.jit(lambda params, state, key: model.apply({'params': params}, token, state, position_BxL=position, **{**context, 'key': key}))
  return call(params, state, context.pop('key', None))


def close(a, b, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, float(np.abs(y).max())))


@pytest.fixture(scope='module')
def base():
  model, params = make()
  return model, params, run(model, params)


# Layers ----------------------------------------------------------------------------------------------------------------------

def test_scanned_repeats_equal_the_layers_written_out(base):
  _, params, (logits, state, aux) = base
  flat = {f'layer_{2 * i + j}': jax.tree.map(lambda x, i=i: x[i], params['repeats'][f'layer_{j}']) for i in range(2) for j in range(2)}
  model, _ = make(prefix=BASE.pattern * 2, repeats=0)
  out, end, other = run(model, {**{n: p for n, p in params.items() if n != 'repeats'}, 'prefix': flat})
  close(out, logits)
  close({n: other[n] for n in aux}, aux)
  for i in range(2):
    for j in range(2): close(end['prefix'][f'layer_{2 * i + j}'], jax.tree.map(lambda x, i=i: x[:, i], state['repeats'][f'layer_{j}']))


def test_prefix_repeats_and_suffix_come_in_this_order(base):
  """The same four layers, divided among the three parts."""
  _, params, (logits, _, _) = base
  one = lambda i, j: jax.tree.map(lambda x: x[i], params['repeats'][f'layer_{j}'])
  model, _ = make(prefix=('near',), pattern=('mem',), repeats=1, suffix=('near', 'mem'))
  rest = {n: p for n, p in params.items() if n != 'repeats'}
  parts = {'prefix': {'layer_0': one(0, 0)}, 'repeats': {'layer_0': jax.tree.map(lambda x: x[None], one(0, 1))},
           'suffix': {'layer_0': one(1, 0), 'layer_1': one(1, 1)}}
  close(run(model, {**rest, **parts})[0], logits)


@pytest.mark.slow
def test_remat_changes_nothing(base):
  model, params, _ = base
  def grads(remat):
    loss = lambda p: jnp.sum(jnp.sin(model.apply({'params': p}, TOKEN_BxL, model.init_state(B), position_BxL=POSITION_BxL, remat=remat)[0]))
    return jax.value_and_grad(loss)
  plain, again = (jax.jit(grads(remat)) for remat in (False, True))
  assert str(jax.make_jaxpr(grads(True))(params)).count('remat') > str(jax.make_jaxpr(grads(False))(params)).count('remat')
  close(again(params), plain(params))


def unrolled(model, unroll, **more):
  """The loss of parameters, whose repeats are scanned or not."""
  def loss(p):
    call = dict(position_BxL=POSITION_BxL, unroll=unroll, **more)
    return jnp.sum(jnp.sin(model.apply({'params': p}, TOKEN_BxL, model.init_state(B), **call)[0]))
  return loss


def test_unrolled_repeats_are_not_scanned(base):
  model, params, _ = base
  scanned, written = (str(jax.make_jaxpr(unrolled(model, unroll))(params)) for unroll in (False, True))
  assert 'unroll=2' in written and 'unroll=2' not in scanned


@pytest.mark.slow
def test_unrolling_changes_nothing(base):
  model, params, _ = base
  both = (jax.jit(jax.value_and_grad(unrolled(model, unroll, remat=unroll))) for unroll in (False, True))
  scanned, written = (f.lower(params).compile() for f in both)
  assert scanned.as_text().count(' while(') > written.as_text().count(' while(')
  close(written(params), scanned(params))


def test_statistics_come_layer_by_layer(base):
  model, params, (logits, _, plain) = base
  out, _, aux = run(model, params, collect=True)
  assert jnp.array_equal(out, logits) and 'layers' not in plain
  assert set(aux['layers']) == {'repeats/layer_0/near', 'repeats/layer_1/mem'}
  assert aux['layers']['repeats/layer_0/near']['read_norm_BxL'].shape == (2, B, L)
  assert aux['layers']['repeats/layer_1/mem']['state_norm_BxHxS'].shape == (2, B, 2, 2)


@pytest.mark.slow
def test_monitors_are_means_over_the_memories_that_report_them():
  """One memory in the prefix, two in the repeats: three values, equal weights; window layers report no keep horizon."""
  loss = HolographicConfig(heads=2, slots=2, loss=MemoryLossConfig(balance=0.5, gate=0.25))
  model, params = make(mixers={**MIXERS, 'mem': loss}, prefix=('mem',))
  _, _, aux = run(model, params, collect=True)
  layers = aux['layers']
  gates = [layers['prefix/layer_0/mem']['gate_H'].mean(), *layers['repeats/layer_1/mem']['gate_H'].mean(-1)]
  assert float(aux['gate_mean']) == pytest.approx(float(np.mean(gates)), rel=1e-5) == pytest.approx(float(aux['gate']), rel=1e-5)
  # penalty: the mean over the three memories that have losses; windows have none
  assert float(aux['penalty']) == pytest.approx(0.5 * float(aux['balance']) + 0.25 * float(aux['gate']), rel=1e-5)


# Wirings ---------------------------------------------------------------------------------------------------------------------

def alone(name, params, x, grafted=False):
  memory = make_memory(MIXERS[name], D, grafted=grafted)
  apply = jax.jit(lambda p, x: memory.apply({'params': p}, x, memory.init_state(B), position_BxL=POSITION_BxL, method='mix'))
  y = apply(params, x)[0]
  return y, jax.jit(lambda p, x, y: memory.apply({'params': p}, x, y, method='readout'))(params, x, y)


def mixers_of(layer):
  """(module, params, x) of the mixers of one layer."""
  from memjax.models.block import Flow, Mixers
  model, params = make(pattern=(layer,), repeats=1)
  x = jax.random.normal(jax.random.key(3), (B, L, D))
  flow, states = Flow(POSITION_BxL), jax.tree.map(lambda a: a[:, 0], model.init_state(B)['repeats']['layer_0'])
  p = jax.tree.map(lambda a: a[0], params['repeats']['layer_0']['mixers'])
  module = Mixers(model.config, *stages(layer)[0])
  return jax.jit(lambda p: module.apply({'params': p}, x, states, flow, stream_BxLxD=x, key=None, prepared={}, collect=False)), p, x


def test_a_sum_is_a_sum():
  call, p, x = mixers_of('near+mem')
  close(call(p)[0], alone('near', p['near'], x)[1] + alone('mem', p['mem'], x)[1])


@pytest.mark.slow
def test_gate_is_the_formula_and_closes_exactly():
  """alpha b + (1 - alpha) a on normalised outputs, alpha = sigmoid(W x + w_c confidence + c); alpha 0 leaves a bit-equal."""
  call, p, x = mixers_of('near+mem:gate')
  (_, a), (read, b) = (np.float64(z) for z in alone('near', p['near'], x)), (np.float64(z) for z in alone('mem', p['mem'], x))
  normed = lambda y, name: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * np.float64(p[name]['scale'])
  a, b = normed(a, 'norm_near'), normed(b, 'norm_mem')
  size = np.sqrt((read * read).mean(-1, keepdims=True))
  logit = np.float64(x) @ np.float64(p['gate']['kernel']) + np.float64(p['gate']['bias']) + size * np.float64(p['gate_confidence'])
  alpha = 1 / (1 + np.exp(-logit))
  y, _, aux = call(p)
  close(y, alpha * b + (1 - alpha) * a, 1e-4)
  assert float(aux['mem']['share']) == pytest.approx(alpha.mean(), rel=1e-4)
  shut = {**p, 'gate': {'kernel': p['gate']['kernel'], 'bias': jnp.full((D,), -200.0)}}
  silent = {**shut, 'mem': jax.tree.map(lambda v: v + 0.25, p['mem']), 'norm_mem': {'scale': jnp.full((D,), 9.0)}}
  assert jnp.array_equal(call(shut)[0], call(silent)[0]) and not jnp.array_equal(call(p)[0], call({**silent, 'gate': p['gate']})[0])
  close(call(shut)[0], a)
  grads = jax.grad(lambda q: jnp.sum(call(q)[0] ** 2))(shut)
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads['mem']))


GRAFT = r'''
import dataclasses, sys, jax, jax.numpy as jnp
from tests.models import test_decoder as t
grafted, host = t.graft(sys.argv[1])
assert jnp.array_equal(grafted, host) and float(jnp.abs(host).max()) > 0, float(jnp.abs(grafted - host).max())
'''


def graft(dtype):
  """Logits of (the model with a fresh memory, the model without) from equal shared parameters."""
  config = dataclasses.replace(BASE, dtype=dtype, pattern=('att+mem',), grafted=('mem',))
  model = build_decoder(config)
  params = jax.jit(lambda: init_params(model, jax.random.key(0))[0])()
  assert not np.asarray(params['repeats']['layer_0']['mixers']['mem']['out']['kernel']).any()
  layer = params['repeats']['layer_0']
  bare = {**params, 'repeats': {'layer_0': {**layer, 'mixers': {'att': layer['mixers']['att']}}}}
  host = build_decoder(dataclasses.replace(config, pattern=('att',), grafted=()))
  return run(model, params)[0], run(host, bare)[0]


def test_a_grafted_memory_leaves_the_logits_bit_equal():
  grafted, host = graft('float32')
  assert jnp.array_equal(grafted, host) and float(jnp.abs(host).max()) > 0


@pytest.mark.slow
def test_a_grafted_memory_leaves_the_logits_bit_equal_in_bfloat16():
  """In a process of its own: XLA may otherwise keep bfloat16 sums in float32 in one program and not in the other."""
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_allow_excess_precision=false'
  done = subprocess.run([sys.executable, '-c', GRAFT, 'bfloat16'], env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


# Blocks and heads, against numpy ---------------------------------------------------------------------------------------------

def layer_norm(x, p, epsilon):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * p['scale'] + p['bias']


def test_post_norm_gelu_layernorm_learned_positions_biases_and_an_untied_head():
  block = BlockConfig(norm='layernorm', placement='post', activation='gelu', bias=True, norm_epsilon=1e-3)
  model, params = make(pattern=('near',), repeats=1, block=block, embedding=EmbeddingConfig(tie=False, position='learned', max_position=9))
  logits, _, _ = run(model, params)
  p = jax.tree.map(np.float64, params)
  layer = jax.tree.map(lambda a: a[0], p['repeats']['layer_0'])
  x = p['embed']['table'][np.asarray(TOKEN_BxL)] + p['position']['position'][np.arange(L)][None]
  mixed = alone('near', jax.tree.map(jnp.float32, layer['mixers']['near']), jnp.float32(x))[1]
  x = layer_norm(x + np.float64(mixed), layer['norm_mixer'], 1e-3)
  h = x @ layer['mlp']['up']['kernel'] + layer['mlp']['up']['bias']
  h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
  x = layer_norm(x + h @ layer['mlp']['down']['kernel'] + layer['mlp']['down']['bias'], layer['norm_mlp'], 1e-3)
  close(logits, layer_norm(x, p['norm'], 1e-3) @ p['head']['kernel'], 1e-4)


def test_pre_norm_swiglu_and_a_tied_head():
  model, params = make(pattern=('near',), repeats=1)
  p = jax.tree.map(np.float64, params)
  layer = jax.tree.map(lambda a: a[0], p['repeats']['layer_0'])
  rms = lambda x, q: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * q['scale']
  x = p['embed']['table'][np.asarray(TOKEN_BxL)]
  mixed = alone('near', jax.tree.map(jnp.float32, layer['mixers']['near']), jnp.float32(rms(x, layer['norm_mixer'])))[1]
  x = x + np.float64(mixed)
  z = rms(x, layer['norm_mlp'])
  g = z @ layer['mlp']['gate']['kernel']
  x = x + (g / (1 + np.exp(-g)) * (z @ layer['mlp']['up']['kernel'])) @ layer['mlp']['down']['kernel']
  close(run(model, params)[0], rms(x, p['norm']) @ p['embed']['table'].T, 1e-4)


# Time ------------------------------------------------------------------------------------------------------------------------

def test_no_token_sees_a_later_one_or_another_row(base):
  model, params, _ = base
  t = 3
  def logit(table_BxLxA):                             # tokens made soft: the embedding is a product with one-hot rows
    one = jax.nn.one_hot(TOKEN_BxL, A) + table_BxLxA
    soft = jax.vmap(jax.vmap(lambda row: row @ params['embed']['table']))(one)
    return jnp.sum(soft_logits(model, params, soft)[0, t] * jnp.arange(1.0, A + 1))
  size = np.abs(np.asarray(jax.jit(jax.grad(logit))(jnp.zeros((B, L, A))))).max(-1)
  assert not size[0, t + 1:].any() and not size[1].any() and (size[0, :t + 1] > 0).all()


def soft_logits(model, params, x_BxLxD):
  """Logits from embeddings: the decoder with one token a place, whose row of the table is that place's embedding."""
  table = jnp.concatenate([params['embed']['table'], x_BxLxD.reshape(-1, D)])
  token = A + jnp.arange(B * L).reshape(B, L)
  wide = build_decoder(dataclasses.replace(model.config, vocabulary=A + B * L))
  return wide.apply({'params': {**params, 'embed': {'table': table}}}, token, wide.init_state(B), position_BxL=POSITION_BxL)[0][..., :A]


@pytest.fixture(scope='module')
def tiny():
  config = load('configs/tiny.py', 'model.vocabulary=256').model
  model = build_decoder(config)
  params = jax.jit(lambda: init_params(model, jax.random.key(0))[0])()
  return model, params


def test_decoding_the_tiny_config_equals_the_full_forward(tiny):
  model, params = tiny
  token = jax.random.randint(jax.random.key(1), (1, 64), 0, 256)
  logits, end, _ = run(model, params, token)
  def step(state, now):
    out, state, _ = model.apply({'params': params}, now[0][None, None], state, position_BxL=now[1][None, None])
    return state, out[0, 0]
  last, steps = jax.jit(lambda state: jax.lax.scan(step, state, (token[0], jnp.arange(64))))(model.init_state(1))
  close((steps[None], last), (logits, end), 1e-4)
  assert np.array_equal(np.argmax(steps, -1), np.argmax(logits[0], -1))


def test_no_tokens_change_nothing(tiny):
  model, params = tiny
  token_BxL = jnp.zeros((2, 0), jnp.int32)
  state = jax.tree.map(jnp.ones_like, model.init_state(2, 8))
  logits, new, aux = model.apply({'params': params}, token_BxL, state, position_BxL=token_BxL)
  assert logits.shape == (2, 0, model.config.vocabulary) and new is state and float(aux['penalty']) == 0


def test_state_bytes_do_not_grow_with_the_text(tiny):
  model, params = tiny
  size = lambda state: sum(a.nbytes for a in jax.tree.leaves(state))
  def after(length):
    token = jax.ShapeDtypeStruct((1, length), jnp.int32)
    call = lambda p, token, position: model.apply({'params': p}, token, model.init_state(1, length), position_BxL=position)[1]
    return jax.eval_shape(call, params, token, token)
  sizes = {sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(after(length))) for length in (1, 64, 5000)}
  assert sizes == {size(model.init_state(1))} and size(model.init_state(1, 5000)) == size(model.init_state(1))
  full, _ = make(pattern=('att',))
  assert size(full.init_state(1, 64)) > 1.9 * size(full.init_state(1, 32))


SHIPPED = {'tiny': (), 'mat_tiny': (), 'default': (), 'hamt_small': ('model.repeats=1',), 'attention_small': ('model.repeats=1',),
           'wikitext2': ('model.repeats=1', 'model.vocabulary=1000'), 'hamt_seed': ('model.repeats=1', 'model.vocabulary=1000')}


@pytest.mark.parametrize('name', [name if name == 'tiny' else pytest.param(name, marks=pytest.mark.slow)
                                  for name in SHIPPED])
def test_the_first_loss_is_that_of_guessing(name):
  """Within .1 of ln V, at full width; large ones with one repeat."""
  config = load(f'configs/{name}.py').model
  overrides = [*SHIPPED[name], *([] if config.vocabulary or name == 'wikitext2' else ['model.vocabulary=256'])]
  model = build_decoder(load(f'configs/{name}.py', *overrides).model)
  @jax.jit
  def loss():
    params, _ = init_params(model, jax.random.key(0))
    token = jax.random.randint(jax.random.key(1), (1, 32), 0, 256)
    logits, _, _ = model.apply({'params': params}, token, model.init_state(1), position_BxL=jnp.arange(32)[None])
    return -jax.nn.log_softmax(logits).mean()                                   # the mean over all targets
  assert float(loss()) == pytest.approx(math.log(model.config.vocabulary), abs=0.1)
