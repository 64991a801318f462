"""Conversations from .jsonl files and from datasets on the hub, one way of writing them for all: a list of role and content."""
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from memjax.config.errors import UserError, shown
from memjax.config.schema import DataConfig
from memjax.data import hub
from memjax.data.sources import FEW, SPLITS, Corpus, Format, divide, filled, read_path, read_text, split_name

logger = logging.getLogger(__name__)

ASSISTANT = 'assistant'
ROLES = {'model': ASSISTANT, 'gpt': ASSISTANT, 'bot': ASSISTANT, 'human': 'user'}       # others are what they say
RECORDS = (('messages',), ('conversations',), ('prompt', 'response'))                  # columns of a record; the first that is there
# Datasets whose splits go by names of their own. Where val and test have the same, they share its rows in turn.
HUB = {'HuggingFaceH4/ultrachat_200k': {'train': ('train_sft',), 'val': ('test_sft',), 'test': ('test_sft',)}}


def load_chats(data: DataConfig, split: str, fetch: Callable[..., list[pathlib.Path]] = hub.fetch) -> Corpus:
  """The conversations of one split: each document is the JSON of its messages.

  `fetch` as in `load_corpus`. UserError, one line, for what `load_corpus` refuses, and for a record that is no conversation.
  """
  split = split_name(split)
  if data.source == 'path': return read_path(data.path, split, Format(read_file, divide_chats, ('.jsonl',)))
  if data.source == 'hub': return filled(Corpus(data.hub, split, _read_hub(data.hub, split, fetch)))
  raise UserError(f"data.source='{data.source}' holds no conversations; use path or hub")


def read_file(path: pathlib.Path) -> list[str]:
  """The conversations of a .jsonl file."""
  if path.suffix != '.jsonl': raise UserError(f'{path} is no .jsonl file: conversations are one JSON object a line')
  documents = []
  for number, line in enumerate(read_text(path).split('\n'), 1):
    if not line.strip(): continue
    try:
      documents.append(conversation(json.loads(line)))
    except (json.JSONDecodeError, RecursionError) as error:
      raise UserError(f'{path} line {number} is not JSON: {getattr(error, "msg", "nested too deeply")}') from None
    except UserError as error:
      raise UserError(f'{path} line {number}: {error}') from None
  if not documents: raise UserError(f'{path} is empty')
  return documents


def _read_hub(name: str, split: str, fetch: Callable[..., list[pathlib.Path]]) -> list[str]:
  owner, _, configuration = name.partition(':')
  names = HUB.get(owner, SPLITS)
  rows, documents = hub.read_rows(fetch(owner, configuration, names[split]), *RECORDS), []
  if names['val'] == names['test'] == names[split]: rows = rows[('val', 'test').index(split)::2]
  for number, row in enumerate(rows, 1):
    try:
      documents.append(conversation(row))
    except UserError as error:
      raise UserError(f'{name}, conversation {number} of {split}: {error}') from None
  return documents


def conversation(record: Any) -> str:
  """The JSON of the messages of a record: `messages` or `conversations`, a list of role and content (or from and value), or
  `prompt` and `response`. Raises UserError for anything else."""
  columns = next((group for group in RECORDS if isinstance(record, dict) and all(record.get(name) is not None for name in group)), None)
  if columns is None:
    found = ', '.join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
    raise UserError(f'no conversation: neither messages, nor conversations, nor prompt and response; there is {found}')
  if len(columns) == 2: turns = [{'role': role, 'content': record[name]} for role, name in zip(('user', ASSISTANT), columns, strict=True)]
  else: turns = record[columns[0]]
  if not isinstance(turns, list) or not turns: raise UserError(f'{columns[0]} is no list of messages: {shown(turns)}')
  return json.dumps([message(turn, number) for number, turn in enumerate(turns, 1)], ensure_ascii=False)


def message(turn: Any, number: int) -> dict[str, Any]:
  """{'role', 'content', whatever else there is} of one message. Raises UserError for one without a role or a text."""
  if not isinstance(turn, Mapping): raise UserError(f'message {number} is no object: {shown(turn)}')
  role, content = (next((turn[name] for name in names if turn.get(name) is not None), None)
                   for names in (('role', 'from'), ('content', 'value')))
  if not isinstance(role, str) or not role: raise UserError(f'message {number} has no role')
  if content is None and turn.get('tool_calls'): content = ''
  if not isinstance(content, str): raise UserError(f'message {number} has no text: {shown(content)}')
  more = {name: value for name, value in turn.items() if name not in ('role', 'from', 'content', 'value') and value is not None}
  return {'role': ROLES.get(role, role), 'content': content, **more}


def divide_chats(documents: list[str], split: str, where: str) -> list[str]:
  """A split of conversations that have none: as `divide`, but never cut: of few the last is test, the one before val."""
  if len(documents) >= FEW: return divide(documents, split, where)
  if len(documents) < 3: raise UserError(f'{where} has {len(documents)} conversations; to be divided into splits it needs 3')
  logger.info('%s has no splits: of its %d conversations the last is test, the one before val', where, len(documents))
  return {'train': documents[:-2], 'val': documents[-2:-1], 'test': documents[-1:]}[split]
