"""The tokenizer inside a GGUF file, from its metadata as plain values; needs the extra `text`.

The vocabulary and the merges do not say how text is cut before they apply: `tokenizer.ggml.pre` names that, each name is mapped
here, and an unknown one is refused, since a wrong cut gives wrong tokens without an error (specification section 3.4).
"""
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from memjax.config.errors import UserError, nearest, shown
from memjax.data.sentencepiece import BYTE, CONTROL, NORMAL, UNUSED, USER, Pieces, build
from memjax.data.subword import SubwordTokenizer, library

PREFIX = 'tokenizer.ggml.'
PLAIN = (NORMAL, CONTROL, USER, UNUSED)                          # the kinds of tokens that byte-level BPE has
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# As in the tokenizer.json of Llama 3 and of Mistral Nemo. Words that are tokens whole are not merged there.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WHOLE = ('llama-bpe', 'llama3', 'llama-v3', 'tekken')            # of PRE: also those that begin with bos where the file does not say


def _gpt2() -> tuple[Any, Any]:
  return None, library.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> tuple[Any, Any]:
  cut = library.pre_tokenizers
  return None, cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])


def _split(pattern: str) -> Any:
  cut = library.pre_tokenizers
  split = cut.Split(library.Regex(pattern), 'isolated', invert=False)
  return cut.Sequence([split, cut.ByteLevel(add_prefix_space=False, use_regex=False)])


def _qwen2() -> tuple[Any, Any]:
  return library.normalizers.NFC(), _split(QWEN2)


def _llama3() -> tuple[Any, Any]:
  return None, _split(LLAMA3)


def _tekken() -> tuple[Any, Any]:
  return None, _split(TEKKEN)


PRE = {'gpt-2': _gpt2, 'smollm': _smollm, 'qwen2': _qwen2, 'llama-bpe': _llama3, 'llama3': _llama3, 'llama-v3': _llama3,
       'tekken': _tekken}                                        # tokenizer.ggml.pre -> () -> (normalizer or None, pre-tokenizer)


def gguf_tokenizer(metadata: Mapping[str, Any]) -> SubwordTokenizer:
  """The tokenizer that the metadata of a GGUF file describe: byte-level BPE, cut as `tokenizer.ggml.pre` says, or SentencePiece.

  Its `bos` is the file's, else the token that ends a text; whether a prompt begins with it: `begins_with_bos`. Raises UserError
  for another model of tokens, an unknown cut, and lists that are missing or contradict one another.
  """
  kind, pre = _get(metadata, 'model', str), metadata.get(f'{PREFIX}pre')
  if kind == 'llama': return SubwordTokenizer(_pieces(metadata), 'file', _begin(metadata))
  if kind != 'gpt2':
    raise UserError(f"{PREFIX}model {shown(kind)} is not supported; 'gpt2', byte-level BPE, and 'llama', SentencePiece, are")
  if not isinstance(pre, str) or pre not in PRE:
    raise UserError(f'{PREFIX}pre {shown(pre)} is not one of {", ".join(PRE)}{nearest(str(pre), PRE)}')
  tokens, kinds = _tokens(metadata)
  normalizer, cut = PRE[pre]()
  try:
    inner = library.Tokenizer(library.models.BPE({token: i for i, token in enumerate(tokens)}, _merges(metadata),
                                                 ignore_merges=pre in WHOLE))
  except UserError: raise
  except Exception as error:    # the library raises bare Exception
    raise UserError(f'{PREFIX}merges do not fit {PREFIX}tokens: {(str(error).splitlines() or [""])[0][:100]}') from error
  if normalizer is not None: inner.normalizer = normalizer
  inner.pre_tokenizer, inner.decoder = cut, library.decoders.ByteLevel()
  added = {kind: [library.AddedToken(token, special=kind == CONTROL, normalized=False)
                  for token, own in zip(tokens, kinds, strict=True) if own == kind] for kind in (CONTROL, USER)}
  inner.add_special_tokens(added[CONTROL])
  inner.add_tokens(added[USER])
  return SubwordTokenizer(inner, 'file', _begin(metadata))


def _begin(metadata: Mapping[str, Any]) -> str:
  begin = next((metadata[key] for key in (f'{PREFIX}bos_token_id', f'{PREFIX}eos_token_id') if key in metadata), None)
  return _token(_get(metadata, 'tokens', list), begin, 'bos_token_id or eos_token_id')


def _pieces(metadata: Mapping[str, Any]) -> Any:
  """The tokenizer of a SentencePiece vocabulary, which is BPE by scores."""
  tokens, kinds = _tokens(metadata, range(NORMAL, BYTE + 1))
  scores = np.asarray(metadata.get(f'{PREFIX}scores', []))
  if scores.shape != (len(tokens),) or scores.dtype.kind != 'f': raise UserError(f'{PREFIX}scores are no {len(tokens)} numbers')
  pieces = Pieces(tokens, scores.tolist(), kinds, has_prefix=_get(metadata, 'add_space_prefix', bool, default=True))
  try:
    return build(pieces)
  except UserError as error:
    raise UserError(f'{PREFIX}tokens: {error}') from None


def begins_with_bos(metadata: Mapping[str, Any]) -> bool:
  """Whether a plain prompt begins with the token that begins a text: `tokenizer.ggml.add_bos_token`, absent = as its kind does."""
  usual = metadata.get(f'{PREFIX}pre') in WHOLE or metadata.get(f'{PREFIX}model') == 'llama'
  return _get(metadata, 'add_bos_token', bool, default=usual)


def special_text(metadata: Mapping[str, Any], kind: str) -> str:
  """The text of the 'bos' or 'eos' token, '' where the file has none: what a chat template may write."""
  index = metadata.get(f'{PREFIX}{kind}_token_id')
  return '' if index is None else _token(_get(metadata, 'tokens', list), index, f'{kind}_token_id')


def _get(metadata: Mapping[str, Any], name: str, kind: type, *, default: Any = None) -> Any:
  value = metadata.get(PREFIX + name, default)
  if value is None: raise UserError(f'{PREFIX}{name} is missing')
  if not isinstance(value, kind): raise UserError(f'{PREFIX}{name} wants {kind.__name__}, got {shown(value)}')
  return value


def _token(tokens: Sequence[str], index: Any, name: str) -> str:
  if type(index) is int and 0 <= index < len(tokens): return tokens[index]
  raise UserError(f'{PREFIX}{name} is no token of {len(tokens)}: {shown(index)}')


def _tokens(metadata: Mapping[str, Any], known: Collection[int] = PLAIN) -> tuple[list[str], list[int]]:
  """(tokens, kind of each), as long as each other, no token twice, none of a kind that is not known."""
  tokens = _get(metadata, 'tokens', list)
  if not all(isinstance(token, str) and token for token in tokens): raise UserError(f'{PREFIX}tokens are not all texts')
  if len(set(tokens)) != len(tokens):
    seen: set[str] = set()
    raise UserError(f'{PREFIX}tokens hold {shown(next(t for t in tokens if t in seen or seen.add(t)))} twice')
  kinds = np.asarray(metadata.get(f'{PREFIX}token_type', [NORMAL] * len(tokens)))
  if kinds.ndim != 1 or kinds.dtype.kind not in 'iu': raise UserError(f'{PREFIX}token_type is no list of whole numbers')
  kinds = kinds.tolist()
  if len(kinds) != len(tokens): raise UserError(f'{PREFIX}token_type has {len(kinds)} entries for {len(tokens)} tokens')
  wrong = next((kind for kind in kinds if kind not in known), None)
  if wrong is not None: raise UserError(f'{PREFIX}token_type {wrong} does not go with {metadata[f"{PREFIX}model"]}')
  return tokens, kinds


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
  pairs = [tuple(merge.split(' ')) if isinstance(merge, str) else () for merge in _get(metadata, 'merges', list)]
  wrong = next((i for i, pair in enumerate(pairs) if len(pair) != 2 or not all(pair)), None)
  if wrong is not None: raise UserError(f'{PREFIX}merges[{wrong}] is no pair of tokens: {shown(metadata[f"{PREFIX}merges"][wrong])}')
  return pairs
