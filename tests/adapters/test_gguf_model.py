"""GGUF files as models: the same config, tensors and parameters as the folder they were made from, and what is refused: Q3.2."""
import jax
import numpy as np
import pytest

from memjax.adapters.families import family_config
from memjax.adapters.gguf_model import GgufModel, hf_name, load_gguf
from memjax.adapters.pretrained import load_pretrained
from memjax.config.errors import UserError
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import tensors_in_gguf, write_case

CASES = ('llama_bias_mha_tied', 'llama_llama3rope', 'llama_linear', 'llama_headdim16', 'qwen2', 'qwen2_tied_yarn', 'qwen3_tied_bias')


@pytest.mark.parametrize('case', CASES)
def test_config_and_tensors_are_those_of_the_folder(case, tmp_path):
  file = GgufModel(write_case(tmp_path / 'm.gguf', case))
  assert file.config() == family_config(cases()[case]['config'])
  wanted = tensors_of(case)
  assert set(file.names) == set(wanted)
  for name, x in wanted.items():
    assert file.shape(name) == x.shape
    np.testing.assert_array_equal(file.read(name), x, err_msg=name)
  assert file.context == 128 and file.ends == (2,)


def test_parameters_are_those_of_the_folder(tmp_path):
  folder = write_folder(tmp_path / 'folder', cases()['llama_plain']['config'], tensors_of('llama_plain'))
  one, other = load_gguf(write_case(tmp_path / 'm.gguf', 'llama_plain')), load_pretrained(folder)
  assert one[0] == other[0]
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
  with pytest.raises(UserError, match=r'has an unknown tensor .blk\.0\.attn_k_norm_2\.weight'):
    load_gguf(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'blk.0.attn_k_norm_2.weight': np.ones(8, np.float32)}))
  with pytest.raises(UserError, match=r'lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight'):
    load_gguf(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'blk.1.ffn_up.weight': None}))


def test_rows_in_the_order_of_queries_are_seen_to_matter():
  """The keys of a model with fewer heads of keys differ between the two orders, so that the test above can fail."""
  stored = tensors_in_gguf('llama_plain')['blk.0.attn_k.weight']
  wanted = tensors_of('llama_plain')['model.layers.0.self_attn.k_proj.weight']
  assert not np.array_equal(stored, wanted)
  assert not np.array_equal(stored.reshape(4, -1, 2, 32).swapaxes(1, 2).reshape(wanted.shape), wanted)      # as many as queries


def test_names_that_are_not_ours_stay():
  for name in ('blk.00.attn_q.weight', 'blk.0.attn_q.scale', 'blk.1.ffn_gate_inp.weight', 'rope_freqs.weight', 'blk..attn_q.weight'):
    assert hf_name(name) == name
  assert hf_name('blk.12.attn_output.bias') == 'model.layers.12.self_attn.o_proj.bias'


def test_what_a_converter_may_leave_out_or_add(tmp_path):
  """Heads of keys, width of a head and base default; keys of zero and divisors of 1 change nothing."""
  keys = {'llama.attention.key_length': None, 'llama.attention.value_length': None, 'llama.rope.dimension_count': None,
          'llama.rope.freq_base': None, 'llama.context_length': None, 'llama.expert_count': 0, 'llama.rope.scaling.type': 'none',
          'tokenizer.ggml.eot_token_id': 1, 'tokenizer.ggml.eom_token_id': 2}
  file = GgufModel(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'rope_freqs.weight': np.ones(4, np.float32)}, **keys))
  assert file.config() == family_config(cases()['llama_plain']['config'])
  assert file.context == 0 and file.ends == (2, 1)
  other = GgufModel(write_case(tmp_path / 'n.gguf', 'llama_bias_mha_tied', **{'llama.attention.head_count_kv': None}))
  assert other.config() == family_config(cases()['llama_bias_mha_tied']['config'])


def test_an_equal_head_is_tied_only_where_there_is_none(tmp_path):
  assert not GgufModel(write_case(tmp_path / 'm.gguf', 'llama_plain')).config().embedding.tie
  assert GgufModel(write_case(tmp_path / 'n.gguf', 'llama_plain', tensors={'output.weight': None})).config().embedding.tie


REFUSED = [
  ('architecture', {'general.architecture': 'lama'}, r"'lama' is not one of llama, qwen2, qwen3; did you mean 'llama'"),
  ('no architecture', {'general.architecture': None}, 'general.architecture None is not one of'),
  ('no layers', {'llama.block_count': None}, r'metadata llama\.block_count is missing'),
  ('layers of another type', {'llama.block_count': 'two'}, 'num_hidden_layers wants int'),
  ('too many layers', {'llama.block_count': 1 << 20}, 'num_hidden_layers=1048576 is above'),
  ('heads by layer', {'llama.attention.head_count_kv': [2, 1]}, r'head_count_kv is no number above 0: array\(\[2, 1\]'),
  ('heads of 0', {'llama.attention.head_count': 0}, 'head_count is no number above 0: 0'),
  ('epsilon', {'llama.attention.layer_norm_rms_epsilon': -1.0}, 'rms_norm_eps must be above 0'),
  ('unknown key', {'llama.attention.sliding_window': 512}, r'attention\.sliding_window=512 is not supported'),
  ('experts', {'llama.expert_count': 8}, r'llama\.expert_count=8 is not supported'),
  ('width of values', {'llama.attention.value_length': 4}, 'value_length is 4; only the width of a head, 8, is supported'),
  ('half a head', {'llama.rope.dimension_count': 4}, 'dimension_count is 4; only the width of a head'),
  ('kind of scaling', {'llama.rope.scaling.type': 'longrope'}, "rope type 'longrope' is not one of"),
  ('no factor', {'llama.rope.scaling.type': 'linear'}, 'rope type linear has no factor'),
]


@pytest.mark.parametrize(('keys', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_metadata_that_is_refused(keys, message, tmp_path):
  path = write_case(tmp_path / 'm.gguf', 'llama_plain', **keys)
  with pytest.raises(UserError, match=message) as error: GgufModel(path).config()
  assert str(error.value).startswith(path)


def test_tensors_that_are_refused(tmp_path):
  divisors = tensors_in_gguf('llama_llama3rope')['rope_freqs.weight']
  for wrong in (divisors * np.float32(1.01), np.array([1, 1, 8], np.float32), np.full(4, np.inf, np.float32), -divisors):
    with pytest.raises(UserError, match='are not the divisors of Llama 3 for texts of 32 tokens'):
      GgufModel(write_case(tmp_path / 'm.gguf', 'llama_llama3rope', tensors={'rope_freqs.weight': wrong}))
  with pytest.raises(UserError, match=r'both rope_freqs\.weight and the rope scaling .linear'):
    GgufModel(write_case(tmp_path / 'm.gguf', 'llama_llama3rope', **{'llama.rope.scaling.type': 'linear'}))
  with pytest.raises(UserError, match=r"'output_norm\.weight' and 'model\.norm\.weight' are both model\.norm\.weight"):
    GgufModel(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'model.norm.weight': np.ones(32, np.float32)}))
  with pytest.raises(UserError, match=r'lacks the tensor token_embd\.weight'):
    GgufModel(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'token_embd.weight': None}))
  with pytest.raises(UserError, match=r'attn_k\.weight.: 15 rows do not divide into pairs of 2 heads'):
    file = GgufModel(write_case(tmp_path / 'm.gguf', 'llama_plain', tensors={'blk.0.attn_k.weight': np.ones((15, 32), np.float32)}))
    file.read('model.layers.0.self_attn.k_proj.weight')
