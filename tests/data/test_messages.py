"""Conversations out of files and datasets: the same messages whatever they are called, splits of whole ones, one line for the rest."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data import messages
from memjax.data.messages import conversation, load_chats

ASKED = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]


@pytest.mark.parametrize('record', [
  {'messages': ASKED, 'prompt': 'x', 'prompt_id': 7}, {'messages': None, 'conversations': ASKED}, {'prompt': 'a', 'response': 'b'},
  *({'conversations': [{'from': 'human', 'value': 'a'}, {'from': role, 'value': 'b'}]} for role in ('assistant', 'model', 'gpt', 'bot'))])
def test_ways_of_writing_a_conversation(record): assert json.loads(conversation(record)) == ASKED


def test_what_else_a_message_holds_is_kept():
  turns = [{'role': 'critic', 'content': 'é', 'name': None}, {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 1}]}]
  assert json.loads(conversation({'messages': turns})) == [
    {'role': 'critic', 'content': 'é'}, {'role': 'assistant', 'content': '', 'tool_calls': [{'id': 1}]}]


WRONG = [
  ([1], 'no conversation: .* there is list'), ({'text': 'a', 'prompt': 'b'}, 'no conversation: .* there is prompt, text'),
  ({'messages': []}, r'messages is no list of messages: \[\]'), ({'messages': 'a'}, "messages is no list of messages: 'a'"),
  ({'messages': ['a']}, "message 1 is no object: 'a'"), ({'messages': [*ASKED, {'content': 'a'}]}, 'message 3 has no role'),
  ({'messages': [{'role': '', 'content': 'a'}]}, 'message 1 has no role'),
  ({'messages': [{'role': 'user'}]}, 'message 1 has no text: None'),
  ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]}, 'message 1 has no text'),
  ({'prompt': 1, 'response': 'b'}, 'no text: 1')]


@pytest.mark.parametrize(('record', 'said'), WRONG)
def test_records_that_are_no_conversation(record, said, tmp_path):
  path = tmp_path / 'chats.jsonl'
  path.write_text(json.dumps({'messages': ASKED}) + '\n\n' + json.dumps(record) + '\n')
  with pytest.raises(UserError, match=rf'chats\.jsonl line 3: .*{said}'): load_chats(DataConfig(source='path', path=str(path)), 'train')


def write(path, count, first=0):
  path.write_text(''.join(json.dumps({'prompt': str(first + n), 'response': 'b'}) + '\n' for n in range(count)))
  return DataConfig(source='path', path=str(path))


def asked(data, split, **rest): return [int(json.loads(document)[0]['content']) for document in load_chats(data, split, **rest).documents]


@pytest.mark.parametrize(('count', 'val', 'test'), [(3, [1], [2]), (19, [17], [18]), (20, [9], [19]), (45, [9, 29], [19, 39])])
def test_a_file_is_divided_by_whole_conversations(count, val, test, tmp_path):
  data = write(tmp_path / 'chats.jsonl', count)
  assert (asked(data, 'val'), asked(data, 'test')) == (val, test)
  assert sorted(asked(data, 'train') + val + test) == list(range(count))


def test_a_folder_has_a_file_for_each_split(tmp_path):
  for number, name in enumerate(('train', 'valid', 'test')): write(tmp_path / f'{name}.jsonl', 1, number)
  data = DataConfig(source='path', path=str(tmp_path))
  assert [asked(data, split) for split in ('train', 'val', 'test')] == [[0], [1], [2]]
  assert load_chats(data, 'val').sha256 != load_chats(data, 'test').sha256


@pytest.mark.parametrize(('name', 'text', 'said'), [
  ('a.jsonl', '{', 'line 1 is not JSON'), ('a.jsonl', ' \n', 'is empty'), ('a.txt', 'a', 'is no .jsonl file'),
  ('a.jsonl', '[' * 100_000, 'line 1 is not JSON'), ('a.jsonl', '{"prompt": "a", "response": "b"}', 'has 1 conversations; .* it needs 3')])
def test_files_without_conversations(name, text, said, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=said): load_chats(DataConfig(source='path', path=str(tmp_path / name)), 'train')


def test_the_bundled_corpus_has_none():
  with pytest.raises(UserError, match=r"data\.source='shakespeare' holds no conversations"): load_chats(DataConfig(), 'train')


def test_the_dataset_of_the_specification(tmp_path):
  """UltraChat goes by names of its own, and its held-out split serves for val and test."""
  rows = [[{'content': str(n), 'role': 'user'}, {'content': 'b', 'role': 'assistant'}] for n in range(4)]
  pyarrow.parquet.write_table(pyarrow.table({'prompt': ['x'] * 4, 'prompt_id': ['x'] * 4, 'messages': rows}), tmp_path / 'a.parquet')
  seen = []
  def fetch(name, configuration, splits): return seen.append((name, configuration, splits)) or [tmp_path / 'a.parquet']
  data = DataConfig(source='hub', hub='HuggingFaceH4/ultrachat_200k')
  assert [asked(data, split, fetch=fetch) for split in ('train', 'val', 'test')] == [[0, 1, 2, 3], [0, 2], [1, 3]]
  assert seen == [(data.hub, '', (f'{split}_sft',)) for split in ('train', 'test', 'test')]
  assert asked(DataConfig(source='hub', hub='a/b:c'), 'val', fetch=fetch) == [0, 1, 2, 3]
  assert seen[-1] == ('a/b', 'c', ('val', 'valid', 'validation', 'dev'))


@pytest.mark.parametrize(('columns', 'said'), [
  ({'text': ['a']}, "a.parquet has no column 'messages' nor 'conversations' nor 'prompt' and 'response'; it has text"),
  ({'messages': [[{'role': 'user', 'content': None}]]}, 'a/b, conversation 1 of train: message 1 has no text')])
def test_datasets_without_conversations(columns, said, tmp_path):
  pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
  with pytest.raises(UserError, match=said): load_chats(DataConfig(source='hub', hub='a/b'), 'train', lambda *_: [tmp_path / 'a.parquet'])


def test_the_reader_knows_the_roles_that_count():
  assert {role for role, name in messages.ROLES.items() if name == 'assistant'} == {'model', 'gpt', 'bot'}
