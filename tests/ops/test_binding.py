"""Algebra of the bindings: properties 1 to 11, 13 to 15 and 34 of the specification."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import binding
from memjax.ops.binding import bind, from_spectrum, identity, inverse, key_map, to_spectrum, unbind
from memjax.ops.keys import random_keys
from tests.ops import oracle
from tests.ops.oracle import relative

KEYED = ('phasor', 'bipolar', 'hrr', 'unitary', 'hlb')
EXACT = ('phasor', 'bipolar', 'unitary')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def compiled(name, *static, **options):
  return jax.jit(functools.partial(getattr(binding, name), *static, **options))


def run(f, *args):
  """f(*args) compiled as one: one operation at a time would compile each of them."""
  return jax.tree.map(np.asarray, jax.jit(f)(*args))


def exact_keys(kind, count, width, seed=0):
  """Keys of exactly unit modulus (in the rounding of fp32)."""
  return random_keys(seed, 'test', np.arange(count), width, kind=kind)


def drawn_keys(kind, count, width):
  """Random keys on the scale of the binding."""
  key = exact_keys({'hrr': 'gaussian', 'hlb': 'bipolar'}.get(kind, kind), count, width)
  return key_map('hrr', to_spectrum(key, 'dft')) if kind == 'hrr' else key


def cosines(x, y):
  """Cosines of the rows."""
  return np.sum(x * y, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


@pytest.mark.parametrize('kind', KEYED)
@pytest.mark.parametrize('width', [8, 9])
def test_commutative_and_associative(kind, width):
  if kind == 'phasor': width = 10
  x, y, z = normal(3, 4, width).astype(np.float32)
  b = functools.partial(bind, kind)
  xy, yx, left, right = run(lambda x, y, z: (b(x, y), b(y, x), b(b(x, y), z), b(x, b(y, z))), x, y, z)
  assert relative(xy, yx) <= 1e-6
  assert relative(left, right) <= 1e-6


@pytest.mark.parametrize('kind', binding.KINDS)
def test_identity(kind):
  v = normal(3, 8).astype(np.float32)
  one = lambda: jnp.broadcast_to(identity(kind, 8)[None], (3, 8))
  for got in run(lambda v: (bind(kind, one(), v), unbind(kind, one(), v)), v): assert relative(got, v) <= 1e-6


def test_identity_of_hrr_is_the_delta():
  delta = run(lambda: from_spectrum(identity('hrr', 9) / binding.spectrum_scale(9), 'dft'))
  assert np.abs(np.asarray(delta) - np.eye(9)[0]).max() <= 1e-6


@pytest.mark.parametrize('kind', EXACT)
def test_unbind_undoes_bind(kind):
  v = normal(6, 64).astype(np.float32)
  def both(v):
    key = exact_keys(kind, 6, 64)
    bound = bind(kind, key, v)
    return unbind(kind, key, bound), bind(kind, inverse(kind, key), bound)
  for got in run(both, v): assert relative(got, v) <= 1e-6


def test_hlb_undoes_bind_away_from_zero():
  key = np.sign(normal(6, 64)) * np.linspace(0.5, 2, 64)
  v = normal(6, 64, seed=1)
  there_and_back = lambda key, v: unbind('hlb', key, bind('hlb', key, v))
  assert relative(run(there_and_back, key.astype(np.float32), v.astype(np.float32)), v) <= 1e-5
  near = np.full((1, 8), 1e-9, np.float32)
  assert np.all(np.abs(run(jax.grad(lambda q: jnp.sum(unbind('hlb', q, jnp.ones((1, 8))))), near)) <= 4)


def test_hrr_keys_unitary():
  """Gaussian keys are not unitary: one item comes back at cosine .70. `unitary` brings it back exactly."""
  z, v = normal(200, 512), normal(200, 512, seed=1)
  def cosine(kind):
    def back(z, v):
      key = key_map(kind, to_spectrum(z, 'dft'))
      return from_spectrum(unbind(kind, key, bind(kind, key, to_spectrum(v, 'dft'))), 'dft')
    return np.mean(cosines(run(back, z.astype(np.float32), v.astype(np.float32)), v))
  assert abs(cosine('hrr') - 0.70) <= 0.03
  assert cosine('unitary') >= 0.9999


@pytest.mark.parametrize('kind', ['phasor', 'unitary'])
def test_unit_keys(kind):
  width = 10
  z = normal(50, width)
  def both(z):
    key = key_map(kind, z)
    return key, key_map(kind, key)
  key, again = run(both, z.astype(np.float32))
  real = binding.real_bins(kind, width)
  half = (width - real) // 2
  size = lambda x: np.concatenate([np.abs(x[:, :real]), np.hypot(x[:, real:real + half], x[:, real + half:])], -1)
  modulus, large = size(key.astype(np.float64)), size(z) >= 1
  assert np.abs(modulus - 1)[large].max() <= 1e-6
  pairs = np.concatenate([large, large[:, real:]], -1)
  assert np.abs(again - key)[pairs].max() <= 1e-6
  v = normal(50, width, seed=1)
  bound = run(lambda v: bind(kind, exact_keys(kind, 50, width), v), v.astype(np.float32))
  norm = np.linalg.norm(bound.astype(np.float64), axis=-1)
  assert relative(norm, np.linalg.norm(v, axis=-1)) <= 1e-6


@pytest.mark.parametrize('kind', binding.KINDS)
def test_key_map_gradient_is_finite_at_zero(kind):
  grad = jax.jit(jax.grad(lambda z: jnp.sum(key_map(kind, z) * jnp.arange(1.0, 9)[None])))(jnp.zeros((1, 8)))
  assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad) != 0)


@pytest.mark.parametrize('kind', ['phasor', 'unitary', 'bipolar'])
def test_identity_bias_starts_near_the_identity(kind):
  z, v = normal(500, 64).astype(np.float32), normal(500, 64, seed=1).astype(np.float32)
  def closeness(bias):
    return np.mean(cosines(run(lambda z, v: bind(kind, key_map(kind, z, identity_bias=bias), v), z, v), v))
  assert closeness(0.0) < 0.1 and closeness(2.0) > 0.5


def test_bipolar_squash():
  z = np.array([[-3.0, -0.5, 0.0, 0.5, 3.0]], np.float32)
  sign = lambda z: key_map('bipolar', z, squash='sign')
  key, grad, tanh = run(lambda z: (sign(z), jax.grad(lambda z: jnp.sum(sign(z)))(z), key_map('bipolar', z)), z)
  assert np.array_equal(key[0], [-1, -1, 1, 1, 1])
  assert np.array_equal(grad[0], [0, 1, 1, 1, 0])
  assert relative(tanh, np.tanh(z)) <= 1e-6


def test_hlb_key_is_the_mixture():
  key = run(functools.partial(key_map, 'hlb'), normal(2000, 64).astype(np.float32))
  assert abs(np.abs(key).mean() - 1 - np.sqrt(2 / np.pi) / 8) < 0.01      # sign(z) + z / sqrt(K): z has the sign it adds to


@pytest.mark.parametrize(('width', 'transform'), list(itertools.product([2, 8, 9, 64, 127], ['dft', 'fft'])))
def test_convolution_is_the_direct_sum(width, transform):
  x, y = normal(2, 3, width)
  for name, want in (('circular_convolution', oracle.convolve(x, y)), ('circular_correlation', oracle.correlate(x, y))):
    with jax.enable_x64():
      assert relative(compiled(name, transform=transform)(x, y), want) <= 1e-12
    assert relative(compiled(name, transform=transform)(x.astype(np.float32), y.astype(np.float32)), want) <= 1e-5


@pytest.mark.parametrize('width', [1, 2, 9, 64])
def test_transform_is_orthonormal(width):
  F = np.asarray(binding.dft_matrix(width))
  assert np.abs(F.T @ F - np.eye(width)).max() <= 1e-6
  x = normal(3, width)
  for transform in binding.TRANSFORMS:
    def both(x, transform=transform):
      there = to_spectrum(x, transform)
      return there, from_spectrum(there, transform)
    there, back = run(both, x.astype(np.float32))
    assert relative(back, x) <= 1e-5
    assert relative(np.linalg.norm(there, axis=-1), np.linalg.norm(x, axis=-1)) <= 1e-5


@pytest.mark.parametrize('width', [8, 9])
def test_inverse_is_index_reversal(width):
  k = normal(1, width)
  def both(k):
    scale, unit = binding.spectrum_scale(width)[None], exact_keys('unitary', 3, width)
    got = from_spectrum(inverse('hrr', to_spectrum(k, 'dft') * scale) / scale, 'dft')
    return got, bind('unitary', unit, inverse('unitary', unit)), identity('unitary', width)
  got, one, delta = run(both, k.astype(np.float32))
  assert relative(got, k[:, -np.arange(width) % width]) <= 1e-6
  assert relative(one, np.tile(delta, (3, 1))) <= 1e-6


@pytest.mark.parametrize('kind', KEYED)
def test_random_keys_hide_the_value(kind):
  """Values of one modulus; with Gaussian values the spread of the cosine would be sqrt(3 / K)."""
  width = 256
  def both():
    v = random_keys(9, 'value', np.arange(200), width, kind=kind if kind in EXACT else 'bipolar')
    return bind(kind, drawn_keys(kind, 200, width), v), v
  assert np.abs(cosines(*run(both))).max() < 4 / np.sqrt(width)


def test_folding_equals_pairwise():
  """Convolution of n vectors by folding the binding is the product of all n spectra."""
  x = normal(4, 16).astype(np.float32)
  folded = run(lambda x: functools.reduce(binding.circular_convolution, [row[None] for row in x]), x)
  product = np.fft.irfft(np.prod(np.fft.rfft(x.astype(np.float64)), 0), n=16)
  assert relative(folded[0], product) <= 1e-5


@pytest.mark.parametrize('kind', binding.KINDS)
def test_cancelled_bundle_is_finite(kind):
  """bundle(x, -x) and an empty memory go through read and gradient without NaN."""
  def loss(z, v):
    key = key_map(kind, z)
    return jnp.sum(unbind(kind, key, bind(kind, key, v) + bind(kind, key, -v)) ** 2)
  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(normal(2, 8).astype(np.float32), normal(2, 8).astype(np.float32))
  assert value < 1e-12 and all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize('kind', KEYED)
def test_hash_table(kind):
  """What was added is found, what was removed is not."""
  v = normal(2, 512).astype(np.float32)
  def found(v):
    key = drawn_keys(kind, 2, 512)
    bound = bind(kind, key, v)
    look = lambda memory: unbind(kind, key, jnp.broadcast_to(memory[None], bound.shape))
    return look(jnp.sum(bound, 0)), look(jnp.sum(bound[1:], 0))
  full, rest = run(found, v)
  assert np.all(cosines(full, v) > 0.5)
  assert cosines(rest, v)[0] < 0.2


def test_folded_transform_is_a_folded_projection():
  """`unitary` by dft, by fft, and folded into the projections: equal outputs, and equal gradients of the input."""
  x, W, F = normal(5, 12), normal(3, 12, 8, seed=1) / 3, np.asarray(binding.dft_matrix(8), np.float64)
  def read(x, W, transform):
    k, v, q = (to_spectrum(x @ w, transform) for w in W)
    bound = jnp.cumsum(bind('unitary', key_map('unitary', k, identity_bias=2.0), v), 0)
    return from_spectrum(unbind('unitary', key_map('unitary', q, identity_bias=2.0), bound), transform)
  loss = lambda x, W, out, transform: jnp.sum((read(x, W, transform) @ out) ** 2)
  results = {}
  for transform in binding.TRANSFORMS:
    weight, out = (W @ F, F.T) if transform == 'folded' else (W, np.eye(8))
    args = [jnp.asarray(a, jnp.float32) for a in (x, weight, out)]
    both = lambda x, W, out, transform=transform: (read(x, W, transform) @ out, jax.grad(loss)(x, W, out, transform))
    results[transform] = run(both, *args)
  for transform in ('fft', 'folded'):
    assert relative(results[transform][0], results['dft'][0]) <= 1e-5
    assert relative(results[transform][1], results['dft'][1]) <= 1e-4


@pytest.mark.parametrize('transform', ['dft', 'folded'])
def test_portable_path_has_no_complex_numbers(transform):
  def loss(z, v):
    key = key_map('unitary', to_spectrum(z, transform))
    return jnp.sum(from_spectrum(unbind('unitary', key, bind('unitary', key, to_spectrum(v, transform))), transform) ** 2)
  text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((2, 8)), jnp.ones((2, 8))).as_text()
  assert 'complex' not in text and 'fft' not in text
  fft = jax.jit(lambda x: to_spectrum(x, 'fft')).lower(jnp.ones((2, 8))).as_text()
  assert 'complex' in fft and 'fft' in fft


@pytest.mark.parametrize('kind', binding.KINDS)
def test_dtypes_are_kept(kind):
  def all_of(z):
    key = key_map(kind, to_spectrum(z, binding.resolve_transform(kind)))
    return key, bind(kind, key, z), to_spectrum(z, 'fft'), from_spectrum(z, 'fft'), unbind(kind, key, z.astype(jnp.float32))
  shapes = jax.eval_shape(all_of, jnp.ones((2, 8), jnp.bfloat16))
  assert [x.dtype for x in shapes] == [jnp.bfloat16] * 4 + [jnp.float32]


def test_bad_names_are_refused():
  x = jnp.ones((1, 8))
  for call in (lambda: bind('polar', x, x), lambda: bind('phasor', x[:, :7], x[:, :7]), lambda: to_spectrum(x, 'fht'),
               lambda: key_map('bipolar', x, squash='relu')):
    with pytest.raises(UserError): call()
