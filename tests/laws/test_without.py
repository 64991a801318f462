"""The laws on a machine without FFT, complex numbers and top-k. All of them: `MEMJAX_TEST_WITHOUT=fft,complex,top_k pytest tests/laws`."""
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops import binding, top_k
from tests import without
from tests.laws import test_laws as laws


@pytest.fixture(scope='module', autouse=True)
def machine():
  """The machine, for this file alone."""
  with pytest.MonkeyPatch.context() as patch:
    without.take_away(without.LACKING, patch.setattr)
    laws.case.cache_clear()
    yield
  without.forget()
  laws.case.cache_clear()


def test_what_is_missing_raises():
  x = jnp.ones((2, 4))
  for call in (jnp.fft.rfft, lambda x: jax.lax.complex(x, x), lambda x: x.astype(jnp.complex64), lambda x: jax.lax.top_k(x, 2)):
    for run in (call, jax.jit(call)):
      with pytest.raises(NotImplementedError, match='this machine has no'): run(x)
  assert not binding.has_fft() and not top_k.has_top_k()


@pytest.mark.parametrize('name', ['hrr-fft-tied', 'product-key'])
def test_what_would_use_them_takes_the_other_path(name):
  laws.test_step(name)


def test_convolution_asked_for_by_fft_is_the_dft():
  x, y = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  expected = np.fft.irfft(np.fft.rfft(x) * np.fft.rfft(y), n=8)
  np.testing.assert_allclose(jax.jit(lambda x, y: binding.circular_convolution(x, y, 'fft'))(x, y), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(laws.EVERY))
def test_every_memory_is_traced_with_gradients(name):
  """Nothing that a memory computes, forward or backward, is among what is missing."""
  c = laws.Case(laws.EVERY[name])
  loss = lambda params, x: jnp.sum(laws.call(c.memory, params, x, c.state, c.position)[0])
  jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(c.params, c.x)


@pytest.mark.slow
def test_the_laws_of_the_default_suite():
  """In a process of its own, with the environment's switch: everything was traced without them from the start."""
  command = [sys.executable, '-m', 'pytest', 'tests/laws/test_laws.py', '-m', 'not slow', '-p', 'no:cacheprovider']
  done = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True, check=False,
                        env={**os.environ, 'MEMJAX_TEST_WITHOUT': 'fft,complex,top_k'})
  assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-2000:]
