"""Address maps, rotation and the forms of keep: sections 3.1 and 3.2, property 46 of the specification."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import routing
from memjax.ops.routing import address_map, log_keep_map, pick_map, rotate_slots, spaced_decay, tied_log_keep
from tests.ops.inputs import quick
from tests.ops.oracle import relative

Z = np.random.default_rng(0).normal(size=(3, 5, 2, 6)).astype(np.float32)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def softmax(z):
  return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def test_maps():
  maps = lambda z: [(address_map(kind, z), pick_map(kind, z)) for kind in routing.ADDRESS_KINDS]
  got = dict(zip(routing.ADDRESS_KINDS, quick(maps)(Z), strict=True))
  unit = Z / np.sqrt(np.sum(Z * Z, -1, keepdims=True) + 1e-6)
  for kind in ('content', 'signed'): assert relative(got[kind][0], unit) <= 1e-6 and relative(got[kind][1], unit) <= 1e-6
  assert relative(got['softmax'][0], softmax(Z)) <= 1e-6
  for kind in ('sigmoid', 'scored'):
    assert relative(got[kind][0], sigmoid(Z)) <= 1e-6 and relative(got[kind][1], softmax(Z)) <= 1e-6
  assert relative(got['top1'][0], np.eye(6)[Z.argmax(-1)]) <= 1e-6
  score = np.where(np.argsort(np.argsort(-Z, -1), -1) < 2, sigmoid(Z), 0)
  assert relative(got['topk'][0], score / score.sum(-1, keepdims=True)) <= 1e-6
  assert relative(quick(lambda z: address_map('softmax', z, temperature=0.25))(Z), softmax(4 * Z)) <= 1e-6


def test_straight_through_reaches_every_slot():
  weight = np.arange(6.0, dtype=np.float32).reshape(1, 1, 1, 6)
  soft = lambda z: jax.nn.sigmoid(z) / jnp.sum(jax.nn.sigmoid(z), -1, keepdims=True)
  grads = quick(lambda z: [jax.grad(lambda z, f=f: jnp.sum(f(z) * weight))(z) for f in (lambda z: routing.top(z, 1), soft)])(Z)
  assert relative(*grads) <= 1e-6 and np.all(np.asarray(grads[0]) != 0)


def test_unit_is_fp32_inside_and_finite_at_zero():
  z = jnp.asarray(Z * 1e3, jnp.bfloat16)
  unit = quick(routing.unit)(z)
  assert unit.dtype == jnp.bfloat16 and np.abs(np.linalg.norm(np.asarray(unit, np.float32), axis=-1) - 1).max() < 4e-3
  grad = quick(jax.grad(lambda z: jnp.sum(routing.unit(z))))(jnp.zeros((1, 4)))
  assert np.all(np.isfinite(grad)) and np.all(np.asarray(grad) > 0)


def test_rotary_addresses_see_distance_only():
  """Products depend on the position difference, at any offset; norms are kept; also with read groups."""
  address, pick = Z[:, :1], Z[:, 1:2]
  score = quick(lambda a, p, s, t: jnp.sum(rotate_slots(a, s) * rotate_slots(p, t), -1))
  at = lambda n: np.full((3, 1), n, np.int32)
  near, far = score(address, pick, at(3), at(10)), score(address, pick, at(1_000_003), at(1_000_010))
  assert relative(far, near) <= 1e-5 and relative(score(address, pick, at(3), at(11)), near) > 1e-2
  turned = quick(rotate_slots)(np.repeat(address[:, :, None], 2, 2), at(7))
  assert turned.shape == (3, 1, 2, 2, 6)
  assert relative(np.linalg.norm(turned[:, :, 0], axis=-1), np.linalg.norm(address, axis=-1)) <= 1e-5


def test_keep_maps():
  got = quick(lambda z: log_keep_map(z, floor=-2.5))(Z * 10)
  assert relative(got, np.maximum(np.log(sigmoid(Z.astype(np.float64) * 10)), -2.5)) <= 1e-6
  assert quick(lambda z: log_keep_map(z, floor=-2.5))(np.full((1,), 30.0, np.float32))[0] < 0        # not rounded to keep = 1
  write = np.abs(np.tanh(Z))
  tied = quick(lambda w: tied_log_keep(jnp.full_like(w, -0.1), w, strength=0.5, floor=-20.0))(write)
  assert relative(np.exp(tied), np.exp(-0.1) * (1 - 0.5 * write)) <= 1e-6
  ones = np.ones((2,), np.float32)
  full = quick(jax.value_and_grad(lambda w: jnp.sum(tied_log_keep(jnp.zeros_like(w), w, strength=1.0, floor=-20.0))))(ones)
  assert all(np.all(np.isfinite(x)) for x in full)


def test_spaced_decay():
  assert np.allclose(spaced_decay(8, 2.0 ** -5, 2.0 ** -12), 2.0 ** -(5.0 + np.arange(8)))
  assert np.allclose(spaced_decay(1, 2.0 ** -6, 2.0 ** -12), 2.0 ** -9)


def test_bad_names_are_refused():
  for call in (lambda: address_map('hash', Z), lambda: routing.top(Z, 7), lambda: rotate_slots(Z[..., :5], np.zeros((3, 5), np.int32))):
    with pytest.raises(UserError): call()
