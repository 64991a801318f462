"""The surprise gate in use: specification 16.4, property 45."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.neural import NeuralConfig, NeuralGatesConfig, NeuralNetConfig, NeuralProjConfig
from memjax.memory.registry import make_memory
from memjax.ops.neural_gated import Surprise, running
from tests.laws.test_laws import parameters

D, L = 8, 48
BASE = NeuralConfig(heads=2, chunk=8, net=NeuralNetConfig(kind='linear'), gates=NeuralGatesConfig(surprise='z', threshold=.5),
                    proj=NeuralProjConfig(conv_width=0))
POSITION = np.arange(L)[None]


@pytest.mark.slow
def test_new_words_are_written_and_repeated_ones_are_not():
  """A text that repeats four vectors, then four others, in one row and beside another row, whole and cut; every token and none of them."""
  rng = np.random.default_rng(0)
  known, other = rng.normal(size=(2, 4, D)).astype(np.float32)
  x = np.concatenate([np.tile(known, (8, 1)), np.tile(3 * other, (4, 1))])[None]
  module = make_memory(BASE, D)
  params = parameters(module, x[:, :1], module.init_state(1), POSITION[:, :1])
  def call(threshold, x, kind='z'):
    gates = dataclasses.replace(BASE.gates, surprise=kind, threshold=threshold)
    made = make_memory(dataclasses.replace(BASE, gates=gates), D)
    run = lambda x: made.apply(params, x, made.init_state(len(x)), position_BxL=jnp.broadcast_to(POSITION[:, :x.shape[1]], x.shape[:2]),
                               method='mix', collect=True)
    _, state, aux = jax.jit(run)(x)
    return jax.tree.map(np.asarray, (state, aux, aux['statistics']))
  _, aux, told = call(.5, x)
  norm, wrote = told['surprise_BxLxH'][0], told['kept_BxLxH'][0] > 0
  before = np.asarray(running(Surprise('z', 0, .99), jnp.asarray(norm.T[None]), jnp.ones((1, L), bool), jnp.zeros((1, 2, 3)))[0])[0]
  mean = before[..., 1] / np.maximum(before[..., 0], 1e-12)
  z = ((norm.T - mean) / np.sqrt(before[..., 2] / np.maximum(before[..., 0], 1e-12) - mean ** 2 + 1e-6))[:, 1:].T
  assert (z[31:35].max(0) > z[8:31].max(0)).all()                         # what is new surprises more than what goes on
  np.testing.assert_array_equal(wrote[1:], z >= .5)
  assert wrote[0].all() and wrote[32:36].mean() > wrote[8:32].mean()
  share = lambda aux: float(aux['written'])
  every, none = call(-1e9, x), call(1e9, x)
  assert share(none[1]) < share(aux) < share(every[1]) and abs(share(every[1]) - 1) < 1e-6
  largest = lambda found: max(float(np.abs(a).max()) for a in jax.tree.leaves(found[0].fast))
  assert largest(none) < largest(every)
  beside = call(.5, np.concatenate([x, 5 * x[:, ::-1]]))[2]               # N and z are those of the row alone, of any length
  np.testing.assert_allclose(beside['surprise_BxLxH'][0], norm, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(beside['kept_BxLxH'][0] > 0, wrote)
  np.testing.assert_array_equal(call(.5, x[:, :20])[2]['kept_BxLxH'][0] > 0, wrote[:20])
