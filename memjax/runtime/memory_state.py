"""What a text left in the memories of a model, as a value: on disk, forked, emptied, merged; and texts that go on from it.

A state is that of a whole decoder, so that a text goes on as if it had never been interrupted, wherever it was cut.
"""
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.config.layout import MAC, stacks, stages
from memjax.config.schema import Config, ModelConfig
from memjax.layers.tree import named, unnamed
from memjax.memory.base import where_rows
from memjax.models.decoder import Decoder, flush_memories
from memjax.runtime.arrays import check_fit, read_arrays, write_arrays
from memjax.runtime.context_bank import fingerprint_of
from memjax.runtime.sampling import Carry, Session
from memjax.runtime.state import check_carry
from memjax.runtime.test_time import LEARNING
from memjax.runtime.text import Continuation, Writer


def save_state(path: str | os.PathLike, state: Any, fingerprint: str, *, position: int = 0) -> None:
  """None; a state in one .npz file, replaced whole or not at all. `fingerprint` is that of the model (`fingerprint_of`),
  `position` how many tokens of the text were read.

  Raises UserError if the file cannot be written.
  """
  write_arrays(path, named(state), {'fingerprint': fingerprint, 'position': int(position)}, prefix='state')


def load_state(path: str | os.PathLike, fingerprint: str, like: Any) -> tuple[Any, int]:
  """(state, position) of a file, bit for bit, in the structure of `like` (an empty state, or its shapes).

  Raises UserError if the file is missing or damaged, or its state is another model's or of other shapes.
  """
  record, arrays = read_arrays(path, prefix='state', what='memory states')
  made_by = record['fingerprint']
  if made_by != fingerprint: raise UserError(f'{path} holds the state of another model: fingerprint {made_by}, not {fingerprint}')
  check_fit(path, arrays, named(like))
  return unnamed({name: jnp.asarray(a) for name, a in arrays.items()}, like), int(record['position'])


def fork(state: Any) -> Any:
  """A copy that shares no array with the state: both may go on, and be donated, on their own."""
  return jax.tree.map(lambda a: jnp.array(a, copy=True), state)


def reset(state: Any, mask_B: jax.Array) -> Any:
  """The state, empty in the rows where the mask holds."""
  return where_rows(mask_B, jax.tree.map(jnp.zeros_like, state), state)


def flush(model: Decoder, params: Any, state: Any) -> Any:
  """The state with the tokens that wait for the end of their chunk written: for the end of a text, and before `merge`.

  Reads see what they saw (in modes block and tnt: all that was written); a text that goes on differs from one that was not flushed.
  Raises UserError for layers that read by segments (mac) and for memories that write whole chunks.
  """
  return _flush(_Written(repr(model.config), model), params, state)


@dataclasses.dataclass(frozen=True)
class _Written:
  """A model that equals another of the same config: configs hold dictionaries, which have no hash."""
  config: str
  model: Decoder = dataclasses.field(compare=False)


_flush = jax.jit(lambda written, params, state: flush_memories(written.model, params, state), static_argnums=0)


def merge(config: ModelConfig, states: Sequence[Any], weights: Sequence[float]) -> Any:
  """One state whose neural memories differ from the learned start by the weighted mean of the differences of `states`, in weights and
  momenta; weights count relative to their sum. Attention begins anew.

  Raises UserError for memories of which no mean is known, tokens of a chunk that is not complete, and weights that do not fit.
  """
  weight = np.asarray(weights, np.float64)
  if not len(states) or weight.shape != (len(states),) or not np.isfinite(weight).all() or weight.sum() <= 0:
    raise UserError(f'merge wants a weight for each of {len(states)} states, with a positive sum, not {list(weights)}')
  share, out = weight / weight.sum(), jax.tree.map(jnp.zeros_like, states[0])
  places = [(part, f'layer_{number}', stage) for part, layers in stacks(config).items() for number, layer in enumerate(layers)
            for stage in stages(layer)]
  found = False
  for part, layer, (names, wiring) in places:
    own = out[part][layer]
    for name in names:
      kind = config.mixers[name].kind
      if kind == 'neural': own[name], found = _merged([state[part][layer][name] for state in states], share, name), True
      elif kind in LEARNING: raise UserError(f'states of kind {kind!r} (mixer {name}) have no mean; merge is for kind neural')
    if wiring == MAC and own[names[0]].start is not None:
      own[names[0]] = own[names[0]].replace(start={name: levels[0] for name, levels in own[names[1]].fast.items()})
  if not found: raise UserError('merge wants a model with a memory of kind neural')
  return out


def _merged(states: list, share: np.ndarray, name: str) -> Any:
  """The mean of states of one memory; local memories of mode tnt begin anew."""
  if not hasattr(states[0], 'whole'): return _mean(states, share, name)
  return jax.tree.map(jnp.zeros_like, states[0]).replace(whole=_mean([state.whole for state in states], share, name))


def _mean(states: list, share: np.ndarray, name: str) -> Any:
  """The mean of states of one neural memory whose chunks are complete."""
  for number, state in enumerate(states, 1):
    pending = int(np.asarray(state.slot_B).max())
    if pending: raise UserError(f'state {number} holds {pending} tokens of a chunk of {name} that is not complete; flush it first')
  mean = lambda *a: sum(x * one for x, one in zip(share.astype(a[0].dtype), a, strict=True))
  fast = jax.tree.map(mean, *(state.fast for state in states))
  new = jax.tree.map(jnp.zeros_like, states[0]).replace(fast=fast)
  new = new.replace(running_BxHxY=mean(*(state.running_BxHxY for state in states)))
  return new if new.anchor is None else new.replace(anchor={name: levels[0] for name, levels in fast.items()})


class Resumed:
  """Texts one after the other in one memory, written by a Writer whose drawing stops at some token: `stream` is that of the Writer for a
  single prompt, which goes on where the memory is; `keep` saves it.

  `path`: a saved state to begin with, '' = empty. Raises UserError for that file, and for a model whose state grows with the text.
  """

  def __init__(self, writer: Writer, path: str = ''):
    self.writer, model = writer, writer.sampler.model
    check_carry(model.config, 'a saved memory')
    if model.config.embedding.max_position: raise UserError('a saved memory does not go with learned positions, which end')
    self.fingerprint = fingerprint_of(Config(model=model.config), writer.params)
    self.state, self.position = model.init_state(1), 0
    if path: self.state, self.position = load_state(path, self.fingerprint, self.state)

  def _tokens(self, prompt: str) -> np.ndarray:
    """The tokens of a prompt; a text that goes on has no beginning."""
    first = self.writer.encode([prompt])[0]
    return first if self.writer.enter or not self.position else first[1:]

  def stream(self, prompts: Sequence[str], max_new_tokens: int, into: list[Continuation]) -> Iterator[tuple[int, str]]:
    """Yields (0, piece of text) as it becomes certain; `into` receives the Continuation."""
    [prompt] = prompts
    tokens, sampler, params = self._tokens(prompt), self.writer.sampler, self.writer.params
    zeros_B = jnp.zeros((1,), jnp.int32)
    carry = Carry(jnp.zeros((1, sampler.vocabulary)), self.state, zeros_B + self.position, jnp.zeros((), jnp.int32), zeros_B > 0)
    session = Session(carry, self.position, self.position + tokens.size + max_new_tokens)
    session = sampler.extend(params, session, [tokens])
    into.append(Continuation(prompt))
    def chunks():
      for after, token_BxN in sampler.drawn(params, session, max_new_tokens):
        self.state, self.position = after.carry.state, after.length
        yield token_BxN
    return self.writer.follow(chunks(), into)

  def keep(self, path: str) -> None:
    """None; what was read and drawn, in a file for `path`."""
    save_state(path, self.state, self.fingerprint, position=self.position)
