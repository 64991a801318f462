"""Tokenizers out of the metadata of GGUF files: each cut tells itself apart from the others, and nothing unknown passes: Q3.4."""
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.data.gguf_tokenizer import PRE, begins_with_bos, gguf_tokenizer, special_text
from memjax.data.subword import byte_of_character
from memjax.data.tokenizers import load_tokenizer

MERGES = ['1 9', '8 4', 'a B', '. /', 'x y', '19 84', 'Ġ 1984', 'Ġ Ġ', 'a t', 'Ġ at', "' S", 'Ã ©', ') Ċ', 'Ġ (']
TOKENS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', *byte_of_character(),
          *[merge.replace(' ', '') for merge in MERGES], 'xyz']
KEYS = {'model': 'gpt2', 'pre': 'smollm', 'tokens': TOKENS, 'token_type': np.array([3, 3, 3, 4] + [1] * (len(TOKENS) - 4), np.int32),
        'merges': MERGES, 'bos_token_id': 1, 'eos_token_id': 2, 'add_bos_token': True}


def metadata(**changes):
  return {f'tokenizer.ggml.{key}': value for key, value in (KEYS | changes).items() if value is not None}


def cut(pre, text):
  """The tokens of a text, as they are written in the vocabulary."""
  tokenizer = gguf_tokenizer(metadata(pre=pre))
  return [tokenizer.inner.id_to_token(token) for token in tokenizer.encode(text)]


SAME = {'llama3': 'llama-bpe', 'llama-v3': 'llama-bpe'}
CUTS = [
  (' 1984', {'gpt-2': ['Ġ1984'], 'smollm': ['Ġ', '1', '9', '8', '4'], 'qwen2': ['Ġ', '1', '9', '8', '4'],
             'llama-bpe': ['Ġ', '19', '8', '4'], 'tekken': ['Ġ', '1', '9', '8', '4']}),
  ('   1', {'gpt-2': ['ĠĠ', 'Ġ', '1'], 'smollm': ['ĠĠ', 'Ġ', '1'], 'qwen2': ['ĠĠ', 'Ġ', '1'], 'llama-bpe': ['ĠĠ', 'Ġ', '1'],
            'tekken': ['ĠĠ', 'Ġ', '1']}),
  (" at'S", {'gpt-2': ['Ġat', "'", 'S'], 'smollm': ['Ġat', "'", 'S'], 'qwen2': ['Ġat', "'S"], 'llama-bpe': ['Ġat', "'S"],
             'tekken': ['Ġat', "'S"]}),
  ('e\u0301', {'gpt-2': ['e', 'Ì', 'ģ'], 'smollm': ['e', 'Ì', 'ģ'], 'qwen2': ['Ã©'], 'llama-bpe': ['e', 'Ì', 'ģ'],
               'tekken': ['e', 'Ì', 'ģ']}),
  (' ()\n', {'gpt-2': ['Ġ(', ')', 'Ċ'], 'smollm': ['Ġ(', ')', 'Ċ'], 'qwen2': ['Ġ(', ')Ċ'], 'llama-bpe': ['Ġ(', ')Ċ'],
             'tekken': ['Ġ(', ')Ċ']}),
  ('aB', {'gpt-2': ['aB'], 'smollm': ['aB'], 'qwen2': ['aB'], 'llama-bpe': ['aB'], 'tekken': ['a', 'B']}),           # cut at a capital
  ('./', {'gpt-2': ['./'], 'smollm': ['./'], 'qwen2': ['./'], 'llama-bpe': ['./'], 'tekken': ['./']}),
  ('xyz', {'gpt-2': ['xy', 'z'], 'smollm': ['xy', 'z'], 'qwen2': ['xy', 'z'], 'llama-bpe': ['xyz'], 'tekken': ['xyz']}),     # no merge
]


@pytest.mark.parametrize('pre', PRE)
@pytest.mark.parametrize(('text', 'wanted'), CUTS, ids=[repr(row[0]) for row in CUTS])
def test_cuts(text, wanted, pre):
  assert cut(pre, text) == wanted[SAME.get(pre, pre)]


@pytest.mark.parametrize('pre', PRE)
def test_special_and_added_tokens(pre, tmp_path):
  tokenizer = gguf_tokenizer(metadata(pre=pre))
  assert tokenizer.vocabulary == len(TOKENS) and tokenizer.bos == 1
  assert tokenizer.encode('<|im_start|>at<think><|im_end|>').tolist() == [1, TOKENS.index('at'), 3, 2]
  added = tokenizer.inner.get_added_tokens_decoder()
  assert {index: token.special for index, token in added.items()} == {0: True, 1: True, 2: True, 3: False}
  text = 'Zürich 1984, naïve 東京 😀\n\t<|endoftext|> at'
  assert tokenizer.decode(tokenizer.encode(text)) == text
  tokenizer.save(tmp_path)
  again = load_tokenizer(tmp_path)
  assert again.fingerprint == tokenizer.fingerprint
  np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_bos_and_eos():
  assert begins_with_bos(metadata()) and not begins_with_bos(metadata(add_bos_token=None))
  assert begins_with_bos(metadata(add_bos_token=None, pre='llama-bpe')) and not begins_with_bos(metadata(add_bos_token=False, pre='tekken'))
  assert special_text(metadata(), 'bos') == '<|im_start|>' and special_text(metadata(bos_token_id=None), 'bos') == ''
  assert gguf_tokenizer(metadata(bos_token_id=None)).bos == 2


REFUSED = [
  ('word pieces', {'model': 'bert'}, "model 'bert' is not supported"),
  ('no model', {'model': None}, r'tokenizer\.ggml\.model is missing'),
  ('unknown cut', {'pre': 'smolm'}, "pre 'smolm' is not one of gpt-2, smollm, qwen2, .*; did you mean 'smollm'"),
  ('no cut', {'pre': None}, 'pre None is not one of'),
  ('no tokens', {'tokens': None}, 'tokens is missing'),
  ('a token twice', {'tokens': [*TOKENS[:-1], TOKENS[9]]}, f"tokens hold '{TOKENS[9]}' twice"),
  ('an empty token', {'tokens': [*TOKENS[:-1], '']}, 'tokens are not all texts'),
  ('kinds of others', {'token_type': [1, 1]}, f'token_type has 2 entries for {len(TOKENS)} tokens'),
  ('kinds in words', {'token_type': ['1'] * len(TOKENS)}, 'token_type is no list of whole numbers'),
  ('bytes', {'token_type': [6] * len(TOKENS)}, 'token_type 6 does not go with'),
  ('a merge of one', {'merges': ['a']}, r"merges\[0\] is no pair of tokens: 'a'"),
  ('a merge of three', {'merges': ['a t', 'a t o']}, r"merges\[1\] is no pair"),
  ('a merge into nothing', {'merges': ['q z']}, 'merges do not fit'),
  ('no merges', {'merges': None}, 'merges is missing'),
  ('bos outside', {'bos_token_id': 10 ** 6}, 'bos_token_id or eos_token_id is no token'),
  ('no bos at all', {'bos_token_id': None, 'eos_token_id': None}, 'is no token of .* None'),
]


@pytest.mark.parametrize(('changes', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_metadata_that_is_refused(changes, message):
  with pytest.raises(UserError, match=message): gguf_tokenizer(metadata(**changes))


def test_other_values_of_the_wrong_type_are_refused():
  with pytest.raises(UserError, match='add_bos_token wants bool, got 1'): begins_with_bos(metadata(add_bos_token=1))
  with pytest.raises(UserError, match='eos_token_id is no token of'): special_text(metadata(eos_token_id='2'), 'eos')
