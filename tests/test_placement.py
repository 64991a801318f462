"""Placements, block variants and sharing: which layers hold memory, the pattern they become, the tables and the parameter groups."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankConfig, BankShapeConfig, ProductKeyConfig
from memjax.config.context import ContextConfig
from memjax.config.errors import ConfigError
from memjax.config.flags import load
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import arrange, fold, parameter_rules, place
from memjax.config.schema import GroupConfig, ModelConfig, OptimizerConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.optim import assign_groups

BANK, KEYS = BankConfig(heads=2, shape=BankShapeConfig(entries=6)), ProductKeyConfig(heads=1, keys=2, top_k=2, key_width=4)
ATTENTION = AttentionConfig(heads=2)
D, A, M, F = 8, 5, 6, 12
SHAPES = {}


def model(where=(0, 2, 4), depth=6, memory=BANK, **options):
  return ModelConfig(width=D, hidden=F, vocabulary=A, **arrange(depth, where, memory=memory, attention=ATTENTION, **options))


def shapes(config):
  if repr(config) not in SHAPES:
    SHAPES[repr(config)] = {path: x.shape for path, x in named(param_shapes(build_decoder(config))[0]).items()}
  return SHAPES[repr(config)]


def count(found, pattern=''): return sum(math.prod(shape) for path, shape in found.items() if pattern in path)


@pytest.mark.parametrize(('kind', 'options', 'layers'), [
    ('all', {}, range(12)), ('none', {}, ()), ('first_k', {'k': 5}, range(5)), ('first_k', {'k': 20}, range(12)),
    ('last_k', {'k': 5}, range(7, 12)), ('last_k', {'k': 20}, range(12)), ('every_n', {'n': 3}, (0, 3, 6, 9)),
    ('every_n', {'n': 1}, range(12)),
    ('every_n', {'n': 12}, (0,)), ('custom', {'indices': (11, 0, 5)}, (0, 5, 11))])
def test_placements_of_twelve_layers(kind, options, layers):
  assert place(12, kind, **options) == tuple(layers)


@pytest.mark.parametrize(('call', 'says'), [
    (lambda: place(12, 'firstk', k=2), "placement must be one of all, first_k, last_k, every_n, custom, none, not 'firstk'; did you mean"),
    (lambda: place(12, 'first_k', k=0), 'k=0 of placement first_k must be at least 1'),
    (lambda: place(12, 'last_k', k=-1), 'k=-1 of placement last_k must be at least 1'),
    (lambda: place(12, 'every_n'), 'n=0 of placement every_n must be at least 1'), (lambda: place(0, 'all'), 'depth=0 leaves no layer'),
    (lambda: place(12, 'custom', indices=(3, 12)), 'indices holds 12; the layers are 0 to 11'),
    (lambda: place(12, 'custom', indices=(-1,)), 'indices holds -1; the layers are 0 to 11'),
    (lambda: place(12, 'custom', indices=(3, 3)), 'indices holds 3 twice'),
    (lambda: place(12, 'custom'), 'indices of placement custom are missing'),
    (lambda: model((9,)), 'indices holds 9; the layers are 0 to 5'), (lambda: model((1, 1)), 'indices holds 1 twice'),
    (lambda: model(variant='C'), "variant must be one of A, B, not 'C'"), (lambda: model(sharing='all'), 'sharing must be one of shared'),
    (lambda: model(sharing='every_k_layers', sharing_k=0), 'sharing_k=0 must be at least 1')])
def test_impossible_placements(call, says):
  with pytest.raises(ConfigError) as caught: call()
  assert str(caught.value).startswith(says)


@pytest.mark.parametrize(('layers', 'prefix', 'pattern', 'repeats', 'suffix'), [
    ('aabaaabaaabaaaba', '', 'aaba', 4, ''), ('mmmmm', '', 'm', 5, ''), ('mmaaaaa', 'mm', 'a', 5, ''), ('aaamm', '', 'a', 3, 'mm'),
    ('mabc', 'mabc', '', 0, ''), ('a', 'a', '', 0, ''), ('xababay', 'x', 'ab', 2, 'ay'), ('aabaab', '', 'aab', 2, '')])
def test_fold_finds_what_repeats(layers, prefix, pattern, repeats, suffix):
  found = fold(layers)
  assert found == {'prefix': tuple(prefix), 'pattern': tuple(pattern), 'repeats': repeats, 'suffix': tuple(suffix)}
  assert found['prefix'] + found['pattern'] * found['repeats'] + found['suffix'] == tuple(layers)


def test_stacks_come_out_as_asked():
  """Every placement, variant and sharing, written out again."""
  every = {'shared': 'bank ' * 6, 'per_layer': 'bank ' * 6, 'every_k_layers': 'bank_0 bank_0 bank_1 bank_1 bank_2 bank_2'}
  for where in ((), (0,), (5,), (0, 2, 4), (1, 2, 5), tuple(range(6))):
    for sharing, tables in every.items():
      names = dict(zip(where, tables.split(), strict=False))
      a = [f'attention>{names[i]}' if i in names else 'attention' for i in range(6)]
      b = [layer for i in range(6) for layer in (['attention', names[i]] if i in names else ['attention'])]
      assert model(where, sharing=sharing).layers == tuple(a)
      assert model(where, sharing=sharing, variant='B').layers == tuple(b)


@pytest.mark.parametrize(('sharing', 'k', 'tables'), [('shared', 1, 1), ('per_layer', 1, 3), ('every_k_layers', 1, 3),
                                                      ('every_k_layers', 2, 2), ('every_k_layers', 5, 1)])
def test_number_of_tables(sharing, k, tables):
  """1, one a layer, and ceil(layers / k): read from the parameters."""
  assert count(shapes(model(sharing=sharing, sharing_k=k)), '/entries') == tables * M * D
  assert count(shapes(model(memory=KEYS, sharing=sharing, sharing_k=k)), '/values') == tables * 4 * D


def test_gradients_of_a_shared_table_add_up():
  """Over the layers that read it: the sum of those of equal tables, one a layer."""
  memory = dataclasses.replace(BANK, zero_out=False)
  bare = lambda sharing: build_decoder(dataclasses.replace(model((0, 1), 2, memory, sharing=sharing), hidden=-1))
  one, two = bare('shared'), bare('per_layer')
  rng, token = np.random.default_rng(0), jnp.arange(4)[None] % A
  flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes(one.config).items()}
  own = {path: x for path, x in flat.items() if path != 'bank_bank/entries'}
  own['repeats/layer_0/mixers_1/bank/bank/entries'] = jnp.stack([flat['bank_bank/entries']] * 2)
  def loss(flat, decoder):
    params = unnamed(flat, param_shapes(decoder)[0])
    return jnp.sin(decoder.apply({'params': params}, token, decoder.init_state(1), position_BxL=jnp.arange(4)[None])[0]).sum()
  a, b = jax.jit(lambda: (jax.grad(loss)(flat, one), jax.grad(loss)(own, two)))()
  shared, each = np.asarray(a['bank_bank/entries']), np.asarray(b['repeats/layer_0/mixers_1/bank/bank/entries'])
  assert np.abs(each).max((1, 2)).min() > 1e-3
  np.testing.assert_allclose(shared, each.sum(0), rtol=1e-4, atol=1e-4 * np.abs(shared).max())


def test_variants_differ_by_a_feed_forward_network_and_its_norm():
  vanilla, a, b = shapes(model(())), shapes(model()), shapes(model(variant='B'))
  memory = 3 * (4 * D * D + D) + M * D
  assert count(a) - count(vanilla) == memory and count(b) - count(a) == 3 * (3 * D * F + D)
  assert count(vanilla, 'bank') == 0 and not [path for path in vanilla if 'mixers_1' in path]
  assert count(b, '/mlp/') == 9 * 3 * D * F and count(a, '/mlp/') == 6 * 3 * D * F


def groups(config):
  rules = parameter_rules(config)
  names = {rule.rpartition('=')[2] for rule in rules}
  return assign_groups(OptimizerConfig(rules=rules, groups={name: GroupConfig() for name in names}), list(shapes(config)))


@pytest.mark.parametrize('sharing', ['shared', 'per_layer', 'every_k_layers'])
@pytest.mark.parametrize('variant', ['A', 'B'])
@pytest.mark.parametrize('memory', [BANK, KEYS], ids=['bank', 'product_key'])
def test_parameter_groups(sharing, variant, memory):
  """Tables, then projections and norm (B: and the second network), then the rest; nothing is left over."""
  config = model(sharing=sharing, variant=variant, memory=memory)
  found, own = shapes(config), groups(config)
  size = lambda group: sum(math.prod(shape) for path, shape in found.items() if own[path] == group)
  tables = count(found, '/entries') + count(found, '/values')
  assert size('memory_bank') == tables > 0
  assert size('base') == count(shapes(model(())))
  assert size('memory') == count(found) - tables - size('base')


def test_groups_without_memory_and_with_a_context_bank():
  assert parameter_rules(model(())) == ('.*=base',)
  context, size = {'context': ContextConfig(heads=2, slots=4)}, dict(width=D, hidden=F, vocabulary=A, repeats=2)
  config = ModelConfig(mixers={'attention': ATTENTION} | context, pattern=('attention>context',), **size)
  assert parameter_rules(config) == ('^repeats/layer_0/(mixers_1/context|norm_mixer_1)/=memory', '.*=base')
  added = ModelConfig(mixers={'attention': ATTENTION, 'bank': BANK}, pattern=('attention+bank',), **size)
  own = groups(added)
  assert own['repeats/layer_0/norm_mixer/scale'] == own['repeats/layer_0/mixers/attention/out/kernel'] == 'base'
  assert own['repeats/layer_0/mixers/bank/out/kernel'] == 'memory' and own['repeats/layer_0/mixers/bank/bank/entries'] == 'memory_bank'


@pytest.mark.parametrize(('name', 'sizes'), [
    ('moc_371m', {'base': 147_874_560, 'memory': 22_042_628, 'memory_bank': 201_375_744}),
    ('mat_small', {'base': 137_841_408, 'memory': 28_468_416, 'memory_bank': 3_145_728}), ('vanilla_control', {'base': 137_841_408})])
def test_sizes_of_the_parts_at_full_size(name, sizes):
  config = load(f'configs/{name}.py')
  found = named(param_shapes(build_decoder(config.model))[0])
  own = assign_groups(config.optimizer, list(found))
  assert {group: sum(found[path].size for path in found if own[path] == group) for group in config.optimizer.groups} == sizes
  assert sum(sizes.values()) == sum(x.size for x in jax.tree.leaves(list(found.values())))


def test_the_memory_layers_of_moc():
  layers = load('configs/moc_371m.py').model.layers
  assert len(layers) == 16 and [i for i, layer in enumerate(layers) if layer != 'attention'] == [2, 6, 10, 14]
