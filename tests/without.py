"""A machine without FFT, complex numbers and top-k, as some plugins leave it: what it lacks raises where it is traced or run.

`MEMJAX_TEST_WITHOUT=fft,complex,top_k pytest tests/laws` runs the laws on it.
"""
import functools
import os

import jax
import jax.numpy as jnp

from memjax.ops import binding, top_k

LACKING = ('fft', 'complex', 'top_k')
PRIMITIVES = {'fft': ('fft_p',), 'complex': ('complex_p', 'real_p', 'imag_p', 'conj_p'), 'top_k': ('top_k_p',)}


def wanted():
  """What the environment asks to be without."""
  return tuple(part for part in os.environ.get('MEMJAX_TEST_WITHOUT', '').split(',') if part)


def take_away(names, setattr=setattr):
  """Makes the operations raise, and forgets what was compiled with them and what was probed."""
  def missing(name):
    def bind(*args, **kwargs): raise NotImplementedError(f'UNIMPLEMENTED: this machine has no {name}')
    return bind
  for name in names:
    for primitive in PRIMITIVES[name]: setattr(getattr(jax.lax, primitive), 'bind', missing(name))
  if 'complex' in names: setattr(jax.lax.convert_element_type_p, 'bind', functools.partial(_convert, jax.lax.convert_element_type_p.bind))
  forget()


def _convert(bind, *args, **params):
  if jnp.issubdtype(params['new_dtype'], jnp.complexfloating): raise NotImplementedError('UNIMPLEMENTED: this machine has no complex64')
  return bind(*args, **params)


def forget():
  """Nothing is remembered of the machine as it was."""
  jax.clear_caches()
  binding.has_fft.cache_clear()
  top_k.has_top_k.cache_clear()
