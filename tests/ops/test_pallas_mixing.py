"""The fused kernels of holographic mixing, interpreted: values against loops, gradients against the XLA path, in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import binding, pallas_mixing
from memjax.ops.mixing import holographic_mix, is_fused
from tests.ops.inputs import gpu_text, make, quick, truth
from tests.ops.oracle import relative, rms

CASES = {          # binding, transform, keep, order, slots, reset, mask, whether one program takes a row
    'hrr-dft-slot-before': ('hrr', 'dft', 'slot', 'before', 5, True, True, False),
    'bipolar-head': ('bipolar', '', 'head', 'after', 8, False, True, False),
    'bipolar-head-row': ('bipolar', '', 'head', 'after', 8, True, True, True),
    'phasor-none': ('phasor', '', 'none', 'after', 16, False, False, False),
    'hlb-head-before': ('hlb', '', 'head', 'before', 3, False, True, False),
    'unitary-static': ('unitary', 'folded', 'static', 'after', 4, True, False, False),
    'unitary-none-reset': ('unitary', 'folded', 'none', 'after', 4, True, True, True),
    'phasor-slot-row': ('phasor', '', 'slot', 'after', 4, False, False, True),
    'bipolar-static-head': ('bipolar', '', 'static_head', 'after', 4, True, False, False),
}
QUICK = ('bipolar-head',)


def cast(tree, dtype):
  """Floating arrays in another dtype."""
  return jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == 'f' else x, tree)


def items(name, *, L=15, K=8):
  """(vectors, arguments of `slot_mix` without bound, options) of a case."""
  kind, transform, keep, order, S, reset, mask, _ = CASES[name]
  (state, _, address, pick), options = make(keep=keep, L=L, S=S, K=K, reset=reset, mask=mask)
  rng = np.random.default_rng(5)
  key, value, query = (rng.normal(size=(2, L, *groups, 2, K)) for groups in ((), (), (1,)))
  return (key, value, query), (state, address, pick), {**options, 'order': order, 'binding': kind, 'transform': transform, 'floor': -1.0}


def loop(vectors, arguments, options):
  """State and reads by the loop over tokens, with numpy around it."""
  kind, transform = options['binding'], options['transform']
  (key, value, query), (state, address, pick) = vectors, arguments
  if transform == 'dft':
    scale = np.asarray(binding.spectrum_scale(key.shape[-1], jnp.float64))
    key, value, query = (x @ np.asarray(binding.dft_matrix(key.shape[-1], jnp.float64)) for x in vectors)
    key, query = key * scale, query * scale
  bound = np.asarray(binding.bind(kind, jnp.asarray(key), jnp.asarray(value)))
  state, mixed = truth((state, bound, address, pick), options, order=options['order'])
  reads = np.asarray(binding.unbind(kind, jnp.asarray(query), jnp.asarray(mixed)))
  return state, reads @ np.asarray(binding.dft_matrix(key.shape[-1], jnp.float64)).T if transform == 'dft' else reads


def run(vectors, arguments, options, *, backends=('xla', 'pallas'), compiled=quick):
  """Per backend: (state, reads), and gradients of a random functional of them by every floating input."""
  def all_of(vectors, arguments, options):
    def loss(vectors, arguments, log_keep, backend):
      out = holographic_mix(arguments[0], vectors, *arguments[1:], **{**static, **options, 'log_keep': log_keep}, chunk=4, backend=backend)
      return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in out), out
    log_keep = options.pop('log_keep')
    wanted = (0, 1, 2) if log_keep is not None else (0, 1)
    results = [jax.value_and_grad(loss, wanted, has_aux=True)(vectors, arguments, log_keep, backend) for backend in backends]
    return [(out, jax.tree.leaves(grads)) for (_, out), grads in results]
  static = {name: x for name, x in options.items() if isinstance(x, str | float)}
  return compiled(all_of)(vectors, arguments, {name: x for name, x in options.items() if name not in static})


@pytest.mark.parametrize('name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_kernels_equal_the_loop(name, monkeypatch):
  """Outputs, final state and all gradients, with resets, masks, a carried state, two chunks a segment that do not divide the row."""
  for launch in ('SMALL', 'SPECTRA'):
    monkeypatch.setattr(pallas_mixing, launch, pallas_mixing.SMALL._replace(programs=1 if CASES[name][-1] else 8))
  vectors, arguments, options = items(name)
  with jax.enable_x64():
    want = loop(vectors, arguments, options)
    (_, right), (got, grads) = run(vectors, arguments, options)
  for x, y in zip(got, want, strict=True): assert relative(x, y) <= 1e-12
  for x, y in zip(grads, right, strict=True): assert relative(x, y) <= 1e-10


@pytest.mark.slow
def test_no_gradient_crosses_a_reset(monkeypatch):
  """Exactly zero, also for the keep of the token that starts a document; the state after it does not know the past."""
  monkeypatch.setattr(pallas_mixing, 'SMALL', pallas_mixing.SMALL._replace(programs=8))
  vectors, arguments, options = cast(items('bipolar-head-row'), np.float32)
  options |= {'mask_BxL': None, 'reset_BxL': np.tile(np.arange(15) == 6, (2, 1))}
  def late(vectors, arguments, log_keep):
    state, y = holographic_mix(arguments[0], vectors, *arguments[1:], **{**options, 'log_keep': log_keep}, chunk=4, backend='pallas')
    return jnp.sum(state ** 2) + jnp.sum(y[:, 6:] ** 2)
  dvectors, (dstate, *dslots), dlog = jax.jit(jax.grad(late, (0, 1, 2)))(vectors, arguments, options['log_keep'])
  assert not np.any(dstate)
  for x in (*dvectors, *dslots, dlog): assert not np.any(x[:, :6]) and np.any(x[:, 7:])
  assert not np.any(dlog[:, 6])


@pytest.mark.slow
def test_bf16_and_masked_tokens():
  """bf16 in, fp32 state; masked tokens leave the state bit-equal even where they are NaN."""
  vectors, arguments, options = cast(items('bipolar-head-row', L=64, K=16), np.float32)
  low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (vectors, arguments[1:]))
  wide = jax.tree.map(lambda x: x.astype(np.float32), low)
  (want, _), = run(wide[0], (arguments[0], *wide[1]), dict(options), backends=('xla',), compiled=jax.jit)
  ((state, y), grads), = run(low[0], (arguments[0], *low[1]), dict(options), backends=('pallas',), compiled=jax.jit)
  assert state.dtype == jnp.float32 and y.dtype == jnp.bfloat16 and all(np.all(np.isfinite(x)) for x in grads)
  assert rms(y, want[1]) <= 2e-2 and rms(state, want[0]) <= 2e-2
  lost = jax.tree.map(lambda x: jnp.where(jnp.arange(64).reshape(-1, *(1,) * (x.ndim - 2)) < 40, x, jnp.nan), low)
  options['mask_BxL'] = np.tile(np.arange(64) < 40, (2, 1))
  short = jax.tree.map(lambda x: x[:, :40], low)
  flow = {name: None if x is None else x[:, :40] for name, x in options.items() if name in ('log_keep', 'reset_BxL', 'mask_BxL')}
  mix = jax.jit(lambda v, s, o: holographic_mix(arguments[0], v, *s, **o, binding='bipolar', chunk=8, backend='pallas'))
  long = mix(*lost, {name: options[name] for name in flow})
  alone = mix(*short, flow)
  assert np.array_equal(long[0], alone[0]) and np.array_equal(long[1][:, :40], alone[1]) and not np.any(long[1][:, 40:])


def test_what_kernels_cannot_do_is_refused(monkeypatch):
  vectors, (state, address, pick), options = cast(items('bipolar-head-row'), np.float32)
  mix = lambda **more: jax.eval_shape(lambda: holographic_mix(state, vectors, address, pick, **{**options, 'backend': 'pallas', **more}))
  wide = (*vectors[:2], np.repeat(vectors[2], 2, 2))
  for more, words in [({'binding': 'none'}, 'binding none'), ({'form': 'scan'}, 'chunked form'), ({'axis': 'sequence'}, 'pieces'),
                      ({'binding': 'hrr', 'transform': 'fft'}, 'fft'), ({'backend': 'cuda'}, 'unknown backend'),
                      ({'log_keep': np.zeros((1, 1, 2, 8)), 'floor': -20.0}, 'factored')]:
    with pytest.raises(UserError, match=words): mix(**more)
  with pytest.raises(UserError, match='read group'): holographic_mix(state, wide, address, pick, binding='bipolar', backend='pallas')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(UserError, match='powers of two'): mix()


def test_auto_takes_kernels_where_they_were_timed(monkeypatch):
  def auto(K=64, S=8, G=1, dtype=jnp.bfloat16, **more):
    query, address = jax.ShapeDtypeStruct((2, 64, G, 2, K), dtype), jax.ShapeDtypeStruct((2, 64, 2, S), dtype)
    return is_fused('auto', query, address, **{'binding': 'phasor', **more})
  assert not auto()                                              # a CPU would interpret
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert auto() and auto(S=64) and auto(binding='bipolar', K=16) and auto(chunk=32)
  refused = (dict(dtype=jnp.float32), dict(K=128), dict(S=65), dict(K=48), dict(K=16), dict(G=2), dict(binding='none'), dict(chunk=24))
  assert not any(auto(**more) for more in refused)
  mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh): assert not auto()                     # opaque to the compiler, unless each device has rows of its own


@pytest.mark.parametrize(('kind', 'S', 'keep'), [('hrr', 8, 'slot'), pytest.param('phasor', 64, 'head', marks=pytest.mark.slow)])
def test_kernels_lower_for_a_gpu(kind, S, keep, monkeypatch):
  """To Triton, forward and backward, at the sizes of the benchmark: blocks are powers of two, every operation exists there."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype)
  B, L, H, K = 2, 1024, 16, 64
  vectors = (shape(B, L, H, K), shape(B, L, H, K), shape(B, L, 1, H, K))
  log_keep = shape(B, L, H, 1 if keep == 'head' else S, dtype=jnp.float32)
  def loss(vectors, slots, log_keep, state, reset):
    state, y = holographic_mix(state, vectors, *slots, binding=kind, transform='dft' if kind == 'hrr' else 'folded', backend='auto',
                               log_keep=log_keep, reset_BxL=reset, floor=-2.5)
    return jnp.sum(state) + jnp.sum(jnp.square(y.astype(jnp.float32)))
  arguments = (vectors, (shape(B, L, H, S), shape(B, L, 1, H, S)), log_keep, shape(B, H, S, K, dtype=jnp.float32), shape(B, L, dtype=bool))
  assert gpu_text(jax.grad(loss, (0, 1, 2, 3)), *arguments).count('xla.gpu.triton') == 4
