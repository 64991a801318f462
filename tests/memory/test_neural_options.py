"""Every option of the neural memory does something, as in tests/memory/test_bank_options.py; fields and choices without a row fail."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.neural import NeuralConfig, NeuralNetConfig
from memjax.memory.neural_inputs import NeuralInputs
from memjax.memory.registry import make_memory
from memjax.ops.neural_custom import custom
from tests.laws.test_laws import parameters
from tests.memory.test_options import Memory, change, differs, fields_of

B, L, D = 1, 7, 8
BASE = NeuralConfig(heads=2, chunk=3, net=NeuralNetConfig(expansion=1))
custom('halved', lambda ops, x: ops.linear('w', x / 2), fast=lambda K, V: {'w': (K, V)})
OFF = {'net.residual': 'off'}
POLYNOMIAL = {**OFF, 'proj.features': 'polynomial'}
MATRIX = {'net.kind': 'linear', 'net.expansion': 4}
EXACT = {**MATRIX, 'rule.mode': 'exact'}
CLIP, BLOCK, HUBER = {'rule.clip': 0.01}, {'rule.mode': 'block'}, {'rule.loss': 'huber'}
LOW, RAW = {'net.kind': 'low_rank'}, {'gates.theta_raw': True}
TNT = {'rule.mode': 'tnt', 'locals.chunks': (3,), 'locals.shard': 6}
TTT = {'rule.momentum': 'none', 'rule.forget': False}
GATED = {**RAW, 'rule.mode': 'chunk_gates', 'rule.momentum': 'none'}
KERNELS = {'key_width': 16, 'chunk': 16, 'net.expansion': 2}
GELU, SECOND = {'net.activation': 'gelu'}, {'rule.momentum': 'second'}

# (fields, what they change, the rest of the config where they apply); effects as in tests/memory/test_options.py, and
#   grads: the gradients alone
TABLE = [
    ({'heads': 4}, 'shape', {}), ({'key_width': 2}, 'shape', {}), ({'value_width': 2}, 'shape', MATRIX), ({'chunk': 2}, 'output', {}),
    ({'chunk': 2}, 'trace', EXACT),
    (MATRIX, 'shape', {}), *(({'net.kind': kind}, 'shape', {}) for kind in ('swiglu', 'gated', 'factorised')), (LOW, 'shape', {}),
    ({'net.kind': 'mlp'}, 'shape', LOW), ({'net.depth': 3}, 'shape', {}), ({'net.expansion': 2}, 'shape', {}),
    ({'net.rank': 3}, 'shape', LOW),
    *(({'net.activation': name}, 'output', GELU) for name in ('silu', 'relu', 'tanh')), (GELU, 'output', {}),
    ({'net.kind': 'custom', 'net.function': 'halved'}, 'shape', {'net.expansion': 4}),
    (OFF, 'shape', {}), ({'proj.features': 'polynomial'}, 'shape', OFF), ({'proj.degree': 3}, 'shape', POLYNOMIAL),
     ({'net.residual': 'on'}, 'shape', MATRIX), ({'net.gain': 'fast'}, 'shape', {}),
    ({'net.bias': True}, 'shape', {}), ({'net.learn_init': False}, 'grads', {}), ({'net.per_head': False}, 'shape', {}),
    ({'net.weight_norm': True}, 'output', BLOCK), ({'rule.momentum': 'muon'}, 'output', BLOCK), (BLOCK, 'output', {}),
    ({'rule.mode': 'exact'}, 'output', MATRIX),
    *(({'rule.loss': name}, 'output', {}) for name in ('dot', 'huber', 'lp', 'kl')),
    ({'rule.loss_scale': 'sum'}, 'output', {}), ({'rule.loss_scale': 'mean'}, 'output', {}), ({'rule.loss_argument': .2}, 'output', HUBER),
    ({'rule.momentum': 'none'}, 'shape', {}), ({'rule.momentum': 'nesterov'}, 'output', {}), (SECOND, 'shape', {}),
    ({'rule.momentum': 'cascade'}, 'shape', {}),
    ({'gates.order': 3}, 'shape', {'rule.momentum': 'cascade'}),
    ({'rule.forget': False}, 'shape', {}), ({'rule.decay_to': 'zero'}, 'output', {}), ({'rule.read': 'before'}, 'output', {}),
    ({'rule.grad_at': 'decayed'}, 'output', EXACT), (CLIP, 'output', {}), ({'rule.clip_kind': 'soft'}, 'output', CLIP),
    ({'rule.first_order': True}, 'grads', {}),
    ({'gates.theta_base': 1.0}, 'output', {}), ({'gates.theta_bias': 1.0}, 'start', {}), ({'gates.theta_norm': 'none'}, 'output', {}),
    ({'gates.theta_norm': 'gram'}, 'output', {}),
    ({'gates.theta_norm': 'chunk'}, 'output', {'gates.theta_norm': 'none'}), ({'gates.theta_momentum_norm': False}, 'output', {}),
    (RAW, 'output', {}), ({'gates.theta_base': 1.0}, 'output', RAW), ({'gates.eta_bias': 1.0}, 'start', {}),
    ({'gates.alpha_bias': -3.0}, 'start', {}),
    ({'write.pairs': 2}, 'shape', {}), ({'write.window': 2}, 'output', {}), ({'write.per_tensor': True}, 'shape', {}),
    ({'write.shrink': .01}, 'output', BLOCK),
    ({'write.window_weights': True}, 'shape', {'write.window': 2}),
    ({'gates.surprise': 'z'}, 'output', {}), ({'gates.threshold': -9.0}, 'output', {'gates.surprise': 'z'}),
    ({'gates.surprise': 'norm'}, 'output', {'gates.surprise': 'z', 'gates.threshold': .5}),
    ({'write.persistent': 2}, 'shape', {}), ({'proj.rope': 'full'}, 'output', {}),
    ({'proj.rope': 'chunk'}, 'output', {'proj.rope': 'full'}),
    ({'write.refresh': 1}, 'output', GATED), ({'rule.mode': 'chunk_gates'}, 'output', {**GATED, 'rule.mode': 'block'}),
    ({'gates.pool': 'attention'}, 'shape', GATED), ({'rule.momentum': 'muon'}, 'output', {**GATED, 'rule.momentum': 'first'}),
    ({'net.kind': 'attention'}, 'shape', BLOCK), ({'write.detach': 1}, 'grads', {}), ({'gates.row_factor': True}, 'shape', TTT),
    (TNT, 'shape', {}), ({'locals.chunks': (1,)}, 'output', TNT), ({'locals.shard': 3}, 'output', TNT),
    ({'locals.project': False}, 'output', TNT),
    ({'proj.source': 'stream'}, 'shape', {}), ({'proj.conv_width': 0}, 'shape', {}), ({'proj.convolved': 'kv'}, 'shape', {}),
    ({'proj.activation': ''}, 'output', {}), ({'proj.activated': 'qk'}, 'output', {}), ({'proj.qk_norm': 'rms'}, 'output', {}),
    ({'proj.qk_norm': 'none'}, 'output', {}), ({'proj.lookahead': True}, 'output', {}), ({'proj.out_norm': False}, 'shape', {}),
    ({'proj.out_gate': ''}, 'shape', {}), ({'proj.out_gate': 'sigmoid'}, 'output', {}),
    ({'exec.spare': 1}, 'trace', {}), ({'exec.aligned': True}, 'trace', {}),
    *(({'exec.remat': name}, 'trace', {}) for name in ('nothing', 'all')), ({'exec.unroll': 2}, 'trace', {}),
    ({'exec.group': 2}, 'trace', {}), ({'exec.group': -1}, 'trace', {'exec.group': 2}),
    ({'exec.solver': 'lax'}, 'trace', EXACT),
    ({'exec.backend': 'pallas'}, 'trace', KERNELS), ({'exec.backend': 'xla'}, 'trace', {**KERNELS, 'exec.backend': 'pallas'}),
]


class Neural(Memory):
  """The same of a neural memory; results are compiled."""

  def __init__(self, config):
    self.memory, self.key = make_memory(config, D), jax.random.key(4)
    self.x, self.position = jax.random.normal(jax.random.key(1), (B, L, D)), jnp.arange(L)[None]
    self.token, self.state = self.position, self.memory.init_state(B, L)

  @property
  def first(self): return self.x[:, :1], self.state, self.position[:, :1]          # one token has all parameters, and is traced sooner

  @functools.cached_property
  def params(self): return parameters(self.memory, *self.first)

  @functools.cached_property
  def start(self):
    x, state, position = self.first
    return jax.jit(lambda key: nn.unbox(self.memory.init(key, x, state, position_BxL=position)))(self.key)

  @functools.cached_property
  def out(self): return np.asarray(jax.jit(self.call)(self.params)[0])

  @functools.cached_property
  def grads(self): return jax.jit(jax.grad(lambda params: self.call(params)[0].sum()))(self.params)


find = functools.cache(Neural)


def timed(row):
  """The row as a parameter; those that compile are slow."""
  return pytest.param(*row, id=f'{row[0]} {row[2]}', marks=[] if row[1] == 'shape' else [pytest.mark.slow])


@pytest.mark.parametrize(('fields', 'effect', 'rest'), [timed(row) for row in TABLE])
def test_option(fields, effect, rest):
  old, new = find(change(BASE, rest)), find(change(BASE, {**rest, **fields}))
  if effect == 'shape':
    assert old.shapes != new.shapes
    return
  assert old.shapes == new.shapes
  if effect == 'start':
    assert differs(old.start, new.start)
    return
  assert np.isfinite(new.out).all()
  if effect == 'output': assert np.abs(new.out - old.out).max() > 1e-4
  else: np.testing.assert_allclose(new.out, old.out, atol=1e-5 * np.abs(old.out).max())
  if effect == 'grads': assert differs(old.grads, new.grads)
  if effect == 'trace': assert new.trace != old.trace


def test_every_field_and_every_choice_has_a_row():
  rows = {}
  for fields, _, rest in TABLE:
    for path, value in fields.items(): rows.setdefault(path, set()).update([repr(value), repr(rest.get(path))])
  fields = dict(fields_of(BASE))
  assert set(rows) == set(fields)
  for path, values in rows.items():
    assert {repr(choice) for choice in fields[path].metadata['choices']} - values <= {repr(fields[path].default)}, path


def test_streams_that_are_convolved_and_activated():
  """Queries the activation alone, values the convolution alone, keys neither."""
  module = make_memory(change(BASE, {'proj.convolved': 'v', 'proj.activated': 'q', 'proj.qk_norm': 'none'}), D)
  position, x = jnp.arange(L)[None], np.asarray(jax.random.normal(jax.random.key(1), (B, L, D)))
  inputs = NeuralInputs((x, 2 * x, 3 * x), jnp.ones((B, L, 4, 2)))
  taps = np.arange(1.0, 5)[:, None] * np.ones(D)
  items = lambda module: module.projections.items(inputs, module.init_state(B).tail)[0]
  params = parameters(module, x[:, :1], module.init_state(B), position[:, :1])
  assert params['params']['projections']['taps'].shape == taps.shape
  params['params']['projections']['taps'] = taps
  found = module.apply(params, method=items)
  flat = lambda a: np.asarray(a).reshape(B, L, D)
  np.testing.assert_allclose(flat(found.query), x / (1 + np.exp(-x)), atol=1e-6)
  np.testing.assert_allclose(flat(found.key), 2 * x, atol=1e-6)
  padded = np.pad(3 * x, ((0, 0), (3, 0), (0, 0)))
  np.testing.assert_allclose(flat(found.value), sum((j + 1) * padded[:, 3 - j:3 - j + L] for j in range(4)), atol=1e-5)


@pytest.mark.parametrize('rest', [{}, TNT], ids=['token', 'tnt'])
def test_keys_and_values_of_the_stream(rest):
  """Queries see the layer's input alone; keys, values and gates the norm of the stream alone."""
  module = make_memory(change(BASE, {**rest, 'proj.source': 'stream'}), D)
  position, x, stream = jnp.arange(L)[None], *jax.random.normal(jax.random.key(1), (2, B, L, D))
  params = parameters(module, x[:, :1], module.init_state(B), position[:, :1])
  project = jax.jit(lambda x, stream: module.apply(params, x, position, stream_BxLxD=stream, method='project'))
  base, asked, stored, scaled = project(x, stream), project(2 * x, stream), project(x, stream + x), project(x, 9 * stream)
  parts = lambda inputs: ((inputs if rest == {} else inputs.whole).streams[0], jax.tree.leaves(inputs)[1:])
  assert module.wants_stream and differs(parts(base)[0], parts(asked)[0])
  for one, other in ((asked, base), (scaled, base)):
    for a, b in zip(parts(one)[1], parts(other)[1], strict=True): np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_array_equal(parts(stored)[0], parts(base)[0])
  assert all(differs(a, b) for a, b in zip(parts(stored)[1], parts(base)[1], strict=True))
