"""Quantised banks against the table of errors, packing, safety at the edges, and training through the rounding: section 7, P7.1 to P7.5."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import quantize as quantization
from memjax.ops.quantize import Quantized, dequantize, fake_quantize, fake_quantize_fixed, lsq, packed_shapes, quantize, stored_bytes
from tests.ops.inputs import quick
from tests.ops.oracle import relative

X = np.random.default_rng(0).normal(0, 0.02, (256, 576)).astype(np.float32)


def trip(**options):
  """(Quantized, dequantised) of an array."""
  def f(x):
    q = quantize(x, **options)
    return q, dequantize(q)
  return quick(f)


# (bits, scheme, group): largest relative RMS error on a normal sample, and the bits a weight takes
TABLE = {(8, 'absmax', 0): (0.0080, 8 + 32 / 576), (8, 'absmax', 32): (0.0060, 9), (4, 'absmax7', 0): (0.140, 4 + 32 / 576),
         (4, 'absmax7', 32): (0.098, 4.5), (4, 'absmax', 0): (0.1285, 4 + 32 / 576), (4, 'absmax', 64): (0.104, 4.25),
         (4, 'absmax', 32): (0.098, 4.5), (4, 'nf4', 0): (0.103, 4 + 32 / 576), (4, 'nf4', 64): (0.093, 4.25), (4, 'nf4', 32): (0.090, 4.5)}


@pytest.mark.parametrize('bits, scheme, group', TABLE)
def test_errors_and_bytes(bits, scheme, group):
  """P7.1, P7.4."""
  options = dict(bits=bits, group=group)
  q, y = trip(**options, scheme=scheme)(X)
  most, weight_bits = TABLE[bits, scheme, group]
  error = np.sqrt(np.mean((y - X) ** 2) / np.mean(X ** 2))
  assert 0.9 * most < error <= most or ((bits, group) == (8, 32) and 0.005 < error <= most)
  scale = np.repeat(np.asarray(q.scale, np.float32), 576 // q.scale.shape[1], 1)
  if scheme != 'nf4': assert np.all(np.abs(y - X) <= scale / 2 * (1 + 2e-5))
  assert stored_bytes(q) == X.size * weight_bits / 8 == sum(leaf.nbytes for leaf in (q.codes, q.scale))
  shapes = packed_shapes(X.shape, **options)
  assert [(s.shape, s.dtype) for s in shapes] == [(a.shape, a.dtype) for a in (q.codes, q.scale)]
  assert q.shape == X.shape and q.ndim == 2 and q.scale.dtype == (jnp.float16 if bits == 4 and group else jnp.float32)


def test_codes_by_hand():
  """Scales, rounding, clipping and nibble order of each scheme."""
  x = np.array([[7.5, -7.5, 2.6, -0.4]], np.float32)
  q, y = trip(bits=4, group=0)(x)
  assert np.array_equal(q.scale, [[1]]) and np.array_equal(q.codes, [[0x87, 0x03]]) and np.array_equal(y, [[7, -8, 3, 0]])
  q, y = trip(bits=4, scheme='absmax7', group=2)(np.array([[7, -3.4, 14, 3]], np.float32))
  assert np.array_equal(q.scale, [[1, 2]]) and np.array_equal(q.codes, [[0xD7, 0x27]]) and np.array_equal(y, [[7, -3, 14, 4]])
  q, y = trip(bits=4, scheme='nf4', group=0)(np.array([[-2, 2, 0, 0.3]], np.float32))
  assert np.array_equal(q.codes, [[0xF0, 0x97]]) and np.allclose(y, [[-2, 2, 0, 2 * 0.16093]], atol=1e-5)
  q, y = trip(bits=8, group=0)(np.array([[-127, 126.6, 0.4, 3]], np.float32))
  assert np.array_equal(q.codes, [[-127, 127, 0, 3]]) and np.array_equal(q.codes, y)


def test_packing_of_every_byte():
  """P7.2."""
  every = np.arange(256, dtype=np.uint8)
  signed, plain = quick(lambda c: [quantization.unpack_nibbles(c, is_signed=s) for s in (True, False)])(every)
  low, high = every & 15, every >> 4
  assert np.array_equal(plain, np.stack([low, high], -1).ravel())
  assert np.array_equal(signed, np.where(np.asarray(plain) > 7, np.asarray(plain) - 16, plain))
  for n in (signed, plain): assert np.array_equal(quick(quantization.pack_nibbles)(n), every)


@pytest.mark.parametrize('bits, scheme, group', [(8, 'absmax', 0), (4, 'absmax', 32), (4, 'absmax7', 32), (4, 'nf4', 32)])
def test_extreme_rows(bits, scheme, group):
  """P7.3: zeros stay zero; constant, huge and tiny rows keep their size, also where the fp16 scale is subnormal."""
  shape = np.linspace(-1, 1, 32, dtype=np.float32)
  rows = np.stack([0 * shape, 0 * shape + 0.3, 0 * shape - 1e4, 1e4 * shape, 1e-4 * shape, 1e-5 * shape, 1e-12 * shape, 1e9 * shape])
  q, y = trip(bits=bits, scheme=scheme, group=group)(rows)
  assert np.all(np.isfinite(y)) and np.all(np.isfinite(q.scale)) and np.all(np.asarray(q.scale) > 0) and np.all(np.asarray(y)[0] == 0)
  worst = np.abs(y - rows).max(1) / np.maximum(np.abs(rows).max(1), 1e-30)
  bound = {8: 0.004, 4: 0.16 if scheme == 'nf4' else 0.08}[bits]
  assert np.all(worst[1:6] <= bound) and worst[6] <= 1 + 1e-6
  assert worst[7] <= (1 if group else bound) and np.all(np.asarray(y)[7] * rows[7] >= 0)     # saturates, never turns


def test_axes_and_dtypes():
  """Leading axes survive and index; fp64 and bf16 come out as asked."""
  x = X[:24].reshape(2, 3, 4, 576)
  q, y = trip(bits=4)(x)
  assert isinstance(q, Quantized) and q.codes.shape == (2, 3, 4, 288) and q.scale.shape == (2, 3, 4, 18)
  assert np.array_equal(quick(dequantize)(jax.tree.map(lambda a: a[1, 2], q)), y[1, 2])
  assert np.array_equal(jax.vmap(jax.vmap(dequantize))(q), y)
  assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
  with jax.enable_x64():
    wide = quick(lambda q: dequantize(q, jnp.float64))(q)
    assert wide.dtype == jnp.float64 and relative(wide, y) <= 1e-7
  shapes = jax.eval_shape(lambda x: quantize(x, bits=4), x)
  assert stored_bytes(shapes) == x.size * 4.5 / 8


def test_bad_requests():
  for options in (dict(bits=5), dict(bits=8, scheme='nf4'), dict(bits=8, scheme='absmax7'), dict(bits=4, group=5), dict(bits=4, group=-1),
                  dict(bits=4, scheme='fp4')):
    with pytest.raises(UserError): quantize(X, **options)
  with pytest.raises(UserError, match='even'): packed_shapes((2, 3), bits=4, group=0)
  with pytest.raises(TypeError): jax.grad(lambda q: jnp.sum(dequantize(q)))(quantize(X[:1], bits=8, group=0))


# Training through the rounding ------------------------------------------------------------------------------------------------

def test_straight_through():
  """P7.5: the value of the stored bank bit for bit, the gradient of the identity."""
  way = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
  for bits, scheme, group in ((8, 'absmax', 0), (4, 'absmax', 32), (4, 'nf4', 32), (4, 'absmax7', 0)):
    options = dict(bits=bits, scheme=scheme, group=group)
    f = quick(lambda x: (fake_quantize(x, **options), jax.grad(lambda x: jnp.sum(fake_quantize(x, **options) * way))(x)))
    y, grad = f(X[:8, :64])
    assert np.array_equal(y, trip(**options)(X[:8, :64])[1]) and np.array_equal(grad, way)


def test_training_with_the_rounding_beats_rounding_after():
  """P7.6: linear maps of inputs with a common offset, along which rounding errors add up; mean over 6 maps with 4-bit weights."""
  rng, steps, options = np.random.default_rng(0), 200, dict(bits=4, group=0)
  inputs, weights = (rng.normal(size=(6, 64, 16)) + 4).astype(np.float32), rng.normal(size=(6, 4, 16)).astype(np.float32)
  def losses(x, trained):
    loss = lambda w: jnp.mean((x @ w.T - x @ trained.T) ** 2)
    slope, rate = jax.grad(lambda w: loss(fake_quantize(w, **options))), len(x) / jnp.sum(x * x)
    w = jax.lax.fori_loop(0, steps, lambda i, w: w - rate * (1 - i / steps) * slope(w), trained)
    return loss(fake_quantize(w, **options)), loss(fake_quantize(trained, **options))
  aware, after = quick(jax.vmap(losses))(inputs, weights)
  assert np.mean(aware) < 0.8 * np.mean(after)


def test_fixed_scale():
  """P7.5: identity inside, zero outside, nothing for the scale."""
  x = np.array([-9, -8, -7.6, 0.4, 0.6, 7, 7.2, 30], np.float32) * 0.5
  f = lambda x, s: jnp.sum(fake_quantize_fixed(x, s, bits=4) * jnp.arange(1.0, 9))
  y, (dx, ds) = quick(lambda x, s: (fake_quantize_fixed(x, s, bits=4), jax.grad(f, (0, 1))(x, s)))(x, np.float32(0.5))
  assert np.array_equal(y, np.array([-8, -8, -8, 0, 1, 7, 7, 7]) * 0.5)
  assert np.array_equal(dx, [0, 2, 3, 4, 5, 6, 0, 0]) and ds == 0
  rows = quick(lambda x, s: fake_quantize_fixed(x, s, bits=8))(np.ones((2, 3), np.float32), np.array([[0.5], [0.3]], np.float32))
  assert relative(rows, [[1] * 3, [0.9] * 3]) <= 1e-6


@pytest.mark.parametrize('shape', [(), (1, 1), (6, 1)])
def test_learned_step(shape):
  """P7.5: the gradient of the step by its formula, also for one step a row."""
  rng = np.random.default_rng(0)
  x, way, step = 3 * rng.normal(size=(6, 32)), rng.normal(size=(6, 32)), 0.4 + 0.1 * rng.random(shape)
  with jax.enable_x64():
    f = lambda x, s: jnp.sum(lsq(x, s, bits=4) * way)
    y, (dx, ds) = quick(lambda x, s: (lsq(x, s, bits=4), jax.grad(f, (0, 1))(x, s)))(x, step)
  ratio = x / step
  code, inside = np.clip(np.round(ratio), -8, 7), (ratio > -8) & (ratio < 7)
  slope = way * np.where(inside, code - ratio, code) / np.sqrt(x.size // step.size * 7)
  want = slope.sum(1, keepdims=True) if shape == (6, 1) else slope.sum().reshape(shape)
  assert 0 < inside.sum() < inside.size and relative(y, code * step) <= 1e-12
  assert np.array_equal(dx, np.where(inside, way, 0)) and np.asarray(ds).shape == shape and relative(ds, want) <= 1e-12
