"""Tokenizers as metadata of GGUF: what is read comes back, the cut is found by what it does, and nothing unknown is given a name."""
import json

import pytest
import tokenizers as library

from memjax.config.errors import UserError
from memjax.data.gguf_tokenizer import PRE, gguf_tokenizer
from memjax.data.gguf_vocabulary import cut_name, gguf_ends, gguf_vocabulary
from memjax.data.subword import SubwordTokenizer
from tests.data.test_gguf_tokenizer import KEYS, TOKENS, metadata

TEXT = "at'S 1984 (\n naïve  e\u0301 <|im_start|>at<think>"


@pytest.mark.parametrize('pre', PRE)
def test_what_is_read_comes_back(pre):
  tokenizer = gguf_tokenizer(metadata(pre=pre))
  found = gguf_vocabulary(tokenizer, len(TOKENS) + 2)
  assert PRE[found['tokenizer.ggml.pre']] is PRE[pre]                    # some have several names
  assert found['tokenizer.ggml.tokens'] == [*TOKENS, f'[PAD{len(TOKENS)}]', f'[PAD{len(TOKENS) + 1}]']
  assert found['tokenizer.ggml.token_type'].tolist() == [*KEYS['token_type'], 5, 5] and found['tokenizer.ggml.merges'] == KEYS['merges']
  again = gguf_tokenizer({**found, 'tokenizer.ggml.bos_token_id': 1})
  assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist() and again.vocabulary == len(TOKENS) + 2


def changed(**parts):
  """The tokenizer.json of gpt-2's cut, with other parts."""
  return {**json.loads(gguf_tokenizer(metadata(pre='gpt-2')).inner.to_str()), **parts}


def test_the_cut_is_found_by_what_it_does():
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': True}
  digits = {'type': 'Digits', 'individual_digits': True}
  sequence = lambda *steps: {'type': 'Sequence', 'pretokenizers': list(steps)}
  assert cut_name(changed(pre_tokenizer=level)) == cut_name(changed(pre_tokenizer=sequence(level))) == 'gpt-2'
  assert cut_name(changed(pre_tokenizer=sequence(digits, level), normalizer={'type': 'Sequence', 'normalizers': []})) == 'smollm'
  for parts in ({'pre_tokenizer': {**level, 'add_prefix_space': True}}, {'pre_tokenizer': sequence(level, digits)}, {'pre_tokenizer': None},
                {'normalizer': {'type': 'Lowercase'}}, {'pre_tokenizer': sequence({**digits, 'individual_digits': False}, level)}):
    with pytest.raises(UserError, match=r'GGUF has no name for how the tokenizer cuts text, .*; known are '): cut_name(changed(**parts))
  with pytest.raises(UserError, match='no name'): cut_name(changed(model={**changed()['model'], 'dropout': 0.1}))


def test_other_tokenizers_are_refused():
  words = library.Tokenizer(library.models.WordLevel({'a': 0, 'b': 1}))
  with pytest.raises(UserError, match="byte-level BPE alone; the tokenizer is 'WordLevel' with the decoder None"):
    gguf_vocabulary(SubwordTokenizer(words, 'file', 'a'), 2)
  with pytest.raises(UserError, match=f'the tokenizer has {len(TOKENS)} tokens, the embedding 5 rows'):
    gguf_vocabulary(gguf_tokenizer(metadata()), 5)


def test_ends():
  """The one that templates write comes first."""
  assert gguf_ends((4, 7), 7) == {'tokenizer.ggml.eos_token_id': 7, 'tokenizer.ggml.eot_token_id': 4}
  assert gguf_ends((4, 7), 9) == {'tokenizer.ggml.eos_token_id': 4, 'tokenizer.ggml.eot_token_id': 7} and gguf_ends((), 1) == {}
  with pytest.raises(UserError, match='GGUF has keys for 3 tokens that end a text; there are 4'): gguf_ends((1, 2, 3, 4), 4)
