"""Attention by entry is that of the read: with one-hot values, a read says how much of it each entry was."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import entry_mass as module
from memjax.ops.entry_mass import entry_mass
from memjax.ops.quantize import quantize
from memjax.ops.routed_attention import routed_attend
from memjax.ops.routed_legacy import attend_scaled_entries

Z, J, P, T, G, H, K, SHARED = 7, 2, 5, 3, 1, 2, 4, 1


@pytest.fixture(scope='module')
def given():
  draw = np.random.default_rng(0)
  ids = np.stack([draw.permutation(np.arange(SHARED, P))[:J] for _ in range(Z)]).astype(np.int32)
  ids[-1] = -1
  q, k = (draw.standard_normal(shape).astype(np.float32) for shape in ((Z, H, K), (P, T, G, K)))
  return q, k, ids, np.log(draw.dirichlet(np.ones(J), Z)).astype(np.float32)


@pytest.mark.parametrize(('mode', 'shared', 'scale'), [
    ('mixture', 0, 1.0), ('mixture', SHARED, 2.5), ('joint', SHARED, 2.5), ('joint_bias', SHARED, 2.5), ('joint_bias', 0, 1.0),
    ('legacy_scale', SHARED, 2.5)])
def test_mass_is_the_read_of_one_hot_values(given, monkeypatch, mode, shared, scale):
  q, k, ids, log_weight = given
  v = np.eye(P * T, dtype=np.float32).reshape(P, T, G, P * T)
  if mode == 'legacy_scale':
    first = np.concatenate([np.zeros((Z, 1), np.int32), ids], 1)
    u = np.concatenate([np.ones((Z, 1)), scale * np.exp(log_weight)], 1)
    u /= u.sum(1, keepdims=True)
    y = attend_scaled_entries(q, k, v, ids, log_weight_ZxJ=log_weight, shared=shared, scale=scale, impl='gather')
    by_chapter = np.zeros((Z, P), np.float32)
    np.put_along_axis(by_chapter, np.maximum(first, 0), u.astype(np.float32), 1)
    y = np.asarray(y) / np.maximum(np.repeat(by_chapter, T, 1), 1e-9)[:, None]          # its values are scaled too
    y = np.where(np.repeat(by_chapter, T, 1)[:, None] > 0, y, 0)
  else:
    kv = (k[:shared].reshape(-1, G, K), v[:shared].reshape(-1, G, P * T)) if shared else None
    y = np.array(routed_attend(q, k, v, ids, log_weight_ZxJ=log_weight, mode=mode, shared_kv=kv, routed_scale=scale, impl='gather'))
    if mode == 'mixture': y /= shared + scale
  expected = y[:-1].mean((0, 1)).reshape(P, T)
  monkeypatch.setattr(module, 'LIMIT', 2 * (J + shared) * T * G * K)                   # two tokens at a time
  call = jax.jit(lambda q, k: entry_mass(q, k, ids, log_weight_ZxJ=log_weight, mode=mode, shared=shared, routed_scale=scale))
  mass = call(q, k)
  np.testing.assert_allclose(mass, expected, atol=1e-6)
  assert mass.sum() == pytest.approx(1, abs=1e-5) and mass.dtype == jnp.float32


def test_padding_and_integers(given):
  given = tuple(map(jnp.asarray, given))
  q, k, ids, log_weight = given
  mass = lambda k, ids: entry_mass(q, k, ids, log_weight_ZxJ=log_weight, mode='mixture')
  assert float(jnp.abs(mass(k, np.full_like(ids, -1))).max()) == 0
  np.testing.assert_allclose(mass(quantize(k, bits=8, group=0), ids), mass(k, ids), atol=0.01)
