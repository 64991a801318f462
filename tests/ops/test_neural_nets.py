"""Memory networks and inner losses against their formulas in numpy, and every network in chunks against the loop (property 1)."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural_nets import Network, Plain, inner_loss
from memjax.ops.neural_reference import reference
from memjax.ops.neural_scan import mix
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, problem, rule, sigmoid, start_of

K, F, R, H, C = 4, 6, 3, 2, 5
ACTS = {'silu': lambda x: x * sigmoid(x), 'relu': lambda x: np.maximum(x, 0), 'tanh': np.tanh,
        'gelu': lambda x: x * .5 * (1 + np.vectorize(math.erf)(x / 2 ** .5))}
softmax = lambda x: np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def formula(net, w, x):
  """M(x) of one row and head, [C, V], from the table of specification section 6."""
  act, n = ACTS[net.activation], net.depth
  if net.kind in ('linear', 'mlp'):
    y = x
    for i in range(1 if net.kind == 'linear' else n): y = (act(y) if i else y) @ w[f'w_{i}'] + (w[f'b_{i}'] if net.bias else 0)
  elif net.kind == 'swiglu': y = (ACTS['silu'](x @ w['gate']) * (x @ w['up'])) @ w['down']
  elif net.kind == 'gated':
    y = x
    for i in range(n):
      u = act(y @ w[f'up_{i}']) @ w[f'down_{i}']
      y = y + sigmoid(u @ w[f'new_{i}'] + y @ w[f'old_{i}']) * (u - y)
    y = y @ w['out']
  elif net.kind in ('factorised', 'low_rank'):
    y = x
    for i in range(n):
      whole = w[f'u_{i}'] @ w[f'v_{i}'] + (w[f's_{i}'] if net.kind == 'low_rank' else 0)
      y = (act(y) if i else y) @ whole
  else:
    unit = lambda a: a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6)
    score = 8 * unit(x @ w['query']) @ unit(x @ w['key']).T
    y = softmax(np.where(np.tril(np.ones((C, C))) > 0, score, -np.inf)) @ (x @ w['value']) + act(x @ w['up']) @ w['down']
  if not net.residual: return y
  y = y - y.mean(-1, keepdims=True)
  return x + (1 + w['gain']) * y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)


NETS = {'linear': dict(bias=True, residual=False), 'mlp': dict(depth=3, bias=True, activation='gelu'), 'swiglu': dict(slow_gain=True),
        'gated': dict(activation='tanh'), 'factorised': dict(depth=3), 'low_rank': dict(activation='relu', residual=False),
        'attention': dict(activation='gelu')}


@pytest.mark.parametrize('kind', NETS)
def test_networks_are_their_formulas(kind):
  rng = np.random.default_rng(0)
  net = Network(K, K, kind, hidden=F, rank=R, **NETS[kind])
  draw = lambda shapes: {name: rng.normal(size=(H, *shape)) for name, shape in shapes.items()}
  fast, slow, x = draw(net.fast), draw(net.slow), rng.normal(size=(1, H, C, K))
  with jax.enable_x64():
    wide = jax.tree.map(jnp.asarray, (fast, slow))
    y = quick(lambda x: net(Plain({name: a[None] for name, a in wide[0].items()}, wide[1], jnp.float64), x))(x)
  want = np.stack([formula(net, {name: a[h] for name, a in {**fast, **slow}.items()}, x[0, h]) for h in range(H)])
  assert furthest(y[0], want) <= 1e-13


@pytest.mark.parametrize(('kind', 'argument'), [('l2', 0), ('dot', 0), ('huber', .7), ('lp', 1.5), ('kl', 0)])
def test_inner_losses_are_their_formulas(kind, argument):
  """With their gradients by differences; l2 and huber meet inside."""
  p, v = np.random.default_rng(1).normal(size=(2, 7, K))
  def want(p):
    e = p - v
    if kind == 'l2': return .25 * (e * e).sum(-1)
    if kind == 'dot': return -(p * v).sum(-1)
    if kind == 'huber': return .25 * np.where(abs(e) < argument, e * e, 2 * argument * abs(e) - argument ** 2).sum(-1)
    if kind == 'lp': return .25 * ((e * e + 1e-6) ** (argument / 2)).sum(-1)
    return (softmax(v) * (np.log(softmax(v)) - np.log(softmax(p)))).sum(-1)
  with jax.enable_x64():
    value = lambda p: inner_loss(kind, p, jnp.asarray(v), scale=.25, argument=argument)
    got, grad = value(jnp.asarray(p)), jax.grad(lambda p: jnp.sum(value(p)))(jnp.asarray(p))
  assert furthest(got, want(p)) <= 1e-13
  step = 1e-6 * np.eye(K)
  slope = np.stack([(want(p + one) - want(p - one)) / 2e-6 for one in step], -1)
  assert furthest(grad, slope) <= 1e-8


GRID = {**{f'mlp-{n}': dict(depth=n) for n in (1, 2, 3, 4)}, 'linear': dict(kind='linear', residual=False),
        **{kind: dict(kind=kind) for kind in ('swiglu', 'gated', 'factorised', 'low_rank')}}


@pytest.mark.slow
@pytest.mark.parametrize('decay', ['init', 'zero'])
@pytest.mark.parametrize('net', GRID)
def test_every_network_in_chunks_of_every_size(net, decay):
  given, L = rule(decay_to=decay, **GRID[net]), 18
  with jax.enable_x64():
    (fast, slow), memory, tokens, gates = jax.tree.map(jnp.asarray, problem(given, L=L, seed=2))
    if decay == 'zero': gates = gates._replace(alpha=gates.alpha / 32)      # memories that die round by norms of almost nothing
    def loop(chunk): return reference(given, start_of(fast, slow, 2), memory, tokens, gates=gates, chunk=chunk)
    loop = quick(loop)
    for chunk in (1, 8, 16):
      got = quick(lambda chunk=chunk: mix(given, start_of(fast, slow, 2), memory, tokens, gates=gates, chunk=chunk))()
      assert furthest(got, loop(chunk)) <= 1e-12, chunk
