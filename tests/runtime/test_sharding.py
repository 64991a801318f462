"""Meshes, axis rules, and the batch over devices."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memjax.config.banks import BankConfig, BankFormConfig, BankShapeConfig
from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig
from memjax.config.schema import Config, MeshConfig, ModelConfig, TrainingConfig
from memjax.layers.axes import constrain
from memjax.runtime import sharding
from memjax.runtime.flops import count_flops


@pytest.mark.parametrize('config, shape', [
    (MeshConfig(), (8, 1, 1, 1)), (MeshConfig(fsdp=2, model=2), (2, 2, 2, 1)), (MeshConfig(data=1, model=4), (1, 1, 4, 1)),
    (MeshConfig(preset='dp'), (8, 1, 1, 1)), (MeshConfig(preset='fsdp', data=2), (2, 4, 1, 1)),
    (MeshConfig(preset='fsdp_tp'), (1, 4, 2, 1)), (MeshConfig(preset='bank_parallel'), (1, 8, 1, 1)),
    (MeshConfig(preset='sequence_parallel', data=2), (2, 1, 1, 4))])
def test_mesh_shapes(config, shape):
  assert tuple(sharding.make_mesh(config).shape.values()) == shape


@pytest.mark.parametrize('config, words', [
    (MeshConfig(fsdp=3), 'does not divide 8 devices'), (MeshConfig(data=16), 'wants 16 devices, there are 8')])
def test_mesh_errors_are_one_line(config, words):
  with pytest.raises(UserError, match=words): sharding.make_mesh(config)


def test_batch_must_split_over_the_rows_of_the_mesh():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, model=2))
  sharding.check_batch(mesh, TrainingConfig(batch=8, accumulate=2))
  with pytest.raises(UserError, match='use a multiple of 16'): sharding.check_batch(mesh, TrainingConfig(batch=8, accumulate=4))


def test_rows_must_split_into_pieces():
  mesh = sharding.make_mesh(MeshConfig(preset='sequence_parallel'))
  sharding.check_batch(mesh, TrainingConfig(length=64))
  with pytest.raises(UserError, match=r'training\.length=65 does not split over mesh\.sequence=8'):
    sharding.check_batch(mesh, TrainingConfig(length=65))
  with pytest.raises(UserError, match=r'training\.bptt=4 does not split'): sharding.check_batch(mesh, TrainingConfig(length=64, bptt=4))


def test_axes_that_do_not_divide_are_replicated():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  axes = {'a': ('embed', 'hidden'), 'b': ('layers', 'heads', 'embed'), 'c': None, 'd': ('hidden', 'heads'),
          'e': ('vocabulary', 'embed')}
  shapes = {'a': (4, 6), 'b': (3, 4, 5), 'c': (7,), 'd': (4, 4), 'e': (5, 4)}
  shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  got = sharding.shardings_for(axes, mesh, shapes)
  assert {k: s.spec for k, s in got.items()} == {
      'a': P('fsdp', 'model'), 'b': P(None, 'model', None), 'c': P(None), 'd': P('model', None), 'e': P(None, 'fsdp')}


def test_data_parallel_equals_jit():
  mesh = sharding.make_mesh(MeshConfig())
  w = jax.random.normal(jax.random.key(0), (5, 3))
  x = jax.random.normal(jax.random.key(1), (16, 5))
  step = lambda w, x: jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
  got = sharding.data_parallel(step, mesh)(w, x)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(step)(w, x)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  rows = sharding.data_parallel(lambda w, x: x @ w, mesh)(w, x)
  assert len(rows.sharding.device_set) == 8 and not rows.sharding.is_fully_replicated


def test_put_batch_keeps_the_rows_and_replicates_odd_ones():
  mesh = sharding.make_mesh(MeshConfig())
  batch = {'token': np.arange(32, dtype=np.int32).reshape(16, 2), 'odd': np.ones((3, 2), bool)}
  put = sharding.put_batch(batch, mesh)
  np.testing.assert_array_equal(put['token'], batch['token'])
  assert put['odd'].sharding.is_fully_replicated and not put['token'].sharding.is_fully_replicated


def test_activations_stay_where_their_rows_and_tokens_are():
  x = jnp.zeros((4, 6, 2))
  place = lambda x: constrain(x, ('batch', 'tokens', None))
  assert 'sharding_constraint' not in str(jax.make_jaxpr(place)(x))                  # no mesh is in force
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1))): assert 'sharding_constraint' not in str(jax.make_jaxpr(place)(x))
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
  with jax.set_mesh(mesh): assert jax.jit(place)(x).sharding.spec == P(('data', 'fsdp'), 'sequence')


def test_bank_parallel_splits_the_chapters_that_have_no_axis():
  bank = BankConfig(shape=BankShapeConfig(entries=16, chapters=8))
  own = dataclasses.replace(bank, form=BankFormConfig(axis='model'))
  mixers = {'some': bank, 'own': own, 'flat': BankConfig(shape=BankShapeConfig(entries=16)), 'attention': AttentionConfig()}
  config = Config(model=ModelConfig(mixers=mixers), mesh=MeshConfig(preset='bank_parallel'))
  placed = sharding.placed(config).mixers
  assert placed == {**mixers, 'some': dataclasses.replace(bank, form=BankFormConfig(axis='fsdp'))}
  assert sharding.placed(dataclasses.replace(config, mesh=MeshConfig(preset='fsdp'))).mixers == mixers


def test_operations_of_all_devices_are_counted():
  x, w = jax.ShapeDtypeStruct((16, 4), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
  mesh = sharding.make_mesh(MeshConfig())
  split = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data'))
  assert count_flops(split, x, w) == count_flops(jnp.dot, x, w) == 2 * 16 * 4 * 3
