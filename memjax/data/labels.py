"""Which tokens of a conversation are trained on: what the assistant wrote, found in what its template makes of the messages."""
import datetime
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.config.chat import ChatConfig
from memjax.config.errors import UserError
from memjax.data.chat import CLOSE, OPEN, ChatTemplate, Speller
from memjax.data.messages import ASSISTANT
from memjax.data.tokenizers import Tokenizer

VERSION = 1
NOW = datetime.datetime(2025, 1, 1)              # what templates read from the clock, so that data depend on nothing but the data
REASONING = re.compile(r'(?:<think>|\A(?=(?:(?!<think>).)*</think>)).*?</think>\s*', re.DOTALL)


class Span(NamedTuple):
  """Characters [start, stop) that an assistant wrote, and [stop, end) what ends its turn."""
  start: int
  stop: int
  end: int


class Labels:
  """Tokens and weights of conversations, given as the JSON of their messages.

  `template` None: `<|role|>`, a new line, the content and a new line a message, after bos. `ends` are the strings that end a
  turn. The fingerprint names all that tokens and weights depend on besides the tokenizer. Raises UserError for a template that says
  neither by tags what an assistant writes nor how its turns end.
  """

  def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, ends: Sequence[str], options: ChatConfig):
    self.tokenizer, self.template, self.options, self.speller = tokenizer, template, options, Speller(tokenizer)
    self.ends = tuple(dict.fromkeys(end for end in ends if end))
    source = [template.source, template.tokens] if template else []
    if template: template.clock = lambda: NOW
    if template and not (self.ends or template.has_tags): raise UserError(f'{template.where} does not say what ends a turn (eos_token)')
    self._end = re.compile('|'.join(map(re.escape, sorted(self.ends, key=len, reverse=True))) or '(?!)')
    text = json.dumps([VERSION, source, self.ends, [str(value) for value in vars(options).items()]])
    self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

  def __call__(self, document: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, bool weight of each, UTF-8 bytes of what is trained on, without what ends turns). Raises UserError for messages that
    the template refuses, or that cannot be found in what it writes."""
    messages = json.loads(document)
    text, spans = self._write(self._checked(messages))
    if self.options.train_on == 'all': spans = [Span(0, len(text), len(text))]
    if self.options.train_on == 'last_assistant': spans = spans[-1:]
    content_C, trained_C = np.zeros((2, len(text)), bool)
    for start, stop, end in spans:
      content_C[start:stop] = trained_C[start:stop] = True
      trained_C[stop:end] = self.options.train_on_eot
      if not self.options.mask_reasoning: continue
      for found in REASONING.finditer(text[start:stop]): content_C[start + found.start():start + found.end()] = False
      trained_C[start:stop] = content_C[start:stop]
    token_N, size_N = self.speller.sized(text)
    byte_C = self.speller.bytes_of(text)
    before_U = np.concatenate([[0], np.cumsum(np.repeat(trained_C, byte_C))])          # trained bytes before each byte
    end_N = np.cumsum(size_N)
    weight_N = before_U[end_N] > before_U[end_N - size_N]
    if self.template is None: token_N, weight_N = self._begun(token_N), np.append(False, weight_N)
    weight_N[:1] = False               # nothing stands before it
    return token_N, weight_N, int(byte_C[content_C].sum())

  def prompt(self, text: str) -> np.ndarray:
    """int32 tokens of a conversation that begins with this message of its user, up to where the reply begins."""
    return self.opening([{'role': 'user', 'content': text}])

  def opening(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """int32 tokens of a conversation up to where the next reply begins."""
    messages = self.speller.hide(list(messages))
    if self.template is None: return self._begun(self.speller.tokens(f'{_fallback(messages)[0]}<|{ASSISTANT}|>\n'))
    return self.speller.tokens(self.template.render(messages, add_generation_prompt=True))

  def _begun(self, token_N: np.ndarray) -> np.ndarray:
    return np.append(np.int32(self.tokenizer.bos), token_N)

  @property
  def end_tokens(self) -> tuple[int, ...]:
    """The tokens that end a turn."""
    found = [self.speller.inner.token_to_id(end) for end in self.ends] if self.speller.inner else []
    return tuple(token for token in found if token is not None)

  def _checked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their special tokens hidden. Raises UserError for the end of a turn inside one that is not."""
    if self.options.escape: return self.speller.hide(messages)
    for number, message in enumerate(messages, 1):
      if found := self._end.search(message['content']): raise UserError(f'message {number} holds {found[0]!r}, which ends a turn')
    return messages

  def _write(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """(the text, in which special tokens of messages are hidden, what the assistant wrote)."""
    if self.template is None: return _fallback(messages)
    if self.template.has_tags: return self._split(self.template.render(messages, marks=True))
    text, spans = self.template.render(messages), []
    for number, message in enumerate(messages):
      if message['role'] != ASSISTANT: continue
      before = self.template.render(messages[:number], add_generation_prompt=True)
      if not text.startswith(before): return self._marked(messages, text)
      spans.append(self._ended(text, len(before)))
    if any(one.end > other.start for one, other in itertools.pairwise(spans)):
      raise UserError(f'{self.template.where} writes none of {", ".join(map(repr, self.ends))} after a reply')
    return text, spans

  def _ended(self, text: str, start: int) -> Span:
    """The reply that begins at `start`: to the first that ends a turn, or to the end of the text."""
    found, last = self._end.search(text, start), max(start, len(text.rstrip()))
    return Span(start, found.start(), found.end()) if found else Span(start, last, last)

  def _marked(self, messages: list[dict[str, Any]], text: str) -> tuple[str, list[Span]]:
    """The same from marks around the contents, for templates whose prompt is not how the reply begins in the whole text."""
    for place in (lambda content: (0, len(content)), _core):
      marked = [{**message, 'content': _around(message['content'], *place(message['content']))} if message['role'] == ASSISTANT else message
                for message in messages]
      plain, spans = self._split(self.template.render(marked))
      if plain == text and len(spans) == sum(message['role'] == ASSISTANT for message in messages): return text, spans
    raise UserError(f'{self.template.where} writes replies in a way in which they cannot be told from the rest')

  def _split(self, text: str) -> tuple[str, list[Span]]:
    """(the text without marks, the spans between them); [] for marks that are not in pairs."""
    pieces = re.split(f'([{OPEN}{CLOSE}])', text)
    plain, border = ''.join(pieces[::2]), np.cumsum([len(piece) for piece in pieces[::2]]).tolist()
    marks = ''.join(pieces[1::2])
    if marks != (OPEN + CLOSE) * (len(marks) // 2): return plain, []
    return plain, [self._enclosed(plain, start, stop) for start, stop in zip(border[:-1:2], border[1::2], strict=True)]

  def _enclosed(self, text: str, start: int, stop: int) -> Span:
    """The reply between `start` and `stop`, where what ends the turn is inside, or follows, or is not there."""
    found = self._end.search(text, start, stop) or self._end.search(text, stop)
    follows = found and not text[stop:found.start()].strip()
    return Span(start, found.start(), found.end()) if follows else Span(start, stop, stop)


def _fallback(messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
  """The text by roles, and the contents of the assistant in it, which nothing ends."""
  text, spans = '', []
  for message in messages:
    text += f'<|{message["role"]}|>\n{message["content"]}\n'
    stop = len(text) - 1
    if message['role'] == ASSISTANT: spans.append(Span(stop - len(message['content']), stop, stop))
  return text, spans


def _core(content: str) -> tuple[int, int]:
  """Where the content begins and ends without outer white space and reasoning, which templates take away."""
  core = content.rpartition('</think>')[2].strip()
  at = content.rindex(core)
  return at, at + len(core)


def _around(content: str, start: int, stop: int) -> str:
  """The content with marks around a part of it."""
  return f'{content[:start]}{OPEN}{content[start:stop]}{CLOSE}{content[stop:]}'
