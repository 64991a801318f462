"""The training step: micro-batches, segments, carried memory, NaN, meshes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, FormConfig, HolographicConfig
from memjax.config.schema import MeshConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime import optim, sharding, state
from memjax.runtime.losses import Totals, scores, token_losses
from tests.runtime import toy


def close(a, b, tolerance=1e-5):
  for (name, x), y in zip(named(a).items(), jax.tree.leaves(b), strict=True):
    largest = max(1e-3, float(jnp.max(jnp.abs(y))))
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * largest, err_msg=name)


def equal(a, b):
  for (name, x), y in zip(named(a).items(), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def gradient_of(model, params, config, memory=(), batch=None):
  optimizer = optim.make_optimizer(config.optimizer, params, 10)
  return jax.jit(state.make_gradient(model, optimizer, config))(params, memory, batch or toy.batch(), jax.random.key(0))


def start(model, params, config, memory=()):
  optimizer = optim.make_optimizer(config.optimizer, params, 10)
  zero = lambda: jnp.zeros((), jnp.int32)
  key = jax.random.key_data(jax.random.key(1))
  first = state.TrainState(zero(), params, optimizer.init(params), key, memory, zero())
  return first, state.make_train_step(model, optimizer, config)


@pytest.mark.parametrize('accumulate', [2, 4])
def test_micro_batches_equal_one_big_batch(accumulate):
  model = toy.Recurrent()
  whole = gradient_of(model, model.params(), toy.tiny())
  parts = gradient_of(model, model.params(), toy.tiny(accumulate=accumulate))
  close(parts, whole)


@pytest.mark.slow
def test_micro_batches_of_the_decoder_equal_one_big_batch():
  model = build_decoder(toy.MODEL)
  params = state.init_params(model, jax.random.key(0))[0]
  parts, whole = (gradient_of(model, params, toy.tiny(accumulate=n)) for n in (2, 1))
  close(parts[:2], whole[:2])


@pytest.mark.slow
def test_segments_keep_values_and_cut_gradients(monkeypatch):
  model, batch = toy.Recurrent(), toy.batch()
  full = gradient_of(model, model.params(), toy.tiny(carry=True), model.init_state(8))
  cut = gradient_of(model, model.params(), toy.tiny(carry=True, bptt=4), model.init_state(8))
  equal(cut[3], full[3])                                                    # the states, bit for bit
  close(cut[1], full[1], 1e-6)
  assert float(jnp.max(jnp.abs(cut[0]['a'] - full[0]['a']))) > 1e-4
  def halves(params):                                 # by hand: a constant state enters the second half
    out, memory = 0.0, model.init_state(8)
    for part in (slice(0, 4), slice(4, 8)):
      x = {k: v[:, part] for k, v in batch.items()}
      logits, memory, aux = model.apply({'params': params}, x['token'], jax.lax.stop_gradient(memory),
                                        position_BxL=x['position'])
      out += token_losses(logits, x['target'], x['weight']).nats / batch['weight'].sum()
    return out + aux['penalty']
  close(cut[0], jax.grad(halves)(model.params()))
  monkeypatch.setattr(jax.lax, 'stop_gradient', lambda x: x)
  close(gradient_of(model, model.params(), toy.tiny(carry=True, bptt=4), model.init_state(8))[0], full[0])


@pytest.mark.slow
def test_segments_of_a_holographic_decoder_keep_values():
  scanned = HolographicConfig(heads=2, form=FormConfig(kind='scan'))
  model = build_decoder(dataclasses.replace(toy.MODEL, mixers={'near': scanned}))
  params = state.init_params(model, jax.random.key(0))[0]
  cut, whole = (jax.jit(state.make_forward(model, toy.tiny(carry=True, bptt=n)))(
      params, model.init_state(8), toy.batch(), jax.random.key(0)) for n in (4, 0))
  equal(cut[2], whole[2])                                                   # the states, bit for bit
  close(cut[0], whole[0], 1e-6)


def test_carried_memory_continues_rows_and_restarts_at_position_zero():
  model = toy.Recurrent()
  long = toy.batch(length=16)
  long['position'][2, 8:] -= 8                                              # row 2 starts a document at the second step
  whole = gradient_of(model, model.params(), toy.tiny(length=16), batch=long)
  memory, nats = model.init_state(8), 0.0
  for part in (slice(0, 8), slice(8, 16)):
    half = {k: v[:, part] for k, v in long.items()}
    _, totals, _, memory = gradient_of(model, model.params(), toy.tiny(carry=True, accumulate=2), memory, half)
    nats += float(totals.nats)
  assert nats == pytest.approx(float(whole[1].nats), rel=1e-6)


def test_full_attention_cannot_be_carried():
  config = dataclasses.replace(toy.MODEL, mixers={'near': AttentionConfig(heads=2)})
  with pytest.raises(UserError, match='does not go with full attention'): state.check_carry(config, 'training.carry')


def test_non_finite_steps_change_nothing_and_are_counted():
  model = toy.Recurrent(poison=True)
  config = toy.tiny(carry=True)
  first, step = start(model, model.params(), config, model.init_state(8))
  good, bad = toy.batch(), toy.batch()
  good['token'] = np.minimum(good['token'], 9)
  bad['token'][0, 0] = 10
  once, _ = step(first, good)
  before = jax.device_get(once)
  twice, metrics = step(once, bad)
  equal((twice.params, twice.opt_state, twice.memory), (before.params, before.opt_state, before.memory))
  assert int(metrics['skipped']) == 1 and int(twice.step) == 2
  thrice, metrics = step(twice, bad)
  assert int(metrics['skipped']) == 2
  last, metrics = step(thrice, good)
  assert int(metrics['skipped']) == 0 and float(jnp.max(jnp.abs(last.params['a'] - before.params['a']))) > 0
  assert step._cache_size() == 1


def test_the_old_state_is_given_away():
  model = toy.Recurrent()
  first, step = start(model, model.params(), toy.tiny())
  step(first, toy.batch())
  assert all(x.is_deleted() for x in jax.tree.leaves(first.params))


def run(mesh_config, steps=3, **training):
  config = dataclasses.replace(toy.tiny(**training), mesh=mesh_config)
  mesh, model = sharding.make_mesh(mesh_config), build_decoder(config.model)
  optimizer = optim.make_optimizer(config.optimizer, param_shapes(model)[0], 10, axes=param_shapes(model)[1])
  abstract = state.abstract_state(model, optimizer, config, mesh)
  now, step = state.init_state(model, optimizer, config, abstract), state.make_train_step(model, optimizer, config, abstract)
  for n in range(steps): now, metrics = sharding.settle(step(now, sharding.put_batch(toy.batch(n), mesh)))
  return now, metrics


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, model=2)], ids=['data', 'all'])
def test_meshes_equal_one_device(mesh):
  one, first = run(MeshConfig(data=1), carry=True)
  many, second = run(mesh, carry=True)
  close(jax.device_get(many.params), jax.device_get(one.params), 2e-4)
  assert float(second['loss']) == pytest.approx(float(first['loss']), rel=1e-5)
  kernel = many.params['repeats']['layer_0']['mlp']['up']['kernel']
  moments = [v for k, v in named(many.opt_state).items() if k.endswith('mlp/up/kernel')]
  assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
  assert kernel.sharding.is_fully_replicated == (mesh.fsdp < 2)
  assert all(not x.sharding.is_fully_replicated for x in jax.tree.leaves(many.memory) if x.size)


def test_masked_targets_do_not_count_even_if_not_finite():
  logits = jnp.array([[[0.0, 1.0], [jnp.nan, 0.0]]])
  target, weight = jnp.array([[1, 0]]), jnp.array([[True, False]])
  totals, grads = jax.value_and_grad(lambda x: token_losses(x, target, weight).nats)(logits)
  assert float(totals) == pytest.approx(float(np.log1p(np.exp(-1.0))), rel=1e-6) and bool(jnp.isfinite(grads).all())


def test_scores_are_ratios_of_sums():
  got = scores(Totals(8 * np.log(2), 4, 1), bytes_per_token=2.0)
  assert got == pytest.approx({'loss': 2 * np.log(2), 'perplexity': 4.0, 'bits_per_byte': 1.0, 'accuracy': 0.25,
                               'tokens': 4})
