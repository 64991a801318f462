"""Generated text: tokens become text as they arrive, each row until its own end or stop string."""
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from memjax.config.errors import UserError
from memjax.data.tokenizers import Tokenizer
from memjax.runtime.sampling import Sampler


class StopText:
  """Text as it arrives, cut before the first stop string, wherever the borders of its pieces fall.

  What could be the start of a stop string is held back until that is decided.
  """

  def __init__(self, stops: Sequence[str] = ()):
    if '' in stops: raise UserError('a stop string must not be empty')
    self.stops, self.held, self.stop = tuple(stops), '', ''

  def push(self, piece: str) -> str:
    """The text that is now certain; '' once a stop string was found, which `stop` then names."""
    if self.stop: return ''
    self.held += piece
    found = [(self.held.find(stop), stop) for stop in self.stops if stop in self.held]
    at, self.stop = min(found) if found else (self._certain(), '')
    text, self.held = self.held[:at], '' if self.stop else self.held[at:]
    return text

  def _certain(self) -> int:
    """Characters of the held text that no stop string can begin in."""
    longest = max((len(stop) for stop in self.stops), default=1) - 1
    starts = range(max(len(self.held) - longest, 0), len(self.held))
    return next((i for i in starts if any(stop.startswith(self.held[i:]) for stop in self.stops)), len(self.held))

  def flush(self) -> str:
    """What was held back, at the end of the text."""
    text, self.held = self.held, ''
    return text


@dataclasses.dataclass
class Continuation:
  """One prompt and the text that followed it. `ended` says why: 'stop', 'end' (a token that ends texts), 'length'.

  `tokens` were drawn for it, those of a stop string included.
  """
  prompt: str
  text: str = ''
  tokens: int = 0
  ended: str = ''


class Writer:
  """Continues texts with one model and tokenizer; compiles once for all its calls.

  `enter` gives the tokens of a prompt that enter the model, None = the one that begins a document, then the prompt; `limit`
  bounds the tokens of a prompt and of what is drawn for it, 0 = any number.
  """

  def __init__(self, sampler: Sampler, params: Any, tokenizer: Tokenizer, *, stops: Sequence[str] = (), ends: Sequence[int] = (),
               enter: Callable[[str], np.ndarray] | None = None, limit: int = 0):
    self.enter, self.limit = enter, limit
    self.sampler, self.params, self.tokenizer = sampler.within(tokenizer.vocabulary, ends), params, tokenizer
    self.stops, self.ends = tuple(stops), frozenset(ends)
    StopText(stops)          # an empty stop string is refused here, before anything is computed

  def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
    """The tokens that enter the model, by default that which begins a document, then the prompt. UserError for an empty one."""
    rows = [(self.enter or self.tokenizer.encode)(prompt) for prompt in prompts]
    for number, row in enumerate(rows, 1):
      if not row.size: raise UserError(f'prompt {number} has no tokens; give it at least one')
    return rows if self.enter else [np.concatenate([[self.tokenizer.bos], row]).astype(np.int32) for row in rows]

  def stream(self, prompts: Sequence[str], max_new_tokens: int,
             into: list[Continuation] | None = None) -> Iterator[tuple[int, str]]:
    """Yields (row, piece of text) as it becomes certain, until every row has ended.

    `into` receives one Continuation a prompt, complete at the end. Raises UserError as `Sampler.stream` does, and for more tokens
    than the limit, at once.
    """
    tokens = self.encode(prompts)
    total = max(map(len, tokens), default=0) + max_new_tokens
    if self.limit and total > self.limit:
      raise UserError(f'the longest prompt and max_new_tokens, {total} tokens, exceed the limit of {self.limit}')
    chunks = self.sampler.stream(self.params, tokens, max_new_tokens)
    rows = [] if into is None else into
    rows += [Continuation(prompt) for prompt in prompts]
    return self.follow(chunks, rows)

  def follow(self, chunks: Iterator[np.ndarray], rows: list[Continuation]) -> Iterator[tuple[int, str]]:
    """Yields what `stream` does for tokens [B, n] as they come, whoever draws them; `rows` are filled."""
    decoders = [self.tokenizer.stream() for _ in rows]
    filters = [StopText(self.stops) for _ in rows]
    for token_BxN in chunks:
      for number, row in enumerate(rows):
        decoder, stop = decoders[number], filters[number]
        if piece := ''.join([self._push(row, int(token), decoder, stop) for token in token_BxN[number]]):
          row.text += piece
          yield number, piece
      if all(row.ended for row in rows): return
    for number, row in enumerate(rows):
      if row.ended: continue
      row.ended, piece = 'length', self._finish(decoders[number], filters[number])
      row.text += piece
      if piece: yield number, piece

  def _push(self, row: Continuation, token: int, decoder: Any, stop: StopText) -> str:
    if row.ended: return ''
    row.tokens += 1
    if token in self.ends:
      row.ended, piece = 'end', self._finish(decoder, stop)
    else:
      piece = stop.push(decoder.push(token))
    if stop.stop: row.ended = 'stop'
    return piece

  def _finish(self, decoder: Any, stop: StopText) -> str:
    return stop.push(decoder.finish()) + stop.flush()

  def write(self, prompts: Sequence[str], max_new_tokens: int) -> list[Continuation]:
    """The continuations of the prompts, whole."""
    rows = []
    for _ in self.stream(prompts, max_new_tokens, into=rows): pass
    return rows
