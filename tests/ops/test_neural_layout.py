"""Chunk slots of a call against a loop over tokens."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural_layout import lay_out, rearrange

B, L, C, N = 60, 13, 3, 5


def loop(written, reset, slot):
  """(place of each token, full, fresh, pending after the call) of one row."""
  place, full, fresh, chunk, started = np.full(L, -1), np.zeros(40, bool), np.zeros(40, bool), 0, False
  for t in np.flatnonzero(written):
    if reset[t]:
      chunk += 0 if slot == 0 else 1
      if not started: chunk = 0
      slot = 0
      fresh[chunk] = True
    place[t], started, slot = chunk * C + slot, True, slot + 1
    if slot == C: full[chunk], chunk, slot = True, chunk + 1, 0
  return place, full, fresh, slot


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  written, reset, slot = rng.random((B, L)) < .7, rng.random((B, L)) < .25, rng.integers(0, C, B).astype(np.int32)
  written[0] = False
  return written, reset, slot, jax.jit(lambda *a: lay_out(*a, chunk=C, count=N))(written, reset, slot)


def test_layout_equals_the_loop(case):
  written, reset, slot, got = case
  assert not bool(got.fits)                                # some of these rows have too many documents
  for b in range(B):
    place, full, fresh, after = loop(written[b], reset[b], slot[b])
    here = (place >= 0) & (place < N * C)
    np.testing.assert_array_equal(np.asarray(got.place[b, C:])[here], place[here])
    assert (np.asarray(got.place[b, C:])[~here] == N * C).all()
    np.testing.assert_array_equal(got.fresh[b], fresh[:N])
    begins = bool(written[b].any() and reset[b][np.flatnonzero(written[b])[0]])
    assert bool(got.begins[b]) == begins
    if place.max() < N * C:
      np.testing.assert_array_equal(got.full[b], full[:N])
      assert got.slot[b] == after and got.last[b] == max(place.max(), 0) // C


def test_rows_fit_exactly(case):
  """The call falls back when any one token has no slot, the first after the last chunk included."""
  written, reset, slot, _ = case
  fits = jax.jit(lambda *a: lay_out(*a, chunk=C, count=N).fits)
  rooms = set()
  for b in range(B):
    most = loop(written[b], reset[b], slot[b])[0].max()
    rooms.add(int(most) - N * C)
    assert bool(fits(written[b:b + 1], reset[b:b + 1], slot[b:b + 1])) == (most < N * C)
  assert 0 in rooms and -1 in rooms


def test_rearranging_there_and_back(case):
  """Tokens with a slot come back as they were, pending ones take the first slots, and the gradient is the inverse."""
  got = case[-1]
  x = jax.random.normal(jax.random.key(0), (B, C + L, 2))
  there, pull = jax.vjp(lambda x: rearrange(x, got.source, got.place), x)
  back = np.asarray(rearrange(there, got.place, got.source))
  has = np.asarray(got.place) < N * C
  np.testing.assert_array_equal(back, np.where(has[..., None], x, 0))
  np.testing.assert_array_equal(pull(jnp.ones_like(there))[0], np.broadcast_to(has[..., None], x.shape))
