"""Chat templates without transformers: conversations as the text, and the tokens, that a model was trained on (extra `text`)."""
import contextlib
import datetime
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memjax.config.errors import UserError, shown
from memjax.data.hub import missing
from memjax.data.subword import SubwordTokenizer

SECONDS = 5.0                  # for one conversation, and for reading the template
MEMORY = 1 << 29               # bytes of the process that renders, Python included
LONGEST = 1 << 22              # characters of a rendered conversation
LARGEST = 1 << 20              # characters of a template
START = 60.0                   # seconds for a Python to start
STAND_IN = 0x100000            # first of the private characters that stand for special tokens inside messages


class ChatTemplate:
  """A jinja2 template of conversations, run in a process of its own that is started when first needed.

  It renders in jinja2's immutable sandbox, and is stopped after `seconds` or beyond `MEMORY`: templates are untrusted code. `where`
  begins the messages of UserError; `clock` is the time that templates see. Usable by several threads, one at a time.
  """

  def __init__(self, source: str, *, bos: str = '', eos: str = '', where: str = 'the chat template', seconds: float = SECONDS,
               clock: Callable[[], datetime.datetime] = datetime.datetime.now):
    if not isinstance(source, str): raise UserError(f'{where} is no text: {shown(source)}')
    if len(source) > LARGEST: raise UserError(f'{where} has {len(source)} characters, {LARGEST} at most')
    self.source, self.where, self.seconds, self.clock = source, where, seconds, clock
    self.tokens = {'bos_token': bos, 'eos_token': eos}
    self._stop, self._process, self._lock = None, None, threading.Lock()

  def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, tools: Sequence | None = None,
             documents: Sequence | None = None, **more: Any) -> str:
    """The text of a conversation; `more` are variables of this template, such as enable_thinking.

    Raises UserError for messages without a role, for what is not JSON, and for whatever the template does wrong or refuses.
    """
    for number, message in enumerate(messages, 1):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise UserError(f'message {number} has no role: {shown(message)}')
    variables = {'messages': list(messages), 'tools': tools, 'documents': documents, 'add_generation_prompt': add_generation_prompt,
                 **self.tokens, **more}
    with self._lock: return self._ask({'variables': variables, 'now': self.clock().isoformat()})

  def close(self) -> None:
    """Ends the process; the next conversation starts another."""
    if self._stop is not None: self._stop()
    self._stop, self._process = None, None

  def _ask(self, request: dict) -> str:
    try:
      line = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
      raise UserError(f'the conversation is not JSON: {error}') from None
    if self._process is None: self._start()
    return self._exchange(line)

  def _start(self) -> None:
    if importlib.util.find_spec('jinja2') is None: raise missing('text', 'jinja2')
    command = [sys.executable, '-P', str(pathlib.Path(__file__).with_name('chat_worker.py')), str(MEMORY)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    self._process, self._stop = process, weakref.finalize(self, _end, process)
    if self._line(START) != b'ready\n':
      self.close()
      raise UserError(f'{self.where}: the process that renders it does not start')
    try:
      self._exchange(json.dumps({'source': self.source, 'longest': LONGEST}).encode())
    except UserError:
      self.close()                       # there is no template to render
      raise

  def _exchange(self, line: bytes) -> str:
    """The answer to a line; the process is gone after UserError for its limits."""
    reply = self._line(self.seconds, line + b'\n')
    if not reply.endswith(b'\n'):
      self.close()
      raise UserError(f'{self.where} was stopped: it takes more than {self.seconds:g} s or too much memory')
    answer = json.loads(reply)
    if 'error' not in answer: return answer['text']
    raise UserError(f'{self.where}: {answer["error"]}: {" ".join(answer["message"].split())}'.removesuffix(': '))

  def _line(self, seconds: float, line: bytes = b'') -> bytes:
    """The next line of the process, b'' if it ended or did not answer in time and was killed."""
    process = self._process
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
      process.stdin.write(line)
      process.stdin.flush()
      return process.stdout.readline()
    except BrokenPipeError:
      return b''
    finally:
      timer.cancel()


def _end(process: subprocess.Popen) -> None:
  process.kill()
  for pipe in (process.stdin, process.stdout):
    with contextlib.suppress(OSError): pipe.close()
  process.wait()


def folder_template(folder: str) -> ChatTemplate | None:
  """The template of a Hugging Face folder: chat_template.jinja, else that of tokenizer_config.json, else None."""
  path, tree = pathlib.Path(folder), read_tokenizer_config(folder)
  text = lambda key: (tree[key].get('content') if isinstance(tree.get(key), dict) else tree.get(key)) or ''
  source, where = tree.get('chat_template'), path / 'tokenizer_config.json'
  if isinstance(source, list):           # several, by name
    source = {entry.get('name'): entry.get('template') for entry in source if isinstance(entry, dict)}.get('default')
  if (path / 'chat_template.jinja').exists():
    where = path / 'chat_template.jinja'
    try:
      source = where.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{where} cannot be read: {error}') from None
  if source is None: return None
  return ChatTemplate(source, bos=text('bos_token'), eos=text('eos_token'), where=f'the chat template of {where}')


def read_tokenizer_config(folder: str) -> dict:
  """The table in tokenizer_config.json, {} where there is none. Raises UserError for anything else in it."""
  path = pathlib.Path(folder) / 'tokenizer_config.json'
  try:
    tree = json.loads(path.read_bytes())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} cannot be read: {error}') from None
  if not isinstance(tree, dict): raise UserError(f'{path} is not a JSON object')
  return tree


def chat_tokens(tokenizer: SubwordTokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *,
                escape: bool = True, **options: Any) -> np.ndarray:
  """int32 tokens of a conversation; `options` are those of `ChatTemplate.render`. Nothing is added: templates write bos.

  With `escape` a special token that is spelt out inside a message stays text, so that nobody ends a turn by writing its end.
  """
  added = tokenizer.inner.get_added_tokens_decoder()
  special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
  if not escape or not special: return tokenizer.encode(template.render(messages, **options))
  pattern = re.compile('|'.join(map(re.escape, special)))
  stand_in = {token: chr(STAND_IN + i) for i, token in enumerate(special)}
  text = template.render(_replaced(messages, pattern, stand_in), **options)
  spelt, pieces, at = {stand: token for token, stand in stand_in.items()}, [], 0
  for found in [*pattern.finditer(text), None]:
    piece = text[at:found.start() if found else len(text)]
    pieces.append(_plain(tokenizer, ''.join(spelt.get(character, character) for character in piece)))
    if found: pieces.append([tokenizer.inner.token_to_id(found[0])])
    at = found.end() if found else at
  return np.concatenate(pieces).astype(np.int32)


def _replaced(value: Any, pattern: re.Pattern, stand_in: Mapping[str, str]) -> Any:
  """The messages with private characters for special tokens, wherever there is text. Raises UserError for such characters."""
  if isinstance(value, str):
    if any(stand in value for stand in stand_in.values()): raise UserError('a message holds characters of a private plane of Unicode')
    return pattern.sub(lambda found: stand_in[found[0]], value)
  if isinstance(value, Mapping): return {key: _replaced(one, pattern, stand_in) for key, one in value.items()}
  return [_replaced(one, pattern, stand_in) for one in value] if isinstance(value, list | tuple) else value


def _plain(tokenizer: SubwordTokenizer, text: str) -> np.ndarray:
  """Tokens of a text whose special tokens are only text."""
  tokenizer.inner.encode_special_tokens = True
  try:
    return tokenizer.encode(text)
  finally:
    tokenizer.inner.encode_special_tokens = False
