"""A conversation with a model: each message goes on from the state that the last reply left, where its text allows it."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from memjax.config.errors import UserError
from memjax.data.tokenizers import Tokenizer
from memjax.runtime.sampling import BUCKET, Sampler
from memjax.runtime.text import Continuation, Writer

LEAST_ROOM = 512     # tokens that a conversation has room for at first; it doubles as needed


class Speaker(NamedTuple):
  """What replies: a pretrained model, or that of a training run."""
  params: Any
  tokenizer: Tokenizer
  ends: tuple[int, ...]                                              # tokens that end a turn
  encode: Callable[[Sequence[Mapping[str, Any]]], np.ndarray]        # tokens of messages up to where the next reply begins


class Conversation:
  """Messages and replies so far, and the state of the model after them.

  The template renders the whole conversation anew for each message. Where those tokens begin with the ones that entered the model,
  only the rest enters; else (templates may rewrite what was said) all do, from an empty state. `opening` are the messages that each
  conversation begins with, `limit` bounds its tokens, 0 = any number.
  """

  def __init__(self, speaker: Speaker, sampler: Sampler, *, opening: Sequence[Mapping[str, Any]] = (), stops: Sequence[str] = (),
               limit: int = 0):
    self.speaker, self.opening, self.limit = speaker, list(opening), limit
    ends = speaker.ends or (-1,)         # without any, drawing still stops at the token that was asked for
    self.writer = Writer(sampler, speaker.params, speaker.tokenizer, stops=stops, ends=ends)
    self.reset()

  def reset(self) -> None:
    """Begins another conversation with the same messages."""
    self.messages: list[Mapping[str, Any]] = list(self.opening)
    self._forget()

  def _forget(self) -> None:
    self._session, self._entered = None, np.zeros((0,), np.int32)

  @property
  def entered(self) -> int:
    """Tokens that are in the state of the model."""
    return self._entered.size

  def say(self, text: str, max_new_tokens: int) -> Iterator[str]:
    """Yields the reply to a message, piece by piece; both are part of the conversation once it is complete.

    Raises UserError for a conversation beyond the limit, at once, and for what the template refuses.
    """
    messages = [*self.messages, {'role': 'user', 'content': text}]
    tokens = self.speaker.encode(messages)
    total = tokens.size + max_new_tokens
    if self.limit and total > self.limit:
      raise UserError(f'the conversation and max_new_tokens, {total} tokens, exceed the limit of {self.limit}')
    return self._reply(messages, tokens, max_new_tokens)

  def _reply(self, messages: list, tokens: np.ndarray, max_new_tokens: int) -> Iterator[str]:
    row = Continuation(messages[-1]['content'])
    session, entered = self._enter(tokens, tokens.size + max_new_tokens), tokens
    self._forget()                       # a reply that is broken off leaves a state that belongs to no text
    drawn: list[np.ndarray] = []
    def chunks():
      nonlocal session
      for after, token_BxN in self.writer.sampler.drawn(self.speaker.params, session, max_new_tokens):
        session = after
        drawn.append(token_BxN[0])
        yield token_BxN
    for _, piece in self.writer.follow(chunks(), [row]): yield piece
    self.messages = [*messages, {'role': 'assistant', 'content': row.text}]
    if not _knows_prompts(session.carry.state): self._session, self._entered = session, np.concatenate([entered, *drawn])

  def _enter(self, tokens: np.ndarray, total: int) -> Any:
    """The session after these tokens, with room for `total`."""
    sampler, known = self.writer.sampler, self._entered.size
    room = max(LEAST_ROOM, 1 << (total - 1).bit_length())
    if self.limit: room = min(room, -(-self.limit // BUCKET) * BUCKET)
    if self._session is None or known >= tokens.size or (tokens[:known] != self._entered).any():
      return sampler.start(self.speaker.params, [tokens], room)
    return sampler.extend(self.speaker.params, sampler.grow(self._session, room), [tokens[known:]])


def _knows_prompts(state: Any) -> bool:
  """Whether a router in the model depends on where the prompt ended: then a longer prompt is another one."""
  return any('prompt_length' in jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(state))
