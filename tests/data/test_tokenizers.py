"""Tokenizers: exact round trips, streams that never split a character, folders that load or say why not."""
import json
import random

import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig, TokenizerConfig
from memjax.data.subword import LONGEST, SubwordTokenizer
from memjax.data.tokenizers import EOS, UNK, ByteTokenizer, WordTokenizer, load_tokenizer, make_tokenizer, utf8

TEXT = 'To be, or not to be: that is the question.\nWhether \'tis nobler in the mind to suffer\n' * 4
EDGES = ['', 'a', '\x00\x00', '😀', 'naïve 東京 \U0010ffff', 'one\r\ntwo\r\n', '\ufeffmark', '<|endoftext|> x',
         ' \n\n\n ']


def data(**tokenizer): return DataConfig(tokenizer=TokenizerConfig(**tokenizer))


@pytest.fixture(scope='module')
def bpe(): return make_tokenizer(data(kind='bpe', size=300), [TEXT])


@pytest.fixture(scope='module')
def word(): return WordTokenizer.train(['b a a <unk> b\n', 'c a\n\n'])


@pytest.fixture(scope='module')
def spaced(tmp_path_factory):
  """A tokenizer.json whose decoder looks at neighbours: leading spaces are stripped, unknown characters are bytes."""
  import tokenizers as library
  vocabulary = {'<s>': 0, '▁to': 1, '▁be': 2, 'or': 3, '▁': 4} | {f'<0x{byte:02X}>': 5 + byte for byte in range(256)}
  inner = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
  inner.add_special_tokens(['<s>'])
  decoders = library.decoders
  inner.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(' ', 1, 0)])
  path = tmp_path_factory.mktemp('spaced') / 'tokenizer.json'
  inner.save(str(path))
  return make_tokenizer(data(kind='file', path=str(path)))


@pytest.fixture(params=['bytes', 'bpe', 'word', 'file'])
def tokenizer(request, bpe, word, spaced):
  return {'bytes': ByteTokenizer(), 'bpe': bpe, 'word': word, 'file': spaced}[request.param]


@pytest.mark.parametrize('text', EDGES)
def test_bytes_and_bpe_give_back_every_text(bpe, text):
  for exact in (ByteTokenizer(), bpe):
    tokens = exact.encode(text)
    assert tokens.dtype == np.int32 and tokens.shape == (len(tokens),)
    assert exact.decode(tokens) == text
  assert ByteTokenizer().encode(text).tolist() == list(text.encode())


def test_every_kind_says_what_it_is(tokenizer, tmp_path):
  assert 0 <= tokenizer.bos < tokenizer.vocabulary
  assert len(tokenizer.fingerprint) == 64
  tokenizer.save(tmp_path / 'made' / 'here')
  again = load_tokenizer(tmp_path / 'made' / 'here')
  assert type(again) is type(tokenizer)
  for field in ('name', 'vocabulary', 'bos', 'fingerprint'): assert getattr(again, field) == getattr(tokenizer, field)
  if tokenizer.name != 'file': np.testing.assert_array_equal(again.encode('b a a\n'), tokenizer.encode('b a a\n'))
  left = sorted(path.name for path in (tmp_path / 'made' / 'here').iterdir())
  assert left == ['meta.json'] + ['tokenizer.json'] * (tokenizer.name in ('bpe', 'file'))    # and no temporary file


def test_stream_gives_the_text_of_decode_whatever_the_tokens(tokenizer):
  draw = random.Random(3)
  for _ in range(20):
    tokens = [draw.randrange(tokenizer.vocabulary) for _ in range(60)]
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    if tokenizer.name == 'file': assert all(isinstance(piece, str) for piece in pieces)
    else: assert ''.join(pieces) == tokenizer.decode(tokens)


def test_stream_waits_for_the_rest_of_a_character(bpe):
  for exact in (ByteTokenizer(), bpe):
    stream = exact.stream()
    pieces = [stream.push(token) for token in exact.encode('a😀b')]
    assert pieces == ['a', '', '', '', '😀', 'b'] and stream.finish() == ''
    stream = exact.stream()
    assert [stream.push(token) for token in exact.encode('😀')[:2]] == ['', '']
    assert stream.finish() == '\ufffd'


def test_stream_of_a_decoder_that_looks_at_neighbours(spaced):
  smile = [5 + byte for byte in '😀'.encode()]
  tokens = [1, 2, *smile, 3, 2]
  stream = spaced.stream()
  assert [stream.push(token) for token in tokens] == ['to', ' be', '', '', '', '😀', 'or', ' be']
  assert ''.join([stream.push(5 + 0xff) for _ in range(3 * LONGEST)]).count('\ufffd') == 3 * LONGEST
  assert len(stream.pending) + len(stream.context) <= 2 * LONGEST    # constant memory
  assert spaced.decode(tokens) == 'to be😀or be'


def test_tokens_outside_the_vocabulary_are_refused(tokenizer):
  for token in (-1, tokenizer.vocabulary, 2**40):
    with pytest.raises(UserError, match='outside the vocabulary'): tokenizer.decode([tokenizer.bos, token])


def test_bpe_is_the_same_when_trained_again(bpe):
  again = make_tokenizer(data(kind='bpe', size=300), [TEXT])
  assert again.fingerprint == bpe.fingerprint and again.vocabulary == 300
  assert again.inner.id_to_token(again.bos) == '<|endoftext|>'
  assert make_tokenizer(data(kind='bpe', size=301), [TEXT]).fingerprint != bpe.fingerprint
  assert len(bpe.encode(TEXT)) < len(TEXT) / 2


def test_words_are_counted_ordered_and_ended_by_lines(word):
  assert word.words == ['<eos>', 'a', 'b', '<unk>', 'c']    # 3, 3, 2, 1, 1: by count, then by code point
  assert WordTokenizer.train(['d a c b']).words == ['a', 'b', 'c', 'd', '<eos>']    # not in order of appearance
  assert word.encode(' b  a \n\n c').tolist() == [2, 1, 0, 0, 4]
  assert word.encode('a zebra').tolist() == [1, word.ids[UNK]]
  assert word.encode('').tolist() == [] and word.bos == word.ids[EOS]
  assert word.decode([2, 1, 0, 4]) == 'b a \nc '


def test_words_of_the_wikitext_layout_count_one_end_a_line():
  text = ' \n = A title = \n \n One <unk> word , two @-@ words . \n \n'
  word = WordTokenizer.train([text])
  tokens = word.encode(text)
  assert len(tokens) == len(text.split()) + 5 and (tokens == word.bos).sum() == 5
  assert word.vocabulary == len(set(text.split())) + 1


def test_unknown_word_without_unk_is_refused():
  with pytest.raises(UserError, match="'zebra'"): WordTokenizer.train(['a b\n']).encode('a zebra')


def test_default_corpus_trains_word_and_bytes_need_no_corpus():
  assert make_tokenizer(data(kind='word')).ids['the'] < 10
  assert make_tokenizer(DataConfig(source='path', path='nowhere')).name == 'bytes'


def test_lone_surrogates_are_refused(tokenizer):
  with pytest.raises(UserError, match='not valid Unicode'): utf8('ab\udcff')
  if tokenizer.name != 'word':
    with pytest.raises(UserError, match='not valid Unicode'): tokenizer.encode('ab\udcff')


def test_bos_of_a_file_comes_from_its_config_first(spaced, tmp_path):
  spaced.inner.save(str(tmp_path / 'tokenizer.json'))
  for bos, want in (('or', 3), ({'content': '▁be'}, 2), (None, 0)):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'bos_token': bos}))
    assert SubwordTokenizer.from_file(tmp_path / 'tokenizer.json').bos == want
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'bos_token': 'absent'}))
  with pytest.raises(UserError, match="no token 'absent'"): SubwordTokenizer.from_file(tmp_path / 'tokenizer.json')
  (tmp_path / 'tokenizer_config.json').write_text('[')
  with pytest.raises(UserError, match='cannot be read'): SubwordTokenizer.from_file(tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('change, said', [
    (lambda meta: None, 'cannot read'), (lambda meta: '{', 'damaged'), (lambda meta: '[]', 'damaged'),
    (lambda meta: json.dumps({**meta, 'name': 'runes'}), 'unknown kind'),
    (lambda meta: json.dumps({**meta, 'fingerprint': '0' * 64}), 'damaged'),
    (lambda meta: json.dumps({**meta, 'words': meta['words'][::-1]}), 'damaged'),
    (lambda meta: json.dumps({**meta, 'words': ['a', 'a', EOS]}), 'twice'),
    (lambda meta: json.dumps({**meta, 'words': ['a']}), 'lacks <eos>')])
def test_damaged_folders_are_refused_in_one_line(word, tmp_path, change, said):
  word.save(tmp_path)
  changed = change(json.loads((tmp_path / 'meta.json').read_text()))
  if changed is None: (tmp_path / 'meta.json').unlink()
  else: (tmp_path / 'meta.json').write_text(changed)
  with pytest.raises(UserError, match=said) as caught: load_tokenizer(tmp_path)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content, said', [
    (None, 'cannot read'), (b'', 'no tokenizer.json'), (b'\xff', 'not UTF-8 at byte 0'),
    (b'{"a": 1}', 'no tokenizer.json')])
def test_files_that_are_no_tokenizer_are_refused(tmp_path, content, said):
  path = tmp_path / 'tokenizer.json'
  if content is not None: path.write_bytes(content)
  with pytest.raises(UserError, match=said): make_tokenizer(data(kind='file', path=str(path)))


def test_file_without_a_beginning_token_is_refused(tmp_path):
  import tokenizers as library
  path = str(tmp_path / 'tokenizer.json')
  library.Tokenizer(library.models.WordLevel({'a': 0, 'b': 1}, unk_token='a')).save(path)
  with pytest.raises(UserError, match='bos_token'): make_tokenizer(data(kind='file', path=path))


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(UserError, match='need 257'): make_tokenizer(data(kind='bpe', size=256), [TEXT])
  assert make_tokenizer(data(kind='bpe', size=257), [TEXT]).vocabulary == 257


def test_missing_extra_is_one_line(monkeypatch):
  import sys
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  monkeypatch.delitem(sys.modules, 'memjax.data.subword')
  import memjax.data
  monkeypatch.delattr(memjax.data, 'subword')
  with pytest.raises(UserError, match=r"pip install 'memjax\[text\]'"): make_tokenizer(data(kind='bpe'), [TEXT])
