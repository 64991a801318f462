"""Checkpoints of four families in this decoder against what transformers computed for them, and the mistakes that must show."""
import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.families import DEPTH_LIMIT, family_config, tensor_places
from memjax.adapters.pretrained import load_params, load_pretrained
from memjax.adapters.safetensors import Checkpoint
from memjax.config.attention import RopeConfig
from memjax.config.errors import UserError
from memjax.config.mixers import WindowConfig
from memjax.models.decoder import build_decoder
from memjax.runtime.losses import token_losses
from tests.adapters.files import cases, reference, tensors_of, write_folder
from tests.adapters.make_references import IGNORED, LENGTH, ROWS, tokens

CASES = sorted(cases())
PREFILL = 15
POSITION = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
SCORED = np.ones((ROWS, LENGTH - 1), bool)
SCORED[0, :IGNORED - 1] = False


def quick(*names):
  """All cases, those not named only in the slow suite: each is a compilation of its own."""
  assert set(names) <= set(CASES)
  return [case if case in names else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture(autouse=True)
def _precision():
  """Full float32 products, on accelerators too."""
  with jax.default_matmul_precision('highest'): yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """{case: folder}, every third one in three shards."""
  root = tmp_path_factory.mktemp('checkpoints')
  return {case: write_folder(root / case, cases()[case]['config'], tensors_of(case), shards=3 if i % 3 == 2 else 1)
          for i, case in enumerate(CASES)}


@pytest.fixture(scope='module')
def loaded(folders):
  return functools.cache(lambda case: load_pretrained(folders[case]))


def forward(config, params, token_BxL):
  model = build_decoder(config)
  return model.apply({'params': params}, token_BxL, model.init_state(ROWS), position_BxL=POSITION)[0]


class Static(tuple):
  """A case and its config as one static argument, told apart by the case."""
  __slots__ = ()
  def __hash__(self): return hash(self[0])
  def __eq__(self, other): return self[0] == other[0]


def leaf(tree, place):
  """The part of a tree that one tensor of the checkpoint fills, as the checkpoint has it."""
  value = np.asarray(functools.reduce(lambda node, key: node[key], place.path, tree))
  value = value[place.repeat] if place.repeat >= 0 else value
  return value.T if place.transposed else value


@pytest.fixture(scope='module')
def jitted():
  """The forward pass; mistakes in parameters alone share the compilation of their case."""
  return jax.jit(lambda static, params, token_BxL: forward(static[1], params, token_BxL), static_argnums=0)


@pytest.mark.parametrize('case', quick('llama_bias_mha_tied', 'llama_llama3rope', 'llama_linear', 'qwen2_window', 'qwen3'))
def test_logits_and_loss(case, loaded, jitted):
  (config, params), wanted, token_BxL = loaded(case), reference(case), jnp.asarray(tokens(case))
  logits = jitted(Static((case, config)), params, token_BxL)
  np.testing.assert_allclose(logits, wanted['logits'], atol=1e-4, rtol=0)
  with jax.enable_x64():                                    # the sum over tokens in float64: what is compared is the model
    totals = token_losses(jnp.asarray(np.asarray(logits, np.float64)[:, :-1]), token_BxL[:, 1:], jnp.asarray(SCORED))
    assert abs(float(totals.nats) / int(totals.tokens) - float(wanted['loss'])) <= 1e-6


@pytest.mark.parametrize('case', quick('llama_bias_mha_tied', 'llama_llama3rope', 'qwen2_window', 'qwen3'))
def test_gradients(case, loaded):
  (config, params), wanted, token_BxL = loaded(case), reference(case), jnp.asarray(tokens(case))
  def loss(params):
    totals = token_losses(forward(config, params, token_BxL)[:, :-1], token_BxL[:, 1:], jnp.asarray(SCORED))
    return totals.nats / totals.tokens
  gradient, places = jax.jit(jax.grad(loss))(params), tensor_places(config)
  names = [name.removeprefix('gradient/') for name in wanted if name.startswith('gradient/')]
  assert len(names) >= 6
  for name in names: np.testing.assert_allclose(leaf(gradient, places[name]), wanted[f'gradient/{name}'], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize('case', quick('llama_linear', 'qwen2_window', 'qwen3'))
def test_decoding_with_a_cache(case, loaded):
  config, params = loaded(case)
  model = build_decoder(config)
  def decode(params, token_BxL):
    state = model.init_state(ROWS, LENGTH)
    head, state, _ = model.apply({'params': params}, token_BxL[:, :PREFILL], state, position_BxL=POSITION[:, :PREFILL])
    def step(state, token):
      logits, state, _ = model.apply({'params': params}, token[0][:, None], state, position_BxL=token[1][:, None])
      return state, logits[:, 0]
    rest = (token_BxL[:, PREFILL:].T, POSITION[:, PREFILL:].T)
    return jnp.concatenate([head, jnp.swapaxes(jax.lax.scan(step, state, rest)[1], 0, 1)], 1)
  logits = jax.jit(decode)(params, jnp.asarray(tokens(case)))
  np.testing.assert_allclose(logits, reference(case)['logits'], atol=1e-4, rtol=0)


def mixers(config, **changes):
  """The config with the fields of all mixers changed; a callable gets the old value."""
  def one(mixer): return dataclasses.replace(mixer, **{n: v(getattr(mixer, n)) if callable(v) else v for n, v in changes.items()})
  return dataclasses.replace(config, mixers={name: one(mixer) for name, mixer in config.mixers.items()})


def tensors(params, config, wanted, change):
  """The parameters with the tensors whose names hold `wanted` changed."""
  params = jax.tree.map(np.array, params)
  found = [place for name, place in tensor_places(config).items() if wanted in name]
  assert found
  for place in {place.path: place for place in found}.values():
    node = functools.reduce(lambda tree, key: tree[key], place.path[:-1], params)
    node[place.path[-1]] = change(node[place.path[-1]])
  return params


def halves_mixed(kernel):
  """The columns of each head of 8 channels in the order of interleaved pairs."""
  shape = kernel.shape
  return kernel.reshape(*shape[:-1], -1, 4, 2).swapaxes(-1, -2).reshape(shape)


def plain(_): return RopeConfig()


def swapped(config):
  return dataclasses.replace(config, mixers={'attention': config.mixers['window'], 'window': config.mixers['attention']})


MUTATIONS = {
    'epsilon': ('llama_plain', lambda c, p: (dataclasses.replace(c, block=dataclasses.replace(c.block, norm_epsilon=1e-5)), p)),
    'base + 1 %': ('llama_plain', lambda c, p: (mixers(c, rotary_base=lambda base: 1.01 * base), p)),
    'linear ignored': ('llama_linear', lambda c, p: (mixers(c, rope=plain), p)),
    'llama3 ignored': ('llama_llama3rope', lambda c, p: (mixers(c, rope=plain), p)),
    'yarn ignored': ('qwen2_tied_yarn', lambda c, p: (mixers(c, rope=plain), p)),
    'factor of yarn ignored': ('qwen2_tied_yarn', lambda c, p: (
        mixers(c, rope=lambda rope: dataclasses.replace(rope, attention_factor=1.0)), p)),
    'given factor of yarn ignored': ('qwen3', lambda c, p: (
        mixers(c, rope=lambda rope: dataclasses.replace(rope, attention_factor=0.0)), p)),
    'qkv bias dropped': ('qwen2', lambda c, p: (c, tensors(p, c, '_proj.bias', np.zeros_like))),
    'q norm ignored': ('qwen3', lambda c, p: (c, tensors(p, c, 'q_norm', np.ones_like))),
    'qk norm dropped': ('qwen3', lambda c, p: (mixers(c, qk_norm=0.0), p)),
    'qk epsilon': ('qwen3_tied_bias', lambda c, p: (mixers(c, qk_norm=1e-3), p)),
    'window off': ('mistral_window', lambda c, p: (mixers(c, window=LENGTH), p)),
    'window off by one': ('mistral_window', lambda c, p: (mixers(c, window=lambda w: w + 1), p)),
    'window in the wrong layers': ('qwen2_window', lambda c, p: (swapped(c), p)),
    'interleaved rope': ('llama_plain', lambda c, p: (c, tensors(tensors(p, c, 'q_proj', halves_mixed), c, 'k_proj', halves_mixed))),
    'layers swapped': ('llama_plain', lambda c, p: (c, tensors(p, c, 'mlp.up_proj', lambda stack: stack[::-1]))),
    'o untransposed': ('llama_plain', lambda c, p: (c, tensors(p, c, 'o_proj', lambda stack: stack.swapaxes(1, 2)))),
    'gate taken for up': ('llama_plain', lambda c, p: (
        c, tensors(p, c, 'up_proj', lambda _: p['repeats']['layer_0']['mlp']['gate']['kernel']))),
}


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_planted_mistake_shows(name, loaded, jitted):
  case, change = MUTATIONS[name]
  config, params = loaded(case)
  new_config, new_params = change(config, params)
  static = Static((case if new_config == config else name, new_config))
  moved = np.abs(jitted(static, new_params, jnp.asarray(tokens(case))) - reference(case)['logits']).max()
  assert moved > 1e-3


def test_scanned_equals_unrolled(loaded, folders, jitted):
  config, params = loaded('llama_bias_mha_tied')
  flat = dataclasses.replace(config, prefix=config.layers, pattern=(), repeats=0)
  other = load_params(flat, Checkpoint(folders['llama_bias_mha_tied']))
  token_BxL = jnp.asarray(tokens('llama_bias_mha_tied'))
  assert config.repeats == 2 and sorted(other) == ['embed', 'norm', 'prefix']
  np.testing.assert_allclose(jitted(Static(('scanned', config)), params, token_BxL), jitted(Static(('flat', flat)), other, token_BxL),
                             atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_both_styles_give_one_config(case):
  config = family_config(cases()[case]['config'])
  assert family_config(cases()[case]['older']) == config
  assert {place.path for place in tensor_places(config).values()} and config.depth == 2
  assert set(tensor_places(config)) == set(cases()[case]['shapes'])


def test_windows_by_layer():
  tree = {**cases()['qwen2_window']['older'], 'num_hidden_layers': 7, 'max_window_layers': 3}
  config = family_config(tree)
  assert config.layers == ('attention',) * 3 + ('window',) * 4 and config.repeats == 4
  assert isinstance(config.mixers['window'], WindowConfig) and config.mixers['window'].window == 7
  assert config.mixers['window'].bias and config.mixers['attention'].bias and not config.mixers['window'].out_bias
  kinds = ['sliding_attention', 'sliding_attention', 'full_attention'] * 2
  config = family_config({**tree, 'num_hidden_layers': 6, 'layer_types': kinds})
  assert config.pattern == ('window', 'window', 'attention') and config.repeats == 2
  assert family_config({**tree, 'use_sliding_window': False}).layers == ('attention',) * 7
  assert family_config({**tree, 'max_window_layers': 0}).layers == ('window',) * 7


BASE = {'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 40, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        'vocab_size': 61, 'max_position_embeddings': 64}


def test_defaults_of_what_is_absent():
  config = family_config(BASE)
  mixer = config.mixers['attention']
  assert (mixer.heads, mixer.kv_heads, mixer.head_width, mixer.rotary_base) == (4, 4, 8, 1e4)
  assert config.block.norm_epsilon == 1e-6 and not config.embedding.tie and not mixer.bias and not config.block.bias
  yarn = family_config({**BASE, 'rope_scaling': {'type': 'yarn', 'factor': 4}}).mixers['attention'].rope
  assert (yarn.kind, yarn.factor, yarn.original) == ('yarn', 4.0, 64)
  assert family_config(BASE, dtype='bfloat16').dtype == 'bfloat16'


QWEN, SLIDING = {'model_type': 'qwen2'}, {'model_type': 'qwen3', 'use_sliding_window': True}
REFUSED = [
    ({'model_type': 'gemma2'}, "model_type 'gemma2' is not one of llama, mistral, qwen2, qwen3"),
    ({'model_type': 'qwen2_moe'}, "did you mean 'qwen2'?"), ({'model_type': None}, 'model_type is missing'),
    ({'model_type': 7}, 'model_type wants str, got 7'),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu' is not supported"),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'the checkpoint is quantised'),
    ({'hidden_size': None}, 'hidden_size is missing'), ({'hidden_size': '32'}, "hidden_size wants int, got '32'"),
    ({'hidden_size': True}, 'hidden_size wants int, got True'), ({'vocab_size': 0}, 'vocab_size must be above 0'),
    ({'vocab_size': 1 << 40}, 'vocab_size must be above 0 and below 2^31'), ({'hidden_size': 33}, 'num_attention_heads=4 does not divide'),
    ({'num_hidden_layers': 10**6}, f'num_hidden_layers=1000000 is above {DEPTH_LIMIT}'),
    ({'num_key_value_heads': 3}, 'kv_heads=3 does not divide heads=4'), ({'head_dim': 5}, 'head_width=5 is odd'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps must be above 0'), ({'rope_theta': -1.0}, 'rope_theta must be above 0'),
    ({'attention_bias': 'yes'}, "attention_bias wants bool, got 'yes'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope type 'dynamic' is not one of default, linear, llama3, yarn"),
    ({'rope_parameters': {'rope_type': 'longrope'}}, "rope type 'longrope' is not one of"),
    ({'rope_scaling': {'type': 'linear'}}, 'rope type linear has no factor'),
    ({'rope_scaling': [1]}, 'the rope parameters are no table: [1]'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'mscale': 1.0}}, "rope type yarn with 'mscale' is not supported"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'truncate': False}}, "rope type yarn with 'truncate' is not supported"),
    ({'rope_scaling': {'type': 'linear', 'factor': 0.5}}, 'rope.factor must be at least 1'),
    ({'rope_scaling': {'type': 'llama3', 'factor': 8.0, 'low_freq_factor': 4.0}}, 'high_factor=4 must be above low_factor=4'),
    ({'rope_parameters': {'full_attention': {'rope_type': 'default'}}}, 'rope parameters by type of layer are not supported'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor other than 1 is not supported'),
    ({'model_type': 'mistral'}, 'sliding_window is missing; write null or a number of tokens'),
    ({**QWEN, 'layer_types': ['full_attention']}, 'layer_types is no list of 2 names'),
    ({**QWEN, 'layer_types': ['full_attention', 'chunked_attention']}, "layer_types holds 'chunked_attention'; known are"),
    ({**QWEN, 'layer_types': ['full_attention', 'sliding_attention']}, 'holds sliding_attention, but no sliding window is in use'),
    ({'layer_types': ['sliding_attention'] * 2}, 'layer_types contradicts what llama does in its layers'),
    ({**SLIDING, 'sliding_window': -4}, 'sliding_window must be above 0'),
    ({**SLIDING, 'max_window_layers': 1.5}, 'max_window_layers wants int, got 1.5'),
]


@pytest.mark.parametrize('changes, says', REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_config_is_refused_in_one_line(changes, says):
  with pytest.raises(UserError) as caught: family_config({**copy.deepcopy(BASE), **changes}, path='folder/config.json')
  message = str(caught.value)
  assert says.removeprefix('rope.') in message and message.startswith('folder/config.json: ') and '\n' not in message and len(message) < 300


def test_written_by_transformers_itself(loaded):
  """The folder under data/ is what `save_pretrained` left."""
  from tests.adapters.make_references import DATA, WRITTEN
  config, params = load_pretrained(str(DATA / 'written'))
  assert config == family_config(cases()[WRITTEN]['config']) and json.loads((DATA / 'written' / 'config.json').read_text())
  jax.tree.map(np.testing.assert_array_equal, params, loaded(WRITTEN)[1])
