"""Text from a model: one parallel prefill, then one token at a time at constant memory (for recurrent memories)."""
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import ConfigError, UserError
from memjax.config.options import config, option
from memjax.models.decoder import prepare_memories, set_prompt_length
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
  return jnp.where(_rank(logits_BxA) < k, logits_BxA, -jnp.inf)


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


def _rank(logits_BxA: jax.Array) -> jax.Array:
  return jnp.argsort(jnp.argsort(-logits_BxA, axis=-1, stable=True), axis=-1)


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

  L is a power of two up to `segment`, beyond it a multiple of `segment`; then all segments of a prompt but the last are
  full and the padding stands inside the last, so that each segment begins at a multiple of `segment` real tokens.
  """
  longest = max(p.size for p in prompts)
  piece = min(segment, 1 << (longest - 1).bit_length())
  length = piece * -(-longest // piece)
  token_BxL = np.zeros((len(prompts), length), np.int32)
  mask_BxL = np.zeros(token_BxL.shape, bool)
  for row, prompt in enumerate(prompts):
    last = (prompt.size - 1) % piece + 1
    places = np.r_[length - piece - (prompt.size - last):length - piece, length - last:length]
    token_BxL[row, places], mask_BxL[row, places] = prompt, True
  return token_BxL, np.maximum(np.cumsum(mask_BxL, 1, dtype=np.int32) - 1, 0), mask_BxL


class Sampler:
  """Draws tokens from one model in one way; compiles once per batch size and prompt bucket, for all its calls.

  `chunk` tokens are drawn, and up to `segment` of a prompt read, in one call; tokens from `limit` on are never drawn.
  """

  def __init__(self, model: Any, sampling: Sampling = Sampling(), *, chunk: int = CHUNK, segment: int = SEGMENT, limit: int = 0):
    self.model, self.sampling, self.chunk, self.segment = model, sampling, chunk, segment
    self.vocabulary = limit or model.config.vocabulary
    self._compute = jax.jit(lambda params: prepare_memories(model, params))
    self._prepared: tuple[list, Any] = [], None                  # the arrays that it was computed from, and what came out
    self.prefill = jax.jit(self._prefill, donate_argnums=1)
    self.decode = jax.jit(self._decode, donate_argnums=1)

  def within(self, vocabulary: int) -> 'Sampler':
    """This sampler, or one like it where the model has more tokens than the tokenizer."""
    if vocabulary >= self.vocabulary: return self
    return Sampler(self.model, self.sampling, chunk=self.chunk, segment=self.segment, limit=vocabulary)

  def prepare(self, params: Any) -> Any:
    """What the memories compute from parameters alone; computed again only where these are not the arrays of the last call."""
    leaves, (known, _) = jax.tree.leaves(params), self._prepared
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
      self._prepared = leaves, self._compute(params)
    return self._prepared[1]

  def _prefill(self, params, state, token_BxL, flow):
    logits_BxLxA, state, _ = self.model.apply({'params': params}, token_BxL, state, **flow)
    return logits_BxLxA[:, -1, :self.vocabulary], state

  def _decode(self, params, carry, row_B):
    *carry, prepared = carry
    def body(carry, _):
      logits_BxA, state, position_B, count = carry
      token_B = draw(logits_BxA, self.sampling, row_B, count)
      flow = {'position_BxL': position_B[:, None], 'prepared': prepared}
      logits_BxA, state = self._prefill(params, state, token_B[:, None], flow)
      return (logits_BxA, state, position_B + 1, count + 1), token_B
    carry, token_NxB = jax.lax.scan(body, tuple(carry), None, length=self.chunk)
    return (*carry, prepared), token_NxB.T

  def start(self, params: Any, prompts: Sequence[np.ndarray], max_len: int) -> tuple:
    """The carry of `decode` after the prompts: (next logits [B, A], state, next position [B], tokens drawn so far, what the
    memories prepared from the parameters).

    `max_len` bounds the tokens of a row, prompt included, where a memory grows with its text.
    """
    token_BxL, position_BxL, mask_BxL = pad_left(prompts, self.segment)
    position_B = jnp.asarray([prompt.size for prompt in prompts], jnp.int32)
    state = set_prompt_length(self.model.init_state(len(prompts), max_len), position_B)
    prepared = self.prepare(params)
    step = min(self.segment, token_BxL.shape[1])
    for cut in range(0, token_BxL.shape[1], step):
      part = slice(cut, cut + step)
      flow = {'position_BxL': position_BxL[:, part], 'mask_BxL': None if mask_BxL[:, part].all() else mask_BxL[:, part],
              'reset_BxL': np.zeros(mask_BxL[:, part].shape, bool), 'prepared': prepared}      # the state is new: nothing to forget
      logits_BxA, state = settle(self.prefill(params, state, token_BxL[:, part], flow))
    return logits_BxA, state, position_B, jnp.zeros((), jnp.int32), prepared

  def stream(self, params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[np.ndarray]:
    """Yields int32 [B, n] arrays, n <= `chunk`, until max_new_tokens columns have come; tokens enter the model once.

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

  def _stream(self, params, prompts, max_new_tokens, max_len):
    carry, row_B = self.start(params, prompts, max_len), jnp.arange(len(prompts), dtype=jnp.int32)
    for done in range(0, max_new_tokens, self.chunk):
      carry, token_BxN = self.decode(params, carry, row_B)
      yield np.asarray(token_BxN)[:, :max_new_tokens - done]


def generate(model: Any, params: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, chunk: int = CHUNK,
             **sampling: Any) -> Iterator[np.ndarray]:
  """Yields int32 [B, n] arrays of new tokens; joined along axis 1 they are [B, max_new_tokens].

  `prompts` are token lists of any lengths; keywords are the fields of `Sampling`. Memory does not grow with the text,
  full attention apart. Keep a `Sampler` to generate more than once without compiling again.
  """
  return Sampler(model, Sampling(**sampling), chunk=chunk).stream(params, prompts, max_new_tokens)
