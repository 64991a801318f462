"""Presets of the mesh on eight devices: the same loss and gradients as one device, and what crosses between devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.mesh import PRESETS, MeshConfig
from memjax.config.mixers import (
  AddressConfig,
  AttentionConfig,
  HolographicConfig,
  KeepConfig,
  WindowConfig,
)
from memjax.config.neural import NeuralConfig
from memjax.config.schema import CheckpointConfig, Config, ModelConfig, TrainingConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime import sharding
from memjax.runtime.checkpoint import Checkpoints, restore
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import abstract_state, init_state, make_gradient
from tests.shard_maps import empty, shard_maps

L = 32
BANK = BankConfig(heads=2, zero_out=False, shape=BankShapeConfig(entries=16, chapters=8), router=RouterConfig(top_k=2))
MIXERS = {
    'near': WindowConfig(heads=2, window=4), 'full': AttentionConfig(heads=2), 'bank': BANK, 'slots': HolographicConfig(heads=2, slots=4),
    'slot_keep': HolographicConfig(heads=2, slots=2, keep=KeepConfig(kind='slot')), 'learns': NeuralConfig(heads=2, chunk=4),
    'channel': HolographicConfig(heads=2, slots=2, keep=KeepConfig(kind='channel')),
    'copies': HolographicConfig(heads=2, slots=2, address=AddressConfig(kind='copies')),
    'delta': HolographicConfig(heads=2, slots=4, keep=KeepConfig(erase='slot'))}


def config_of(layers, mesh):
  names = {name for layer in layers for name in layer.split('+')}
  model = ModelConfig(width=16, hidden=16, vocabulary=11, mixers={name: MIXERS[name] for name in names}, pattern=layers, repeats=2,
                      dtype='float64')
  return Config(model=model, mesh=mesh, training=TrainingConfig(batch=8, length=L))


def rows(seed=0):
  """Random tokens; a document starts inside of some rows."""
  draw = np.random.default_rng(seed)
  position = np.tile(np.arange(L, dtype=np.int32), (8, 1))
  position[1, 9:] -= 9
  position[2, 29:] -= 29
  position[3] += 5
  token, target = draw.integers(0, 11, (2, 8, L), dtype=np.int32)
  return {'token': token, 'target': target, 'position': position, 'weight': draw.random((8, L)) < .8}


def gradients(config, params):
  """(gradients, nats and counts, aux) on the mesh of a config; and the compiled text."""
  mesh, model = sharding.make_mesh(config.mesh), build_decoder(sharding.placed(config))
  shapes, axes = param_shapes(model)
  optimizer = make_optimizer(config.optimizer, shapes, 1, axes=axes)
  gradient = make_gradient(model, optimizer, config)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, sharding.shardings_for(axes, mesh, shapes))
    traced = jax.jit(lambda params, batch: gradient(params, (), batch, None)[:3]).trace(params, sharding.put_batch(rows(), mesh))
    assert empty(shard_maps(traced.jaxpr.jaxpr)) == []
    run = traced.lower().compile()
    return jax.device_get(jax.block_until_ready(run(params, sharding.put_batch(rows(), mesh)))), run.as_text()


def check(layers, mesh):
  """The text of the program for a mesh, after comparing its results with those of one device."""
  one = config_of(layers, MeshConfig(data=1))
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), init_params(build_decoder(one.model), jax.random.key(0))[0])
    expected, _ = gradients(one, params)
    actual, text = gradients(config_of(layers, mesh), params)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    close = 1e-10 if b.dtype == np.float64 else 2e-6           # monitors are float32
    np.testing.assert_allclose(a, b, rtol=close, atol=close * max(1, float(np.abs(b).max())))
  return text


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['near', 'slots', 'slot_keep', 'channel', 'copies', 'delta', 'learns', 'full', 'bank'])
def test_pieces_of_rows_equal_whole_rows(layer):
  check((layer,), MeshConfig(preset='sequence_parallel', data=2))


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['dp', 'fsdp', 'fsdp_tp', 'bank_parallel', 'sequence_parallel'])
def test_presets_equal_one_device(preset):
  text = check(('near+slots', 'bank'), MeshConfig(preset=preset))
  assert 'all-reduce' in text and ('collective-permute' in text or preset != 'sequence_parallel')


@pytest.mark.slow
def test_no_row_leaves_its_device_under_dp():
  for layer in ('near', 'slots', 'learns'): assert 'all-gather' not in check((layer,), MeshConfig(preset='dp'))


def abstract_of(preset):
  """(state as shapes with shardings, function that makes it) under a preset."""
  config = config_of(('near', 'bank'), MeshConfig(preset=preset))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype='float32'))
  mesh, model = sharding.make_mesh(config.mesh), build_decoder(sharding.placed(config))
  optimizer = make_optimizer(config.optimizer, param_shapes(model)[0], 1, axes=param_shapes(model)[1])
  abstract = abstract_state(model, optimizer, config, mesh)
  return abstract, lambda: init_state(model, optimizer, config, abstract)


@pytest.mark.slow
def test_checkpoints_move_between_any_two_presets(tmp_path):
  presets = [preset for preset in PRESETS if preset]
  parts = {preset: abstract_of(preset) for preset in presets}
  split = {preset: {axis for x in jax.tree.leaves(abstract) for axis in x.sharding.spec if axis} for preset, (abstract, _) in parts.items()}
  assert split == {'dp': set(), 'fsdp': {'fsdp'}, 'fsdp_tp': {'fsdp', 'model'}, 'bank_parallel': {'fsdp'}, 'sequence_parallel': set()}
  entries = lambda preset: named(parts[preset][0].params)['repeats/layer_1/mixers/bank/bank/entries'].sharding.spec
  assert 'fsdp' in entries('bank_parallel') and entries('bank_parallel') != entries('fsdp')
  for source in presets:
    state = parts[source][1]()
    values = jax.device_get(state)
    checkpoints = Checkpoints(str(tmp_path / source), CheckpointConfig(asynchronous=False))
    checkpoints.save(1, state, {'data': {}, 'config': {}, 'early': {}})
    checkpoints.close()
    for target in presets:
      _, moved, _ = restore(str(tmp_path / source), parts[target][0])
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(moved), values)
      assert all(jax.tree.leaves(jax.tree.map(lambda x, like: x.sharding == like.sharding, moved, parts[target][0])))
