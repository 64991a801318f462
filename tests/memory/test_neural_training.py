"""The neural memory under an optimiser: what is frozen stays, what is trained is reached from the default start."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.neural import NeuralConfig, NeuralLocalsConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import GroupConfig, OptimizerConfig
from memjax.layers.tree import named
from memjax.memory.neural_inputs import apart
from memjax.memory.registry import make_memory
from memjax.runtime import optim

GOLDEN = Path(__file__).parent.parent / 'golden'
DECAY = OptimizerConfig(groups={'main': GroupConfig(rate=.1, schedule='constant', weight_decay=.5)}, no_decay='')


@pytest.mark.parametrize('mode', ['token', pytest.param('tnt', marks=pytest.mark.slow)])
def test_a_start_that_is_not_learned_does_not_decay(mode):
  """After AdamW with weight decay it is bit-equal, fast biases included; matrices that are learned have moved."""
  local = dict(locals=NeuralLocalsConfig(chunks=(2,), shard=4)) if mode == 'tnt' else {}
  config = NeuralConfig(heads=2, chunk=4, net=NeuralNetConfig(expansion=1, bias=True, learn_init=False), rule=NeuralRuleConfig(mode=mode),
                        **local)
  memory = make_memory(config, 8)
  boxed = jax.eval_shape(lambda: memory.init(jax.random.key(0), jnp.zeros((1, 1, 8)), memory.init_state(1),
                                             position_BxL=jnp.zeros((1, 1), jnp.int32)))
  shapes, axes = nn.unbox(boxed), nn.get_partition_spec(boxed)
  params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
  optimizer = optim.make_optimizer(DECAY, params, 10, axes=axes)
  zeros = {path: jnp.zeros_like(a) for path, a in optimizer.split(params)[0].items()}
  new = named(optim.apply(optimizer, zeros, optimizer.init(params), params)[0])
  fixed = {path for path in new if '/start_' in path}
  assert len(fixed) == (4 if mode == 'token' else 8)
  for path, a in new.items():
    if path in fixed: np.testing.assert_array_equal(a, 1)
    elif path.endswith(('kernel', 'theta')): assert float(a.max()) < 1, path


@pytest.mark.parametrize('name', ['default', *sorted(path.stem for path in GOLDEN.glob('titans_*.json'))])
def test_the_first_loss_is_that_of_knowing_nothing(name):
  """Shipped configs, over bytes: within 2 % of ln 256."""
  assert json.loads((GOLDEN / f'{name}.json').read_text())['loss'][0] == pytest.approx(np.log(256), rel=.02)


@pytest.mark.parametrize('same', [True, False], ids=['one input', 'two'])
def test_what_is_multiplied_apart_shares_its_gradient(same):
  """Queries take the input, all else what is stored; each product counts once, whether the two are one array or not."""
  x, y, *weights = np.random.default_rng(0).normal(size=(6, 3, 5))
  def loss(x, y, form): return sum(jnp.vdot(w, jnp.sin(a)) for w, a in zip(weights, form(x, x if same else y), strict=True))
  with jax.enable_x64():
    want, got = (jax.grad(loss, (0, 1))(x, y, form) for form in (lambda own, other: (own, other, other, other), apart))
  for a, b in zip(got, want, strict=True): np.testing.assert_allclose(a, b, rtol=1e-12)
  assert np.any(want[0]) and np.any(want[1]) != same
