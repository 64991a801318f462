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
from typing import TYPE_CHECKING, Any

import numpy as np

from memjax.config.errors import UserError, shown
from memjax.data.hub import missing
from memjax.data.tokenizers import Tokenizer

if TYPE_CHECKING:
  from memjax.data.subword import SubwordTokenizer  # needs the extra `text`

SECONDS = 5.0                  # for one conversation, and for reading the template
MEMORY = 1 << 29               # bytes of the process that renders, Python included
LONGEST = 1 << 22              # characters of a rendered conversation
LARGEST = 1 << 20              # characters of a template
START = 60.0                   # seconds for a Python to start
STAND_IN = 0x100000            # first of the private characters that stand for special tokens inside messages
OPEN, CLOSE = '\U0010fffe', '\U0010ffff'       # the marks of chat_worker, which is not imported: jinja2 is an extra
TAG = re.compile(r'{%[-+]?\s*generation\s*[-+]?%}')


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
             documents: Sequence | None = None, marks: bool = False, **more: Any) -> str:
    """The text of a conversation; `more` are variables of this template, such as enable_thinking.

    With `marks`, OPEN and CLOSE stand around what the template's generation tags enclose, if it has any (`has_tags`).

    Raises UserError for messages without a role, for what is not JSON, and for whatever the template does wrong or refuses.
    """
    for number, message in enumerate(messages, 1):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise UserError(f'message {number} has no role: {shown(message)}')
    variables = {'messages': list(messages), 'tools': tools, 'documents': documents, 'add_generation_prompt': add_generation_prompt,
                 **self.tokens, **more}
    with self._lock: return self._ask({'variables': variables, 'now': self.clock().isoformat(), 'marks': marks})

  @property
  def has_tags(self) -> bool:
    """Whether the template says itself what the assistant writes."""
    return bool(TAG.search(self.source))

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


def chat_tokens(tokenizer: 'SubwordTokenizer', template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *,
                escape: bool = True, **options: Any) -> np.ndarray:
  """int32 tokens of a conversation; `options` are those of `ChatTemplate.render`. Nothing is added: templates write bos.

  With `escape` a special token that is spelt out inside a message stays text, so that nobody ends a turn by writing its end.
  """
  speller = Speller(tokenizer)
  return speller.tokens(template.render(speller.hide(messages) if escape else messages, **options))


class Speller:
  """Texts as tokens, where the special tokens inside messages were hidden and so stay text, those of the template are special."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer, self.inner = tokenizer, getattr(tokenizer, 'inner', None)
    added = self.inner.get_added_tokens_decoder() if self.inner else {}
    special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
    self.pattern = re.compile('|'.join(map(re.escape, special)) or '(?!)')
    self.stand_in = {token: chr(STAND_IN + i) for i, token in enumerate(special)}
    self.spelt = {stand: token for token, stand in self.stand_in.items()}
    self.hidden = re.compile(f'[{"".join(self.spelt)}]' if special else '(?!)')
    self._bytes: np.ndarray | None = None        # of each token, where a text is the bytes of its tokens

  def hide(self, value: Any) -> Any:
    """The messages with private characters for special tokens, wherever there is text. Raises UserError for such characters."""
    if isinstance(value, str):
      if OPEN in value or CLOSE in value or self.hidden.search(value):
        raise UserError('a message holds characters of a private plane of Unicode')
      return self.pattern.sub(lambda found: self.stand_in[found[0]], value)
    if isinstance(value, Mapping): return {key: self.hide(one) for key, one in value.items()}
    return [self.hide(one) for one in value] if isinstance(value, list | tuple) else value

  def show(self, text: str) -> str:
    """The text with special tokens spelt out for private characters."""
    return self.hidden.sub(lambda found: self.spelt[found[0]], text)

  def bytes_of(self, text: str) -> np.ndarray:
    """UTF-8 bytes that each character of a text with hidden special tokens has in `show(text)`."""
    byte_C = utf8_sizes(text)
    for found in self.hidden.finditer(text): byte_C[found.start()] = len(self.spelt[found[0]].encode())
    return byte_C

  def tokens(self, text: str) -> np.ndarray:
    """int32 tokens of a text with hidden special tokens."""
    return np.concatenate([token_N for _, token_N in self._pieces(text)] or [[]]).astype(np.int32)

  def sized(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(int32 tokens, how many UTF-8 bytes of `show(text)` belong to each)."""
    pieces = self._pieces(text)
    sizes = np.concatenate([self._sizes(piece, token_N) for piece, token_N in pieces] or [[]])
    return np.concatenate([token_N for _, token_N in pieces] or [[]]).astype(np.int32), sizes.astype(np.int64)

  def _pieces(self, text: str) -> list[tuple[str, np.ndarray]]:
    """(text, tokens) of the special tokens and of what is between them."""
    found, at = [], 0
    for special in self.pattern.finditer(text):
      found += [self.show(text[at:special.start()]), special[0]]
      at = special.end()
    found.append(self.show(text[at:]))
    special = lambda number, piece: np.array([self.inner.token_to_id(piece)]) if number % 2 else self._plain(piece)
    return [(piece, special(number, piece)) for number, piece in enumerate(found) if piece]

  def _plain(self, text: str) -> np.ndarray:
    """Tokens of a text whose special tokens are only text."""
    if self.inner is None: return self.tokenizer.encode(text)
    self.inner.encode_special_tokens = True
    try:
      return self.tokenizer.encode(text)
    finally:
      self.inner.encode_special_tokens = False

  def _sizes(self, text: str, token_N: np.ndarray) -> np.ndarray:
    """Bytes of each token: its own, where they add up to the text, else by the offsets of the library, which may leave out spaces."""
    if len(token_N) == 1: return np.array([len(text.encode())])
    if self._bytes is None:
      piece = getattr(self.tokenizer.stream(), 'pieces', lambda token: b'')
      self._bytes = np.array([len(piece(token)) for token in range(self.tokenizer.vocabulary)])
    raw, own_N = text.encode(), self._bytes[token_N]
    if own_N.sum() == len(raw) or self.inner is None: return own_N
    self.inner.encode_special_tokens = True
    try:
      end_N = np.array([end for _, end in self.inner.encode(text, add_special_tokens=False).offsets])
    finally:
      self.inner.encode_special_tokens = False
    bytes_C = np.concatenate([[0], np.cumsum(utf8_sizes(text))])
    return np.diff(bytes_C[np.maximum.accumulate(end_N)], prepend=0)


def utf8_sizes(text: str) -> np.ndarray:
  """UTF-8 bytes of each character."""
  code_C = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  return 1 + (code_C > 0x7f) + (code_C > 0x7ff) + (code_C > 0xffff)
