"""Decoders with banks: a fresh bank changes nothing, gradients, causality, decoding, shared tables, losses."""
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankLossConfig, BankShapeConfig, MixingConfig, ProductKeyConfig
from memjax.config.context import ContextConfig
from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, WindowConfig
from memjax.config.schema import EmbeddingConfig, ModelConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, init_params, param_shapes, prepare_memories, set_prompt_length, shared_tables
from memjax.models.quantized import parse_quantization
from memjax.runtime.sampling import Sampler, Sampling
from tests.memory.bank_oracle import ORACLE, STRATEGIES, routed

B, L, D, A = 2, 9, 8, 13
POSITION = np.broadcast_to(np.arange(L), (B, L))
QUIET = BankLossConfig(balance=0)
NEAR = WindowConfig(heads=2, window=2)
PRODUCT_KEY = ProductKeyConfig(heads=2, keys=4, top_k=3, key_width=6)


def model_of(layers, mixers, **options):
  """A decoder of these layers, without networks and repeats unless asked."""
  mixers = {'att': AttentionConfig(heads=2), **mixers}
  given = {'width': D, 'hidden': -1, 'vocabulary': A, 'prefix': tuple(layers), 'pattern': (), 'repeats': 0, **options}
  return build_decoder(ModelConfig(mixers=mixers, **given))


def draw(model, seed=1, size=.5):
  """Parameters of the size of trained ones, zeros and ones included."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(size * rng.normal(size=a.shape), a.dtype), param_shapes(model)[0])


def logits_of(model, params, token, position=POSITION, **context):
  return model.apply({'params': params}, token, model.init_state(token.shape[0]), position_BxL=position, **context)[0]


def tokens(seed=0, shape=(B, L)): return np.random.default_rng(seed).integers(0, A, shape).astype(np.int32)


# A fresh bank ----------------------------------------------------------------------------------------------------------------

FRESH = ('dense', 'narrow', 'reduced', 'shared', 'key', 'context')
CONTEXT = ContextConfig(heads=2, slots=3, ratio=2)


def fresh(dtype, names):
  """(logits of the finished initialised model with a bank of each variant, those of its host, without any)."""
  mixers = {**ORACLE, 'key': PRODUCT_KEY, 'context': CONTEXT}
  layers = ['>'.join(['att', *names]), 'shared']                             # variant A, then variant B: a layer of its own
  model = model_of(layers, {name: mixers[name] for name in names}, hidden=8, dtype=dtype, grafted=tuple({'context'} & {*names}))
  params = jax.jit(lambda key: init_params(model, key)[0])(jax.random.key(0))
  params['prefix']['layer_1']['mlp']['down']['kernel'] *= 0                  # the second network of variant B, which the host lacks
  host = model_of(['att'], {}, hidden=8, dtype=dtype)
  flat, token = named(params), tokens()
  bare = unnamed({path: flat[path] for path in named(param_shapes(host)[0])}, param_shapes(host)[0])
  run = lambda model, params: jax.jit(lambda params: logits_of(model, params, token))(params)
  return run(model, params), run(host, bare)


def unchanged(dtype, names=FRESH):
  """None; asserts that fresh banks leave the logits of their host bit-equal."""
  logits, host = fresh(dtype, names)
  assert float(jnp.abs(host).max()) > 1e-3
  np.testing.assert_array_equal(logits, host)


def test_a_fresh_bank_leaves_the_logits_of_its_host_bit_equal():
  """P2.2 in float32: every variant, chapters or not, in a layer of another memory and in one of its own."""
  unchanged('float32')


@pytest.mark.slow
def test_a_fresh_bank_leaves_the_logits_of_its_host_bit_equal_in_bfloat16():
  """In a process of its own: XLA may otherwise keep bfloat16 sums in float32 in one program and not in the other."""
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_allow_excess_precision=false'
  code = "import tests.conftest\nfrom tests.models.test_banks import unchanged\nunchanged('bfloat16', ('narrow', 'shared'))"
  done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_a_fresh_bank_first_trains_its_output_alone_then_everything():
  """P2.3: |dW_O| > 0 and every other gradient of the bank exactly 0; after one step none is."""
  model = model_of(['near>mem>key'], {'near': NEAR, 'mem': routed(loss=QUIET, mixing=MixingConfig(shared=1)), 'key': PRODUCT_KEY})
  token, target = tokens(), tokens(1)[..., None]
  def loss(params): return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_of(model, params, token)), target, -1))
  gradient, init = jax.jit(jax.grad(loss)), jax.jit(lambda key: init_params(model, key)[0])
  params = jax.tree.map(lambda p: p * 5, init(jax.random.key(0)))                # gradients by entries of .02 would be tiny
  first = gradient(params)
  first, second = named(first), named(gradient(jax.tree.map(lambda p, g: p - .5 * g, params, first)))
  bank = [path for path in first if '/mem/' in path or '/mixers_2/' in path]
  assert len(bank) == 7 + 6
  for path in bank:
    assert np.asarray(first[path]).any() == path.endswith('out/kernel'), path
    assert np.asarray(second[path]).any(), path


def test_a_model_that_uses_no_bank_has_no_trace_of_one():
  """P2.5: not a parameter, and the same computation."""
  plain, described = model_of(['att'], {}), model_of(['att'], {'mem': routed(shape=BankShapeConfig(entries=20, chapters=5, share='x'))})
  params = draw(plain)
  assert named(param_shapes(plain)[0]).keys() == named(param_shapes(described)[0]).keys() and not shared_tables(described.config)
  assert not any(word in path for path in named(params) for word in ('mem', 'bank', 'router'))
  one, other = (str(jax.make_jaxpr(lambda p, m=m: logits_of(m, p, tokens()))(params)) for m in (plain, described))
  assert one == other


@pytest.mark.slow
def test_what_is_prepared_once_is_what_is_computed_in_the_call():
  """P2.6: of repeated, shared, factorised, stored and product-key tables."""
  kv = parse_quantization('int8/kv')
  shared = routed(shape=BankShapeConfig(entries=20, chapters=5, share='x'))
  mixers = {'mem': ORACLE['weights over all'], 'one': shared, 'two': dataclasses.replace(shared, heads=4), 'key': PRODUCT_KEY,
            'stored': dataclasses.replace(ORACLE['shared'], quant=kv)}
  model = model_of(['att>one'], mixers, pattern=('mem+key', 'two'), repeats=2, suffix=('stored',))
  params, token = draw(model), tokens()
  prepared = jax.jit(lambda params: prepare_memories(model, params))(params)
  assert set(prepared) == {'prefix', 'repeats', 'suffix'} and set(prepared['repeats']['layer_0']) == {'mem', 'key'}
  run = jax.jit(lambda params, prepared: (logits_of(model, params, token), logits_of(model, params, token, prepared=prepared)))
  computed, kept = run(params, prepared)
  np.testing.assert_allclose(kept, computed, rtol=0, atol=1e-6 * np.abs(computed).max())
  halved = jax.tree.map(lambda leaf: leaf // 2 if leaf.dtype == jnp.int8 else leaf / 2, prepared)
  assert np.abs(run(params, halved)[1] - computed).max() > 1e-2             # it is what is used


# Time ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def timed():
  """({name: model}, {name: parameters}): all causal strategies one after the other in one model, and one model for each other."""
  banks = {name.replace('-', '_'): routed(**options, mixing=MixingConfig(shared=1, scale=2.0)) for name, options in STRATEGIES.items()}
  build = lambda *names: model_of(['>'.join(['near', *names])], {'near': NEAR, **banks}, embedding=EmbeddingConfig(tie=False))
  models = {'causal': build(*(name for name in banks if not name.startswith('sequence')))}
  models |= {name: build(name) for name in banks if name.startswith('sequence')}
  return models, {name: draw(model, size=1) for name, model in models.items()}


@pytest.fixture(scope='module')
def whole(timed):
  """(model, parameters, call(params, state, token, mask) -> (logits, state)) of the causal strategies."""
  model = timed[0]['causal']
  def call(params, state, token, mask):
    return model.apply({'params': params}, token, state, position_BxL=POSITION, reset_BxL=np.zeros((B, L), bool), mask_BxL=mask)[:2]
  return model, timed[1]['causal'], jax.jit(call)


PROMPT = 4                                               # tokens of it, where a strategy asks


def start(model, rows=B):
  return set_prompt_length(model.init_state(rows), jnp.full((rows,), PROMPT, jnp.int32))


def test_no_strategy_but_two_sees_a_later_token(timed):
  """P4.1, P4.2, P4.5: by value bit for bit, and by gradient; `sequence` and `sequence-rolling` are caught by the same test."""
  models, params = timed
  reset, t, token = np.zeros((B, L), bool), 5, np.broadcast_to(np.arange(L) % A, (B, L)).astype(np.int32)          # each token once a row
  def logits(name, p, token):
    return models[name].apply({'params': p}, token, start(models[name]), position_BxL=POSITION, reset_BxL=reset)[0]
  run = jax.jit(lambda params, token: {name: logits(name, params[name], token) for name in models})
  def early(p, name):
    table = p['embed']['table']
    return jnp.sum(jnp.sin(logits(name, {**p, 'embed': {'table': table}}, token)[0, :t + 1]))
  gradient = jax.jit(lambda params: {n: jax.grad(early)(params[n], n)['embed']['table'] for n in ('causal', 'sequence')})(params)
  changed = token.copy()
  changed[0, t + 1:] = token[0, t + 1:] + 3
  before, after = run(params, token), run(params, changed)
  for name in models:
    moved = np.abs(np.asarray(after[name] - before[name])).max(-1)
    assert not moved[1].any() and moved[0, t + 1:].any() and moved[0, :t + 1].any() == (name != 'causal'), name
    if name != 'causal': assert moved[0, :t + 1].max() > 1e-2, name
  size = {name: np.abs(np.asarray(g)).max(-1) for name, g in gradient.items()}
  assert all((g[:t + 1] > 0).all() for g in size.values()) and not size['causal'][t + 1:].any() and (size['sequence'][t + 1:L] > 1e-4).all()


def test_decoding_equals_the_full_forward_wherever_the_prompt_ends(whole):
  """P4.3: a prompt of any length in one call, the rest token by token, for all causal strategies."""
  (model, params, call), token, every = whole, jnp.asarray(tokens()), np.ones((B, L), bool)
  @jax.jit
  def one_by_one(params, state, cut):
    def step(state, now):
      flow = {'reset_BxL': ~every[:, :1], 'mask_BxL': jnp.broadcast_to(now >= cut, (B, 1)), 'position_BxL': jnp.broadcast_to(now, (B, 1))}
      out, state, _ = model.apply({'params': params}, jax.lax.dynamic_slice_in_dim(token, now, 1, 1), state, **flow)
      return state, out[:, 0]
    state, out = jax.lax.scan(step, state, jnp.arange(L))
    return jnp.swapaxes(out, 0, 1), state
  full, end = call(params, start(model), token, every)
  for cut in range(L):
    head = np.broadcast_to(np.arange(L) < cut, (B, L))
    first, state = call(params, start(model), token, head)
    rest, last = one_by_one(params, state, cut)
    for a, b in zip(jax.tree.leaves((np.where(head[..., None], first, rest), last)), jax.tree.leaves((full, end)), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max()), err_msg=f'cut at {cut}')
  alone = call(params, set_prompt_length(start(model), jnp.zeros(B, jnp.int32)), token, every)[0]
  assert np.abs(alone - full)[:, :PROMPT].max() > 1e-2                       # the length of the prompt is used


@pytest.mark.slow
def test_greedy_text_is_the_argmax_of_the_full_forward(whole):
  """With all causal strategies in one model, prompts of two lengths, and a router that is told where they end."""
  model, params, call = whole
  quiet = {path: leaf / 20 if path.endswith('out/kernel') else leaf for path, leaf in named(params).items()}
  quiet |= {'head/kernel': jnp.roll(quiet['embed/table'], 1, 0).T, 'norm/scale': jnp.ones(D)}
  params = unnamed(quiet, params)                                            # a text that tends to count, not one token all along
  prompts, new = [np.array(row, np.int32) for row in ([1, 2, 3], [7])], 6
  sampler = Sampler(model, Sampling(temperature=0.0), chunk=new)
  session = sampler.start(params, prompts, 16)
  after_prompt = np.asarray(session.carry.logits_BxA)
  session, out = sampler.advance(params, session, jnp.arange(B))
  rows, lengths = [np.r_[prompt, more] for prompt, more in zip(prompts, out, strict=True)], jnp.asarray([3, 1])
  token, mask = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
  for number, row in enumerate(rows): token[number, :len(row)], mask[number, :len(row)] = row, True
  full = np.asarray(call(params, set_prompt_length(model.init_state(B), lengths), token, mask)[0])
  for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
    np.testing.assert_array_equal(row[len(prompt):], full[number].argmax(-1)[len(prompt) - 1:len(row) - 1])
    np.testing.assert_allclose(after_prompt[number], full[number, len(prompt) - 1], rtol=0, atol=1e-4 * np.abs(full).max())
    np.testing.assert_allclose(session.carry.logits_BxA[number], full[number, len(row) - 1], rtol=0, atol=1e-4 * np.abs(full).max())
  flat = call(params, model.init_state(B), token, mask)[0]
  assert len(set(np.asarray(out).ravel().tolist())) > 2 and np.abs(flat - full)[mask].max() > 1e-2        # the prompts' lengths matter


def test_a_model_that_sees_the_future_does_not_generate(timed):
  models, params = timed
  with pytest.raises(UserError, match=r"^router\.strategy='sequence' sees the future: it cannot stream, generate"):
    next(Sampler(models['sequence']).stream(params['sequence'], [[1, 2]], 3))


# Sharing, the residual stream, losses ------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_layers_that_share_a_table_hold_one_whose_gradients_add_up():
  """P3.2: one for all, or one for every two memory layers; each layer has its own keys and values."""
  own = ORACLE['dense']
  shared = lambda name: dataclasses.replace(own, shape=dataclasses.replace(own.shape, share=name))
  alone, together = model_of(['a', 'a', 'b'], {'a': own, 'b': own}), model_of(['a', 'a', 'b'], {'a': shared('x'), 'b': shared('x')})
  two = model_of(['a', 'a', 'b', 'b', 'c'], {'a': shared('x'), 'b': shared('y'), 'c': shared('z')})
  tables = lambda model: [path for path in named(param_shapes(model)[0]) if path.endswith('/entries')]
  assert tables(together) == ['bank_x/entries'] and tables(two) == ['bank_x/entries', 'bank_y/entries', 'bank_z/entries']
  assert len(tables(alone)) == 3 and len([path for path in named(param_shapes(together)[0]) if path.endswith('key/kernel')]) == 3
  params = draw(together)
  flat = {path: leaf for path, leaf in named(params).items() if not path.startswith('bank_x')}
  separate = unnamed({**flat, **dict.fromkeys(tables(alone), params['bank_x']['entries'])}, param_shapes(alone)[0])
  loss = lambda model, params: jnp.sum(jnp.sin(logits_of(model, params, tokens())))
  one, many = jax.jit(lambda p, q: (jax.grad(loss, 1)(together, p), jax.grad(loss, 1)(alone, q)))(params, separate)
  many = named(many)
  np.testing.assert_allclose(one['bank_x']['entries'], sum(many[path] for path in tables(alone)), rtol=1e-4, atol=1e-5)
  assert all(np.abs(many[path]).max() > 1e-3 for path in tables(alone))


def test_a_router_may_look_at_the_residual_stream():
  """input 'stream': the use of the chapters is that of softmax(residual W + b), here the embeddings; 'normed' cannot see their size."""
  configs = {name: model_of(['mem'], {'mem': routed(input=name)}) for name in ('stream', 'normed')}
  params, token = draw(configs['stream']), tokens()
  larger = {**params, 'embed': {'table': 3 * params['embed']['table']}}
  def entropy(model, params): return model.apply({'params': params}, token, model.init_state(B), position_BxL=POSITION)[2]['router_entropy']
  found = jax.jit(lambda p, q: {name: (entropy(model, p), entropy(model, q)) for name, model in configs.items()})(params, larger)
  router = params['prefix']['layer_0']['mixers']['mem']['router']
  for table, got in zip((params['embed']['table'], larger['embed']['table']), found['stream'], strict=True):
    logit = np.float64(table)[token] @ np.float64(router['kernel']) + np.float64(router['bias'])
    share = np.exp(logit) / np.exp(logit).sum(-1, keepdims=True)
    assert float(got) == pytest.approx(-(share * np.log(share)).sum(-1).mean(), rel=1e-5)
  assert float(found['normed'][0]) == pytest.approx(float(found['normed'][1]), rel=1e-3)


def test_router_losses_are_averaged_over_memory_layers():
  """P6.4: two layers with different routers that see the same (the first adds nothing) have the mean of what each has alone."""
  bank = routed(loss=BankLossConfig(balance=.5, auxiliary=.25, z=.125))
  one, two = model_of(['mem'], {'mem': bank}), model_of(['mem', 'other', 'key'], {'mem': bank, 'other': bank, 'key': PRODUCT_KEY})
  params, other, token = draw(one), draw(one, 2), tokens()
  params['prefix']['layer_0']['mixers']['mem']['out']['kernel'] *= 0
  other['embed'] = params['embed']
  layers = {'layer_0': params['prefix']['layer_0'],
            'layer_1': {**other['prefix']['layer_0'], 'norm_mixer': params['prefix']['layer_0']['norm_mixer'],
                        'mixers': {'other': other['prefix']['layer_0']['mixers']['mem']}},
            'layer_2': draw(two)['prefix']['layer_2']}
  other['prefix']['layer_0'] = {**other['prefix']['layer_0'], 'norm_mixer': params['prefix']['layer_0']['norm_mixer']}
  aux = lambda model, params: model.apply({'params': params}, token, model.init_state(B), position_BxL=POSITION)[2]
  first, second, mean = jax.jit(lambda: (aux(one, params), aux(one, other), aux(two, {**params, 'prefix': layers})))()
  assert abs(float(first['penalty']) - float(second['penalty'])) > .01
  for name in ('penalty', 'router_balance', 'router_auxiliary', 'router_z', 'chapter_gini'):
    assert float(mean[name]) == pytest.approx((float(first[name]) + float(second[name])) / 2, rel=1e-5), name
