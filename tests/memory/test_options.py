"""Every option does something: one field at a time, with what it changes. A field or a choice without a row here fails."""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig
from memjax.memory.registry import make_memory
from memjax.models.decoder import build_decoder, init_params, noise, param_shapes
from tests.laws.test_laws import parameters

B, L, D, A = 1, 8, 8, 7
MEM = HolographicConfig(heads=2, slots=4)
BASES = {'holographic': MEM, 'attention': AttentionConfig(heads=2), 'window': WindowConfig(heads=2, window=3)}
NEAR = BASES['window']
MODEL = ModelConfig(width=D, hidden=8, vocabulary=A, mixers={'near': NEAR, 'far': MEM}, pattern=('near',), repeats=0, prefix=('near',))
TIERS = {'tiers.kind': 'consolidate', 'tiers.interval': 4}
HARD = {**TIERS, 'tiers.hard': True}
HRR, UNITARY, SLOT = {'binding.kind': 'hrr'}, {'binding.kind': 'unitary'}, {'keep.kind': 'slot'}
RANDOM, FRACTIONAL = {'binding.position': 'random'}, {'binding.position': 'fractional'}
GELU, LORA = {'block.activation': 'gelu'}, {'block.lora.rank': 2}
INT8, WIDE = {'block.quant.storage': 'int8'}, {'width': 32, 'hidden': 32}
CONTRAST = {'loss.contrastive': 1.0}
PAIR = {'near': NEAR, 'mem': NeuralConfig(heads=2, chunk=3, net=NeuralNetConfig(kind='linear'))}
MAG, MAC = ({'mixers': PAIR, 'prefix': (f'near+mem:{wiring}',)} for wiring in ('mag', 'mac'))
YARN = {'rope.kind': 'yarn', 'rope.factor': 4.0, 'rope.original': 64, 'rotary_base': 10.0}
LLAMA3 = {**YARN, 'rope.kind': 'llama3'}

# (field, value, what it changes, the rest of the config where the field applies)
#   shape: the parameters       start: their first values       output: the result, from equal parameters
#   penalty: the auxiliary loss alone      trace: the computation, and not the result
HOLOGRAPHIC = [
    ('heads', 4, 'shape', {}), ('key_width', 6, 'shape', {}), ('slots', 2, 'shape', {}), ('reads', 2, 'shape', {}),
    ('conv_width', 0, 'shape', {}),
    ('binding.kind', 'bipolar', 'output', {}), ('binding.kind', 'hrr', 'output', {}), ('binding.kind', 'unitary', 'output', HRR),
    ('binding.kind', 'hlb', 'output', {}), ('binding.kind', 'none', 'output', {}), ('binding.kind', 'phasor', 'output', UNITARY),
    ('binding.transform', 'fft', 'trace', HRR), ('binding.transform', 'dft', 'trace', {**HRR, 'binding.transform': 'fft'}),
    ('binding.transform', 'folded', 'output', UNITARY),
    ('binding.squash', 'sign', 'output', {'binding.kind': 'bipolar'}),
    ('binding.identity_bias', 0.0, 'output', {}), ('binding.eps', 0.5, 'output', {}), ('binding.tie_query', True, 'shape', {}),
    ('binding.position', 'fractional', 'output', {}), ('binding.position', 'random', 'output', FRACTIONAL),
    ('binding.position_heads', 1, 'output', FRACTIONAL), ('binding.frequencies', 'geometric', 'output', FRACTIONAL),
    ('binding.seed', 1, 'output', RANDOM),
    ('binding.seed', 1, 'output', {'address.kind': 'copies'}),
    ('address.kind', 'signed', 'shape', {}), ('address.kind', 'softmax', 'shape', {}),
    ('address.kind', 'sigmoid', 'output', {'address.kind': 'softmax'}), ('address.kind', 'top1', 'output', {'address.kind': 'softmax'}),
    ('address.kind', 'topk', 'output', {'address.kind': 'top1'}), ('address.kind', 'scored', 'shape', {'address.kind': 'softmax'}),
    ('address.kind', 'copies', 'shape', {}), ('address.source', 'key', 'shape', {}), ('address.tie', True, 'shape', {}),
    ('address.tie', True, 'shape', {'address.kind': 'softmax'}), ('address.after_conv', False, 'shape', {}),
    ('address.temperature', 0.3, 'output', {'address.kind': 'softmax'}),
    ('address.temperature', 0.3, 'output', {'address.kind': 'scored'}), ('address.top_k', 3, 'output', {'address.kind': 'topk'}),
    ('address.rotary', True, 'output', {}), ('address.gate', '', 'shape', {}), ('address.gate', 'channel', 'shape', {}),
    ('address.gate_bias', 1.0, 'start', {}),
    ('keep.kind', 'none', 'shape', {}), ('keep.kind', 'static', 'output', {'keep.kind': 'none'}), ('keep.kind', 'slot', 'shape', {}),
    ('keep.kind', 'tied', 'output', {}), ('keep.kind', 'channel', 'shape', {}),
    ('keep.bias', 3.0, 'start', {}), ('keep.fast', 0.3, 'start', {}), ('keep.slow', 0.001, 'start', SLOT),
    ('keep.fast', 0.3, 'output', {'keep.kind': 'static'}), ('keep.slow', 0.001, 'output', {'keep.kind': 'static'}),
    ('keep.floor', -0.1, 'output', {}), ('keep.floor', -0.1, 'output', SLOT), ('keep.tie_strength', 0.9, 'output', {'keep.kind': 'tied'}),
    ('keep.form', 'exact', 'trace', SLOT), ('keep.form', 'factored', 'trace', {**SLOT, 'keep.form': 'exact'}),
    ('keep.erase', 'slot', 'output', {}),
    ('loss.replay', 1.0, 'penalty', {}), ('loss.contrastive', 1.0, 'penalty', {}), ('loss.balance', 1.0, 'penalty', {}),
    ('loss.gate', 1.0, 'penalty', {}), ('loss.window', 2, 'penalty', {'loss.replay': 1.0}), ('loss.temperature', 1.0, 'penalty', CONTRAST),
    ('tiers.kind', 'consolidate', 'shape', {}), ('tiers.interval', 2, 'output', TIERS), ('tiers.rate', 0.9, 'output', TIERS),
    ('tiers.threshold', 0.0, 'output', {**HARD, 'tiers.threshold': 1.0}), ('tiers.hard', True, 'output', {**TIERS, 'tiers.interval': 1}),
    ('tiers.source', 'item', 'output', TIERS), ('tiers.mix', 'learned', 'shape', TIERS), ('tiers.fast_share', 0.2, 'output', TIERS),
    ('tiers.fast_share', 0.2, 'start', {**TIERS, 'tiers.mix': 'learned'}), ('tiers.controller', True, 'shape', TIERS),
    ('read.order', 'before', 'output', {}), ('read.norm', 'full', 'output', {}), ('read.norm', '', 'shape', {}),
    ('read.out_gate', 'silu', 'shape', {}),
    ('form.kind', 'scan', 'trace', {}), ('form.kind', 'associative', 'trace', {}), ('form.kind', 'chunk', 'trace', {'form.kind': 'scan'}),
    ('form.chunk', 2, 'trace', {}), ('form.remat', False, 'trace', {}), ('form.remat', False, 'trace', TIERS),
    ('form.backend', 'pallas', 'trace', {}), ('form.backend', 'xla', 'trace', {'form.backend': 'pallas'}),
]
ATTENTION = [
    ('heads', 4, 'shape', {'head_width': 2}), ('kv_heads', 1, 'shape', {}), ('head_width', 2, 'shape', {}), ('rotary', False, 'output', {}),
    ('rotary_base', 10.0, 'output', {'rotary_base': 1e4}), ('qk_norm', 1e-6, 'shape', {}), ('bias', True, 'shape', {}),
    ('qk_norm', 0.5, 'output', {'qk_norm': 1e-6}), ('rope.kind', 'linear', 'output', {'rope.factor': 3.0}),
    ('rope.kind', 'llama3', 'output', YARN), ('rope.kind', 'yarn', 'output', LLAMA3), ('rope.factor', 3.0, 'output', YARN),
    ('rope.original', 20, 'output', YARN), ('rope.low_factor', 3.0, 'output', LLAMA3), ('rope.high_factor', 9.0, 'output', LLAMA3),
    ('rope.beta_fast', 2.0, 'output', YARN), ('rope.beta_slow', 5.0, 'output', YARN), ('rope.attention_factor', 2.0, 'output', YARN),
    ('out_bias', True, 'shape', {}), ('persistent', 2, 'shape', {}), ('backend', 'cudnn', 'trace', {}),
    ('backend', 'xla', 'trace', {'backend': 'cudnn'}), ('backend', 'cudnn_rows', 'trace', {'backend': 'cudnn'}),
]
DECODER = [
    ('width', 4, 'shape', {}), ('hidden', -1, 'shape', {}), ('hidden', 0, 'shape', {}), ('vocabulary', 9, 'shape', {}),
    ('mixers', {'near': WindowConfig(heads=2, window=2), 'far': MEM}, 'output', {}), ('pattern', ('far',), 'shape', {'repeats': 1}),
    ('repeats', 2, 'shape', {'repeats': 1}), ('prefix', ('near', 'near'), 'shape', {}), ('suffix', ('near',), 'shape', {}),
    ('grafted', ('near',), 'start', {}), ('dtype', 'bfloat16', 'output', {}), ('dtype', 'float64', 'float64', {}),
    ('block.norm', 'layernorm', 'shape', {}), ('block.placement', 'post', 'output', {}), ('block.activation', 'gelu', 'shape', {}),
    ('block.bias', True, 'shape', {}), ('block.norm_epsilon', 0.5, 'output', {}), ('block.dropout', 0.5, 'output', {}),
    ('block.init_std', 0.5, 'start', {}), ('block.mixer_out_std', 0.5, 'start', {}), ('block.mlp_out_std', 0.5, 'start', {}),
    ('block.lora.rank', 2, 'shape', {}), ('block.lora.alpha', 8.0, 'output', LORA), ('block.lora.stabilised', True, 'output', LORA),
    ('block.lora.dropout', 0.5, 'output', LORA), ('block.lora.targets', ('/key/',), 'shape', LORA),
    ('block.lora.exclude', ('/query/',), 'shape', LORA), ('block.lora.ranks', ('/query/=3',), 'shape', LORA),
    ('block.lora.alphas', ('/query/=8.5',), 'output', LORA), ('block.lora.dora', True, 'shape', LORA),
    ('block.quant.storage', 'int8', 'shape', {}), ('block.quant.storage', 'int4', 'shape', WIDE),
    ('block.quant.storage', 'nf4', 'output', {**WIDE, 'block.quant.storage': 'int4'}), ('block.quant.storage', 'bfloat16', 'output', {}),
    ('block.quant.storage', 'float16', 'output', {}), ('block.quant.targets', ('/key/',), 'shape', INT8),
    ('block.quant.exclude', ('/key/',), 'shape', INT8), ('block.quant.head', True, 'shape', {**INT8, 'embedding.tie': False}),
    ('block.titans.fuse', 'sigmoid', 'output', MAG), ('block.titans.fuse', 'silu', 'output', MAG),
    ('block.titans.fuse', 'mix', 'shape', MAG),
    ('block.titans.lookback', 1, 'output', MAC), ('block.titans.learned', 2, 'shape', MAC), ('block.titans.read', 'segment', 'output', MAC),
    ('block.titans.asked', 'previous', 'output', MAC), ('block.titans.write', 'sum', 'output', MAC),
    ('block.titans.write', 'input', 'shape', MAC),
    ('block.activation', 'silu', 'output', GELU), ('block.activation', 'relu', 'output', GELU),
    ('block.activation', 'sigmoid', 'output', GELU), ('block.activation', 'tanh', 'output', GELU),
    ('embedding.tie', False, 'shape', {}), ('embedding.position', 'learned', 'shape', {'embedding.max_position': 8}),
    ('embedding.max_position', 9, 'shape', {'embedding.position': 'learned'}), ('embedding.std', 0.5, 'start', {}),
]
TABLE = [('holographic', *row) for row in HOLOGRAPHIC] + [('attention', *row) for row in ATTENTION]
TABLE += [('window', *row) for row in [*ATTENTION, ('window', 5, 'output', {})]] + [('model', *row) for row in DECODER]
# Pairs of a field and another that is refused without it: the other one changes with it.
TOGETHER = {('embedding.position', 'embedding.max_position'), ('embedding.max_position', 'embedding.position'),
            ('rope.kind', 'rope.factor')}


def change(config, fields):
  """The config with the fields at dotted paths replaced, those of one group together."""
  groups = {}
  for path, value in fields.items():
    group, dot, name = path.partition('.')
    if dot: groups.setdefault(group, {})[name] = value
  own = {path: value for path, value in fields.items() if '.' not in path}
  return dataclasses.replace(config, **own, **{g: change(getattr(config, g), inner) for g, inner in groups.items()})


def fields_of(config, prefix=''):
  """Dotted path -> field, groups opened."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value): yield from fields_of(value, f'{prefix}{field.name}.')
    else: yield prefix + field.name, field


class Memory:
  """What one memory config leads to; its token inputs and parameters depend on shapes alone."""

  def __init__(self, config):
    self.memory, self.key = make_memory(config, D), jax.random.key(4)
    self.x, self.position = jax.random.normal(jax.random.key(1), (B, L, D)), jnp.arange(L)[None]
    self.token, self.state = jnp.arange(L)[None], self.memory.init_state(B, L)

  @functools.cached_property
  def params(self): return parameters(self.memory, self.x, self.state, self.position)

  @functools.cached_property
  def start(self): return nn.unbox(self.memory.init(self.key, self.x, self.state, position_BxL=self.position))

  @functools.cached_property
  def shapes(self): return jax.tree.map(jnp.shape, self.params)

  def call(self, params):
    return self.memory.apply(params, self.x, self.state, position_BxL=self.position, key=self.key, token_BxL=self.token)

  @functools.cached_property
  def out(self):
    y, _, aux = self.call(self.params)
    return np.asarray(y), float(aux.get('penalty', 0.0))

  @functools.cached_property
  def trace(self):
    text = str(jax.make_jaxpr(jax.grad(lambda params: self.call(params)[0].sum()))(self.params))
    return re.sub(r'0x[0-9a-f]+', '', text)


class Model(Memory):
  """The same of a decoder."""

  def __init__(self, config):
    self.config, self.memory, self.key = config, build_decoder(config), jax.random.key(4)
    self.token, self.position, self.state = jnp.arange(L)[None] % A, jnp.arange(L)[None], self.memory.init_state(B, L)

  @functools.cached_property
  def start(self): return {'params': init_params(self.memory, self.key)[0]}

  @functools.cached_property
  def params(self):
    shapes, rng = param_shapes(self.memory)[0], np.random.default_rng(0)
    return {'params': jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), shapes)}

  def call(self, params):
    return self.memory.apply(params, self.token, self.state, position_BxL=self.position, key=self.key, rngs=noise(self.config, self.key))


@functools.cache
def outcome(text, kind):
  return (Model if kind == 'model' else Memory)(CONFIGS[text])


CONFIGS = {}


def find(kind, fields):
  config = change(MODEL if kind == 'model' else BASES[kind], fields)
  CONFIGS[repr(config)] = config
  return outcome(repr(config), kind)


def differs(a, b):
  return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def timed(row):
  """The row as a parameter; all but those of attention are slow."""
  kind, path, value, *_ = row
  slow = [pytest.mark.slow] if kind != 'attention' else []
  return pytest.param(*row, id=f'{kind}.{path}={"other" if isinstance(value, dict) else value}', marks=slow)


@pytest.mark.parametrize(('kind', 'path', 'value', 'effect', 'rest'), [timed(row) for row in TABLE])
def test_option(kind, path, value, effect, rest):
  before = {name: old for name, old in rest.items() if (path, name) not in TOGETHER}
  if path == 'embedding.max_position': before = {**rest, path: 8}
  old = find(kind, before)
  if effect == 'float64':
    with jax.enable_x64(): assert find(kind, {path: value}).call(old.params)[0].dtype == jnp.float64 != old.out[0].dtype
    return
  new = find(kind, {**before, **rest, path: value})
  if effect == 'shape':
    assert old.shapes != new.shapes and np.isfinite(new.out[0]).all()
    return
  assert old.shapes == new.shapes
  if effect == 'start':
    assert differs(old.start, new.start)
    return
  (y, penalty), (other, other_penalty) = old.out, new.out
  assert np.isfinite(other).all()
  if effect == 'output': assert np.abs(other - y).max() > 1e-4
  else: np.testing.assert_allclose(other, y, atol=1e-5 * np.abs(y).max())
  if effect == 'penalty': assert abs(other_penalty - penalty) > 1e-4
  if effect == 'trace': assert new.trace != old.trace


@pytest.mark.parametrize('kind', [*BASES, 'model'])
def test_every_field_and_every_choice_has_a_row(kind):
  config = MODEL if kind == 'model' else BASES[kind]
  rows = {}
  for owner, path, value, _, rest in TABLE:
    if owner == kind: rows.setdefault(path, set()).update([repr(value), repr(rest.get(path))])
  fields = dict(fields_of(config))
  assert set(rows) == set(fields)
  for path, field in fields.items():
    missing = {repr(choice) for choice in field.metadata['choices']} - rows[path] - {repr(field.default)}
    assert not missing, f'{path}: {missing}'


def test_groups_of_the_decoder_are_those_tested():
  assert {type(MODEL.block), type(MODEL.embedding)} == {BlockConfig, EmbeddingConfig}
