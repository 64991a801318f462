"""Seeded keys, position codes and permutations: properties 8, 11, 12 and 46 of the specification."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import keys
from memjax.ops.binding import bind, unbind
from tests.ops.oracle import relative

CODE = '''import numpy as np
from memjax.ops import keys
print(keys.fingerprint(7), np.asarray(keys.random_keys(7, "p", np.arange(3), 8, kind="bipolar")).astype(int).tolist())'''


def test_keys_are_deterministic():
  """The same in two calls, at any batch and offset, under jit, on eight devices, and in another process."""
  position = np.arange(64, dtype=np.int32)
  draw = jax.jit(lambda p: keys.random_keys(7, 'p', p, 16, kind='phasor'))
  whole = np.asarray(draw(position))
  assert np.array_equal(whole, draw(position))
  assert np.array_equal(whole[40:44], jax.jit(lambda p: keys.random_keys(7, 'p', p, 16, kind='phasor'))(position[40:44]))
  assert np.array_equal(whole.reshape(8, 8, 16), draw(position.reshape(8, 8)))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(position, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')))
  assert np.array_equal(whole, draw(spread))
  here = f'{keys.fingerprint(7)} {np.asarray(keys.random_keys(7, "p", np.arange(3), 8)).astype(int).tolist()}'
  there = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True)
  assert there.stdout.strip() == here


def test_known_bits():
  """The hash may never change: states and checkpoints are made with it."""
  assert keys.fingerprint(0) == '1ea73646' and keys.fingerprint(1) == '076ef8a5'
  device = np.asarray(keys.counter_bits(3, 'x', jnp.arange(5), 7))
  assert np.array_equal(device, keys.counter_bits(3, 'x', np.arange(5), 7))


def test_fingerprint_mismatch_raises():
  keys.check_fingerprint(3, keys.fingerprint(3))
  with pytest.raises(UserError, match='fingerprint'): keys.check_fingerprint(4, keys.fingerprint(3))


@pytest.mark.parametrize('kind', keys.RANDOM_KINDS)
def test_random_keys_are_independent(kind):
  width = 64
  x = np.asarray(keys.random_keys(1, 's', np.arange(500), width, kind=kind), np.float64)
  others = (np.asarray(keys.random_keys(seed, stream, np.arange(500), width, kind=kind)) for seed, stream in ((2, 's'), (1, 'z')))
  for y in others: assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.02
  norm = np.sum(x * x, -1)
  expected = {'gaussian': 1, 'phasor': width / 2, 'bipolar': width, 'unitary': width / 2 + 1}[kind]
  assert np.abs(norm - expected).max() <= 1e-4 * width
  gram = (x @ x.T) / expected
  np.fill_diagonal(gram, 0)
  assert 0.8 < gram.std() * np.sqrt(width) < 1.6 and np.abs(gram.mean()) < 2e-3


def test_uniform_and_normal_moments():
  u, n = keys.counter_uniform(0, 'u', np.arange(300), 300), np.asarray(keys.counter_normal(0, 'n', np.arange(300), 300))
  assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 3e-3 and abs(u.var() - 1 / 12) < 1e-3
  assert abs(n.mean()) < 0.01 and abs(n.var() - 1) < 0.015 and abs((n ** 4).mean() - 3) < 0.1


@pytest.mark.parametrize(('kind', 'width'), [('phasor', 8), ('unitary', 9)])
def test_fractional_codes_are_powers(kind, width):
  theta = keys.fractional_phases(kind, width, seed=3)
  code = lambda position: keys.fractional_code(kind, width, jnp.asarray(position), theta)
  far = 10 ** 9
  pairs = jax.jit(lambda: (
      (bind(kind, code([2.25]), code([3.5])), code([5.75])),
      (bind(kind, code([1.5]), bind(kind, code([1.5]), code([1.5]))), code([4.5])),
      (code(np.arange(6)), code(np.arange(6.0, dtype=np.float32))),
      (bind(kind, code([far]), code([5])), code([far + 5]))))()
  for got, want in pairs: assert relative(got, want) <= 1e-5


def test_fractional_kernel_is_sinc():
  theta = keys.fractional_phases('phasor', 20_000)
  for distance in (0.25, 0.5, 1.0, 1.5):
    code = np.asarray(keys.fractional_code('phasor', 20_000, jnp.asarray([distance]), theta))[0]
    assert abs(code[:10_000].mean() - np.sinc(distance)) <= 0.02


def test_distant_item_returns_rotated():
  """With codes on key and query, content at distance d returns turned by p^-d: recall by position, not by content."""
  theta = keys.fractional_phases('phasor', 16)
  code = lambda position: keys.fractional_code('phasor', 16, jnp.asarray([position]), theta)
  key, v = keys.random_keys(0, 'k', np.arange(1), 16, kind='phasor'), np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
  stored = lambda: bind('phasor', bind('phasor', code(3), key), v)
  back, want = jax.jit(lambda: (unbind('phasor', bind('phasor', code(10), key), stored()), unbind('phasor', code(7), v)))()
  assert relative(back, want) <= 1e-5


def test_geometric_phases():
  theta = keys.fractional_phases('phasor', 8, frequencies='geometric')
  assert np.allclose(theta, 10_000.0 ** (-2 * np.arange(4) / 8))


@pytest.mark.parametrize(('kind', 'width'), [('phasor', 256), ('bipolar', 256), ('unitary', 256), ('unitary', 255)])
def test_permutation(kind, width):
  index = keys.permutation(0, width, kind)
  assert np.array_equal(np.sort(index), np.arange(width))
  assert not np.array_equal(index, keys.permutation(1, width, kind))
  v = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
  def moves(v):
    key = keys.random_keys(0, 'k', np.arange(20), width, kind=kind)
    moved = keys.permute(key, index)
    copies = keys.permute(key, np.stack([index, np.arange(width)]))
    return key, moved, keys.permute(moved, np.argsort(index)), copies, unbind(kind, moved, bind(kind, moved, v))
  key, moved, back, copies, read = (np.asarray(x) for x in jax.jit(moves)(v))
  assert np.array_equal(back, key)
  cosine = np.sum(moved * key, -1) / np.sum(key ** 2, -1)
  assert np.abs(cosine).max() < 4 / np.sqrt(width)
  assert relative(read, v) <= 1e-5                                           # pairs moved together: still unit keys
  assert copies.shape == (20, 2, width) and np.array_equal(copies[:, 0], moved)


def test_bad_names_are_refused():
  draw = lambda width, kind: keys.random_keys(0, 's', np.arange(2), width, kind=kind)
  for call in (lambda: draw(8, 'hrr'), lambda: draw(7, 'phasor'),
               lambda: keys.fractional_phases('bipolar', 8), lambda: keys.fractional_phases('phasor', 8, frequencies='random')):
    with pytest.raises(UserError): call()
