"""The kernel of one holographic token, interpreted, against the plain form."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.mixers import BindingConfig, FormConfig, HolographicConfig, KeepConfig, ReadConfig
from memjax.memory.registry import make_memory
from memjax.ops.pallas_step import _plain, pallas_step, plan_step
from tests.laws.test_laws import parameters
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest

B, H = 3, 2
FRESH, WRITTEN = np.array([True, False, False]), np.array([True, True, False])
CASES = {          # binding, keeps a head (0: none), rows of keeps, order, slots, width, rows that start and write
    'phasor-slot-before': ('phasor', 8, B, 'before', 8, 12, True),
    'hrr-head': ('hrr', 1, B, 'after', 4, 10, True),
    'unitary-static': ('unitary', 4, 1, 'after', 4, 12, False),
    'bipolar': ('bipolar', 0, B, 'after', 1, 5, True),
    'hlb-before': ('hlb', 1, B, 'before', 2, 8, False),
    'phasor-many-slots': ('phasor', 1, B, 'after', 256, 64, False),
}


def problem(name):
  """(plan, state, (key, value, query), (address, pick), log keep) of a case, float64."""
  kind, keeps, rows, order, S, K, _ = CASES[name]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=(B, H, *shape))
  log = -rng.uniform(size=(rows, H, keeps)) if keeps else None
  return plan_step(kind, S, K, order=order), draw(S, K), [draw(K) for _ in range(3)], [draw(S) for _ in range(2)], log


def run(problem, flags, form):
  """((slots, reads), gradients of a functional of them by all that is floating)."""
  plan, *rest = problem
  def value(state, vectors, slots, log):
    out = form(plan, state, vectors, slots, log, flags)
    return sum(jnp.sum(jnp.sin(x)) for x in out), out
  (_, out), grads = jax.value_and_grad(value, (0, 1, 2, 3) if rest[-1] is not None else (0, 1, 2), has_aux=True)(*rest)
  return out, grads


def kernel(plan, state, vectors, slots, log, flags):
  return pallas_step(plan, state, vectors, slots, log_keep=log, **flags)


def plain(plan, state, vectors, slots, log, flags):
  arrays = dict(zip(('key', 'value', 'query', 'address', 'pick'), (*vectors, *slots), strict=True))
  out = _plain(plan, {'state': state, **arrays, **({} if log is None else {'log': log})}, {n.removesuffix('_B'): x for n, x in flags.items()})
  return out['state'], out['y']


@pytest.mark.parametrize('name', CASES)
def test_kernel_equals_the_plain_form(name):
  """Slots, reads and gradients."""
  with jax.enable_x64():
    given = problem(name)
    flags = {'fresh_B': jnp.asarray(FRESH), 'written_B': jnp.asarray(WRITTEN)} if CASES[name][-1] else {}
    found, want = (quick(lambda form=form: run(given, flags, form))() for form in (kernel, plain))
    assert furthest(found, want) <= 1e-12
