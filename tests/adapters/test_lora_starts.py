"""Changes that begin inside the kernel: the sum stays, the singular values are the largest, training is told as a change of the host."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.lora import extract, insert, merge, with_lora
from memjax.adapters.lora_starts import STARTS, difference, start_inside
from memjax.config.errors import UserError
from memjax.config.quant import QuantConfig
from memjax.layers.tree import named
from memjax.models.quantized import quantize_host, with_quant
from tests.adapters.test_lora import EVERY, QUERY_VALUE, SMALL, logits, random_params

LORA = dataclasses.replace(EVERY, targets=('/attention/',), exclude=(), stabilised=True)
MODEL = with_lora(SMALL, LORA)


@pytest.fixture(scope='module')
def host(): return random_params(SMALL)


@pytest.mark.parametrize('how', STARTS)
def test_the_start_is_the_host_but_for_rounding(how, host):
  begun = start_inside(MODEL, host, how)
  meant = logits(SMALL, host)
  np.testing.assert_allclose(logits(MODEL, begun), meant, atol=1e-4)
  np.testing.assert_allclose(logits(SMALL, merge(begun, [extract(begun, LORA)])), meant, atol=1e-4)
  for path, (a, b, scale, _) in extract(begun, LORA).items():
    w, rest = np.asarray(named(host)[path], np.float64), np.asarray(named(begun)[path], np.float64)
    part = scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(rest + part, w, atol=1e-6)
    size, left = (np.linalg.svd(x, compute_uv=False) for x in (w, rest))
    if how == 'pissa': np.testing.assert_allclose(left[..., :-a.shape[-1]], size[..., a.shape[-1]:], atol=1e-5)
    else: np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), np.broadcast_to(np.eye(b.shape[-2]), (2, *b.shape[-2:-1] * 2)), atol=1e-5)
  assert np.abs(logits(SMALL, {**begun, 'repeats': merge(begun, [])['repeats']}) - meant).max() > 0.1


def test_training_is_a_change_of_the_host(host):
  begun, rng = start_inside(MODEL, host, 'pissa'), np.random.default_rng(1)
  move = lambda path, x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) if 'lora_' in jax.tree_util.keystr(path) else x
  trained = jax.tree_util.tree_map_with_path(move, begun)
  settings, adapter = difference(trained, begun, LORA)
  meant = logits(MODEL, trained)
  np.testing.assert_allclose(logits(with_lora(SMALL, settings), insert(host, adapter)), meant, atol=1e-4)
  np.testing.assert_allclose(logits(SMALL, merge(host, [adapter])), meant, atol=1e-4)
  assert np.abs(meant - logits(SMALL, host)).max() > 0.1 and all(f.a.shape[-1] in (4, 6) for f in adapter.values())


REFUSED = {
    'name': (lambda h: start_inside(MODEL, h, 'pisa'), "not 'pisa'; did you mean 'pissa'?"),
    'none': (lambda h: start_inside(SMALL, h, 'pissa'), 'lora.rank is 0'),
    'magnitudes': (lambda h: start_inside(with_lora(SMALL, dataclasses.replace(LORA, dora=True)), h, 'olora'), 'does not go with'),
    'packed': (lambda h: start_inside(with_quant(MODEL, QuantConfig(storage='int8')), h, 'pissa'), 'quantise the host afterwards'),
    'rank': (lambda h: start_inside(with_lora(SMALL, dataclasses.replace(QUERY_VALUE, rank=9)), h, 'pissa'), 'its rank cannot be 9'),
    'twice': (lambda h: start_inside(MODEL, start_inside(MODEL, h, 'olora'), 'olora'), 'has a low-rank change already'),
    'other': (lambda h: difference(start_inside(MODEL, h, 'olora'), h, LORA), 'do not hold the changes that they began with')}


@pytest.mark.parametrize('name', REFUSED)
def test_refusal(name, host):
  call, says = REFUSED[name]
  with pytest.raises(UserError) as caught: call(host)
  assert says in str(caught.value) and '\n' not in str(caught.value)


def test_what_is_left_is_packed_with_less_error():
  """PiSSA before nf4: the large part of W is in A B, the rest has smaller numbers and so a smaller error in all."""
  host, lora = random_params(dataclasses.replace(SMALL, width=32)), dataclasses.replace(QUERY_VALUE, rank=8)
  config = with_lora(dataclasses.replace(SMALL, width=32), lora)
  quant = QuantConfig(storage='nf4', targets=('/(query|value)/',))
  plain, begun = quantize_host(config, host, quant)[2].error, start_inside(config, host, 'pissa')
  left = quantize_host(config, begun, quant)[2].error
  for path, error in left.items():
    norm = lambda tree, path=path: np.linalg.norm(named(tree)[path])
    assert error * norm(begun) < 0.9 * plain[path] * norm(host)
