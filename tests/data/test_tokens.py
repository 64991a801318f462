"""The token cache: small types, exact starts, whole or rebuilt, two writers at once."""
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data import tokens as module
from memjax.data.sources import Corpus
from memjax.data.tokenizers import ByteTokenizer, WordTokenizer
from memjax.data.tokens import cache_folder, tokenize_split

DOCUMENTS = ['one 😀\n\n\n', 'two\x00\n\n\n', 'three']


@pytest.fixture
def data(tmp_path): return DataConfig(cache=str(tmp_path / 'cache'))


def tokenize(data, documents=DOCUMENTS, tokenizer=None):
  return tokenize_split(data, tokenizer or ByteTokenizer(), 'train', Corpus('a/b:c', 'train', documents))


def files(data, suffix): return sorted(name for name in os.listdir(data.cache) if name.endswith(suffix))


def damage(data, suffix, change):
  path = os.path.join(data.cache, files(data, suffix)[0])
  with open(path, 'rb') as file: content = file.read()
  with open(path, 'wb') as file: file.write(change(content))


def test_tokens_are_those_of_the_text_and_starts_those_of_documents(data):
  tokens = tokenize(data)
  assert bytes(tokens.token_N) == ''.join(DOCUMENTS).encode() and isinstance(tokens.token_N, np.memmap)
  assert tokens.starts.tolist() == [0, 11, 18] and tokens.starts.dtype == np.int64
  assert (len(tokens), tokens.bytes, tokens.bos, tokens.vocabulary, tokens.token_N.dtype) == (23, 23, 10, 256, np.uint8)
  assert tokens.identity == {'name': 'a/b:c', 'split': 'train', 'tokens': 23, 'sha256': tokens.sha256,
                             'fingerprint': ByteTokenizer.fingerprint}
  json.dumps(tokens.identity)


@pytest.mark.parametrize('vocabulary, dtype', [(255, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_the_smallest_type_that_holds_the_vocabulary(data, vocabulary, dtype):
  word = WordTokenizer(['<eos>', *(f'w{index}' for index in range(vocabulary - 1))])
  tokens = tokenize(data, [f'w{vocabulary - 2}\n'], word)
  assert tokens.token_N.dtype == dtype and tokens.token_N.tolist() == [vocabulary - 1, 0]


def test_documents_without_tokens_have_no_start(data):
  tokens = tokenize(data, ['  ', 'a ', ' ', 'b a ', '  '], WordTokenizer(['<eos>', 'a', 'b']))
  assert tokens.token_N.tolist() == [1, 2, 1] and tokens.starts.tolist() == [0, 1]
  assert tokens.bytes == 11


def test_no_tokens_at_all_is_one_line(data):
  with pytest.raises(UserError, match='has no tokens'): tokenize(data, ['  '], WordTokenizer(['<eos>']))
  assert not os.listdir(data.cache)


def test_a_second_call_reads_the_cache(data, monkeypatch):
  first = tokenize(data)
  monkeypatch.setattr(module, '_build', lambda *args: pytest.fail('built again'))
  second = tokenize(data)
  np.testing.assert_array_equal(first.token_N, second.token_N)
  np.testing.assert_array_equal(first.starts, second.starts)


def test_text_borders_and_tokenizer_have_files_of_their_own(data):
  tokenize(data)
  tokenize(data, ['one 😀\n\n\ntwo\x00\n\n\n', 'three'])
  tokenize(data, [*DOCUMENTS, '!'])
  tokenize(data, DOCUMENTS, WordTokenizer.train(DOCUMENTS))
  assert len(files(data, '.bin')) == len(files(data, '.json')) == 4
  assert len(os.listdir(data.cache)) == 8    # no temporary file


@pytest.mark.parametrize('suffix, change', [
    ('.bin', lambda b: b[:-1]), ('.bin', lambda b: b''), ('.bin', lambda b: b + b'x'),
    ('.bin', lambda b: bytes([b[0] ^ 1]) + b[1:]), ('.json', lambda b: b[:40]), ('.json', lambda b: b''),
    ('.json', lambda b: b'[]'), ('.json', lambda b: b'{}'), ('.json', lambda b: b.replace(b'[0, 11, 18]', b'[0, 12, 18]')),
    ('.json', lambda b: b.replace(b'"tokens": 23', b'"tokens": 22'))])
def test_a_damaged_cache_is_rebuilt_and_said_once(data, caplog, suffix, change):
  good = tokenize(data)
  expected = bytes(good.token_N), good.starts.tolist()
  del good
  damage(data, suffix, change)
  with caplog.at_level(logging.WARNING): again = tokenize(data)
  assert (bytes(again.token_N), again.starts.tolist()) == expected
  assert len(caplog.records) == 1 and 'made anew' in caplog.text
  caplog.clear()
  with caplog.at_level(logging.WARNING): tokenize(data)
  assert not caplog.records


def test_a_missing_half_is_made_without_a_word(data, caplog):
  for suffix in ('.bin', '.json'):
    tokenize(data)
    os.unlink(os.path.join(data.cache, files(data, suffix)[0]))
    with caplog.at_level(logging.WARNING): assert bytes(tokenize(data).token_N) == ''.join(DOCUMENTS).encode()
    assert not caplog.records


def _write_often(folder, barrier, results):
  data = DataConfig(cache=folder)
  barrier.wait(60)
  for index in range(30):
    documents = [f'text {index}\n\n\n', 'x' * 5000]
    tokens = tokenize(data, documents)
    if bytes(tokens.token_N) != ''.join(documents).encode(): break
  else: results.put('fine')


def test_two_writers_at_once_leave_whole_files(tmp_path):
  context = multiprocessing.get_context('spawn')
  barrier, results = context.Barrier(2), context.Queue()
  writers = [context.Process(target=_write_often, args=(str(tmp_path), barrier, results)) for _ in range(2)]
  for writer in writers: writer.start()
  for writer in writers: writer.join(120)
  assert [writer.exitcode for writer in writers] == [0, 0]
  assert [results.get(timeout=10) for _ in writers] == ['fine', 'fine']
  assert len(os.listdir(tmp_path)) == 60
  results.close()


def test_default_folder_follows_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache_folder(DataConfig()) == tmp_path / 'xdg' / 'memjax' and (tmp_path / 'xdg' / 'memjax').is_dir()
  monkeypatch.setenv('XDG_CACHE_HOME', '')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache_folder(DataConfig()) == tmp_path / '.cache' / 'memjax'
  assert cache_folder(DataConfig(cache='~/here')) == tmp_path / 'here'


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot use .* set data\.cache'): tokenize(DataConfig(cache=str(tmp_path / 'file')))

  def full(*args, **rest): raise OSError(28, 'No space left on device')
  monkeypatch.setattr(module.os, 'replace', full)
  with pytest.raises(UserError, match='No space left'): tokenize(DataConfig(cache=str(tmp_path / 'full')))
  assert not os.listdir(tmp_path / 'full')
