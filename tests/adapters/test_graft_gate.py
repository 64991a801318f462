"""Memories grafted at the gate of a host's attention (MAG): bit-equal at the start, with a gate that learns; parts, files, refusals."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.graft import adapter_of, graft, graft_params, host_of, join_adapter, load_adapter, save_adapter, split_adapter
from memjax.adapters.pretrained import load_pretrained
from memjax.config.errors import ConfigError
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig
from memjax.config.placement import fold, parameter_rules
from memjax.config.schema import GroupConfig, ModelConfig, OptimizerConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.footprint import parts_footprint
from memjax.runtime.optim import assign_groups
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.make_references import tokens
from tests.adapters.test_graft import forward, same

NEURAL = NeuralConfig(heads=2, chunk=4, net=NeuralNetConfig(kind='linear'))
CASE = 'llama_plain'


@pytest.fixture(scope='module')
def host(tmp_path_factory):
  return load_pretrained(write_folder(tmp_path_factory.mktemp('host') / CASE, cases()[CASE]['config'], tensors_of(CASE)))


@pytest.mark.slow
@pytest.mark.parametrize(('memory', 'where'), [(HolographicConfig(heads=4), (0,)), (NEURAL, (0, 1))])
def test_the_logits_are_those_of_the_host(memory, where, host):
  """Bit for bit; and the gain of the gate learns first: one factor is zero, and so are the gradients of all others."""
  config, params = host
  new = graft(config, memory, where=where, wiring=':mag')
  assert new.depth == config.depth and sum('+memory:mag' in layer for layer in new.layers) == len(where) and host_of(new) == config
  token_BxL, whole = jnp.asarray(tokens(CASE)), graft_params(params, new, jax.random.key(0))
  logits = jax.jit(functools.partial(forward, config))(params, token_BxL)
  def loss(whole):
    out = forward(new, whole, token_BxL)
    return jnp.sum(jnp.sin(out)), out
  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(whole)
  np.testing.assert_array_equal(out, logits)
  own = adapter_of(grads, new)
  gains = [np.asarray(a) for path, a in own.items() if path.endswith('fuse/norm_memory/scale')]
  assert gains and all((np.abs(gain) > 0).all() for gain in gains)
  assert not any(np.asarray(a).any() for path, a in own.items() if '/memory/' in path)


@pytest.mark.parametrize('where', [(0,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_parts_and_whole(where, host, tmp_path):
  """The host's arrays come back bit for bit, scanned or not; its dictionaries are left alone; files and groups hold the memory."""
  config, params = host
  before = sorted(named(params))
  new = graft(config, HolographicConfig(heads=4), where=where, wiring=':mag')
  shapes, rng = named(param_shapes(build_decoder(new))[0]), np.random.default_rng(0)
  own = {path: rng.normal(size=shapes[path].shape).astype(np.float32) for path in adapter_of(param_shapes(build_decoder(new))[0], new)}
  whole = join_adapter(params, own, new)
  assert {path: x.shape for path, x in named(whole).items()} == {path: x.shape for path, x in shapes.items()}
  assert sorted(named(params)) == before
  again, adapter = split_adapter(whole, new)
  same(again, params)
  assert set(adapter) == set(own) and all('/memory/' in path or '/fuse/' in path for path in own)
  rules = parameter_rules(new)
  groups = assign_groups(OptimizerConfig(rules=rules, groups={rule.rpartition('=')[2]: GroupConfig() for rule in rules}), list(shapes))
  assert {path for path, group in groups.items() if group == 'memory'} == set(own)
  assert parts_footprint(new, whole)['memory']['parameters'] == sum(a.size for a in own.values())
  save_adapter(str(tmp_path / 'adapter'), new, whole)
  found, loaded = load_adapter(str(tmp_path / 'adapter'), config, params)
  assert found == new
  same(loaded, whole)


def test_where_they_stand():
  config = ModelConfig(width=32, vocabulary=61, mixers={'near': WindowConfig(heads=4, window=4), 'far': HolographicConfig(heads=4)},
                       **fold(('near>far', 'far', 'near')))
  one = graft(config, HolographicConfig(heads=4), where=(0, 2), wiring=':mag', name='gate')
  assert one.layers == ('near+gate:mag>far', 'far', 'near+gate:mag') and host_of(one) == config
  two = graft(one, HolographicConfig(heads=4), where=(1, 2), name='after')
  assert two.layers == ('near+gate:mag>far', 'far', 'after:bare', 'near+gate:mag', 'after:bare') and host_of(two) == config
  own = '(mixers/gate|mixers/fuse)/=memory'
  assert set(parameter_rules(one)) == {f'^prefix/layer_0/{own}', f'^prefix/layer_2/{own}', '.*=base'}
  for where, wiring, says in (((1,), ':mag', "where names a layer 'far' in which no attention stands alone"),
                              ((0,), ':mac', "wiring must be '' or ':mag', not ':mac'")):
    with pytest.raises(ConfigError) as caught: graft(config, HolographicConfig(heads=4), where=where, wiring=wiring)
    assert says in str(caught.value)
