"""Networks and feature maps of the user's own: registered by name, equal to the loop with `jax.grad`, refused in one line."""
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import ConfigError, UserError
from memjax.config.neural import NeuralNetConfig, NeuralProjConfig
from memjax.ops.neural import Tokens, factors
from memjax.ops.neural_custom import custom, feature_map, feature_width, features
from memjax.ops.neural_reference import reference
from memjax.ops.neural_scan import mix
from tests.ops.neural_cases import furthest, problem, rule, run


def two_branches(ops, x):
  """A norm, a residual, biases, gains and slow tensors: everything that the interpreters know."""
  h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)
  h = jnp.tanh(ops.bias('b_up', ops.linear('up', h))) * ops.scale('g_side', ops.linear('side', x))
  return ops.linear('down', h) * ops.slow('share')[None, :, None] + jnp.sin(x)


BRANCHES = dict(fast=lambda K, V: {'up': (K, 5), 'b_up': (5,), 'side': (K, 5), 'g_side': (5,), 'down': (5, V)},
                slow=lambda K, V: {'share': (V,)})
custom('two_branches', two_branches, **BRANCHES)
custom('twice', lambda ops, x: ops.linear('w', ops.linear('w', x)), fast=lambda K, V: {'w': (K, V)})
custom('unused', lambda ops, x: ops.linear('w', x), fast=lambda K, V: {'w': (K, V), 'more': (K, V)})
custom('narrow', lambda ops, x: ops.linear('w', x), fast=lambda K, V: {'w': (K, 1)})
feature_map('with_squares', lambda x: jnp.concatenate([x, x * x], -1))

CASES = {'token': (rule(kind='custom', function='two_branches', slow_gain=True, clip=.5), {'chunk': 4}),
         'plain-zero-before': (rule('nesterov', kind='custom', function='two_branches', residual=False, decay_to='zero', read='before'),
                               {'chunk': 4, 'window': 3}),
         'block': (rule('muon', mode='block', kind='custom', function='two_branches'), {'chunk': 8})}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_chunks_equal_the_loop(name):
  given, options = CASES[name]
  with jax.enable_x64():
    arguments = problem(given)
    (out, grads), (want, want_grads) = run(mix, given, arguments, **options), run(reference, given, arguments, **options)
  assert furthest(out, want) <= 1e-12
  assert furthest(grads, want_grads) <= 1e-10


@pytest.mark.parametrize(('name', 'says'), [('twice', "uses 'w' twice"), ('unused', "does not use 'more'"),
                                            ('narrow', r'gives \[2, 2, 14, 1\], not \[2, 2, 14, 4\]')])
def test_what_raises_when_a_program_is_traced(name, says):
  given = rule(kind='custom', function=name, residual=False)
  (fast, slow), _, (_, key, value), found = problem(given)
  weights = {tensor: np.repeat(a[None], 2, 0) for tensor, a in fast.items()}
  with jax.enable_x64(), pytest.raises(ValueError, match=says):
    jax.eval_shape(lambda: factors(given, weights, slow, Tokens(key, value, *[found.theta] * 2)))


@pytest.mark.parametrize(('build', 'says'), [
    (lambda: custom('twice', two_branches, **BRANCHES), "network 'twice' cannot be registered: names are identifiers that are not in use"),
    (lambda: custom('a b', two_branches, **BRANCHES), "network 'a b' cannot be registered"),
    (lambda: custom('new', two_branches, fast=lambda K, V: {'up': (5,)}), "fast tensor 'up' of network 'new': names of vectors, and of no"),
    (lambda: custom('new', two_branches, fast=lambda K, V: {'b_up': (K, V)}), "fast tensor 'b_up' of network 'new'"),
    (lambda: custom('new', two_branches, fast=lambda K, V: {'gain': (V,)}), "fast tensor 'gain' of network 'new'"),
    (lambda: custom('new', two_branches, fast=lambda K, V: {'up': (K, V, 1)}), "fast tensor 'up' of network 'new' has 3 axes"),
    (lambda: feature_map('polynomial', jnp.sin), "feature map 'polynomial' cannot be registered")])
def test_bad_registrations(build, says):
  with pytest.raises(UserError) as caught: build()
  assert says in str(caught.value) and '\n' not in str(caught.value)


def test_unknown_names_have_a_neighbour():
  for build, says in ((lambda: NeuralNetConfig(kind='custom', function='two_branch'), "did you mean 'two_branches'?"),
                      (lambda: NeuralProjConfig(features='with_square'), "did you mean 'with_squares'?")):
    with pytest.raises(ConfigError, match=r'is not registered') as caught: build()
    assert says in str(caught.value) and 'neural_custom' in str(caught.value)


@pytest.mark.parametrize('degree', [3, *(pytest.param(degree, marks=pytest.mark.slow) for degree in (2, 4))])
def test_polynomial_features_are_a_kernel(degree):
  """Their products are the series of exp, of unit vectors of length 1; monomials by hand."""
  x, y = np.random.default_rng(0).normal(size=(2, 6, 3))
  with jax.enable_x64():
    phi = lambda a: np.asarray(features(jnp.asarray(a), 'polynomial', degree))
    series = lambda inner: sum(inner ** n / math.factorial(n) for n in range(1, degree + 1))
    np.testing.assert_allclose(phi(x) @ phi(y).T, series(x @ y.T) / series(1), rtol=1e-12)
    made = phi(x)
  assert made.shape[1] == feature_width(3, 'polynomial', degree) == sum(math.comb(2 + n, n) for n in range(1, degree + 1))
  index = [power for n in range(1, degree + 1) for power in itertools.combinations_with_replacement(range(3), n)]
  one = index.index((0, 2))
  np.testing.assert_allclose(made[:, one], x[:, 0] * x[:, 2] / series(1) ** .5, rtol=1e-12)


def test_features_by_name():
  assert feature_width(4, '') == 4 and feature_width(4, 'with_squares') == 8
  np.testing.assert_allclose(features(jnp.array([2.0, 3.0]), 'with_squares'), [2, 3, 4, 9])
