"""LoRA: a start that changes nothing, steps that change nothing else, merging and taking back, refusals."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.lora import extract, insert, kernels_of, merge, size_of, start, strip, unmerge, with_lora
from memjax.adapters.peft import save_peft
from memjax.config.banks import BankConfig, BankShapeConfig, ProductKeyConfig
from memjax.config.context import ContextConfig
from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, alpha_of, rank_of, scale_of
from memjax.config.mixers import AttentionConfig, HolographicConfig, HolographicSeedConfig, WindowConfig
from memjax.config.placement import parameter_rules, train_only
from memjax.config.schema import Config, EmbeddingConfig, GroupConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, noise, param_shapes, prepare_memories
from memjax.runtime.optim import assign_groups, make_optimizer
from memjax.runtime.sharding import make_mesh
from memjax.runtime.state import abstract_state, init_state, make_train_step

D, A, B, L = 16, 11, 2, 6
EVERY = LoraConfig(rank=3, alpha=6.0, targets=('kernel$',), exclude=('/gate/', '/keep/'), ranks=('/query/=2',), alphas=('/value/=9',))
MIXERS = {'attention': AttentionConfig(heads=4, kv_heads=2, bias=True), 'bank': BankConfig(heads=2, shape=BankShapeConfig(entries=6))}
SIZE = dict(width=D, vocabulary=A, embedding=EmbeddingConfig(tie=False))
HOST = ModelConfig(mixers=MIXERS, hidden=24, prefix=('bank',), pattern=('attention',), repeats=2, **SIZE)
SMALL = ModelConfig(mixers={'attention': MIXERS['attention']}, hidden=-1, repeats=2, **SIZE)
KINDS = {'context': ContextConfig(heads=2, slots=4, ratio=2, out_gate='silu'),
         'product_key': ProductKeyConfig(heads=1, keys=2, top_k=2, key_width=4),
         'holographic': HolographicConfig(heads=2, slots=4), 'window': WindowConfig(heads=2, window=3),
         'holographic_seed': HolographicSeedConfig(key_width=D)}
MODEL = with_lora(HOST, EVERY)
DORA = with_lora(HOST, dataclasses.replace(EVERY, dora=True))
QUERY_VALUE = LoraConfig(rank=4, alpha=8.0, targets=('/(query|value)/kernel$',))
TOKEN, POSITION = jnp.arange(B * L).reshape(B, L) % A, jnp.broadcast_to(jnp.arange(L), (B, L))
CALLS = {}


def logits(config, params, rngs=None):
  """Of the two rows, through one compiled function for each config."""
  if repr(config) not in CALLS:
    model = build_decoder(config)
    call = lambda params, rngs: model.apply({'params': params}, TOKEN, model.init_state(B), position_BxL=POSITION, rngs=rngs)[0]
    CALLS[repr(config)] = jax.jit(call)
  return np.asarray(CALLS[repr(config)](params, rngs or {}))


def random_params(config, seed=0):
  """Parameters of a config, drawn by numpy: nothing is zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(0.25 * rng.normal(size=a.shape), a.dtype), param_shapes(build_decoder(config))[0])


def random_adapter(config, seed=0): return extract(random_params(config, seed), config.block.lora)
def same(one, other):
  one, other = named(one), named(other)
  assert set(one) == set(other)
  return all(one[path].dtype == other[path].dtype and np.array_equal(one[path], other[path]) for path in one)


@pytest.fixture(scope='module')
def host(): return random_params(HOST)


@pytest.fixture(scope='module')
def changed(): return random_params(MODEL, 1)


def test_the_start_is_the_host_bit_for_bit(host):
  params = start(MODEL, host, jax.random.key(0))
  np.testing.assert_array_equal(logits(MODEL, params), logits(HOST, host))
  kernel, flat = named(host), named(params)
  assert all(flat[path] is kernel[path] for path in kernel)           # not even copied
  fresh = {path: x for path, x in flat.items() if path not in kernel}
  assert fresh and all(path.endswith(('/lora_a', '/lora_b')) for path in fresh)
  for path, x in fresh.items():
    if path.endswith('b'): assert not x.any()
    else: assert 0.5 * x.shape[-2] ** -0.5 < np.abs(x).max() <= x.shape[-2] ** -0.5
  assert set(flat) == set(named(param_shapes(build_decoder(MODEL))[0]))


def test_patterns_choose_kernels_ranks_and_scales(changed):
  adapter = extract(changed, EVERY)
  own = {path for path in named(strip(changed)) if path.endswith('/kernel')}
  assert set(adapter) == {path for path in own if not any(name in path for name in ('/gate/', '/keep/'))} and len(adapter) == 13
  for path, (a, b, scale, _) in adapter.items():
    rank, alpha = 2 if '/query/' in path else 3, 9 if '/value/' in path else 6
    assert a.shape[-1] == b.shape[-2] == rank == rank_of(EVERY, path) and scale == alpha / rank and alpha == alpha_of(EVERY, path)
  stabilised = dataclasses.replace(EVERY, stabilised=True)
  assert scale_of(stabilised, 'a/value/kernel') == 9 / 3 ** 0.5 and rank_of(LoraConfig(), 'a/value/kernel') == 0
  narrow = LoraConfig(rank=1, targets=('^suffix/', '/up/kernel$'))    # '/up/' is not '/update/', and mixers have paths
  assert [rank_of(narrow, path) for path in ('suffix/x/kernel', 'a/suffix/x/kernel', 'a/update/kernel', 'a/up/kernel')] == [1, 0, 0, 1]


def test_the_number_of_parameters_of_the_specification():
  smollm = ModelConfig(width=576, hidden=1536, vocabulary=8, mixers={'attention': AttentionConfig(heads=9, kv_heads=3)}, repeats=30)
  shapes = param_shapes(build_decoder(with_lora(smollm, dataclasses.replace(QUERY_VALUE, rank=16))))[0]
  assert size_of(extract(shapes, QUERY_VALUE)) == 921_600


def test_merged_is_unmerged_and_not_the_host(host, changed):
  adapter = extract(changed, EVERY)
  params = insert(host, adapter)
  full, merged = logits(MODEL, params), merge(params, [adapter])
  np.testing.assert_allclose(logits(HOST, merged), full, atol=1e-5 * np.abs(full).max())
  assert np.abs(full - logits(HOST, host)).max() > 0.1 * np.abs(full).max()
  assert same(merged, merge(host, [adapter]))
  kept = kernels_of(host, [adapter])
  assert same(unmerge(merged, kept), host) and set(named(kept)) == set(adapter)
  for path, (a, b, scale, _) in adapter.items():
    exact = np.asarray(named(host)[path], np.float64) + scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(named(merged)[path], exact, atol=2e-6)


def test_the_linear_maps_of_every_memory_can_be_changed():
  every = LoraConfig(rank=2, targets=('/mixers/',))
  for kind, mixer in KINDS.items():
    flat = named(param_shapes(build_decoder(with_lora(memory_model(mixer), every)))[0])
    kernels = {path for path in flat if re.search('/mixers/.*/kernel$', path) and not re.search('/(select|gate_sizes|gate_out)/', path)}
    assert kernels == {path.replace('/lora_a', '/kernel') for path in flat if path.endswith('/lora_a')} and len(kernels) > 2, kind


def memory_model(mixer): return ModelConfig(mixers={'mem': mixer}, hidden=-1, pattern=('mem',), repeats=2, **SIZE)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_memories_start_and_merge(kind):
  plain = memory_model(KINDS[kind])
  config, host = with_lora(plain, LoraConfig(rank=2, targets=('kernel$',))), random_params(plain)
  np.testing.assert_array_equal(logits(config, start(config, host, jax.random.key(0))), logits(plain, host))
  adapter = {path: f._replace(scale=0.5 * f.scale) for path, f in random_adapter(config).items()}
  small = with_lora(plain, dataclasses.replace(config.block.lora, alpha=16.0))
  full, merged = logits(small, insert(host, adapter)), logits(plain, merge(host, [adapter]))
  np.testing.assert_allclose(merged, full, atol=3e-5 * np.abs(full).max())
  assert np.abs(full - logits(plain, host)).max() > 1e-3 * np.abs(full).max()


def test_memories_prepare_with_their_changes(host, changed):
  params, model = insert(host, extract(changed, EVERY)), build_decoder(MODEL)
  call = lambda p: model.apply({'params': p}, TOKEN, model.init_state(B), position_BxL=POSITION, prepared=prepare_memories(model, p))[0]
  np.testing.assert_allclose(jax.jit(call)(params), logits(MODEL, params), atol=1e-5)


@pytest.mark.slow
def test_magnitudes_start_as_they_are_and_merge(host):
  """DoRA: the start is the host bit for bit; m (W + s A B) / ||W + s A B|| afterwards, merged or not."""
  begun = start(DORA, host, jax.random.key(0))
  np.testing.assert_array_equal(logits(DORA, begun), logits(HOST, host))
  assert {path for path, x in named(begun).items() if path.endswith('/lora_m')} == {
      path.replace('/kernel', '/lora_m') for path in extract(begun, DORA.block.lora)} and not begun['head']['lora_m'].any()
  adapter = random_adapter(DORA, 1)
  params, merged = insert(host, adapter), merge(host, [adapter])
  full = logits(DORA, params)
  np.testing.assert_allclose(logits(HOST, merged), full, atol=1e-5 * np.abs(full).max())
  assert np.abs(full - logits(HOST, host)).max() > 0.1 * np.abs(full).max() and same(unmerge(merged, kernels_of(host, [adapter])), host)
  for path, (a, b, scale, magnitude) in adapter.items():
    v = np.asarray(named(host)[path], np.float64) + scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    exact = v / np.linalg.norm(v, axis=-2, keepdims=True) * np.asarray(magnitude)[..., None, :]
    np.testing.assert_allclose(named(merged)[path], exact, atol=2e-6)
    np.testing.assert_allclose(extract(params, DORA.block.lora)[path].magnitude, magnitude, rtol=1e-6)
  assert size_of(adapter) - size_of(random_adapter(MODEL, 1)) == sum(factors.magnitude.size for factors in adapter.values())


def test_several_at_once_are_a_weighted_sum(host):
  one, other = random_adapter(MODEL, 1), random_adapter(with_lora(HOST, QUERY_VALUE), 2)
  both, flat = named(merge(host, [one, other], [0.5, -2.0])), named(host)
  for path, kernel in flat.items():
    wanted = np.asarray(kernel, np.float64)
    for adapter, weight in ((one, 0.5), (other, -2.0)):
      if path in adapter: wanted = wanted + weight * adapter[path].scale * np.asarray(adapter[path].a) @ np.asarray(adapter[path].b)
    np.testing.assert_allclose(both[path], wanted, atol=1e-5)
  assert set(other) < set(one) and same(merge(host, [one, other], [0.0, 0.0]), host)


def test_bfloat16_kernels_are_rounded_once(host):
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), host)
  adapter = random_adapter(MODEL)
  merged = merge(small, [adapter])
  wide = named(merge(jax.tree.map(lambda x: x.astype(jnp.float32), small), [adapter]))
  for path in adapter: np.testing.assert_array_equal(named(merged)[path], wide[path].astype(jnp.bfloat16))
  assert same(unmerge(merged, kernels_of(small, [adapter])), small)


def test_dropout_needs_random_numbers():
  config = with_lora(SMALL, dataclasses.replace(QUERY_VALUE, dropout=0.5))
  params, plain = random_params(config), logits(with_lora(SMALL, QUERY_VALUE), random_params(config))
  first, again, other = (logits(config, params, noise(config, jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(logits(config, params), plain)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - plain).max() > 0.1 and np.abs(first - other).max() > 0.1
  assert noise(MODEL, jax.random.key(0)) == noise(config, None) == {}


@pytest.fixture(scope='module')
def trained():
  """(state before, state after two steps, metrics, config) of a host whose changes alone are trained, with dropout and remat."""
  model_config = with_lora(SMALL, dataclasses.replace(QUERY_VALUE, dropout=0.1))
  optimizer_config = OptimizerConfig(**train_only(model_config, {'lora': GroupConfig(rate=0.05, schedule='constant', end=0.1)}))
  config = Config(model=model_config, optimizer=optimizer_config, mesh=MeshConfig(data=1),
                  training=TrainingConfig(steps=2, batch=B, length=L, remat=True))
  model = build_decoder(model_config)
  optimizer = make_optimizer(optimizer_config, param_shapes(model)[0], 2)
  abstract = abstract_state(model, optimizer, config, make_mesh(config.mesh))
  step, state = make_train_step(model, optimizer, config, abstract), init_state(model, optimizer, config, abstract)
  before = jax.tree.map(np.array, state.params)
  batch = {'token': TOKEN, 'target': (TOKEN + 1) % A, 'weight': jnp.ones((B, L), bool), 'position': POSITION}
  losses = []
  for _ in range(2):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return named(before), named(state.params), losses, (optimizer, state)


def test_only_the_changes_are_trained(trained):
  before, after, losses, (optimizer, state) = trained
  for path in before: assert np.array_equal(before[path], after[path]) != path.endswith(('/lora_a', '/lora_b')), path
  assert losses[1] < losses[0]
  moments = {path.rpartition('/')[0] for path in map('/'.join, (p.split('/') for p in optimizer.split(state.params)[0]))}
  assert moments == {f'repeats/layer_0/mixers/attention/{name}' for name in ('query', 'value')}


def test_groups_with_changes():
  rules = parameter_rules(MODEL)
  own = assign_groups(OptimizerConfig(rules=rules, groups={name: GroupConfig() for name in ('lora', 'memory_bank', 'memory', 'base')}),
                      list(named(param_shapes(build_decoder(MODEL))[0])))
  assert {path for path, group in own.items() if group == 'lora'} == {path for path in own if '/lora_' in path}
  assert parameter_rules(HOST) == rules[1:]
  fields = train_only(MODEL, {'lora': GroupConfig(rate=0.5), 'memory': GroupConfig(rate=0.25)})
  assert {name: group.rate for name, group in fields['groups'].items()} == {'lora': 0.5, 'memory_bank': 0.0, 'memory': 0.25, 'base': 0.0}


def broken(adapter, **changes):
  path = next(iter(adapter))
  return {path: adapter[path]._replace(**changes)}


REFUSALS = {
    'nothing to start': (lambda h, a: start(HOST, h, jax.random.key(0)), 'lora.rank is 0'),
    'changed twice': (lambda h, a: insert(insert(h, a), a), 'has a low-rank change already'),
    'no such kernel': (lambda h, a: insert(h, {'prefix/layer_9/mlp/up/kernel': a['head/kernel']}), 'has no kernel prefix/layer_9'),
    'not a kernel': (lambda h, a: insert(h, {'norm/scale': a['head/kernel']}), 'has no kernel norm/scale'),
    'another shape': (lambda h, a: merge(h, [broken(a, a=jnp.ones((3, 3)))]), 'does not fit'),
    'NaN': (lambda h, a: merge(h, [broken(a, b=next(iter(a.values())).b * jnp.nan)]), 'holds NaN or infinity'),
    'magnitudes': (lambda h, a: merge(h, [broken(a, magnitude=jnp.ones(3))]), 'magnitudes [3] do not fit'),
    'NaN in magnitudes': (lambda h, a: merge(h, [broken(a, magnitude=next(iter(a.values())).b[..., 0, :] * jnp.nan)]), 'holds NaN or'),
    'two with magnitudes': (lambda h, a: merge(h, [a, random_adapter(DORA)]), 'has magnitudes (DoRA); it is merged alone, with weight 1'),
    'half of magnitudes': (lambda h, a: merge(h, [random_adapter(DORA)], [0.5]), 'it is merged alone, with weight 1'),
    'weights': (lambda h, a: merge(h, [a], [1.0, 2.0]), '2 weights for 1 adapters'),
    'target without kernel': (lambda h, a: param_shapes(build_decoder(with_lora(HOST, LoraConfig(rank=2, targets=('/q_proj/',))))),
                              "lora.targets holds '/q_proj/', which matches no kernel"),
    'rule without kernel': (lambda h, a: param_shapes(build_decoder(with_lora(HOST, LoraConfig(rank=2, ranks=('/key/=4',))))),
                            "lora.ranks holds '/key/', which matches no kernel"),
    'group': (lambda h, a: train_only(HOST, {'lora': GroupConfig()}), "trained names 'lora'; the groups of the model are"),
    'PEFT of memories': (lambda h, a: save_peft('nowhere', MODEL, insert(h, a)), 'is no kernel of a Hugging Face model'),
    'PEFT of nothing': (lambda h, a: save_peft('nowhere', HOST, h), 'hold no low-rank changes')}


@pytest.mark.parametrize('name', REFUSALS)
def test_refusal(name, host, changed):
  call, says = REFUSALS[name]
  with pytest.raises(UserError) as caught: call(host, extract(changed, EVERY))
  assert says in str(caught.value) and '\n' not in str(caught.value)
