"""Cross-entropy piece by piece: the same sums and gradients, without the logits of all tokens."""
import dataclasses

import jax
import numpy as np
import pytest

from memjax.config.lora import LoraConfig
from memjax.models.decoder import build_decoder, head, init_params
from memjax.runtime import scoring
from memjax.runtime.losses import head_losses, token_losses
from tests.runtime import toy


def model_of(tie):
  return build_decoder(dataclasses.replace(toy.MODEL, embedding=dataclasses.replace(toy.MODEL.embedding, tie=tie)))


def objective(model, batch):
  def loss(params):
    totals, _, _ = scoring.score(model, params, model.init_state(8), batch)
    return totals.nats / 7, totals
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('tie', [pytest.param(False, marks=pytest.mark.slow), True])
def test_pieces_equal_the_whole(tie, monkeypatch):
  model, batch = model_of(tie), toy.batch()
  params = init_params(model, jax.random.key(0))[0]
  (_, whole), whole_g = objective(model, batch)(params)
  monkeypatch.setattr(scoring, 'LOGITS', 8 * 3 * toy.VOCABULARY)
  assert scoring.piece_length(model.config, params, (8, 8)) == 3              # the last piece is filled up
  (_, pieces), pieces_g = objective(model, batch)(params)
  np.testing.assert_allclose(pieces.nats, whole.nats, rtol=1e-6)
  assert (pieces.tokens, pieces.correct) == (whole.tokens, whole.correct)
  for a, b in zip(jax.tree.leaves(pieces_g), jax.tree.leaves(whole_g), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(abs(b).max()))
  alone = jax.jit(lambda params: scoring.score(model, params, model.init_state(8), batch)[0])(params)      # without a gradient
  np.testing.assert_allclose(alone.nats, whole.nats, rtol=1e-6)


def test_no_array_holds_all_logits():
  model, rows, length = model_of(True), 4, 64
  config = dataclasses.replace(model.config, vocabulary=97)
  x, table = np.ones((rows, length, 8), np.float32), {'table': np.ones((97, 8), np.float32)}
  target = np.zeros((rows, length), np.int32), np.ones((rows, length), bool)
  made = lambda fn: str(jax.make_jaxpr(jax.grad(lambda x: fn(x).nats))(x))
  assert f'{rows},{length},97' in made(lambda x: token_losses(head(config, table, x), *target))
  pieces = made(lambda x: head_losses((lambda params, x: head(config, params, x), 16), table, x, target))
  assert f'{rows},{length},97' not in pieces and f'{rows},16,97' in pieces


def test_all_at_once_where_it_is_small_or_must_be(monkeypatch):
  model = model_of(False)
  params = init_params(model, jax.random.key(0))[0]
  assert scoring.piece_length(model.config, params, (8, 8)) == 0
  monkeypatch.setattr(scoring, 'LOGITS', 1)
  assert scoring.piece_length(model.config, params, (1, 1)) == 1              # one token is the least
  noisy = dataclasses.replace(model.config.block, lora=LoraConfig(rank=2, dropout=0.1))
  assert scoring.piece_length(dataclasses.replace(model.config, block=noisy), params, (8, 8)) == 0
  packed = {**params, 'head': {'kernel_codes': np.zeros((8, 11), np.int8)}}
  assert scoring.piece_length(model.config, packed, (8, 8)) == 0
