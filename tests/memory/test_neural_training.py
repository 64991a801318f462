"""The neural memory under an optimiser: what is frozen stays, what is trained is reached from the default start."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.neural import NeuralConfig, NeuralLocalsConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import GroupConfig, ModelConfig, OptimizerConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime import optim

DECAY = OptimizerConfig(groups={'main': GroupConfig(rate=.1, schedule='constant', weight_decay=.5)}, no_decay='')


@pytest.mark.parametrize('mode', ['token', 'tnt'])
def test_a_start_that_is_not_learned_does_not_decay(mode):
  """After AdamW with weight decay it is bit-equal, fast biases included; matrices that are learned have moved."""
  local = dict(locals=NeuralLocalsConfig(chunks=(2,), shard=4)) if mode == 'tnt' else {}
  config = NeuralConfig(heads=2, chunk=4, net=NeuralNetConfig(expansion=1, bias=True, learn_init=False), rule=NeuralRuleConfig(mode=mode),
                        **local)
  shapes, axes = param_shapes(build_decoder(ModelConfig(width=8, hidden=8, vocabulary=11, mixers={'mem': config}, pattern=('mem',))))
  params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
  optimizer = optim.make_optimizer(DECAY, params, 10, axes=axes)
  zeros = {path: jnp.zeros_like(a) for path, a in optimizer.split(params)[0].items()}
  new = named(optim.apply(optimizer, zeros, optimizer.init(params), params)[0])
  fixed = {path for path in new if '/start_' in path}
  assert len(fixed) == (4 if mode == 'token' else 8)
  for path, a in new.items():
    if path in fixed: np.testing.assert_array_equal(a, 1)
    elif path.endswith(('kernel', 'theta')): assert float(a.max()) < 1, path
