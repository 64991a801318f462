"""Capacity against theory: properties 56 to 60 of the specification, and `test_slots_differ`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import capacity
from memjax.ops.holographic import effective_slots, plate_bound, recall_capacity, recall_probability
from memjax.ops.keys import permutation, permute, random_keys
from memjax.ops.recurrence import slot_copies, slot_mix
from memjax.ops.routing import address_map
from tests.ops.inputs import quick
from tests.ops.oracle import relative

THEORY = {8: 1.0, 12: 0.999, 16: 0.990, 24: 0.907, 32: 0.767, 48: 0.511, 64: 0.349, 96: 0.189, 128: 0.119}
THEORY_SLOTS = {32: 1.0, 64: 1.0, 96: 0.999, 128: 0.988, 192: 0.903, 256: 0.764, 384: 0.511, 512: 0.350}


def test_theory():
  for floats, table in ((512, THEORY), (4096, THEORY_SLOTS)):
    for pairs, want in table.items(): assert abs(recall_probability(pairs, floats=floats, items=1000) - want) <= 0.002
  assert [round(recall_capacity(p, floats=512, items=1000)) for p in (0.99, 0.9, 0.5)] == [16, 24, 49]
  assert round(plate_bound(512, items=1000, error=0.01), 1) == 4.5 and round(plate_bound(512, items=1000, error=0.1), 1) == 8.2


@pytest.mark.parametrize('memory', capacity.KEYED, ids=[m.label for m in capacity.KEYED])
def test_capacity_of_every_binding(memory):
  """Within three points of theory at six loads."""
  loads = (16, 24, 32, 48, 64, 96)
  for pairs, got in zip(loads, capacity.measure(memory, loads, trials=200), strict=True): assert abs(got - THEORY[pairs]) <= 0.03


@pytest.mark.slow
def test_slots_multiply_capacity():
  """Signed and top-1 addresses hold eight times the pairs, the same write to all slots holds no more than one slot."""
  half = functools.partial(capacity.pairs_at_half, trials=100)
  signed, top, same = (next(m for m in capacity.SLOTTED if m.address == kind) for kind in ('content', 'top1', 'same'))
  one = half(capacity.KEYED[0], 25, width=256)
  assert abs(half(same, one, width=256) / one - 1) <= 0.1
  for memory in (signed, top): assert abs(half(memory, 4 * one, width=128) / (4 * one) - 1) <= 0.1       # half the width


def test_effective_slots_predict_capacity():
  softmax = next(m for m in capacity.SLOTTED if m.address == 'softmax')
  floats = capacity.state_floats(softmax, 256)
  assert abs(floats / 256 - 2.72) <= 0.1
  expected = recall_capacity(0.5, floats=floats, items=1000)
  assert abs(capacity.pairs_at_half(softmax, expected, trials=100, width=256) / expected - 1) <= 0.1


def test_effective_slots():
  normal = jax.random.normal(jax.random.key(0), (1, 4000, 1, 8))
  slots = jax.jit(effective_slots)
  assert abs(slots(address_map('content', normal))[0] - 8) < 0.1
  assert relative(slots(np.ones((1, 10, 2, 8), np.float32)), [1, 1]) <= 1e-5
  assert relative(slots(np.tile(np.eye(8, dtype=np.float32), (1, 5, 1))[:, :, None]), [8]) <= 1e-5
  assert abs(slots(address_map('sigmoid', normal))[0] - 1.33) < 0.1
  mask = np.arange(10)[None] < 3
  address = np.ones((1, 10, 1, 8), np.float32)
  address[:, 3:] = np.nan
  assert relative(slots(address, mask), [1]) <= 1e-5
  assert relative(slots(np.zeros((1, 3, 1, 8), np.float32)) + 1, [1]) <= 1e-5


def _cosine(read, value):
  cosine = np.sum(read * value, -1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(value, axis=-1)
  return cosine.mean()


@pytest.fixture(scope='module')
def copies():
  """A function of the number of pairs: mean cosine of what eight permuted copies of 512 channels give back, bipolar."""
  index = np.stack([permutation(0, 512, 'bipolar', stream=f'copy/{s}') for s in range(8)])
  def read(load):
    key = random_keys(0, 'key', jnp.arange(20 * 50).reshape(20, 50), 512)
    value = random_keys(0, 'value', jnp.arange(20 * 50).reshape(20, 50), 512)
    own = permute(key, index)
    written = jnp.broadcast_to(jnp.arange(50)[None] < load, (20, 50))
    state, _ = slot_copies(jnp.zeros((20, 1, 8, 512)), (own * value[:, :, None])[:, :, None], mask_BxL=written)
    return jnp.mean(own * state, 2), value
  read = jax.jit(read)
  def mean_cosine(load):
    back, value = read(load)
    return _cosine(np.asarray(back)[:, :load], np.asarray(value)[:, :load])
  return mean_cosine


def test_permuted_copies_cosines(copies):
  want = {1: 1.0, 2: 0.942, 5: 0.814, 10: 0.684, 20: 0.540, 50: 0.371}
  for load, cosine in want.items(): assert abs(copies(load) - cosine) <= 0.02


def test_slots_differ(copies):
  """The same item and key in every slot gain nothing over one slot; copies with their own keys do."""
  def read(slots):
    key, value = (random_keys(0, name, jnp.arange(200).reshape(20, 10), 512)[:, :, None] for name in ('key', 'value'))
    address = jnp.ones((20, 10, 1, slots))
    state, _ = slot_mix(jnp.zeros((20, 1, slots, 512)), key * value, address, address[:, :, None])
    return key[:, :, 0] * jnp.mean(state, 2), value[:, :, 0]
  one, eight = (_cosine(*map(np.asarray, quick(read, static_argnums=0)(slots))) for slots in (1, 8))
  assert abs(one - eight) <= 1e-6 and abs(one - 0.317) <= 0.03
  assert copies(10) > 2 * one
