"""Low-rank changes in PEFT's files: written as PEFT writes them, read back bit for bit, refused in one line."""
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.families import family_config, tensor_places
from memjax.adapters.lora import Factors, extract, insert, merge, strip, with_lora
from memjax.adapters.peft import CONFIG, TENSORS, load_peft, save_peft
from memjax.adapters.pretrained import load_pretrained
from memjax.adapters.safetensors import SafeTensors
from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, scale_of
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from tests.adapters.files import cases, safetensors, tensors_of, write_folder
from tests.adapters.make_peft import CASE, HERE, METHODS, TOKEN
from tests.adapters.test_lora import QUERY_VALUE, random_params, same

LLAMA = family_config(cases()['llama_plain']['config'])

VARIANTS = {
    'query and value': QUERY_VALUE, 'every kernel': LoraConfig(rank=2, targets=('kernel$',)),
    'patterns': LoraConfig(rank=3, alpha=6.5, stabilised=True, dropout=0.1, targets=('/(query|key|up)/',), ranks=('/key/=2',),
                           alphas=('/up/=1.25',)),
    'magnitudes': LoraConfig(rank=2, targets=('/(query|down)/',), dora=True)}


@pytest.mark.parametrize('name', VARIANTS)
def test_round_trip_through_files(name, tmp_path):
  config = with_lora(LLAMA, VARIANTS[name])
  params = random_params(config)
  save_peft(str(tmp_path), config, params, base='host')
  loaded, adapter = load_peft(str(tmp_path), LLAMA)
  own = extract(params, config.block.lora)
  assert set(adapter) == set(own)
  for path, factors in own.items():
    assert adapter[path].scale == pytest.approx(factors.scale, rel=1e-12)
    assert np.array_equal(adapter[path].a, factors.a) and np.array_equal(adapter[path].b, factors.b)
    assert np.array_equal(adapter[path].magnitude, factors.magnitude) and (factors.magnitude is not None) == config.block.lora.dora
  again, flat = named(insert(strip(params), adapter)), named(params)
  for path, x in flat.items():
    if path.endswith('/lora_m'): np.testing.assert_allclose(again[path], x, atol=1e-6)      # m = ||W|| + x was rounded
    else: assert again[path].dtype == x.dtype and np.array_equal(again[path], x)
  assert again.keys() == flat.keys()
  shapes_of = lambda tree: {path: x.shape for path, x in named(tree).items()}
  assert shapes_of(param_shapes(build_decoder(loaded))[0]) == shapes_of(params)
  for name in ('dropout', 'stabilised', 'dora'): assert getattr(loaded.block.lora, name) == getattr(config.block.lora, name)


def test_files_are_those_of_the_specification(tmp_path):
  config = with_lora(LLAMA, QUERY_VALUE)
  params = random_params(config)
  save_peft(str(tmp_path), config, params, base='host')
  file, tree = SafeTensors(str(tmp_path / TENSORS)), json.loads((tmp_path / CONFIG).read_text())
  heads, kv, width = 4 * 8, 2 * 8, 32
  sizes = {'q_proj': heads, 'v_proj': kv}
  assert {name: entry.shape for name, entry in file.entries.items()} == {
      f'base_model.model.model.layers.{i}.self_attn.{name}.lora_{side}.weight': (4, width) if side == 'A' else (size, 4)
      for i in range(2) for name, size in sizes.items() for side in 'AB'}
  assert tree == {'base_model_name_or_path': 'host', 'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 4, 'lora_alpha': 8,
                  'lora_dropout': 0.0, 'target_modules': ['q_proj', 'v_proj'], 'rank_pattern': {}, 'alpha_pattern': {},
                  'use_rslora': False, 'bias': 'none', 'fan_in_fan_out': False, 'use_dora': False, 'init_lora_weights': True,
                  'inference_mode': True, 'modules_to_save': None}
  merged = named(merge(params, [extract(params, QUERY_VALUE)]))
  for name, place in tensor_places(LLAMA).items():
    a = f'base_model.model.{name.removesuffix(".weight")}.lora_A.weight'
    path = '/'.join(place.path)
    moved = (merged[path] - named(params)[path])[place.repeat if place.repeat >= 0 else ...]
    if a in file.entries: np.testing.assert_allclose(moved.T, 2 * file.read(a.replace('_A', '_B')) @ file.read(a), atol=1e-5)
    else: assert not moved.any()


@pytest.mark.parametrize('method', METHODS)
def test_adapters_that_peft_wrote(method, tmp_path):
  """Q6.4: the logits of PEFT with its own adapter, unmerged and merged; far from those of the host."""
  host, params = load_pretrained(write_folder(tmp_path / CASE, cases()[CASE]['config'], tensors_of(CASE)))
  config, adapter = load_peft(str(HERE / method), host)
  assert len(adapter) == 3 and config.block.lora.dora == (method == 'dora') != config.block.lora.stabilised
  meant = np.load(HERE / method / 'logits.npy')
  def call(config, params):
    model = build_decoder(config)
    state, position = model.init_state(len(TOKEN)), jnp.broadcast_to(jnp.arange(TOKEN.shape[1]), TOKEN.shape)
    return model.apply({'params': params}, jnp.asarray(TOKEN), state, position_BxL=position)[0]
  def both(params, merged): return call(config, params), call(host, merged), call(host, params)
  full, merged, plain = jax.jit(both)(insert(params, adapter), merge(params, [adapter]))
  np.testing.assert_allclose(full, meant, atol=1e-4)
  np.testing.assert_allclose(merged, meant, atol=1e-4)
  assert np.abs(plain - meant).max() > 1


def test_what_reads_back_differently_does_not_take_the_name(tmp_path, monkeypatch):
  config, path = with_lora(LLAMA, QUERY_VALUE), tmp_path / TENSORS
  save_peft(str(tmp_path), config, random_params(config))
  before = path.read_bytes()
  monkeypatch.setattr(SafeTensors, 'read', lambda self, name: np.zeros(self.entries[name].shape, np.float32))
  with pytest.raises(UserError, match='does not hold what was written'): save_peft(str(tmp_path), config, random_params(config))
  assert path.read_bytes() == before


KEY = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight'
GOOD = {KEY.format(i, side): np.full((2, 32) if side == 'A' else (32, 2), i + 1, np.float32) for i in range(2) for side in 'AB'}
# Every key that peft 0.21.2 writes, at its default.
OFF = ('alora_invocation_tokens', 'arrow_config', 'auto_mapping', 'corda_config', 'eva_config', 'exclude_modules', 'kasa_config',
       'layer_replication', 'layers_pattern', 'layers_to_transform', 'lora_ga_config', 'megatron_config', 'modules_to_save',
       'monteclora_config', 'revision', 'target_parameters', 'trainable_token_indices', 'use_bdlora', 'velora_config')
NO = ('ensure_weight_tying', 'fan_in_fan_out', 'lora_bias', 'use_dora', 'use_qalora', 'use_rslora')
SETTINGS = dict.fromkeys(OFF) | dict.fromkeys(NO, False) | {
    'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'lora_dropout': 0.0, 'bias': 'none', 'target_modules': ['q_proj'], 'loftq_config': {},
    'rank_pattern': {}, 'alpha_pattern': {}, 'megatron_core': 'megatron.core', 'qalora_group_size': 16, 'init_lora_weights': True,
    'inference_mode': True, 'peft_version': '0.21.2', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': 'host'}
FIRST = KEY.format(0, 'A')
BAD_FILES = {
    'another method': ({'peft_type': 'IA3'}, {}, "peft_type is 'IA3'"),
    'no magnitudes': ({'use_dora': True}, {}, f'lacks the tensor {FIRST[:-14]}.lora_magnitude_vector'),
    'odd magnitudes': ({'use_dora': True}, {f'{KEY.format(i, "A")[:-14]}.lora_magnitude_vector': np.ones(3 + 29 * i, np.float32)
                                            for i in range(2)}, 'q_proj has magnitudes [3]; its kernel is [32, 32]'),
    'biases': ({'bias': 'all'}, {}, "bias='all' is not supported"), 'unknown': ({'layer_replication': [[0, 2]]}, {}, 'layer_replication='),
    'modules': ({'modules_to_save': ['lm_head']}, {}, 'modules_to_save='),
    'PiSSA': ({'init_lora_weights': 'pissa'}, {}, 'changes the host'),
    'no rank': ({'r': None}, {}, 'r must be a number above 0'), 'rank 0': ({'rank_pattern': {'q': 0}}, {}, 'r must be a number above 0'),
    'alpha': ({'lora_alpha': True}, {}, 'lora_alpha must be a number'), 'dropout': ({'lora_dropout': '1'}, {}, 'lora_dropout is no number'),
    'dropout 1': ({'lora_dropout': 1.0}, {}, 'dropout must be at most 0.999'),
    'no pattern': ({'rank_pattern': {'[': 2}}, {}, 'not a regular expression'),
    'another rank': ({'r': 3}, {}, 'its rank 3'), 'pattern of ranks': ({'rank_pattern': {'q_proj': 3}}, {}, 'its rank 3'),
    'layers differ': ({'alpha_pattern': {r'layers\.1\.self_attn\.q_proj': 8}}, {}, 'differently'),
    'layer missing': ({}, {KEY.format(1, 'A'): None, KEY.format(1, 'B'): None}, 'differently'),
    'half': ({}, {FIRST: None}, f'lacks the tensor {FIRST}'), 'nothing': ({}, dict.fromkeys(GOOD), 'holds no changes'),
    'no such layer': ({}, {KEY.format(9, side): GOOD[KEY.format(0, side)] for side in 'AB'}, "changes 'model.layers.9.self_attn.q_proj'"),
    'magnitudes': ({}, {'base_model.model.x.lora_magnitude_vector': np.ones(3, np.float32)}, 'is no factor of a linear map'),
    'width': ({}, {FIRST: np.ones((2, 31), np.float32)}, 'its kernel is [32, 32], its rank 2')}


def write_peft(folder, settings=(), tensors=()):
  tensors = {name: x for name, x in {**GOOD, **dict(tensors)}.items() if x is not None}
  (folder / CONFIG).write_text(json.dumps(SETTINGS | dict(settings)))
  (folder / TENSORS).write_bytes(safetensors(tensors))
  return str(folder)


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_adapter_is_one_line(name, tmp_path):
  settings, tensors, says = BAD_FILES[name]
  with pytest.raises(UserError) as caught: load_peft(write_peft(tmp_path, settings, tensors), LLAMA)
  assert says in str(caught.value) and str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_patterns_of_peft_end_at_dots(tmp_path):
  config, adapter = load_peft(write_peft(tmp_path, {'alpha_pattern': {'proj': 9, 'self_attn.q_proj': 5}, 'use_rslora': True}), LLAMA)
  (path, factors), = adapter.items()
  assert path == 'repeats/layer_0/mixers/attention/query/kernel' and factors.scale == 5 / 2 ** 0.5 == scale_of(config.block.lora, path)
  assert isinstance(factors, Factors) and factors.a.shape == (2, 32, 2) and np.all(np.asarray(factors.a)[1] == 2)


def test_the_flags_of_the_page_exist():
  page = (Path(__file__).parent.parent.parent / 'docs' / 'lora.md').read_text(encoding='utf-8')
  commands = re.findall(r'^python -m memjax\.(\w+) (.*)$', page, re.M)
  assert len(commands) == 5
  for name, words in commands:
    known = {flag.name for flag in importlib.import_module(f'memjax.{name}').FLAGS} | {'config'}
    assert {word.partition('.')[0] for word in re.findall(r'--([\w.]+)', words)} <= known, name


@pytest.mark.slow
def test_the_page_on_changes_does_what_it_says(tmp_path):
  page = (Path(__file__).parent.parent.parent / 'docs' / 'lora.md').read_text(encoding='utf-8')
  host, names = write_folder(tmp_path / 'host', cases()['llama_plain']['config'], tensors_of('llama_plain')), {}
  code = '\n'.join(re.findall(r'```python\n(.*?)```', page, re.DOTALL))
  for word, place in (('HOST', host), ('ADAPTER', tmp_path / 'adapter'), ('PACKED', tmp_path / 'packed'), ('nf4', 'int8')):
    code = code.replace(f"'{word}'", f"'{place}'")       # groups of 32 do not divide the 40 numbers of this host
  exec(compile(code, 'docs/lora.md', 'exec'), names)
  assert same(names['again'], names['host']) and set(names['optimizer'].groups) == {'lora', 'base'}
  assert names['loss'].error.keys() == names['adapter'].keys() < names['report'].error.keys() and not same(names['remade'], names['small'])
  assert named(names['params']).keys() - named(names['host']).keys() == {f'{path[:-6]}lora_{x}' for path in names['adapter'] for x in 'ab'}
