"""MAC with a deep memory in float64: rounding grows ten-thousandfold in as many tokens as the laws read, more than float32 has."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.mixers import WindowConfig
from memjax.config.neural import NeuralNetConfig
from tests.laws.cases import neural
from tests.laws.test_laws import B, D, L, build, call, close, parameters, slow
from tests.laws.wired import Wiring


@pytest.mark.slow
def test_segments_equal_steps():
  """Outputs and state by segments are those token by token, and no token sees a later one."""
  with jax.enable_x64():
    stage = build(Wiring('mac', WindowConfig(heads=2, window=4, persistent=1), neural(chunk=2, net=NeuralNetConfig(expansion=1))),
                  dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (B, L, D), jnp.float64)
    position, state = jnp.broadcast_to(jnp.arange(L)[None], (B, L)).at[1, 7:].set(jnp.arange(L - 7)), stage.init_state(B, L)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), parameters(stage, x, state, position))
    run = lambda form: jax.jit(lambda x: call(form, params, x, state, position))(x)
    close(run(stage), run(slow(stage)), 1e-10)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(call(stage, params, x, state, position)[0][0, 5]))))(x)
  size = np.abs(np.asarray(grad)).max(-1)
  assert not size[0, 6:].any() and not size[1].any() and (size[0, :6] > 0).all()
