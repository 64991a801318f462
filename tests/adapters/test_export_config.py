"""config.json, metadata and names as they are written: what was read comes back, and what a file cannot say is refused by name."""
import dataclasses
import json

import numpy as np
import pytest

from memjax.adapters.export_config import config_json, difference, plain_config, without_windows
from memjax.adapters.export_gguf import gguf_metadata, gguf_name, gguf_tensors
from memjax.adapters.export_hf import hf_rows, write_weights
from memjax.adapters.families import family_config
from memjax.adapters.gguf_model import GgufModel, hf_name
from memjax.adapters.gguf_write import write_gguf
from memjax.adapters.pretrained import load_pretrained
from memjax.adapters.safetensors import Checkpoint
from memjax.config.attention import RopeConfig
from memjax.config.banks import BankConfig, BankShapeConfig
from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig
from memjax.config.mixers import AttentionConfig, WindowConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig
from memjax.models.decoder import build_decoder, param_shapes
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import VOCABULARY, metadata_of
from tests.adapters.test_lora import random_params

NEWER = ('rope_parameters', 'dtype', 'layer_types')
FAMILY = {'mistral_nowin_hd12': 'llama'}           # without a window they are the same model


@pytest.mark.parametrize('case', cases())
def test_both_styles_say_the_same_model(case):
  found = cases()[case]
  config = family_config(found['config'])
  apart = ('max_window_layers', 'rope_parameters')
  for given in (found['config'], found['older'], {}):
    tree = config_json(config, context=128, dtype='float32', given=given)
    assert tree['model_type'] == (found['config']['model_type'] if given else FAMILY.get(case, found['config']['model_type']))
    assert family_config(tree) == family_config({name: value for name, value in tree.items() if name not in NEWER}) == config
    for name, value in found['config'].items():
      if name in tree and given == found['config'] and name not in apart: assert tree[name] == value, name
  assert json.loads(json.dumps(tree)) == tree and tree['torch_dtype'] == tree['dtype'] == 'float32'


def test_a_run_of_its_own_is_llama():
  """Sizes that a config leaves out are written out; names of mixers do not matter; what only training knows does not either."""
  block = BlockConfig(dropout=0.1, init_std=0.02, lora=LoraConfig(rank=2))
  config = ModelConfig(width=24, vocabulary=11, mixers={'near': AttentionConfig(heads=4)}, pattern=('near',), repeats=3, block=block,
                       embedding=EmbeddingConfig(tie=False))
  tree = config_json(config, context=64, dtype='bfloat16')
  assert (tree['model_type'], tree['intermediate_size'], tree['head_dim'], tree['num_key_value_heads']) == ('llama', 64, 6, 4)
  again = family_config(tree)
  assert again.layers == ('attention',) * 3 and not difference(again, plain_config(config)) and not plain_config(config).block.lora.rank
  assert difference(again, dataclasses.replace(again, width=32)) == 'width'


PLAIN = dict(width=16, vocabulary=11, hidden=24)
MIXERS = {'attention': AttentionConfig(heads=2), 'window': WindowConfig(heads=2, window=3), 'other': AttentionConfig(heads=4),
          'bank': BankConfig(heads=2, shape=BankShapeConfig(entries=4))}
REFUSED = [
  ('a bank', dict(pattern=('attention>bank',)), "cannot hold the bank memory 'bank' of the model"),
  ('two sizes of heads', dict(pattern=('attention', 'other')), "cannot hold the layer 'other' of the model"),
  ('a sum', dict(pattern=('attention+window',)), r"cannot hold the layer 'attention\+window' of the model"),
  ('bare', dict(pattern=('attention:bare',)), "cannot hold the layer 'attention:bare' of the model"),
  ('windows in some layers of llama', dict(pattern=('attention', 'window')), 'checkpoint of llama cannot hold this model: its pattern is'),
  ('layer norm', dict(block=BlockConfig(norm='layernorm')), "checkpoint of llama cannot hold this model: its block.norm is 'layernorm'"),
  ('no gate', dict(block=BlockConfig(activation='gelu')), "its block.activation is 'gelu'"),
  ('learned positions', dict(embedding=EmbeddingConfig(position='learned', max_position=8)), "its embedding.position is 'learned'"),
  ('no positions', dict(mixers={'attention': AttentionConfig(heads=2, rotary=False)}), 'its mixers.attention.rotary is False'),
  ('no network', dict(hidden=-1), 'cannot hold a model without feed-forward networks')]


@pytest.mark.parametrize(('changes', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_no_family_has_is_refused_by_name(changes, message):
  config = ModelConfig(**{**PLAIN, 'mixers': MIXERS, 'pattern': ('attention',), **changes})
  with pytest.raises(UserError, match=message): config_json(config, context=8, dtype='float32')


@pytest.mark.parametrize('case', [case for case in cases() if case != 'qwen3'])
def test_metadata_and_tensors_come_back_from_gguf(case, tmp_path):
  """F32: config, names, rows of queries and keys, divisors of Llama 3; windows are left out."""
  config, wanted = family_config(cases()[case]['config']), tensors_of(case)
  wide = plain_config(without_windows(config))
  tree = config_json(wide, context=128, dtype='float32', given=cases()[case]['config'])
  _, params = load_pretrained(write_folder(tmp_path / 'm', cases()[case]['config'], wanted))
  metadata = gguf_metadata(tree, wide, 'F32')
  write_gguf(tmp_path / 'm.gguf', metadata | VOCABULARY, gguf_tensors(tree, wide, hf_rows(config, params, {}), 'F32'))
  file = GgufModel(tmp_path / 'm.gguf')
  assert file.config() == wide and file.context == 128 and set(file.names) == set(wanted)
  for name, x in wanted.items(): np.testing.assert_array_equal(file.read(name), x, err_msg=name)
  for key, value in metadata_of(case).items(): assert metadata[key] == value, key
  assert all(hf_name(gguf_name(name)) == name for name in wanted)


def test_what_gguf_has_no_words_for():
  config = family_config(cases()['qwen3']['config'])
  tree = config_json(config, context=8, dtype='float32')
  with pytest.raises(UserError, match=r'no key for the attention_factor=1\.3 of yarn'): gguf_metadata(tree, config, 'F32')
  rope = RopeConfig(kind='llama3', factor=2.0, original=64, low_factor=2.0)
  attention = dataclasses.replace(config.mixers['attention'], rope=rope)
  with pytest.raises(UserError, match='no key for the low_factor=2 of llama3'):
    gguf_metadata(tree, dataclasses.replace(config, mixers={'attention': attention}), 'F32')


def test_types_of_gguf():
  """Vectors F32, rows of 40 numbers F16, tables of tokens no coarser than Q8_0."""
  config = family_config(cases()['llama_plain']['config'])
  rows = hf_rows(config, random_params(config), {})
  tree = config_json(config, context=8, dtype='float32')
  found = {name: tensor.type for name, tensor in gguf_tensors(tree, config, rows, 'Q4_0').items() if not name.startswith('blk.1')}
  assert found == {
      'token_embd.weight': 'Q8_0', 'output.weight': 'Q8_0', 'output_norm.weight': 'F32', 'blk.0.attn_norm.weight': 'F32',
      'blk.0.ffn_norm.weight': 'F32', 'blk.0.ffn_down.weight': 'F16',
      **{f'blk.0.{name}.weight': 'Q4_0' for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up')}}
  assert {tensor.type for tensor in gguf_tensors(tree, config, rows, 'BF16').values()} == {'F32', 'BF16'}
  assert [gguf_metadata(tree, config, kind)['general.file_type'] for kind in ('F32', 'F16', 'Q8_0', 'BF16')] == [0, 1, 7, 32]
  assert 'general.quantization_version' not in gguf_metadata(tree, config, 'F16')


def test_shards_and_their_index(tmp_path):
  config = family_config(cases()['llama_plain']['config'])
  rows = hf_rows(config, random_params(config), dict.fromkeys(['model.norm.weight'], 'bfloat16'))
  assert write_weights(str(tmp_path), rows) == ['model.safetensors']
  whole = Checkpoint(str(tmp_path))
  (tmp_path / 'cut').mkdir()
  files = write_weights(str(tmp_path / 'cut'), rows, limit=20_000)
  cut, index = Checkpoint(str(tmp_path / 'cut')), json.loads((tmp_path / 'cut' / files[-1]).read_text())
  assert len(files) == 5 and sorted(path.name for path in (tmp_path / 'cut').iterdir()) == sorted(files)
  assert index['metadata']['total_size'] == sum(whole.read(name).nbytes for name in whole.names)
  assert files[0] == 'model-00001-of-00004.safetensors'
  assert all((tmp_path / 'cut' / name).stat().st_size < 22_000 for name in files)
  assert set(whole.names) == set(cut.names) == set(index['weight_map'])
  for name in whole.names: assert whole.read(name).tobytes() == cut.read(name).tobytes() and whole.shape(name) == rows[name].shape
  assert whole.read('model.norm.weight').dtype.name == 'bfloat16'
  with pytest.raises(UserError, match=r"'model\.embed_tokens\.weight' takes 7,808 bytes, more than a file may hold \(5,000\)"):
    write_weights(str(tmp_path), rows, limit=5_000)


def test_numbers_that_do_not_fit():
  config = family_config(cases()['llama_plain']['config'])
  params = random_params(config)
  params['norm']['scale'] = params['norm']['scale'] * 1e6
  with pytest.raises(UserError, match='norm/scale holds numbers that do not fit float16'):
    np.asarray(hf_rows(config, params, {'model.norm.weight': 'float16'})['model.norm.weight'])
  assert param_shapes(build_decoder(config))[0]['norm']['scale'].shape == (32,)
