"""`chunk_gates`, and the scan in that mode, against stored outputs of titans-pytorch 0.5.5 in float64 (make_titans_reference.py):
specification 8.3."""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import Network
from memjax.ops.neural_parity import chunk_gates
from memjax.ops.neural_scan import mix
from memjax.ops.neural_steps import Gates
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, sigmoid

B, T, WIDTH, H, CHUNK, LENGTHS = 2, 16, 8, 2, 4, (3, 12, 13, 15, 16)
CASES = {'default': ('first', 0), 'plain': ('none', 0), 'refresh-1': ('first', 1), 'refresh-2': ('first', 2)}
MORE = {'second': ('cascade', 1), 'spectral': ('muon', 0), 'mixed': ('cascade', 0)}           # of which the scan alone has a form


@pytest.fixture(scope='module')
def stored():
  return dict(np.load(Path(__file__).parent / 'titans_pytorch.npz'))


def in_scan(rule, start, tokens, *, theta, chunk_gate, mixture):
  """y by `mix`, from gates [.., H orders, N] of chunks."""
  length, order = tokens[0].shape[2], rule.order or 1
  each = lambda a: jnp.pad(jnp.repeat(a, CHUNK, -1), ((0, 0), (0, 0), (0, length - CHUNK * a.shape[-1])))
  apart = lambda a, count: [each(one) for one in np.moveaxis(a.reshape(B, H, count, -1), 2, 0)]
  eta, *higher = apart(chunk_gate[0], order)
  mixed = tuple(apart(mixture, order + 1)) if order > 1 else ()
  gates = Gates(theta, eta, each(chunk_gate[1]), jnp.ones_like(theta, bool), tuple(higher), mixed)
  memory = {name: jnp.zeros((B, H, rule.levels, *a.shape[2:])) for name, a in start.fast.items()}
  return mix(rule, start, memory, tokens, gates=gates, chunk=CHUNK)[1]


def mixture_of(p, pooled):
  """What the package makes of two momenta and of the gradient, [B, H 3, N]: the second momentum alone, or learned."""
  name = 'to_learned_momentum_combine.0'
  if f'{name}.weight' not in p: return np.broadcast_to(np.tile([[0.0], [0], [1]], (H, 1)), (B, 3 * H, pooled.shape[1]))
  logit = pooled @ p[f'{name}.weight'].T + p[f'{name}.bias']
  share = np.exp(logit).reshape(*logit.shape[:2], H, 3)
  return np.moveaxis((share / share.sum(-1, keepdims=True)).reshape(logit.shape), 2, 1)


def outputs(stored, length, case):
  """What the package computes, from its parameters: projections and gates in numpy, the memory by `chunk_gates` or the scan."""
  own = lambda prefix: {name.removeprefix(prefix): a for name, a in stored.items() if name.startswith(prefix)}
  p, (momentum, refresh) = own('parameters/') | own(f'{case}/parameters/'), (CASES | MORE)[case]
  x = stored['x'][:, :length]
  normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.finfo(np.float64).eps)
  read, store = normed * p['retrieve_norm.weight'], normed * p['store_norm.weight']
  heads = lambda a: np.moveaxis(a.reshape(B, length, H, -1), 2, 1)
  linear = lambda a, name: a @ p[f'{name}.weight'].T + p.get(f'{name}.bias', 0)
  pooled = store[:, :length // CHUNK * CHUNK].reshape(B, -1, CHUNK, WIDTH).mean(2)
  gate = lambda a, name: np.moveaxis(sigmoid(linear(a, name)), 2, 1)
  tokens = heads(linear(read, 'to_queries')), heads(linear(store, 'to_keys')), heads(linear(store, 'to_values'))
  K = WIDTH // H
  rule = Rule(Network(K, K, hidden=4 * K, activation='gelu'), 'chunk_gates', scale=1 / K, momentum=momentum, decay_to='zero',
              dtype=jnp.float64, refresh=refresh, order=2 if momentum == 'cascade' else 0)
  gain, first, second = (np.broadcast_to(p[f'memory_model_parameters.{n}'][None], (B, *p[f'memory_model_parameters.{n}'].shape))
                         for n in range(3))
  start = Weights({'w_0': jnp.asarray(first), 'w_1': jnp.asarray(second), 'gain': jnp.asarray(gain)}, {})
  given = tokens, gate(store, 'to_adaptive_step.0'), (gate(pooled, 'to_momentum.0'), gate(pooled, 'to_decay_factor.0'))
  def call(tokens, theta, both):
    if case in MORE: return in_scan(rule, start, tokens, theta=theta, chunk_gate=both, mixture=mixture_of(p, pooled))
    return chunk_gates(rule, start, tokens, theta=theta, chunk_gate=both, chunk=CHUNK, refresh=refresh)
  run = quick(call)
  y = np.asarray(run(*given)) * sigmoid(np.moveaxis(linear(read, 'retrieve_gate.0'), 2, 1))[..., None]
  return np.moveaxis(y, 1, 2).reshape(B, length, -1) @ p['combine_heads.weight'].T


@pytest.mark.parametrize('length', [n if n == 15 else pytest.param(n, marks=pytest.mark.slow) for n in LENGTHS])
@pytest.mark.parametrize('case', [name if name == 'default' else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_equals_titans_pytorch(stored, case, length):
  with jax.enable_x64(): got = outputs(stored, length, case)
  assert furthest(got, stored[f'{case}/{length}']) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize('case', MORE)
def test_momenta_of_titans_pytorch(stored, case):
  with jax.enable_x64(): got = outputs(stored, T - 1, case)
  assert furthest(got, stored[f'{case}/{T - 1}']) <= 1e-10
