"""Models whose banks are stored as integers."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankShapeConfig
from memjax.config.errors import ConfigError, UserError
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.models.quantized import SCHEMES, parse_quantization, quantize_banks
from tests.memory.bank_oracle import routed
from tests.models.test_banks import draw, logits_of, model_of, tokens


def test_a_trained_model_may_store_its_banks_as_integers():
  """Every scheme, of entries and of keys and values; shared, factorised and repeated tables; the other parameters are the same arrays."""
  width = 32
  shape = BankShapeConfig(entries=40, chapters=5)
  mixers = {'own': routed(heads=1, shape=dataclasses.replace(shape, low_rank='factorized', rank=32)),
            'one': routed(heads=1, shape=dataclasses.replace(shape, share='x'))}
  model = model_of(['one'], mixers, pattern=('own',), repeats=2, width=width)
  params, token = draw(model, size=width ** -.5), tokens()
  assert set(SCHEMES) == {'int8', 'int4', 'nf4'}
  names = [*SCHEMES, 'int8/kv']
  stored = {name: quantize_banks(model.config, params, parse_quantization(name)) for name in names}
  plain, out = jax.jit(lambda params, all_params: (
      logits_of(model, params, token), {name: logits_of(build_decoder(stored[name][0]), p, token) for name, p in all_params.items()}))(
      params, {name: p for name, (_, p) in stored.items()})
  rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
  for name, logits in out.items():
    assert 1e-4 < rms(logits - plain) / rms(plain - plain.mean()) < (.02 if name.startswith('int8') else .3), name
  small = named(stored['int4'][1])
  assert [path for path in small if path.endswith('codes')] == [
      'bank_x/entries_codes', 'repeats/layer_0/mixers/own/bank/entries_codes', 'repeats/layer_0/mixers/own/bank/mix_codes']
  assert small['bank_x/entries_codes'].shape == (40, 16) and small['repeats/layer_0/mixers/own/bank/entries_scale'].shape == (2, 40, 1)
  assert all(named(params)[path] is leaf for path, leaf in small.items() if path in named(params)) and stored['int8/kv'][1] is params
  shapes = jax.tree.map(lambda a: (a.shape, a.dtype), param_shapes(build_decoder(stored['int4'][0]))[0])
  assert jax.tree.map(lambda a: (a.shape, a.dtype), stored['int4'][1]) == shapes                      # what init makes
  with pytest.raises(TypeError, match='grad requires real- or complex-valued inputs'):
    jax.eval_shape(jax.grad(lambda p: jnp.sum(logits_of(build_decoder(stored['int8'][0]), p, token))), stored['int8'][1])


def test_what_cannot_be_stored_is_refused():
  for name in ('int3', 'int8/kvs', ''):
    with pytest.raises(UserError, match=rf'^--quantize={name} is not one of int8, int4, nf4'): parse_quantization(name)
  none, small = model_of(['att'], {}).config, model_of(['mem'], {'mem': routed()}).config
  with pytest.raises(UserError, match=r'^there is nothing to quantise'): quantize_banks(none, {}, parse_quantization('int8'))
  with pytest.raises(ConfigError, match=r'^mixers\.mem\.quant\.group=32 does not divide the 8 numbers of a row'):
    quantize_banks(small, {}, parse_quantization('int4'))
