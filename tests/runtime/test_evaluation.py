"""Exact token weighting of evaluation, and the operation counter against XLA's."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import EvaluationConfig, MeshConfig, ModelConfig
from memjax.data.pipeline import eval_batches
from memjax.data.tokens import Tokens
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime import evaluation, flops, optim, sharding
from memjax.runtime.losses import token_losses
from tests.runtime import toy

TOKENS = Tokens(np.random.default_rng(0).integers(0, 10, 101).astype(np.uint8), np.array([0, 40]), 150, 'f', 10, 10)


@pytest.fixture(scope='module')
def exact():
  """(model, params, nats and hits over each document in one call)."""
  model = toy.Recurrent()
  params, nats, correct = model.params(), 0.0, 0
  for start, end in ((0, 40), (40, 101)):
    target = TOKENS.token_N[start:end].astype(np.int32)[None]
    token = np.concatenate([[[10]], target[:, :-1]], 1).astype(np.int32)
    logits, _, _ = model.apply({'params': params}, token, model.init_state(1), position_BxL=np.arange(end - start)[None])
    totals = token_losses(logits, jnp.asarray(target), jnp.ones(target.shape, bool))
    nats, correct = nats + float(totals.nats), correct + int(totals.correct)
  return model, params, nats, correct


@pytest.mark.parametrize('batch, length', [(1, 101), (1, 16), (1, 101 + 7)])
def test_a_stream_scores_every_token_as_if_read_at_once(exact, batch, length):
  model, params, nats, correct = exact
  batches = eval_batches(TOKENS, batch=batch, length=length, stream=True)
  totals = evaluation.evaluate_tokens(model, params, batches, stream=True)
  assert totals.tokens == 101 and totals.correct == correct and totals.nats == pytest.approx(nats, rel=1e-6)


def test_sliding_windows_score_every_token_once_whatever_the_batch(exact):
  model, params = exact[:2]
  results = [evaluation.evaluate_tokens(model, params, eval_batches(TOKENS, batch=batch, length=16, context=5)) for batch in (1, 3, 8)]
  for totals in results:
    assert totals.tokens == 101 and totals.nats == pytest.approx(results[0].nats, rel=1e-6)


def test_scores_of_a_split_and_of_its_first_batches(exact):
  model, params = exact[:2]
  config = dataclasses.replace(toy.CONFIG, evaluation=EvaluationConfig(batch=2, length=16))
  score = evaluation.make_scorer(model, config)
  whole, part = score(params, TOKENS), score(params, TOKENS, 2)
  assert whole['tokens'] == 101 and part['tokens'] == 64
  assert whole['bits_per_byte'] == pytest.approx(whole['loss'] / np.log(2) * 101 / 150)


def test_a_mesh_gives_the_same_scores(exact):
  model, params = exact[:2]
  mesh = sharding.make_mesh(MeshConfig())
  for batch in (8, 3):
    one, many = (evaluation.evaluate_tokens(model, params, eval_batches(TOKENS, batch=batch, length=16), mesh=m) for m in (None, mesh))
    assert one[1:] == many[1:] and one.nats == pytest.approx(many.nats, rel=1e-6)


def test_full_attention_does_not_stream():
  model = build_decoder(dataclasses.replace(toy.MODEL, mixers={'near': AttentionConfig(heads=2)}))
  with pytest.raises(UserError, match=r'evaluation\.stream does not go with full attention'):
    evaluation.make_evaluator(model, stream=True)


MIXERS = {'attention': AttentionConfig(heads=4), 'window': WindowConfig(heads=4, window=16), 'holographic': HolographicConfig(heads=4),
          'neural': NeuralConfig(heads=4, chunk=64, exec=NeuralExecConfig(aligned=True))}             # one chunk, so one turn of its loop
SLOW = {mode: dataclasses.replace(MIXERS['neural'], rule=NeuralRuleConfig(mode=mode), net=NeuralNetConfig(kind=kind))
        for mode, kind in (('block', 'mlp'), ('exact', 'linear'))}
MIXERS |= SLOW


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MIXERS])
def test_operations_agree_with_xla(name):
  """Within 5 % of XLA's own count of the forward pass, one repeat (XLA counts the body of a loop once)."""
  model = build_decoder(ModelConfig(width=64, vocabulary=64, mixers={'m': MIXERS[name]}, pattern=('m',), repeats=1))
  token = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  def call(params, token, position): return model.apply({'params': params}, token, model.init_state(1), position_BxL=position)[0]
  measured = jax.jit(call).lower(param_shapes(model)[0], token, token).cost_analysis()['flops']
  assert flops.forward_flops(model, 64) * 64 == pytest.approx(measured, rel=0.05)
  mixer = getattr(MIXERS[name], 'exec', None)
  if not hasattr(mixer, 'aligned'): return
  usual = dataclasses.replace(model.config, mixers={'m': dataclasses.replace(MIXERS[name], exec=NeuralExecConfig())})
  assert flops.forward_flops(build_decoder(usual), 64) == flops.forward_flops(model, 64)      # token by token is not what is done


def test_operations_of_known_functions():
  a, b = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32)
  assert flops.count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
  assert flops.count_flops(lambda a: jax.lax.scan(lambda c, x: (c * 2 + x, None), a[0], a)[0], a) == 3 * 4 * 2
  choose = lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a + a * a, lambda a: a, a)
  assert flops.count_flops(choose, a) == 24 + 2 and flops.count_flops(choose, a, branch=min) == 2
  assert flops.count_flops(jax.checkpoint(lambda a: jnp.sum(a)), a) == 12


def test_layers_and_training_multiply_operations():
  one, four = (build_decoder(dataclasses.replace(toy.MODEL, repeats=n)) for n in (1, 4))
  base = build_decoder(dataclasses.replace(toy.MODEL, repeats=2))
  layer = flops.forward_flops(base, 8) - flops.forward_flops(one, 8)
  assert flops.forward_flops(four, 8) == pytest.approx(flops.forward_flops(one, 8) + 3 * layer, rel=1e-3)
  optimizer = optim.make_optimizer(toy.CONFIG.optimizer, param_shapes(one)[0], 5)
  ratio = flops.training_flops(one, optimizer, toy.CONFIG) / flops.forward_flops(one, 8)
  assert 2.5 < ratio < 4


def test_state_bytes_are_those_of_the_leaves():
  model = build_decoder(dataclasses.replace(toy.MODEL, mixers={'near': AttentionConfig(heads=2)}, repeats=3))
  size = lambda n: sum(x.nbytes for x in jax.tree.leaves(model.init_state(1, n)))
  assert flops.state_bytes(model, 10) == (size(0), size(10) - size(0))
