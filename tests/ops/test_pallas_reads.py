"""The fused reads of a neural memory, interpreted, against the XLA form; both see coefficients of gates that are 0 and 1 here and there."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import Network
from memjax.ops.neural_reads import Prepared, read_prepared
from memjax.ops.neural_steps import Coefficients, coefficients
from memjax.ops.pallas_reads import Launch, read_prepared_fused, supports
from tests.ops.inputs import gpu_text, quick
from tests.ops.neural_cases import furthest, gates, rule

TINY = Launch(*[(4, 16, 1)] * 4, chunks=2)
SIZES = dict(key_width=16, value_width=16, hidden=32)
CASES = {                                     # rule, rows of the learned start
    'none': (rule('none', slow_gain=True, **SIZES), 1),
    'first': (rule(slow_gain=True, **SIZES), 1),
    'fast-gain': (rule(**SIZES), 1),
    'none-zero-tanh': (rule('none', decay_to='zero', activation='tanh', **SIZES), 2),
    'zero-slow-gain': (rule(decay_to='zero', slow_gain=True, **SIZES), 2),
    'cascade-relu': (rule('cascade', order=2, activation='relu', **SIZES), 2),
    'nesterov-three-blocks': (rule('nesterov', **{**SIZES, 'hidden': 64}), 2),
}


def problem(given: Rule, rows: int, N=2, H=2, C=16):
  """(learned start, seen, query, coefficients) of N chunks of as many rows, float64."""
  rng, net, Q = np.random.default_rng(0), given.network, given.levels
  (K, F), V = net.widths[0], net.value_width
  draw = lambda *shape, scale=1.0: scale * rng.normal(size=(N * rows, H, *shape))
  home = Weights({name: draw(*shape, scale=shape[0] ** -.5)[:rows] for name, shape in net.fast.items()},
                 {name: draw(*shape)[0] for name, shape in net.slow.items()})
  seen = Prepared({'w_0': draw(C, K), 'w_1': draw(C, F)},
                  {'w_0': (draw(Q * K + C, F, scale=.1),), 'w_1': (draw(F, Q * V, scale=.1), draw(C, V, scale=.1)),
                   **({} if net.slow_gain else {'gain': (draw(Q, V), draw(C, V))})})
  made = coefficients(given.momentum, jax.tree.map(jnp.asarray, gates(rng, (N * rows, H, C), order=given.order)))
  return home, seen, draw(C, K), (np.asarray(made.weigh), np.asarray(made.reach))


def run(given: Rule, arguments, *, fused, rows=None, compiled=quick):
  """(y, gradients of the learned start, what is seen, queries, weigh and reach)."""
  *rest, (weigh, reach) = arguments
  def value(start, seen, query, weigh, reach):
    form, more = (read_prepared_fused, {'launch': TINY, 'rows': rows}) if fused else (read_prepared, {})
    y = form(given, start, seen, query, coefficients=Coefficients(weigh, reach, None, None), **more)
    return jnp.sum(jnp.sin(3 * y.astype(jnp.promote_types(jnp.float32, y.dtype)))), y
  (_, y), grads = compiled(jax.value_and_grad(value, range(5), has_aux=True))(*rest, weigh, reach)
  return y, grads


@pytest.mark.parametrize('name', [n if n == 'none' else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_kernels_equal_the_plain_form(name):
  """Values and the gradients of all that is read; chunks of one learned start are summed in several programs."""
  given, rows = CASES[name]
  with jax.enable_x64():
    arguments = problem(given, rows)
    (y, grads), (want, want_grads) = (run(given, arguments, fused=fused, rows=rows) for fused in (True, False))
  assert furthest(y, want) <= 1e-12
  assert furthest(grads, want_grads) <= 1e-10


@pytest.mark.slow
def test_rows_may_share_one_learned_start():
  """The same as equal starts of all rows, with gradients that add up; more groups of chunks than one."""
  given = CASES['first'][0]
  with jax.enable_x64():
    home, *rest = problem(given, 2, N=6)
    shared = home._replace(fast={name: a[:1] for name, a in home.fast.items()})
    y, (one, *grads) = run(given, (shared, *rest), fused=True, rows=3)
    each = home._replace(fast={name: np.repeat(a, 2, 0) for name, a in shared.fast.items()})
    want, (many, *want_grads) = run(given, (each, *rest), fused=False)
  assert furthest((y, grads, one.slow), (want, want_grads, many.slow)) <= 1e-10
  assert furthest(one.fast, {name: np.asarray(a).sum(0, keepdims=True) for name, a in many.fast.items()}) <= 1e-10


@pytest.mark.slow
def test_narrow_operands():
  """bf16 matrices: not further from float64 than the plain form is, reads as wide as queries; float32 near float64."""
  given, rows = CASES['fast-gain']
  with jax.enable_x64():
    arguments = problem(given, rows)
    want = jax.tree.map(np.asarray, run(given, arguments, fused=False))
  is_matrix = lambda path: any(key in str(path) for key in ('w_0', 'w_1'))
  for dtype in (jnp.float32, jnp.bfloat16):
    cast = lambda path, a, dtype=dtype: jnp.asarray(a, dtype if is_matrix(path) else jnp.float32)
    home, seen, query, made = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arguments)
    low = home, jax.tree_util.tree_map_with_path(cast, seen), query.astype(dtype), made
    ours, plain = (run(dataclasses.replace(given, dtype=dtype), low, fused=fused, compiled=jax.jit) for fused in (True, False))
    assert ours[0].dtype == dtype
    for got, other, true in zip(*map(jax.tree.leaves, (ours, plain, want)), strict=True):
      wrong = [np.sqrt(np.mean((np.asarray(a, np.float64) - true) ** 2) / np.mean(np.square(true))) for a in (got, other)]
      assert wrong[0] <= (1e-5 if dtype == jnp.float32 else 1.5 * wrong[1] + 2e-3)


def test_what_kernels_can_read():
  weigh = lambda *shape: jax.ShapeDtypeStruct((8, 2, *shape), jnp.float32)
  fits = lambda weigh, **options: supports(rule(**{**SIZES, **options}), weigh)
  for options in ({}, {'slow_gain': True}, {'activation': 'relu'}, {'decay_to': 'zero'}, {'clip': .5}, {'gram': True}, {'loss': 'dot'}):
    assert fits(weigh(16, 16), **options)
  for shape in ((24, 24), (8, 8), (128, 128), (16, 18), (16, 32)): assert not fits(weigh(*shape))
  for options in ({'kind': 'swiglu'}, {'depth': 3}, {'depth': 1}, {'bias': True}, {'residual': False}, {'hidden': 48},
                  {'hidden': 16}, {'activation': 'gelu'}, {'key_width': 8, 'value_width': 8}):
    assert not fits(weigh(16, 16), **options)


@pytest.mark.slow
@pytest.mark.parametrize('options', [{'slow_gain': True}, {'activation': 'relu'}, {'activation': 'tanh'}])
def test_kernels_lower_for_a_gpu(monkeypatch, options):
  """To Triton, forward and backward, at the sizes of the benchmark: every operation exists there."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  given, H, C, K, F, Q = Rule(Network(64, 64, **options), dtype=jnp.bfloat16), 2, 64, 64, 256, 2
  shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((4, H, *size), dtype)
  wide = lambda *size: shape(*size, dtype=jnp.float32)
  home = Weights({name: wide(*size) for name, size in given.network.fast.items()},
                 {name: jax.ShapeDtypeStruct((H, *size), jnp.float32) for name, size in given.network.slow.items()})
  seen = Prepared({'w_0': shape(C, K), 'w_1': shape(C, F)},
                  {'w_0': (shape(Q * K + C, F),), 'w_1': (shape(F, Q * K), shape(C, K)),
                   **({} if given.network.slow_gain else {'gain': (wide(Q, K), wide(C, K))})})
  def value(start, seen, query, weigh, reach):
    made = Coefficients(weigh, reach, None, None)
    return jnp.sum(read_prepared_fused(given, start, seen, query, coefficients=made).astype(jnp.float32))
  assert supports(given, wide(C, C)) and not supports(dataclasses.replace(given, dtype=jnp.float32), wide(C, C))
  assert gpu_text(jax.grad(value, range(5)), home, seen, shape(C, K), wide(C, C), wide(Q, C)).count('xla.gpu.triton') == 4
