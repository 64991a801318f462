"""Rotary frequencies of every kind against loops in plain Python, and what a rotation must keep."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.attention import RopeConfig
from memjax.ops.rope import frequencies, magnitude, rotate

LLAMA3 = RopeConfig(kind='llama3', factor=8.0, original=8192)
YARN = RopeConfig(kind='yarn', factor=4.0, original=32768)


def llama3(width, base, factor, low, high, original):
  """As published: by wavelength, the middle band interpolated."""
  out = []
  for i in range(width // 2):
    f = base ** (-2 * i / width)
    wavelength = 2 * math.pi / f
    if wavelength < original / high: out.append(f)
    elif wavelength > original / low: out.append(f / factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      out.append((1 - smooth) * f / factor + smooth * f)
  return out


def yarn(width, base, factor, fast, slow, original):
  """As published: by channel, a linear ramp between two rounded bounds."""
  bound = lambda turns: width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))
  low, high = max(math.floor(bound(fast)), 0), min(math.ceil(bound(slow)), width - 1)
  out = []
  for i in range(width // 2):
    f = base ** (-2 * i / width)
    ramp = min(max((i - low) / (high - low if high > low else .001), 0), 1)
    out.append(f / factor * ramp + f * (1 - ramp))
  return out


@pytest.mark.parametrize('rope, wanted', [
  (RopeConfig(), [1e6 ** (-2 * i / 64) for i in range(32)]),
  (RopeConfig(kind='linear', factor=4.0), [1e6 ** (-2 * i / 64) / 4 for i in range(32)]),
  (LLAMA3, llama3(64, 1e6, 8, 1, 4, 8192)),
  (RopeConfig(kind='llama3', factor=8.0, original=32, low_factor=2.0, high_factor=3.0), llama3(64, 1e6, 8, 2, 3, 32)),
  (YARN, yarn(64, 1e6, 4, 32, 1, 32768)),
  (RopeConfig(kind='yarn', factor=2.0, original=32, beta_fast=3.0, beta_slow=2.0), yarn(64, 1e6, 2, 3, 2, 32)),
  (RopeConfig(kind='yarn', factor=2.0, original=3), yarn(64, 1e6, 2, 32, 1, 3)),
], ids=['default', 'linear', 'llama3', 'llama3 narrow', 'yarn', 'yarn narrow', 'yarn short'])
def test_frequencies(rope, wanted):
  found = frequencies(64, 1e6, rope)
  assert found.dtype == np.float64
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_stretched_kinds_differ_only_where_they_should():
  plain = frequencies(64, 1e6)
  for rope in (LLAMA3, YARN):
    ratio = plain / frequencies(64, 1e6, rope)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(rope.factor) and (np.diff(ratio) >= -1e-9).all()
    assert ((ratio > 1.01) & (ratio < rope.factor - .01)).any()


def test_magnitude():
  assert magnitude(RopeConfig()) == magnitude(LLAMA3) == 1
  assert magnitude(YARN) == pytest.approx(.1 * math.log(4) + 1)
  assert magnitude(RopeConfig(kind='yarn', factor=4.0, original=8, attention_factor=1.5)) == 1.5


def test_rotation_is_complex_multiplication_by_halves():
  with jax.enable_x64():
    x, position = np.random.default_rng(0).normal(size=(2, 3, 2, 6)), np.array([[0, 1, 7], [5, 5, 99]])
    f = frequencies(6, 1e4)
    z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * position[:, :, None, None] * f) * 1.25
    y = rotate(jnp.asarray(x), jnp.asarray(position), f, scale=1.25)
    np.testing.assert_allclose(y, np.concatenate([z.real, z.imag], -1), atol=2e-5)
    assert y.dtype == jnp.float64
  assert rotate(jnp.ones((1, 1, 1, 4), jnp.bfloat16), jnp.zeros((1, 1), int), frequencies(4, 1e4)).dtype == jnp.bfloat16


def test_products_see_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  f = frequencies(16, 1e4, RopeConfig(kind='yarn', factor=4.0, original=32))
  turn = lambda x, at: rotate(x, jnp.full((1, 1), at), f)
  product = lambda one, other: float(jnp.sum(turn(q, one) * turn(k, other)))
  assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
  assert abs(product(7, 4) - product(7, 5)) > 1e-2
