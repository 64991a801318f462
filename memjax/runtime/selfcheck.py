"""What is compared after an export: tensors, logits, tokens, chat texts, ends. Each function raises UserError at a difference."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.adapters.gguf_types import decode, encode, type_named
from memjax.adapters.pretrained import Tensors
from memjax.config.errors import UserError, shown
from memjax.config.schema import ModelConfig
from memjax.models.decoder import build_decoder
from memjax.runtime.texts import Texts

SAMPLES = ('Hello world', 'In 1984, 2025+17=2042.', '  indented\n\tcode(x)', 'naïve café 日本語', "it's at <|im_end|> the end")
PROMPTS = ('What is the capital of France?', 'def add(a, b):\n  return a + b\n', 'Once upon a time, in 1842, there was the')
LENGTH = 16                        # tokens of each prompt
TALKS = (({'role': 'user', 'content': 'Hello'},),
         ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' a <b> '}, {'role': 'assistant', 'content': 'c'},
          {'role': 'user', 'content': 'd'}))
EXACT = 1e-5                       # largest difference of logits by the largest logit, against the numbers that were meant
MERGED = 1e-4                      # against low-rank changes beside their kernels, whose sums are rounded otherwise
ROUNDED = {'float32': 1e-5, 'float16': 5e-3, 'bfloat16': 3e-2}     # and against those before rounding; a model beyond is warned of


class Agreement(NamedTuple):
  """How close two sets of logits are: largest difference by the largest logit, mean KL divergence in nats, share of equal choices."""
  difference: float
  divergence: float
  choices: float

  def __str__(self) -> str:
    return f'logits differ by {self.difference:.1e} of the largest, KL {self.divergence:.1e} nats, {self.choices:.0%} equal choices'


def prompt_tokens(tokenizer: Any, vocabulary: int) -> np.ndarray:
  """int32 tokens [3, 16] of the fixed prompts; short ones go on with numbers that reach all over the vocabulary."""
  rest = [(13 + 7919 * number) % vocabulary for number in range(LENGTH)]
  return np.array([[*tokenizer.encode(prompt).tolist(), *rest][:LENGTH] for prompt in PROMPTS], np.int32)


def forward_of(config: ModelConfig) -> Callable[[Any, np.ndarray], np.ndarray]:
  """forward(params, token_BxL) -> float32 logits [B, L, A] of a decoder, computed in float32 with exact products."""
  model = build_decoder(dataclasses.replace(config, dtype='float32'))
  @jax.jit
  def call(params, token_BxL):
    position_BxL = jnp.broadcast_to(jnp.arange(token_BxL.shape[1]), token_BxL.shape)
    return model.apply({'params': params}, token_BxL, model.init_state(len(token_BxL)), position_BxL=position_BxL)[0]
  def forward(params, token_BxL):
    with jax.default_matmul_precision('highest'): return np.asarray(call(params, token_BxL))
  return forward


def agreement(want_BxLxA: np.ndarray, have_BxLxA: np.ndarray) -> Agreement:
  """How close logits are to those that were wanted."""
  want, have = (np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32))) for x in (want_BxLxA, have_BxLxA))
  difference = np.abs(want_BxLxA - have_BxLxA).max() / np.abs(want_BxLxA).max()
  choices = np.mean(want.argmax(-1) == have.argmax(-1))
  return Agreement(float(difference), float((np.exp(want) * (want - have)).sum(-1).mean()), float(choices))


def check_logits(want_BxLxA: np.ndarray, have_BxLxA: np.ndarray, limit: float, what: str = 'what was written') -> None:
  """Raises UserError for logits that are further apart than `limit`, by the largest, and for NaN."""
  found = agreement(want_BxLxA, have_BxLxA).difference
  if not found <= limit: raise UserError(f'the logits of {what} differ by {found:.1e} of the largest, {limit:g} at most')


class Rounded:
  """The tensors `rows` with the numbers that a file keeps of them; `kinds` are types of GGUF by name, where they are stored so."""
  folder = 'the model in memory'

  def __init__(self, rows: Mapping[str, Any], kinds: Mapping[str, str] | None = None):
    self.rows, self.kinds = rows, kinds or {}

  @property
  def names(self) -> list[str]:
    """All tensors."""
    return list(self.rows)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one."""
    return self.rows[name].shape

  def read(self, name: str) -> np.ndarray:
    """One as it is stored, in float32."""
    x = np.asarray(self.rows[name])
    if name not in self.kinds: return x.astype(np.float32)
    kind = type_named(self.kinds[name])
    return decode(kind, encode(kind, x)).reshape(x.shape)


def check_rows(want: Mapping[str, Any], have: Tensors) -> None:
  """Raises UserError unless the tensors that were written are, bit for bit and by type, those that were meant."""
  for name in sorted(set(want) ^ set(have.names)): raise UserError(f'tensor {name} {"is missing" if name in want else "was not meant"}')
  for name, row in want.items():
    meant, found = np.asarray(row), have.read(name)
    if meant.dtype != found.dtype or meant.shape != found.shape or meant.tobytes() != found.tobytes():
      raise UserError(f'tensor {name} differs from what was meant')


def check_texts(want: Texts, have: Texts) -> None:
  """Raises UserError unless samples have the same tokens, conversations the same text, and texts begin and end alike."""
  for text in SAMPLES:
    ids = [texts.words.tokenizer.encode(text).tolist() for texts in (want, have)]
    if ids[0] != ids[1]: raise UserError(f'the tokens of {shown(text)} were {shown(ids[0])} and are {shown(ids[1])}')
  for name, token in want.special.items():
    if (name == 'bos' or (name == 'eos' and token in want.ends)) and have.special.get(name) != token:
      raise UserError(f'{name} was token {token} and is {have.special.get(name)}')
  if set(want.ends) != set(have.ends): raise UserError(f'the tokens that end a text were {list(want.ends)} and are {list(have.ends)}')
  if want.has_bos != have.has_bos: raise UserError(f'whether prompts begin with bos was {want.has_bos} and is {have.has_bos}')
  one, other = want.words.template, have.words.template
  if (one and one.source) != (other and other.source): raise UserError('the chat template differs')
  if one is None: return
  for talk in TALKS:
    for prompt in (False, True):
      texts = [_rendered(template, talk, prompt) for template in (one, other)]
      if texts[0] != texts[1]: raise UserError(f'a conversation was written as {shown(texts[0])} and is as {shown(texts[1])}')


def _rendered(template: Any, talk: Any, prompt: bool) -> str:
  """The text of a conversation, or that the template refuses it."""
  try:
    return template.render(talk, add_generation_prompt=prompt)
  except UserError:
    return 'a refusal'


def check_merged(before: Mapping[str, Any], after: Mapping[str, Any], configured: Mapping[str, Any], changes: Mapping[str, Any]) -> int:
  """The number of linear maps that were merged; scanned ones count each.

  `before` and `after` are kernels by path, `configured` the paths that the config changes, `changes` {path: (A, B, ..)}. A map
  counts whose kernel moved, or whose B is zero. Raises UserError unless these are all that are configured.
  """
  missing = sorted(set(configured) ^ set(changes))
  count, wanted = 0, 0
  for path in sorted(set(configured) & set(changes)):
    stack = lambda x: np.asarray(x).reshape(-1, *x.shape[-2:])
    moved = np.any(stack(before[path]) != stack(after[path]), axis=(1, 2))
    count, wanted = count + int(np.sum(moved | ~np.any(stack(changes[path][1]), axis=(1, 2)))), wanted + len(moved)
  if missing or count != wanted:
    raise UserError(f'{count} of {wanted} linear maps were merged' + (f'; {missing[0]} is not among them' if missing else ''))
  return count
