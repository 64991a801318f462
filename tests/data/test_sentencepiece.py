"""SentencePiece vocabularies: the pieces are those of its own rule, out of a tokenizer.model and out of a GGUF file alike."""
import itertools
import random
import struct

import pytest

from memjax.config.errors import UserError
from memjax.data.gguf_tokenizer import begins_with_bos, gguf_tokenizer
from memjax.data.sentencepiece import BYTE, CONTROL, MARK, NORMAL, UNKNOWN, USER, Pieces, build, read_model
from memjax.data.subword import SubwordTokenizer

WORDS = [f'{MARK}a', 'ab', f'{MARK}ab', f'{MARK}{MARK}', 'ba', 'bab', f'{MARK}abab', 'é', f'c{MARK}', 'cc', 'ccc']
TEXTS = ['<unk>', '<s>', '</s>', *[f'<0x{i:02X}>' for i in range(256)], '[INST]', *WORDS, MARK, *'abcd']
KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER, *[NORMAL] * (len(WORDS) + 5)]
SCORES = [0.0] * 260 + [-float(i) for i in range(len(WORDS) + 5)]


def cut(text):
  """The pieces by the rule: of all neighbours that make a piece, those of the highest score become one, the leftmost first."""
  score = dict(zip(TEXTS[260:], SCORES[260:], strict=True))
  parts = list(MARK + text.replace(' ', MARK)) if text else []
  while True:
    found = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
    if not found: break
    at = min(found)[1]
    parts[at:at + 2] = [parts[at] + parts[at + 1]]
  return [piece for part in parts for piece in ([part] if part in score else [f'<0x{byte:02X}>' for byte in part.encode()])]


def field(number, value):
  """One field of a protocol buffer."""
  def varint(n): return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])
  if isinstance(value, int): return varint(number << 3) + varint(value)
  if isinstance(value, float): return varint(number << 3 | 5) + struct.pack('<f', value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def model(*, texts=TEXTS, kind=2, normalizer=None):
  pieces = [field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in zip(texts, SCORES, KINDS, strict=False)]
  return b''.join(pieces) + field(2, field(3, kind)) + field(3, field(3, 1) + field(4, 0) if normalizer is None else normalizer)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(model())
  return tmp_path


def metadata(**changes):
  keys = {'model': 'llama', 'tokens': TEXTS, 'scores': SCORES, 'token_type': KINDS, 'bos_token_id': 1, 'eos_token_id': 2}
  return {f'tokenizer.ggml.{key}': value for key, value in (keys | changes).items() if value is not None}


def test_pieces(folder):
  tokenizer, other = SubwordTokenizer.from_file(folder / 'tokenizer.json'), gguf_tokenizer(metadata())
  assert (tokenizer.vocabulary, tokenizer.bos, other.bos) == (len(TEXTS), 1, 1)
  draw = random.Random(0)
  drawn = [''.join(draw.choices('aabbcc  dé\nx', k=draw.randint(1, 40))) for _ in range(500)]
  for text in ['', 'a', ' a', 'ab  ab', 'naïve é 日', 'x\ty\n', *drawn]:
    tokens = tokenizer.encode(text)
    assert [TEXTS[token] for token in tokens] == cut(text), text
    assert tokens.tolist() == other.encode(text).tolist() and tokenizer.decode(tokens) == text


def test_specials_and_bos(folder):
  tokenizer = SubwordTokenizer.from_file(folder / 'tokenizer.json')
  assert tokenizer.encode('<s>ab</s>').tolist() == [1, TEXTS.index(f'{MARK}ab'), 2]
  assert tokenizer.encode('[INST]a').tolist() == [TEXTS.index('[INST]'), TEXTS.index(f'{MARK}a')]
  assert tokenizer.inner.encode('ab', add_special_tokens=True).ids[0] == 1            # a plain prompt begins with it
  assert begins_with_bos(metadata()) and not begins_with_bos(metadata(add_bos_token=False))
  bare = gguf_tokenizer(metadata(add_space_prefix=False))
  assert [TEXTS[token] for token in bare.encode('ab a')] == ['ab', f'{MARK}a'] and bare.decode(bare.encode(' ab a')) == ' ab a'


MALFORMED = [
  ('empty', b'', 'is no SentencePiece model: it has no pieces'),
  ('text', b'{"model": 1}', 'is no SentencePiece model'),
  ('cut off', model()[:-3], 'is no SentencePiece model'),
  ('endless number', b'\xff' * 64, 'is no SentencePiece model'),
  ('a huge field', field(1, b'')[:1] + b'\xff\xff\xff\xff\x7f', 'is no SentencePiece model'),
  ('unigram', model(kind=1), r'of type 1; only BPE \(2\) is read'),
  ('normalised', model(normalizer=field(2, b'x') + field(4, 0)), 'normalises texts'),
  ('white space', model(normalizer=field(3, 1)), 'normalises texts'),
  ('twice', model(texts=[*TEXTS[:-1], TEXTS[-2]]), 'the vocabulary holds a piece twice'),
  ('some bytes', model(texts=TEXTS[:200]), 'has 197 of 256 bytes'),
]


@pytest.mark.parametrize(('data', 'message'), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed(data, message, folder):
  (folder / 'tokenizer.model').write_bytes(data)
  with pytest.raises(UserError, match=message) as caught: SubwordTokenizer.from_file(folder / 'tokenizer.json')
  assert 'tokenizer.model' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(('changes', 'message'), [
  ({'scores': None}, r'tokenizer\.ggml\.scores are no'), ({'scores': [1.0]}, 'scores are no'),
  ({'scores': ['a'] * len(TEXTS)}, 'scores are no'),
  ({'token_type': [1] * len(TEXTS)}, 'has 0 unknown pieces, 1 is wanted'),
  ({'token_type': [9] * len(TEXTS)}, 'token_type 9 does not go with llama'),
  ({'tokens': [*TEXTS[:-1], 'a']}, "tokens hold 'a' twice"), ({'add_space_prefix': 1}, 'add_space_prefix wants bool')])
def test_metadata_that_is_refused(changes, message):
  with pytest.raises(UserError, match=message): gguf_tokenizer(metadata(**changes))


def test_a_file_that_is_gone(tmp_path):
  with pytest.raises(UserError, match=r'cannot read the tokenizer .*no\.model: No such file'): read_model(tmp_path / 'no.model')
  with pytest.raises(UserError, match='2 unknown pieces'): build(Pieces(['a', 'b'], [0.0, 0.0], [UNKNOWN, UNKNOWN]))
