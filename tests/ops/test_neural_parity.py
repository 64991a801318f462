"""`chunk_gates` against stored outputs of titans-pytorch 0.5.5 in float64 (make_titans_reference.py): specification 8.3."""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_nets import Network
from memjax.ops.neural_parity import chunk_gates
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, sigmoid

B, T, WIDTH, H, CHUNK, LENGTHS = 2, 16, 8, 2, 4, (3, 12, 13, 15, 16)
CASES = {'default': ('first', 0), 'plain': ('none', 0), 'refresh-1': ('first', 1), 'refresh-2': ('first', 2)}


@pytest.fixture(scope='module')
def stored():
  return dict(np.load(Path(__file__).parent / 'titans_pytorch.npz'))


def outputs(stored, length, momentum, refresh):
  """What the package computes, from its parameters: projections and gates in numpy, the memory by `chunk_gates`."""
  p = {name.removeprefix('parameters/'): a for name, a in stored.items() if name.startswith('parameters/')}
  x = stored['x'][:, :length]
  normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.finfo(np.float64).eps)
  read, store = normed * p['retrieve_norm.weight'], normed * p['store_norm.weight']
  heads = lambda a: np.moveaxis(a.reshape(B, length, H, -1), 2, 1)
  linear = lambda a, name: a @ p[f'{name}.weight'].T + p.get(f'{name}.bias', 0)
  pooled = store[:, :length // CHUNK * CHUNK].reshape(B, -1, CHUNK, WIDTH).mean(2)
  gate = lambda a, name: np.moveaxis(sigmoid(linear(a, name)), 2, 1)
  tokens = heads(linear(read, 'to_queries')), heads(linear(store, 'to_keys')), heads(linear(store, 'to_values'))
  K = WIDTH // H
  rule = Rule(Network(K, K, hidden=4 * K, activation='gelu'), scale=1 / K, momentum=momentum, decay_to='zero', dtype=jnp.float64)
  gain, first, second = (np.broadcast_to(p[f'memory_model_parameters.{n}'][None], (B, *p[f'memory_model_parameters.{n}'].shape))
                         for n in range(3))
  start = Weights({'w_0': jnp.asarray(first), 'w_1': jnp.asarray(second), 'gain': jnp.asarray(gain)}, {})
  given = tokens, gate(store, 'to_adaptive_step.0'), (gate(pooled, 'to_momentum.0'), gate(pooled, 'to_decay_factor.0'))
  run = quick(lambda tokens, theta, both: chunk_gates(rule, start, tokens, theta=theta, chunk_gate=both, chunk=CHUNK, refresh=refresh))
  y = np.asarray(run(*given)) * sigmoid(np.moveaxis(linear(read, 'retrieve_gate.0'), 2, 1))[..., None]
  return np.moveaxis(y, 1, 2).reshape(B, length, -1) @ p['combine_heads.weight'].T


@pytest.mark.parametrize('length', [n if n == 15 else pytest.param(n, marks=pytest.mark.slow) for n in LENGTHS])
@pytest.mark.parametrize('case', [name if name == 'default' else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_equals_titans_pytorch(stored, case, length):
  with jax.enable_x64(): got = outputs(stored, length, *CASES[case])
  assert furthest(got, stored[f'{case}/{length}']) <= 1e-10
