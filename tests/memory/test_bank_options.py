"""Every option of a bank does something, as in tests/memory/test_options.py; fields and choices without a row here fail."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.banks import BankConfig, BankShapeConfig, ProductKeyConfig, RouterConfig, for_inference
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named
from memjax.memory.registry import make_memory
from memjax.models.decoder import build_decoder, param_shapes
from tests.memory.test_options import B, D, L, Memory, change, differs, fields_of

BASES = {'bank': BankConfig(heads=2, shape=BankShapeConfig(entries=20, chapters=5), router=RouterConfig(top_k=2)),
         'product_key': ProductKeyConfig(heads=2, keys=4, top_k=3, key_width=8)}
NINE = {'shape.entries': 18, 'shape.chapters': 9}
SHARED, FACTORIZED = {'mixing.shared': 1}, {'shape.low_rank': 'factorized', 'shape.rank': 4}
RMS = {**SHARED, 'mixing.norm': 'rms'}
AHEAD = {'router.strategy': 'sequence', 'router.allow_noncausal': True}
ROLLING, CHUNK = {'router.strategy': 'rolling', 'router.window': 2}, {'router.strategy': 'chunk', 'router.block': 2}
ROUNDED = {'quant.bits': 4, 'quant.group': 8, 'quant.train': 'straight'}
STORED = {'quant.bits': 4, 'quant.group': 4}
TILES, LEGACY = {'form.kind': 'tiles'}, {'mixing.combine': 'legacy_scale'}

# (fields, what they change, the rest of the config where they apply), the effects as in tests/memory/test_options.py and
#   inference: the result of the model that evaluates      axes: the logical axes of the parameters
BANK = [
    ({'heads': 4}, 'output', {}), ({'kv_heads': 1}, 'shape', {}), ({'head_width': 2}, 'shape', {}), ({'projection_rank': 3}, 'shape', {}),
    ({'zero_out': False}, 'start', {}), ({'shape.entries': 40}, 'shape', {}), ({'shape.width': 6}, 'shape', {}),
    ({'shape.chapters': 4}, 'shape', {}), (FACTORIZED, 'shape', {}), ({'shape.rank': 6}, 'shape', FACTORIZED),
    ({'shape.low_rank': 'reduced'}, 'shape', FACTORIZED), ({'shape.std': .5}, 'start', {}),
    ({'router.strategy': 'prefix-mean'}, 'output', {}), (ROLLING, 'output', {}), (CHUNK, 'shape', {}), (AHEAD, 'output', {}),
    ({**AHEAD, 'router.strategy': 'sequence-rolling', 'router.window': 2}, 'output', {}),
    ({'router.strategy': 'hybrid', 'router.inference': 'hybrid', 'router.window': 2}, 'output', {}),
    *(({'router.inference': name}, 'inference', {}) for name in ('prefix-mean', 'rolling', 'hybrid')),
    ({'router.inference': 'token'}, 'inference', {'router.strategy': 'rolling'}),
    ({'router.top_k': 3}, 'output', {}), ({'router.window': 3}, 'output', ROLLING),
    ({'router.block': 3}, 'output', CHUNK), ({'router.input': 'stream'}, 'output', {}), ({'router.kind': 'product_key'}, 'shape', NINE),
    ({'router.weight_norm': 'full'}, 'output', {}),
    *(({'mixing.combine': name}, 'output', {}) for name in ('joint', 'joint_bias', 'legacy_scale')),
    (SHARED, 'output', {}), ({'mixing.scale': 2.0}, 'output', SHARED), ({'mixing.norm': 'rms'}, 'output', SHARED),
    ({'mixing.norm': 'layernorm'}, 'output', RMS), ({'mixing.norm_epsilon': .5}, 'output', RMS),
    ({'mixing.scale': 2.0}, 'output', {**SHARED, 'mixing.combine': 'legacy_scale'}),
    ({'loss.balance': 1.0}, 'penalty', {}), ({'loss.auxiliary': 1.0}, 'penalty', {}), ({'loss.z': 1.0}, 'penalty', {}),
    ({'loss.balance_form': 'legacy'}, 'penalty', {}), ({'loss.auxiliary_form': 'cv2'}, 'penalty', {'loss.auxiliary': 1.0}),
    ({'loss.auxiliary_form': 'legacy_mse'}, 'penalty', {'loss.auxiliary': 1.0}), ({'loss.bias_rate': .1}, 'shape', {}),
    ({'quant.bits': 8, 'quant.group': 4}, 'shape', {}), ({'quant.bits': 4, 'quant.group': 4}, 'shape', {}),
    ({'quant.bits': 8}, 'output', ROUNDED), ({'quant.scheme': 'absmax7'}, 'output', ROUNDED), ({'quant.scheme': 'nf4'}, 'output', ROUNDED),
    ({'quant.group': 2}, 'output', ROUNDED), ({'quant.group': 8}, 'shape', {**STORED}), ({'quant.target': 'kv'}, 'shape', STORED),
    ({'quant.train': 'straight'}, 'shape', STORED), ({'quant.group': 0, 'quant.train': 'learned'}, 'shape', STORED),
    *(({'form.kind': name}, 'trace', {}) for name in ('scan', 'tiles', 'capacity', 'dense')), ({'form.kind': 'gather'}, 'trace', TILES),
    ({'form.block': 4}, 'trace', TILES), ({'form.token_chunk': 3}, 'trace', {}), ({'form.gather_limit_mb': 0}, 'trace', {}),
    ({'form.remat': False}, 'trace', {'form.token_chunk': 3}), ({'form.gather_limit_mb': 0}, 'trace', LEGACY),
    ({'form.token_chunk': 3}, 'trace', LEGACY), ({'form.remat': False}, 'trace', LEGACY), ({'form.block': 4}, 'trace', {**LEGACY, **TILES}),
    ({'form.axis': 'model'}, 'axes', {}), ({'form.axis': 'fsdp'}, 'axes', {}),
]
PRODUCT_KEY = [
    ({'heads': 4}, 'shape', {}), ({'keys': 5}, 'shape', {}), ({'top_k': 2}, 'output', {}), ({'key_width': 6}, 'shape', {}),
    ({'value_width': 6}, 'shape', {}), ({'query_norm': False}, 'shape', {}), ({'gate': False}, 'shape', {}),
    ({'zero_out': False}, 'start', {}),
]
TABLE = [('bank', *row) for row in BANK] + [('product_key', *row) for row in PRODUCT_KEY]
ELSEWHERE = {('bank', 'dropout'), ('product_key', 'dropout'), ('bank', 'shape.share'), ('product_key', 'share')}      # tested below
NEEDS_A_GPU = {('bank', 'form.kind', "'cudnn'")}                # tests/ops


class Bank(Memory):
  """The same of a bank, compiled; the residual stream is not what the norm made of it."""

  def __init__(self, config):
    super().__init__(BASES[config.kind])
    self.memory = make_memory(config, D)
    self.state = self.memory.init_state(B)

  @functools.cached_property
  def start(self): return jax.jit(lambda key: nn.unbox(self.memory.init(key, self.x, self.state, position_BxL=self.position)))(self.key)

  @functools.cached_property
  def axes(self):
    boxed = jax.eval_shape(lambda: self.memory.init(self.key, self.x, self.state, position_BxL=self.position))
    return [str(axes) for axes in jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda leaf: isinstance(leaf, tuple))]

  def call(self, params):
    return self.memory.apply(params, self.x, self.state, position_BxL=self.position, stream_BxLxD=2 * self.x[..., ::-1])

  @property
  def out(self): return results()[self.memory.config]


find = functools.cache(Bank)


def pair(kind, fields, effect, rest):
  """The configs without and with the change."""
  before, after = change(BASES[kind], rest), change(BASES[kind], {**rest, **fields})
  return before, for_inference({'mem': after})['mem'] if effect == 'inference' else after


@functools.cache
def results():
  """{config: (output, penalty)} of all rows that compare results, from one program: a compilation each would take four times as long."""
  configs = {config for row in TABLE if row[2] not in ('shape', 'start', 'axes') for config in pair(*row)}
  banks = {config: find(config) for config in configs}
  def one(config, params):
    y, _, aux = banks[config].call(params)
    return y, aux.get('penalty', jnp.zeros(()))
  call = jax.jit(lambda params: [one(config, p) for config, p in zip(banks, params, strict=True)])
  out = call([bank.params for bank in banks.values()])
  return {config: (np.asarray(out[i][0]), float(out[i][1])) for i, config in enumerate(banks)}


def timed(row):
  """The row as a parameter; those that compare results are slow: all of them are one long compilation."""
  kind, fields, effect, _ = row
  slow = [] if effect in ('shape', 'start', 'axes') else [pytest.mark.slow]
  return pytest.param(*row, id=f'{kind} {fields}', marks=slow)


@pytest.mark.parametrize(('kind', 'fields', 'effect', 'rest'), [timed(row) for row in TABLE])
def test_option(kind, fields, effect, rest):
  old, new = map(find, pair(kind, fields, effect, rest))
  if effect == 'axes':
    assert old.axes != new.axes and old.shapes == new.shapes
    return
  if effect == 'shape':
    assert old.shapes != new.shapes and jax.eval_shape(new.call, new.params)[0].shape == (B, L, D)
    return
  assert old.shapes == new.shapes
  if effect == 'start':
    assert differs(old.start, new.start)
    return
  (y, penalty), (other, other_penalty) = old.out, new.out
  assert np.isfinite(other).all()
  if effect in ('output', 'inference'): assert np.abs(other - y).max() > 1e-4
  else: np.testing.assert_allclose(other, y, atol=1e-5 * np.abs(y).max())
  if effect == 'penalty': assert abs(other_penalty - penalty) > 1e-4
  if effect == 'trace': assert new.trace != old.trace


@pytest.mark.parametrize('kind', BASES)
def test_every_field_and_every_choice_has_a_row(kind):
  rows = {}
  for owner, changed, _, rest in TABLE:
    for path, value in (changed.items() if owner == kind else ()):
      rows.setdefault(path, set()).update([repr(value), repr(rest.get(path))])
  fields = dict(fields_of(BASES[kind]))
  assert set(rows) == {path for path in fields if (kind, path) not in ELSEWHERE}
  for path, values in rows.items():
    choices = {repr(choice) for choice in fields[path].metadata['choices']} - {repr(fields[path].default)}
    assert {choice for choice in choices - values if (kind, path, choice) not in NEEDS_A_GPU} == set(), path


@pytest.fixture(scope='module', params=list(BASES))
def dropped(request):
  """logits(own rate, rate of the block) of a model with one memory."""
  mixer = dataclasses.replace(BASES[request.param], zero_out=False)
  token, position = jnp.arange(L)[None] % 7, jnp.arange(L)[None]
  @functools.cache
  def logits(own, block):
    mixers = {'mem': dataclasses.replace(mixer, dropout=own)}
    config = ModelConfig(width=D, hidden=-1, vocabulary=7, mixers=mixers, pattern=(), repeats=0, prefix=('mem',))
    model, rng = build_decoder(change(config, {'block.dropout': block})), np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), param_shapes(model)[0])
    call = jax.jit(lambda params, key: model.apply({'params': params}, token, model.init_state(1), position_BxL=position, key=key)[0])
    return np.asarray(call(params, jax.random.key(0)))
  return logits


def test_dropout_is_that_of_the_block_or_its_own(dropped):
  """Of the output of the stage; with a rate of 0 that of the block does not apply."""
  none, own, block, embedding = dropped(0.0, 0.0), dropped(.5, 0.0), dropped(-1.0, .5), dropped(0.0, .5)
  for a, b in ((none, own), (none, block), (block, embedding), (none, embedding)): assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(('kind', 'path', 'leaf'), [('bank', 'shape.share', 'entries'), ('product_key', 'share', 'values')])
def test_a_name_makes_one_table_for_all_layers(kind, path, leaf):
  def shapes(mixer):
    model = build_decoder(ModelConfig(width=D, hidden=-1, vocabulary=7, mixers={'mem': mixer}, pattern=('mem',), repeats=3))
    return {path: leaf.shape for path, leaf in named(param_shapes(model)[0]).items()}
  own, shared = shapes(BASES[kind]), shapes(change(BASES[kind], {path: 'common'}))
  before, after = f'repeats/layer_0/mixers/mem/bank/{leaf}', f'bank_common/{leaf}'
  assert set(own) - set(shared) == {before} and set(shared) - set(own) == {after}
  assert own[before] == (3, *shared[after])
