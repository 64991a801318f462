"""Neural memories of the laws in float64, compiled once for one shape, for tests of what must hold to rounding."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.neural import NeuralConfig
from memjax.memory.registry import make_memory
from tests.laws.cases import FULL, MORE
from tests.laws.test_laws import parameters

B, L, D = 2, 12, 8
NEURAL = {name: config for name, config in {**FULL, **MORE}.items() if isinstance(config, NeuralConfig)}


def with_room(config: NeuralConfig) -> NeuralConfig:
  """The same with a chunk for each token of a call, so that calls are never read by steps."""
  return dataclasses.replace(config, exec=dataclasses.replace(config.exec, spare=L))


class Exact:
  """A memory, its parameters, a text, and jitted calls of [B, L, D]."""

  def __init__(self, config: NeuralConfig):
    self.memory = make_memory(with_room(config), D, dtype=jnp.float64)
    self.x = np.random.default_rng(1).normal(size=(B, L, D))
    self.position = np.broadcast_to(np.arange(L)[None], (B, L))
    self.empty = self.memory.init_state(B)
    params = parameters(self.memory, self.x[:, :1], self.empty, self.position[:, :1])
    self.params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    self.run, self.flow_run, self.grad = jax.jit(self.call), jax.jit(self.call), jax.jit(jax.grad(self.loss, argnums=(0, 1)))

  def call(self, params, x, state, position, **flow):
    """(y, state)."""
    return self.memory.apply(params, x, state, position_BxL=position, **flow)[:2]

  def loss(self, params, x, position, mask, ends=1.0):
    """Sines of outputs, and of the final state times `ends`, from the empty one."""
    y, state = self.call(params, x, self.empty, position, mask_BxL=mask)
    return jnp.sum(jnp.sin(3 * y)) + ends * sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(state) if a.dtype == y.dtype)


@functools.cache
def exact(name: str) -> Exact:
  """The case, made once; call it where float64 is on."""
  return Exact(NEURAL[name])


def far(actual, expected) -> float:
  """The largest difference of two trees relative to the largest entry, 1 at least, of each leaf; infinite where not finite."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()): return np.inf
    if b.size: worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1.0))
  return worst
