"""The kernel of one holographic token, interpreted, against the plain form."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.mixers import BindingConfig, FormConfig, HolographicConfig, KeepConfig
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


def kernel(plan, state, vectors, slots, log, flags):
  return pallas_step(plan, state, vectors, slots, log_keep=log, **flags)


def plain(plan, state, vectors, slots, log, flags):
  arrays = {'state': state, **dict(zip(('key', 'value', 'query', 'address', 'pick'), (*vectors, *slots), strict=True))}
  if log is not None: arrays['log'] = log
  out = _plain(plan, arrays, {n.removesuffix('_B'): x for n, x in flags.items()})
  return out['state'], out['y']


@pytest.mark.parametrize('name', [n if n == 'hrr-head' else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_kernel_equals_the_plain_form(name):
  """Slots and reads of rows that start, are written or are not."""
  with jax.enable_x64():
    plan, *given = problem(name)
    flags = {'fresh_B': jnp.asarray(FRESH), 'written_B': jnp.asarray(WRITTEN)} if CASES[name][-1] else {}
    found, want = (quick(lambda *given, form=form: form(plan, *given, flags))(*given) for form in (kernel, plain))
    state = np.asarray(found[0])
    assert furthest(found, want) <= 1e-12
  if flags: assert np.array_equal(state[~WRITTEN], given[0][~WRITTEN])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['phasor-slot-before', 'unitary-static'])
def test_gradients_are_those_of_the_plain_form(name):
  """Of all that is floating, through slots and reads."""
  with jax.enable_x64():
    plan, *given = problem(name)
    def value(state, vectors, slots, log, form):
      return sum(jnp.sum(jnp.sin(x)) for x in form(plan, state, vectors, slots, log, {'fresh_B': jnp.asarray(FRESH)}))
    found, want = (quick(lambda *given, form=form: jax.grad(value, (0, 1, 2, 3))(*given, form))(*given) for form in (kernel, plain))
  assert furthest(found, want) <= 1e-12 and all(np.any(a) for a in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize('changes', [{}, {'binding': BindingConfig(kind='hrr'), 'keep': KeepConfig(kind='slot')}], ids=['phasor', 'hrr'])
def test_decoding_equals_the_form_in_chunks(changes):
  """Reads and state, all by kernels."""
  L, D = 9, 16
  x, position = np.random.default_rng(0).normal(size=(B, L, D)), np.tile(np.arange(L), (B, 1))
  with jax.enable_x64():
    module = make_memory(HolographicConfig(heads=H, form=FormConfig(backend='pallas', chunk=4), **changes), D, dtype=jnp.float64)
    cast = lambda a: jnp.asarray(a, jnp.float64)
    params = jax.tree.map(cast, parameters(module, x[:, :1], module.init_state(B), position[:, :1]))
    def token(state, item):
      y, state, _ = module.apply(params, item[0][:, None], state, position_BxL=item[1][:, None], method='mix')
      return state, y[:, 0]
    turned = jnp.swapaxes(jnp.asarray(x), 0, 1), jnp.swapaxes(jnp.asarray(position), 0, 1)
    state, y = quick(lambda: jax.lax.scan(token, module.init_state(B), turned))()
    want, end, _ = quick(lambda: module.apply(params, x, module.init_state(B), position_BxL=position, method='mix'))()
    assert 'step_kernel' in str(jax.make_jaxpr(lambda: token(module.init_state(B), (x[:, 0], position[:, 0])))())
  assert furthest((jnp.swapaxes(y, 0, 1), state), (want, end)) <= 1e-11


@pytest.mark.slow
def test_narrow_vectors():
  """Not further from float64 than the plain form is, in bfloat16; slots in float32."""
  with jax.enable_x64():
    plan, *given = problem('phasor-slot-before')
    want = jax.tree.map(np.asarray, plain(plan, *given, {}))
  narrow = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
  state, vectors, slots, log = given
  low = jnp.asarray(state, jnp.float32), narrow(vectors), narrow(slots), jnp.asarray(log, jnp.float32)
  found, other = (jax.jit(lambda *given, form=form: form(plan, *given, {}))(*low) for form in (kernel, plain))
  assert (found[0].dtype, found[1].dtype) == (jnp.float32, jnp.bfloat16)
  for ours, theirs, true in zip(found, other, want, strict=True):
    wrong = [np.sqrt(np.mean((np.asarray(a, np.float64) - true) ** 2)) for a in (ours, theirs)]
    assert wrong[0] <= 1.2 * wrong[1] + 1e-3


def test_what_the_kernel_takes():
  """Anything else goes through XLA, as do rows that lie on several devices, and all that is not asked for."""
  takes = lambda *shape: plan_step(*shape, order='after') is not None
  assert takes('phasor', 64, 64) and takes('hrr', 8, 512) and takes('bipolar', 1, 5) and takes('hlb', 4, 7)
  assert not (takes('none', 4, 8) or takes('hrr', 4, 7) or takes('phasor', 6, 8) or takes('bipolar', 12, 8))
  module = lambda backend, **changes: make_memory(HolographicConfig(heads=H, form=FormConfig(backend=backend), **changes), 16)
  uses = lambda *given, **changes: module(*given, **changes).step_plan() is not None
  assert uses('pallas') and not uses('auto') and not uses('xla') and not uses('pallas', slots=6)
  with jax.set_mesh(jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))): assert not uses('pallas')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['phasor', 'unitary', 'bipolar'])
@pytest.mark.parametrize('width', [64, 128])
def test_kernel_lowers_for_a_gpu(monkeypatch, kind, width):
  """To Triton at the sizes of the benchmark: every operation exists there."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((4, 8, *size), dtype)
  flag = jax.ShapeDtypeStruct((4,), bool)
  step = lambda state, vectors, slots, log, fresh, written: pallas_step(
      plan_step(kind, width, width, order='after'), state, vectors, slots, log_keep=log, fresh_B=fresh, written_B=written)
  traced = jax.jit(step).trace(shape(width, width, dtype=jnp.float32), (shape(width),) * 3, (shape(width),) * 2,
                               shape(width, dtype=jnp.float32), flag, flag)
  assert 'step_kernel' in traced.lower(lowering_platforms=('cuda',)).as_text()
