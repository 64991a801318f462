"""Text by split: every byte once, documents where they begin, and one line where there is no text."""
import hashlib
import itertools
import json
import logging
import pathlib
import sys

import pyarrow
import pyarrow.parquet
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data import hub, sources
from memjax.data.sources import Corpus, cut, load_corpus

ARTICLES = [' \n = One = \n \n a = b = c \n \n = = Section = = \n \n text \n \n',    # its last line precedes a title
            ' = Two = three = \n \n more \n = no title = \n']


def from_path(path, split='train', **fields):
  return load_corpus(DataConfig(source='path', path=str(path), **fields), split)


def write(folder, **texts):
  for name, text in texts.items():
    (folder / f'{name}.txt').write_bytes(text.encode() if isinstance(text, str) else text)
  return folder


@pytest.mark.parametrize('split, documents, size', [('train', 8, 1086027), ('val', 1, 103371), ('test', 1, 98308)])
def test_bundled_corpus_is_whole(split, documents, size):
  corpus = load_corpus(DataConfig(), split)
  assert (len(corpus.documents), corpus.bytes, corpus.name, corpus.split) == (documents, size, 'shakespeare', split)
  assert corpus.sha256 == sources.BUNDLED[split]
  assert all(document.endswith('\n\n\n') for document in corpus.documents[:-1])


@pytest.mark.parametrize('damage', [lambda raw: raw[:-20], lambda raw: b'', lambda raw: raw[:500] + b'x' + raw[501:]])
def test_damaged_installation_is_one_line(monkeypatch, damage):
  read = pathlib.Path.read_bytes
  monkeypatch.setattr(pathlib.Path, 'read_bytes', lambda path: damage(read(path)))
  with pytest.raises(UserError, match='cannot be read'): load_corpus(DataConfig(), 'val')


def test_changed_corpus_is_one_line(monkeypatch):
  monkeypatch.setitem(sources.BUNDLED, 'val', '0' * 64)
  with pytest.raises(UserError, match='was changed'): load_corpus(DataConfig(), 'val')


@pytest.mark.parametrize('text', ['', 'a', 'a\n\n\nb', '\n\n\n', 'a\n\n\n\n\n\nb\n\n\n', 'a\r\n\n\n\nb', '\x00\n\n\n😀',
                                  ''.join(ARTICLES)])
@pytest.mark.parametrize('separator', ['\n\n\n', '', 'wikitext', '.', 'a'])
def test_documents_in_a_row_are_the_text(text, separator):
  documents = cut(text, separator)
  assert ''.join(documents) == text and all(documents)
  if separator not in ('', 'wikitext'): assert all(document.endswith(separator) for document in documents[:-1])


def test_articles_begin_at_their_headings():
  assert cut(''.join(ARTICLES), 'wikitext') == ARTICLES
  assert cut('no heading\n', 'wikitext') == ['no heading\n']


@pytest.mark.parametrize('name, split', [('val', 'val'), ('valid', 'val'), ('validation', 'val'), ('train', 'train')])
def test_both_names_of_the_held_out_split(tmp_path, name, split):
  write(tmp_path, train='t', valid='held out', test='x')
  assert from_path(tmp_path, name).documents == ['t' if split == 'train' else 'held out']
  assert from_path(tmp_path, name).split == split


@pytest.mark.parametrize('name', ['val.txt', 'valid.tokens', 'validation.md', 'wiki.valid.tokens', 'VAL.txt'])
def test_files_that_name_a_split(tmp_path, name):
  (tmp_path / name).write_text('held out')
  assert from_path(tmp_path, 'val').documents == ['held out']


def test_text_is_read_as_it_is(tmp_path):
  write(tmp_path, train='\ufeffa\r\nb\x00\r😀\ufeff'.encode())
  corpus = from_path(tmp_path)
  assert corpus.documents == ['a\r\nb\x00\r😀\ufeff']    # only the mark at the start of the file is none of the text
  assert corpus.bytes == 13 and corpus.sha256 == hashlib.sha256(corpus.documents[0].encode()).hexdigest()


def test_jsonl_rows_are_documents(tmp_path):
  (tmp_path / 'train.jsonl').write_text('{"text": "one"}\n\n{"text": "two\\n\\n\\nlines", "other": 1}\n')
  assert from_path(tmp_path).documents == ['one\n\n\n', 'two\n\n\nlines']
  assert from_path(tmp_path, separator='').documents == ['one', 'two\n\n\nlines']


def test_one_file_is_divided_by_documents_where_there_are_many(tmp_path, caplog):
  documents = [f'document {index}\n\n\n' for index in range(45)]
  (tmp_path / 'book.txt').write_text(''.join(documents))
  with caplog.at_level(logging.INFO):
    splits = {split: from_path(tmp_path / 'book.txt', split).documents for split in sources.SPLITS}
  assert sorted(itertools.chain(*splits.values())) == sorted(documents)
  assert splits['val'] == [documents[9], documents[29]] and splits['test'] == [documents[19], documents[39]]
  assert 'has no splits' in caplog.text


@pytest.mark.parametrize('text', ['line of text\n' * 200, 'x' * 1000, 'one\n\n\n' + 'two ' * 200 + '\n\n\nthree\n' * 5])
def test_one_file_is_divided_by_length_where_there_are_few(tmp_path, text):
  (tmp_path / 'book.txt').write_text(text)
  splits = {split: ''.join(from_path(tmp_path / 'book.txt', split).documents) for split in sources.SPLITS}
  assert splits['train'] + splits['val'] + splits['test'] == text
  for split, want in (('train', 0.9), ('val', 0.05), ('test', 0.05)):
    assert abs(len(splits[split]) / len(text) - want) < 0.03


def test_a_folder_of_many_files_is_divided_by_their_hashes(tmp_path):
  write(tmp_path, **{f'{index:02}': f'text {index} ' for index in range(40)})
  (tmp_path / '.hidden.txt').write_text('hidden')
  (tmp_path / 'image.png').write_bytes(b'\xff')
  splits = {split: from_path(tmp_path, split).documents for split in sources.SPLITS}
  assert [len(splits[split]) for split in ('train', 'val', 'test')] == [36, 2, 2]
  assert sorted(itertools.chain(*splits.values())) == sorted(f'text {index} ' for index in range(40))
  for index in range(40): (tmp_path / f'{index:02}.txt').rename(tmp_path / f'{40 - index:02}.md')    # no matter
  for split in splits: assert sorted(from_path(tmp_path, split).documents) == sorted(splits[split])


def test_a_folder_of_few_files_is_divided_as_one_text(tmp_path):
  (tmp_path / 'sub').mkdir()
  write(tmp_path, a='a' * 50, b='b' * 20)
  write(tmp_path / 'sub', c='c' * 30)
  text = ''.join(''.join(from_path(tmp_path, split).documents) for split in sources.SPLITS)
  assert text == 'a' * 50 + 'b' * 20 + 'c' * 30
  assert from_path(tmp_path).documents == ['a' * 50, 'b' * 20, 'c' * 20]


def parquet(path, rows, column='text'):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)


def from_hub(split='train', hub_name='owner/name:small', **fields):
  return load_corpus(DataConfig(source='hub', hub=hub_name, **fields), split)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
  """A hub whose repository is the folder `tmp_path`; the calls are recorded."""
  import huggingface_hub
  calls = []

  def snapshot_download(name, *, repo_type, revision, allow_patterns):
    calls.append((name, repo_type, revision, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  return calls


def test_hub_rows_become_documents_or_lines(downloads, tmp_path):
  lines = [line + '\n' for line in ''.join(ARTICLES).split('\n')[:-1]]
  stored = ['' if line == ' \n' else line for line in lines]    # as the hub keeps WikiText
  parquet(tmp_path / 'small' / 'train-00000-of-00002.parquet', stored[:4])
  parquet(tmp_path / 'small' / 'train-00001-of-00002.parquet', stored[4:])
  parquet(tmp_path / 'small' / 'validation-00000-of-00001.parquet', ['a', 'b'])
  parquet(tmp_path / 'large' / 'train-00000-of-00001.parquet', ['wrong'])
  assert from_hub(separator='wikitext').documents == ARTICLES
  assert from_hub('val').documents == ['a\n\n\n', 'b']
  assert from_hub('val').name == 'owner/name:small'
  name, kind, revision, patterns = downloads[0]
  assert (name, kind, revision) == ('owner/name', 'dataset', None)
  assert all(pattern.startswith('small/train') for pattern in patterns)


@pytest.mark.parametrize('file', ['train.parquet', 'data/train-0.parquet', 'default/train/0000.parquet',
                                  'data/train/0.parquet'])
def test_hub_layouts_without_configuration(downloads, tmp_path, file):
  parquet(tmp_path / file, ['one'], 'body')
  parquet(tmp_path / 'other' / 'train-0.parquet', ['wrong'], 'body')
  assert from_hub(hub_name='owner/name', column='body').documents == ['one']


def test_hub_falls_back_to_the_converted_copy(monkeypatch, tmp_path):
  import huggingface_hub
  parquet(tmp_path / 'converted' / 'small' / 'test' / '0000.parquet', ['one', None])
  folders = {None: tmp_path / 'plain', hub.CONVERTED: tmp_path / 'converted'}
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, revision, **rest: str(folders[revision]))
  assert from_hub('test', separator='').documents == ['one', '']


def test_hub_faults_are_one_line(downloads, tmp_path, monkeypatch):
  import huggingface_hub
  with pytest.raises(UserError, match=r"no parquet files of split train .*'small'"): from_hub()
  parquet(tmp_path / 'small' / 'train.parquet', [1], 'number')
  with pytest.raises(UserError, match="no column 'text'; it has number"): from_hub()
  with pytest.raises(UserError, match="column 'number' holds int"): from_hub(column='number')
  (tmp_path / 'small' / 'train.parquet').write_bytes(b'PAR1 no')
  with pytest.raises(UserError, match='not a parquet file') as caught: from_hub()
  assert '\n' not in str(caught.value)

  def offline(*args, **rest): raise ConnectionError('no route\nto host')
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(UserError, match=r'cannot get owner/name .*no route') as caught: from_hub()
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('module', ['huggingface_hub', 'pyarrow'])
def test_missing_extra_is_one_line(downloads, tmp_path, monkeypatch, module):
  parquet(tmp_path / 'small' / 'train.parquet', ['a'])
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=rf"{module} is not installed; pip install 'memjax\[hub\]'"): from_hub()


def test_another_fetch_may_be_given(tmp_path):
  parquet(tmp_path / 'rows.parquet', ['given'])
  seen = []

  def fetch(*args):
    seen.append(args)
    return [tmp_path / 'rows.parquet']

  corpus = load_corpus(DataConfig(source='hub', hub='a/b:c'), 'valid', fetch)
  assert corpus.documents == ['given'] and seen == [('a/b', 'c', sources.SPLITS['val'])]


BAD = {
    'unknown split': ({'train': 'a'}, '', 'dev2', "unknown split 'dev2'"),
    'missing': ({}, 'nowhere.txt', 'train', 'no such file or folder'),
    'empty folder': ({}, '', 'train', 'holds no text files'),
    'empty file': ({'train': ''}, '', 'train', 'train.txt is empty'),
    'empty after the mark': ({'train': '\ufeff'}, '', 'train', 'is empty'),
    'not UTF-8': ({'train': b'abc\xff\xfe'}, '', 'train', r'not UTF-8 at byte 3 \(0xff\)'),
    'UTF-16': ({'train': 'abc'.encode('utf-16')}, '', 'train', 'not UTF-8 at byte 0'),
    'cut character': ({'train': '😀'.encode()[:3]}, '', 'train', 'not UTF-8 at byte 0'),
    'no such split': ({'train': 'a'}, '', 'test', r'no test split; it has train\.txt'),
    'two files of a split': ({'val': 'a', 'valid': 'b'}, '', 'val', r'two files of split val: val\.txt, valid\.txt'),
    'too short to divide': ({'book': 'a'}, 'book.txt', 'train', 'the train split of book is empty')}


@pytest.mark.parametrize('case', BAD)
def test_bad_text_is_one_line(tmp_path, case):
  texts, name, split, said = BAD[case]
  write(tmp_path, **texts)
  with pytest.raises(UserError, match=said) as caught: from_path(tmp_path / name, split)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('row, said', [('{', 'line 2 is not JSON'), ('[1]', 'line 2 has no text .*list'),
                                       ('{"body": "x"}', "line 2 has no text in column 'text'; it has body"),
                                       ('{"text": 3}', 'line 2 has no text')])
def test_bad_rows_are_one_line(tmp_path, row, said):
  (tmp_path / 'train.jsonl').write_text(f'{json.dumps({"text": "fine"})}\n{row}\n')
  with pytest.raises(UserError, match=said): from_path(tmp_path)


def test_unreadable_file_is_one_line(tmp_path, monkeypatch):
  write(tmp_path, train='a')

  def refuse(path): raise PermissionError(13, 'Permission denied')
  monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)
  with pytest.raises(UserError, match=r'cannot read .*Permission denied'): from_path(tmp_path)


def test_corpus_hash_is_that_of_its_text():
  assert Corpus('', 'train', ['ab', 'c']).sha256 == hashlib.sha256(b'abc').hexdigest()
