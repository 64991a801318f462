"""A neural memory by fused kernels is the memory by XLA, outputs, state and gradients; what kernels cannot compute is refused."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.memory.registry import make_memory
from tests.laws.test_laws import parameters

B, L, D, C = 2, 40, 32, 16
BASE = NeuralConfig(heads=2, chunk=C, net=NeuralNetConfig(expansion=2), exec=NeuralExecConfig(spare=1))
X = np.random.default_rng(0).normal(size=(B, L, D))
POSITION = np.stack([np.arange(L), np.concatenate([np.arange(2 * C - 3), np.arange(L - 2 * C + 3)])])   # the second row has two documents


def with_backend(backend, **rule):
  """The memory of BASE with this backend."""
  return dataclasses.replace(BASE, rule=NeuralRuleConfig(**rule), exec=dataclasses.replace(BASE.exec, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize(('changes', 'length'), [({}, L), ({'net': NeuralNetConfig(expansion=2, gain='fast')}, L),
                                                 ({'write': dataclasses.replace(BASE.write, detach=1)}, L), ({}, 2 * C)],
                         ids=['slow-gain', 'fast-gain', 'detach', 'whole-chunks'])
def test_kernels_equal_xla(changes, length):
  found, x, position = {}, X[:, :length], POSITION[:, :length]
  with jax.enable_x64():
    for backend in ('xla', 'pallas'):
      module = make_memory(dataclasses.replace(with_backend(backend), **changes), D, dtype=jnp.float64)
      params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), parameters(module, x[:, :1], module.init_state(B), position[:, :1]))
      def loss(params, x, module=module):
        y, state, _ = module.apply(params, x, module.init_state(B), position_BxL=position, reset_BxL=position == 0, method='mix')
        return jnp.sum(jnp.sin(3 * y)) + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(state.fast)), (y, state)
      found[backend] = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(x))
  for a, b in zip(*(jax.tree.leaves(found[backend]) for backend in ('xla', 'pallas')), strict=True):
    np.testing.assert_allclose(np.asarray(b, np.float64), a, rtol=0, atol=1e-10 * max(np.abs(a).max(), 1e-6))


@pytest.mark.parametrize(('rule', 'chunk', 'why'), [({'clip': 1.0}, C, 'computes two layers'), ({}, 12, 'computes two layers')])
def test_what_kernels_cannot_compute_is_refused(rule, chunk, why):
  module = make_memory(dataclasses.replace(with_backend('pallas', **rule), chunk=chunk), D)
  call = lambda x: module.init(jax.random.key(0), x, module.init_state(B), position_BxL=POSITION)
  with pytest.raises(UserError, match=f"exec.backend='pallas' {why}"): jax.eval_shape(call, jax.ShapeDtypeStruct(X.shape, jnp.float32))
