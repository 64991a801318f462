"""Chapters split over a mesh axis, rows over another: the same loss and gradients as one device."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankConfig, BankFormConfig, BankShapeConfig, RouterConfig
from memjax.config.mixers import AttentionConfig
from memjax.config.schema import MeshConfig, ModelConfig
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime import sharding

MEM = BankConfig(heads=2, zero_out=False, shape=BankShapeConfig(entries=12, chapters=4, share='bank'), router=RouterConfig(top_k=2))
MODEL = ModelConfig(width=8, hidden=8, vocabulary=11, mixers={'attention': AttentionConfig(heads=2), 'mem': MEM},
                    pattern=('attention>mem',), repeats=2)


@pytest.mark.slow
@pytest.mark.parametrize('axis, mesh', [('model', MeshConfig(data=4, model=2)), ('fsdp', MeshConfig(data=2, fsdp=4))])
def test_split_chapters_equal_one_device(axis, mesh):
  split = dataclasses.replace(MODEL, mixers={**MODEL.mixers, 'mem': dataclasses.replace(MEM, form=BankFormConfig(axis=axis))})
  token_BxL, position_BxL = jax.random.randint(jax.random.key(1), (8, 5), 0, 11), jnp.broadcast_to(jnp.arange(5)[None], (8, 5))
  params = init_params(build_decoder(MODEL), jax.random.key(0))[0]
  def gradient(config):
    model = build_decoder(config)
    def loss(params, token_BxL):
      logits, _, aux = model.apply({'params': params}, token_BxL, model.init_state(8), position_BxL=position_BxL)
      return jnp.mean(jax.nn.logsumexp(logits, -1)) + jnp.mean(logits[..., 0] ** 2) + aux['penalty']
    return jax.jit(jax.value_and_grad(loss))
  plain = gradient(MODEL)(params, token_BxL)
  devices = sharding.make_mesh(mesh)
  shapes, axes = param_shapes(build_decoder(split))
  places = sharding.shardings_for(axes, devices, shapes)
  assert places['bank_bank']['entries'].spec[0] == axis
  with jax.set_mesh(devices):
    rows = sharding.put_batch({'token': np.asarray(token_BxL)}, devices)['token']
    placed = jax.device_put(params, places)
    run = gradient(split)
    assert 'shard_map' in str(jax.make_jaxpr(lambda *a: run(*a))(placed, rows))
    spread = jax.block_until_ready(run(placed, rows))
  for a, b in zip(jax.tree.leaves(jax.device_get(spread)), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1, float(np.abs(b).max())))
