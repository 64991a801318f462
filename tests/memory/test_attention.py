"""What a ring of keys and values costs a token: no copy of it, and no word between devices."""
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.config.mixers import AttentionConfig
from memjax.memory.attention import AttentionInputs
from memjax.memory.registry import make_memory

TOKENS, SLOTS = 2, 512
MEMORY = make_memory(AttentionConfig(heads=4, rotary=False), 64)


def decode(state, inputs):
  """The state and the reads of some tokens, one after the other."""
  return MEMORY.scan(state, inputs, reset_BxL=jnp.zeros(inputs.q_BxLxHxK.shape[:2], bool))


def shapes(batch, state_of=(), inputs_of=()):
  """(state, inputs) as shapes, laid out over devices where asked."""
  a_BxLxHxK = jax.ShapeDtypeStruct((batch, TOKENS, 4, 16), jnp.float32, **dict(inputs_of))
  state = jax.eval_shape(lambda: MEMORY.init_state(batch, SLOTS))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, **dict(state_of)), state), AttentionInputs(*[a_BxLxHxK] * 3)


@pytest.mark.parametrize('batch', [1, 2])
def test_decoding_does_not_copy_the_ring(batch):
  state, inputs = shapes(batch)
  memory = jax.jit(decode, donate_argnums=0).lower(state, inputs).compile().memory_analysis()
  assert memory.temp_size_in_bytes < state.k_BxGxMxK.size * 4 / 2


def test_rows_write_on_their_own_devices():
  mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
  rows = {'sharding': NamedSharding(mesh, P('data'))}
  state, inputs = shapes(2, rows, rows)
  write = jax.jit(lambda state, inputs: MEMORY.write(state, jax.tree.map(lambda a: a[:, 0], inputs)))
  text = write.lower(state, inputs).compile().as_text()
  assert not re.search(r' (all-|collective-)', text)
