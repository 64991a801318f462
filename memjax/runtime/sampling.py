"""Text from a model: one parallel prefill, then one token at a time at constant memory (for recurrent memories)."""
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import ConfigError, UserError
from memjax.config.options import config, option
from memjax.models.decoder import prepare_memories, set_prompt_length
from memjax.ops.top_k import largest
from memjax.runtime.sharding import settle

SEGMENT = 512      # tokens of a prompt that enter the model in one call; longer prompts take several
CHUNK = 16         # tokens generated in one call
BUCKET = 64        # full attention holds a multiple of this, so that prompts of many lengths share one compilation


@config
class Sampling:
  """How the next token is drawn. Order: temperature, top_k, top_p, min_p; each sees what the one before it left."""
  temperature: float = option(1.0, 'divides the logits; 0 = the most likely token', low=0.0)
  top_k: int = option(0, 'only the k most likely tokens; 0 = off', low=0)
  top_p: float = option(1.0, 'only the most likely tokens that hold this share of the probability; 1 = off', high=1.0)
  min_p: float = option(0.0, 'only tokens at least this share as likely as the likeliest; 0 = off', low=0.0, high=1.0)
  seed: int = option(0, 'of all draws', low=0, high=2 ** 32 - 1)

  def __post_init__(self):
    if self.top_p <= 0: raise ConfigError(f'top_p must be above 0, not {self.top_p}')


def keep_top_k(logits_BxA: jax.Array, k: int) -> jax.Array:
  """Logits with all but the k largest at -inf; equal logits rank by token id."""
  value_BxK, token_BxK = largest(logits_BxA, k)                    # of equal ones the first
  return jnp.full_like(logits_BxA, -jnp.inf).at[jnp.arange(logits_BxA.shape[0])[:, None], token_BxK].set(value_BxK)


def keep_top_p(logits_BxA: jax.Array, p: float) -> jax.Array:
  """Logits with all at -inf but the fewest that together hold probability p (nucleus, Holtzman et al. 2020).

  A token stays if those more likely than it hold less than p, so the most likely one always does.
  """
  order = jnp.argsort(-logits_BxA, axis=-1, stable=True)
  probability = jax.nn.softmax(jnp.take_along_axis(logits_BxA, order, -1), -1)
  before = jnp.cumsum(probability, -1) - probability
  keep = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), -1)
  return jnp.where(keep, logits_BxA, -jnp.inf)


def keep_min_p(logits_BxA: jax.Array, p: float) -> jax.Array:
  """Logits with those at -inf whose probability is below p times the largest one (Nguyen et al. 2024)."""
  return jnp.where(logits_BxA >= logits_BxA.max(-1, keepdims=True) + jnp.log(p), logits_BxA, -jnp.inf)


def shape_logits(logits_BxA: jax.Array, sampling: Sampling) -> jax.Array:
  """The logits to draw from, excluded tokens at -inf. Not for temperature 0, which draws nothing."""
  logits_BxA = logits_BxA / sampling.temperature
  if 0 < sampling.top_k < logits_BxA.shape[-1]: logits_BxA = keep_top_k(logits_BxA, sampling.top_k)
  if sampling.top_p < 1: logits_BxA = keep_top_p(logits_BxA, sampling.top_p)
  return keep_min_p(logits_BxA, sampling.min_p) if sampling.min_p > 0 else logits_BxA


def draw(logits_BxA: jax.Array, sampling: Sampling, row_B: jax.Array, count: jax.Array) -> jax.Array:
  """The next token of each row, int32 [B]: token number `count` of row number `row` depends on nothing but its logits,
  the seed and these two numbers, not on the other rows."""
  if sampling.temperature == 0: return jnp.argmax(logits_BxA, -1).astype(jnp.int32)
  root = jax.random.fold_in(jax.random.key(sampling.seed), count)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(root, row_B)
  return jax.vmap(jax.random.categorical)(keys, shape_logits(logits_BxA, sampling)).astype(jnp.int32)


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> list[np.ndarray]:
  """The prompts as int32 arrays; UserError where one has no token or a token outside 0 .. vocabulary - 1."""
  if not len(prompts): raise UserError('no prompt given')
  checked = []
  for number, prompt in enumerate(prompts, 1):
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in 'iu'):
      raise UserError(f'prompt {number} is not a list of token numbers')
    if not prompt.size: raise UserError(f'prompt {number} has no tokens; give it at least one')
    outside = prompt[(prompt < 0) | (prompt >= vocabulary)]
    if outside.size: raise UserError(f'prompt {number} holds token {outside[0]}; tokens are 0 to {vocabulary - 1}')
    checked.append(prompt.astype(np.int32))
  return checked


def pad_left(prompts: Sequence[np.ndarray], segment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(token, position, mask), each [B, L]: prompts end at the last column; positions count the real tokens from 0.

  L is a power of two up to 16, then a quarter of one (16 at least) more than another up to `segment`: few shapes to compile, and
  little padding to compute. Beyond `segment` it is a multiple of that; then all segments of a prompt but the last are
  full and the padding stands inside the last, so that each segment begins at a multiple of `segment` real tokens.
  """
  longest = max(p.size for p in prompts)
  above = 1 << (longest - 1).bit_length()
  step = above if above <= 16 else max(16, above // 4)
  piece = min(segment, step * -(-longest // step))
  length = piece * -(-longest // piece)
  token_BxL = np.zeros((len(prompts), length), np.int32)
  mask_BxL = np.zeros(token_BxL.shape, bool)
  for row, prompt in enumerate(prompts):
    last = (prompt.size - 1) % piece + 1
    places = np.r_[length - piece - (prompt.size - last):length - piece, length - last:length]
    token_BxL[row, places], mask_BxL[row, places] = prompt, True
  return token_BxL, np.maximum(np.cumsum(mask_BxL, 1, dtype=np.int32) - 1, 0), mask_BxL


class Carry(NamedTuple):
  """Rows in the middle of their text, on the device."""
  logits_BxA: jax.Array              # of the next token
  state: Any
  position_B: jax.Array              # of the next token
  count: jax.Array                   # tokens drawn so far
  done_B: jax.Array                  # whether an end was drawn


class Session(NamedTuple):
  """Rows in the middle of their text: what entered the model, and how much more may."""
  carry: Carry
  length: int                        # tokens of the longest row
  room: int                          # tokens that a row may have


class Sampler:
  """Draws tokens from one model in one way; compiles once per batch size and prompt bucket, for all its calls.

  `chunk` tokens are drawn, and up to `segment` of a prompt read, in one call; tokens from `limit` on are never drawn. Drawing
  stops where every row has drawn one of `ends`; a row that had its end is filled up with the first of them.
  """

  def __init__(self, model: Any, sampling: Sampling = Sampling(), *, chunk: int = CHUNK, segment: int = SEGMENT, limit: int = 0,
               ends: Sequence[int] = ()):
    self.model, self.sampling, self.chunk, self.segment = model, sampling, chunk, segment
    self.vocabulary, self.ends = limit or model.config.vocabulary, tuple(dict.fromkeys(ends))
    self.compute = jax.jit(lambda params: prepare_memories(model, params))
    self.begin = jax.jit(self._begin, static_argnums=(0, 1))     # one call in place of one for each array of each layer
    self.prefill = jax.jit(self._prefill, donate_argnums=1)
    self.decode = jax.jit(self._decode, donate_argnums=1)
    self._prepared: tuple[list, Any] = [], None                  # the arrays that it was computed from, and what came out
    self._others: dict[tuple, Sampler] = {}

  def within(self, vocabulary: int, ends: Sequence[int] = ()) -> 'Sampler':
    """This sampler, or one like it where the model has more tokens than the tokenizer, or where `ends` are others."""
    limit, ends = min(vocabulary, self.vocabulary), tuple(dict.fromkeys(ends)) or self.ends
    if (limit, ends) == (self.vocabulary, self.ends): return self
    if (limit, ends) not in self._others:
      self._others[limit, ends] = Sampler(self.model, self.sampling, chunk=self.chunk, segment=self.segment, limit=limit, ends=ends)
    return self._others[limit, ends]

  def prepare(self, params: Any) -> Any:
    """What the memories compute from parameters alone; computed again only where these are not the arrays of the last call."""
    leaves, (known, _) = jax.tree.leaves(params), self._prepared
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
      self._prepared = leaves, self.compute(params)
    return self._prepared[1]

  def _begin(self, batch, room, length_B):
    zeros_B = jnp.zeros((batch,), jnp.int32)
    state = set_prompt_length(self.model.init_state(batch, room), length_B)
    return Carry(jnp.zeros((batch, self.vocabulary)), state, zeros_B, jnp.zeros((), jnp.int32), zeros_B > 0)

  def _prefill(self, params, state, token_BxL, flow):
    logits_BxLxA, state, _ = self.model.apply({'params': params}, token_BxL, state, last=True, **flow)
    return logits_BxLxA[:, 0, :self.vocabulary], state

  def _decode(self, params, carry, row_B, *, prepared, steps):
    """(carry, tokens [B, chunk], how many of them were drawn)."""
    def body(carry, _):
      token_B = draw(carry.logits_BxA, self.sampling, row_B, carry.count)
      done_B = carry.done_B
      if self.ends:
        token_B = jnp.where(done_B, jnp.int32(self.ends[0]), token_B)
        done_B |= (token_B[:, None] == jnp.asarray(self.ends, jnp.int32)[None]).any(-1)
      # no text begins here: a constant, so that no state is compared with an empty one and copied
      flow = {'position_BxL': carry.position_B[:, None], 'reset_BxL': jnp.zeros((token_B.size, 1), bool), 'prepared': prepared}
      logits_BxA, state = self._prefill(params, carry.state, token_B[:, None], flow)
      return Carry(logits_BxA, state, carry.position_B + 1, carry.count + 1, done_B), token_B
    if not self.ends:
      carry, token_NxB = jax.lax.scan(body, carry, None, length=self.chunk)
      return carry, token_NxB.T, jnp.int32(self.chunk)
    def more(loop): return (loop[1] < steps) & ~loop[0].done_B.all()
    def step(loop):
      carry, token_B = body(loop[0], None)
      return carry, loop[1] + 1, jax.lax.dynamic_update_index_in_dim(loop[2], token_B, loop[1], 1)
    carry, drawn, token_BxN = jax.lax.while_loop(more, step, (carry, jnp.int32(0), jnp.zeros((row_B.size, self.chunk), jnp.int32)))
    return carry, token_BxN, drawn

  def start(self, params: Any, prompts: Sequence[np.ndarray], room: int) -> Session:
    """Rows after their prompts. `room` bounds the tokens of a row, prompt included, where a memory grows with its text."""
    carry = self.begin(len(prompts), room, np.asarray([prompt.size for prompt in prompts], np.int32))
    return self.extend(params, Session(carry, 0, room), prompts)

  def extend(self, params: Any, session: Session, prompts: Sequence[np.ndarray]) -> Session:
    """The rows after as many more tokens; those that had ended go on. The session given is used up.

    Raises UserError for more tokens than there is room for.
    """
    self._check_room(session, max(prompt.size for prompt in prompts))
    carry, prepared = session.carry, self.prepare(params)
    token_BxL, position_BxL, mask_BxL = pad_left(prompts, self.segment)
    before_B, state = np.asarray(carry.position_B), carry.state
    step = min(self.segment, token_BxL.shape[1])
    for cut in range(0, token_BxL.shape[1], step):
      part = slice(cut, cut + step)
      flow = {'position_BxL': position_BxL[:, part] + before_B[:, None], 'mask_BxL': None if mask_BxL[:, part].all() else mask_BxL[:, part],
              'reset_BxL': np.zeros(mask_BxL[:, part].shape, bool), 'prepared': prepared}      # nothing to forget
      logits_BxA, state = settle(self.prefill(params, state, token_BxL[:, part], flow))
    position_B = before_B + np.asarray([prompt.size for prompt in prompts], np.int32)
    carry = carry._replace(logits_BxA=logits_BxA, state=state, position_B=jnp.asarray(position_B), done_B=jnp.zeros_like(carry.done_B))
    return session._replace(carry=carry, length=int(position_B.max()))

  def advance(self, params: Any, session: Session, row_B: jax.Array, steps: int = 0) -> tuple[Session, np.ndarray]:
    """(the rows, int32 [B, n] tokens drawn) after `steps` tokens, 0 or more than `chunk` = as many as that; fewer where all rows
    have ended. The session given is used up. Raises UserError for more tokens than there is room for."""
    steps = min(steps or self.chunk, self.chunk)
    self._check_room(session, steps)
    carry, token_BxN, drawn = self.decode(params, session.carry, row_B, prepared=self.prepare(params), steps=np.int32(steps))
    drawn = int(drawn)
    return session._replace(carry=carry, length=session.length + drawn), np.asarray(token_BxN)[:, :min(drawn, steps)]

  def drawn(self, params: Any, session: Session, left: int) -> Iterator[tuple[Session, np.ndarray]]:
    """Yields (the rows after them, int32 [B, n] tokens) until `left` columns have come or all rows have ended: then n may be 0."""
    row_B = jnp.arange(session.carry.done_B.size, dtype=jnp.int32)
    while left > 0:
      session, token_BxN = self.advance(params, session, row_B, left)
      left -= token_BxN.shape[1]
      yield session, token_BxN          # also without tokens: the rows before it are used up
      if not token_BxN.size: return

  def _check_room(self, session: Session, more: int) -> None:
    if session.length + more <= session.room: return
    raise UserError(f'a text of {session.length + more} tokens does not fit into a memory of {session.room}')

  def grow(self, session: Session, room: int) -> Session:
    """The session with room for longer texts: rings of keys and values that never wrapped get more slots."""
    if room <= session.room: return session
    wanted = jax.eval_shape(lambda: self.model.init_state(session.carry.done_B.size, room))
    def fit(leaf, like): return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, like.shape, strict=True)])
    return session._replace(carry=session.carry._replace(state=jax.tree.map(fit, session.carry.state, wanted)), room=room)

  def stream(self, params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[np.ndarray]:
    """Yields int32 [B, n] arrays, n <= `chunk`, until max_new_tokens columns have come or all rows have ended; tokens enter the
    model once.

    Raises UserError for a prompt without tokens, tokens outside the vocabulary, max_new_tokens < 1, and more tokens
    than learned positions.
    """
    prompts = check_prompts(prompts, self.vocabulary)
    if max_new_tokens < 1: raise UserError(f'max_new_tokens must be at least 1, not {max_new_tokens}')
    total = max(p.size for p in prompts) + max_new_tokens
    table = self.model.config.embedding.max_position
    if table and total > table:
      raise UserError(f'the longest prompt and max_new_tokens, {total} tokens, exceed the {table} learned positions')
    return self._stream(params, prompts, max_new_tokens, -(-total // BUCKET) * BUCKET)

  def _stream(self, params, prompts, max_new_tokens, room):
    session = self.start(params, prompts, room)
    for _, token_BxN in self.drawn(params, session, max_new_tokens):
      if token_BxN.size: yield token_BxN


def generate(model: Any, params: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, chunk: int = CHUNK,
             **sampling: Any) -> Iterator[np.ndarray]:
  """Yields int32 [B, n] arrays of new tokens; joined along axis 1 they are [B, max_new_tokens].

  `prompts` are token lists of any lengths; keywords are the fields of `Sampling`. Memory does not grow with the text,
  full attention apart. Keep a `Sampler` to generate more than once without compiling again.
  """
  return Sampler(model, Sampling(**sampling), chunk=chunk).stream(params, prompts, max_new_tokens)
