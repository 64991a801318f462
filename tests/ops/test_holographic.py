"""Auxiliary losses and cleanup: properties 47 to 49, sections 3.5, 6 and 14 of the specification."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import holographic
from memjax.ops.binding import bind, unbind
from memjax.ops.keys import random_keys
from memjax.ops.recurrence import slot_mix, slot_read, slot_write
from tests.ops.inputs import quick
from tests.ops.oracle import relative


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_replay_stays_in_its_document_and_window():
  mask = np.random.default_rng(0).random((4, 40)) < 0.7
  reset = np.random.default_rng(1).random((4, 40)) < 0.1
  draw = quick(lambda key: holographic.sample_replay(key, (4, 40), window=5, mask_BxL=mask, reset_BxL=reset))
  segment, rank, delays = np.cumsum(reset & mask, 1), np.cumsum(mask, 1), []
  for seed in range(20):
    index, valid = (np.asarray(x) for x in draw(jax.random.key(seed)))
    assert np.array_equal(valid, mask)
    for b, t in zip(*np.nonzero(valid), strict=True):
      i = index[b, t]
      assert i <= t and mask[b, i] and segment[b, i] == segment[b, t] and rank[b, t] - rank[b, i] < 5
      if t > 30 and segment[b, t] == segment[b, t - 12]: delays.append(rank[b, t] - rank[b, i])
  assert np.all(np.bincount(delays, minlength=5) / len(delays) > 0.1)           # uniform: .2 each


def test_replay_of_a_perfect_memory_is_zero():
  """S >= L, orthonormal addresses, keep 1: what was written comes back, whatever its scale."""
  length = 8
  key = random_keys(0, 'key', np.arange(length), 16, kind='phasor').reshape(1, length, 1, 16)
  value, address = normal(1, length, 1, 16), np.eye(length, dtype=np.float32).reshape(1, length, 1, length)
  def loss(value):
    index, valid = holographic.sample_replay(jax.random.key(0), (1, length), window=256)
    gather = lambda x: holographic.gather_tokens(x, index)
    pick = gather(jnp.asarray(address))[:, :, None]
    _, y = slot_mix(jnp.zeros((1, 1, length, 16)), bind('phasor', key, value), jnp.asarray(address), pick)
    read = unbind('phasor', gather(key), y[:, :, 0])
    return holographic.replay_loss(3 * read, gather(value), valid[..., None].astype(jnp.float32))
  assert quick(loss)(value) <= 1e-5


def test_aux_is_not_degenerate():
  """Raising keep lowers the replay loss and raises the immediate one (table of section 6)."""
  pairs, repeats = 64, 20
  key = random_keys(0, 'key', np.arange(repeats * pairs).reshape(repeats, pairs), 32, kind='phasor')[:, :, None]
  value, z = normal(repeats, pairs, 1, 32), normal(repeats, pairs, 1, 8, seed=1)
  address = z / np.linalg.norm(z, axis=-1, keepdims=True)
  def losses(keep):
    log_keep = jnp.broadcast_to(jnp.log(keep), (repeats, pairs, 1, 1))
    def read(index):
      gather = lambda x: holographic.gather_tokens(jnp.asarray(x), index)
      _, y = slot_mix(jnp.zeros((repeats, 1, 8, 32)), bind('phasor', key, jnp.asarray(value)), jnp.asarray(address),
                      gather(address)[:, :, None], log_keep=log_keep)
      return holographic.replay_loss(unbind('phasor', gather(key), y[:, :, 0]), gather(value), jnp.ones((repeats, pairs, 1)))
    now = jnp.broadcast_to(jnp.arange(pairs)[None], (repeats, pairs))
    later, _ = holographic.sample_replay(jax.random.key(1), (repeats, pairs), window=256)
    return read(now), read(later)
  losses = jax.jit(losses)
  immediate, replay = np.array([losses(keep) for keep in (0.3, 0.5, 0.9, 1.0)]).T
  assert np.all(np.diff(immediate) > 0) and np.all(np.diff(replay) < 0)
  assert np.abs(immediate - [0.006, 0.020, 0.177, 0.496]).max() < 0.03 and np.abs(replay - [0.851, 0.808, 0.614, 0.5]).max() < 0.04


def test_replay_gradients():
  """Into the read only; a cosine does not change with the scale of the read; zero weights and a zero read are finite."""
  read, value, weight = normal(1, 4, 2, 3), normal(1, 4, 2, 3, seed=1), np.abs(normal(1, 4, 2, seed=2))
  both = quick(jax.value_and_grad(holographic.replay_loss, (0, 1, 2)))
  loss, (to_read, to_value, to_weight) = both(read, value, weight)
  cosine = np.sum(read * value, -1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(value, axis=-1)
  assert relative(loss, np.sum(weight * (1 - cosine)) / weight.sum()) <= 1e-5
  assert np.any(np.asarray(to_read) != 0) and not np.any(to_value) and not np.any(to_weight)
  assert np.abs(np.sum(np.asarray(to_read) * read, -1)).max() <= 1e-6
  assert both(read, value, 0 * weight)[0] == 0 and relative(both(0 * read, value, weight)[0], 1) <= 1e-6
  assert all(np.all(np.isfinite(g)) for g in both(0 * read, value, weight)[1])


@pytest.fixture(scope='module')
def contrast():
  """contrastive_loss with candidates 0 to 5, and its gradients, from (read, value, target, token)."""
  candidate, valid = np.arange(6)[None], np.arange(6)[None] < 5
  def loss(read, value, target, token):
    allowed = holographic.distinct(target, candidate, valid, token)
    return holographic.contrastive_loss(read, value, target_BxL=target, candidate_BxJ=candidate, allowed_BxLxJ=allowed,
                                        weight_BxL=jnp.ones(target.shape))
  return quick(jax.value_and_grad(loss, (0, 1)))


def test_contrastive(contrast):
  value, target = normal(1, 8, 4), np.array([[0, 0, 1, 1, 2, 3, 4, 7]])
  different = np.arange(8)[None]
  loss, (to_read, to_value) = contrast(normal(1, 8, 4, seed=1), value, target, different)
  assert loss > 0 and np.any(np.asarray(to_read) != 0) and not np.any(to_value)
  perfect = contrast(20 * np.take(value, target[0], 1), value, target, different)[0]
  assert 0 <= perfect < loss
  # zero read: log of the number of candidates, the target included: 5 valid ones, and one more where the target is not among them
  assert relative(contrast(0 * value, value, target, different)[0], np.mean(np.log([5] * 7 + [6]))) <= 1e-6
  same = np.array([[0, 0, 2, 3, 4, 5, 6, 7]])                    # token 1 is the equal of 0, and no rival
  assert relative(contrast(0 * value, value, target, same)[0], np.mean(np.log([4] * 4 + [5] * 3 + [6]))) <= 1e-6


def test_contrastive_by_position(contrast):
  value, target = normal(1, 8, 4), np.array([[0, 0, 1, 1, 2, 3, 4, 7]])
  read = normal(1, 8, 4, seed=1)
  assert contrast(read, value, target, None)[0] == contrast(read, value, target, np.arange(8)[None])[0]


def test_candidates():
  mask = np.arange(100)[None] < np.array([[100], [10]])
  index, valid = (np.asarray(x) for x in quick(lambda key: holographic.sample_candidates(key, mask, count=64))(jax.random.key(0)))
  assert index.shape == (2, 63) and valid[0].all() and valid[1].sum() == 10
  assert len(set(index[0])) == 63 and set(index[1][valid[1]]) == set(range(10))


def test_balance():
  balance = quick(holographic.balance_loss)
  assert abs(balance(np.tile(np.eye(4, dtype=np.float32), (1, 3, 1))[:, :, None])) <= 1e-5
  assert relative(balance(np.ones((2, 5, 3, 4), np.float32)), 3) <= 1e-5
  mask = np.arange(8)[None] < 4
  address = np.concatenate([np.eye(4, dtype=np.float32), np.full((4, 4), np.nan, np.float32)])[None, :, None]
  assert abs(balance(address, mask)) <= 1e-5
  value, grad = quick(jax.value_and_grad(holographic.balance_loss))(np.zeros((1, 3, 1, 4), np.float32))
  assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_cleanup_is_nearest_item_at_large_beta():
  codebook = normal(20, 16)
  noisy = codebook[[3, 7]] + 0.1 * normal(2, 16, seed=1)
  assert relative(quick(functools.partial(holographic.cleanup, beta=100.0))(noisy, codebook), codebook[[3, 7]]) <= 1e-4
  assert relative(quick(functools.partial(holographic.cleanup, beta=0.0))(noisy, codebook), np.tile(codebook.mean(0), (2, 1))) <= 1e-5


def test_cleanup_erase_returns_the_newest_value():
  """Each of 32 keys written twice (table of section 14): erasing through the codebook recalls the newest, plain adding half."""
  pairs, width, slots, items = 32, 512, 8, 100
  key = random_keys(0, 'key', np.arange(pairs), width, kind='phasor')[:, None, None]
  codebook = np.asarray(random_keys(0, 'item', np.arange(items), width))
  z = normal(pairs, 1, 1, slots)
  address = z / np.linalg.norm(z, axis=-1, keepdims=True)
  item = np.random.default_rng(2).permutation(items)[:2 * pairs].reshape(2, pairs)
  def recalled(is_erasing):
    def write(state, token):
      key, address, value = token
      if is_erasing: state = holographic.cleanup_erase('phasor', state, key, address, codebook_MxK=codebook)
      return slot_write(state, bind('phasor', key, value), address), None
    state = jnp.zeros((1, 1, slots, width))
    for round_ in item: state, _ = jax.lax.scan(write, state, (key, jnp.asarray(address), jnp.asarray(codebook)[round_][:, None, None]))
    read = unbind('phasor', key[:, 0], slot_read(jnp.tile(state, (pairs, 1, 1, 1)), jnp.asarray(address))[:, 0])
    return jnp.argmax(jnp.einsum('nhk,mk->nhm', read, codebook), -1)[:, 0]
  erased, added = quick(lambda: (recalled(True), recalled(False)))()
  assert np.mean(np.asarray(erased) == item[1]) > 0.95
  assert 0.2 < np.mean(np.asarray(added) == item[1]) < 0.8
