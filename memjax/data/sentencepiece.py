"""Vocabularies of SentencePiece (Kudo and Richardson 2018) with BPE, as Llama 2 and Mistral have them, in the library `tokenizers`.

They come from a `tokenizer.model`, or with the metadata of a GGUF file. SentencePiece merges whichever neighbours make the piece of
the highest score; here each pair that makes a piece is a merge, ordered by that score, as transformers converts them. Unigram models
are refused: where two ways to cut a text are equally likely, the library takes another one than SentencePiece.
"""
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memjax.config.errors import UserError
from memjax.data.subword import library

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
BPE = 2
MARK = '\u2581'                      # stands for a space
LARGEST = 1 << 26                    # bytes of a tokenizer.model


class Pieces(NamedTuple):
  """A vocabulary: the pieces in order with score and kind, and how text becomes pieces."""
  texts: Sequence[str]
  scores: Sequence[float]
  kinds: Sequence[int]
  has_prefix: bool = True            # a space is put before each text


def build(pieces: Pieces) -> library.Tokenizer:
  """The tokenizer of a vocabulary. Raises UserError for one without an unknown piece, twice the same, or with some bytes only."""
  ids = {text: index for index, text in enumerate(pieces.texts)}
  if len(ids) != len(pieces.texts): raise UserError('the vocabulary holds a piece twice')
  unknown = [index for index, kind in enumerate(pieces.kinds) if kind == UNKNOWN]
  if len(unknown) != 1: raise UserError(f'the vocabulary has {len(unknown)} unknown pieces, 1 is wanted')
  count = sum(kind == BYTE for kind in pieces.kinds)
  if count not in (0, 256): raise UserError(f'the vocabulary has {count} of 256 bytes')
  inner = library.Tokenizer(_model(pieces, ids, unknown[0], bool(count)))
  steps = [library.normalizers.Prepend(MARK)] if pieces.has_prefix else []
  inner.normalizer = library.normalizers.Sequence([*steps, library.normalizers.Replace(' ', MARK)])
  decode = library.decoders
  last = [decode.Strip(' ', 1, 0)] if pieces.has_prefix else []
  inner.decoder = decode.Sequence([decode.Replace(MARK, ' '), decode.ByteFallback(), decode.Fuse(), *last])
  def added(kinds, special):
    return [library.AddedToken(text, special=special, normalized=False)
            for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind in kinds]
  inner.add_special_tokens(added((UNKNOWN, CONTROL), True))
  inner.add_tokens(added((USER,), False))
  return inner


def _model(pieces: Pieces, ids: dict[str, int], unknown: int, has_bytes: bool) -> Any:
  normal = {text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind == NORMAL}
  merges = [(-score, -at, text[:at], text[at:]) for text, score in zip(pieces.texts, pieces.scores, strict=True) if text in normal
            for at in range(1, len(text)) if text[:at] in normal and text[at:] in normal]
  pairs = [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])]
  return library.models.BPE(ids, pairs, unk_token=pieces.texts[unknown], fuse_unk=True, byte_fallback=has_bytes)


def read_model(path: str | os.PathLike) -> Pieces:
  """The vocabulary of a tokenizer.model. Raises UserError for a file that is none, that is no BPE, or that changes the text first."""
  path = os.fspath(path)
  try:
    if os.path.getsize(path) > LARGEST: raise UserError(f'{path} has more than {LARGEST} bytes')
    with open(path, 'rb') as file: data = file.read()
  except OSError as error:
    raise UserError(f'cannot read the tokenizer {path}: {error.strerror or error}') from error
  try:
    fields = list(_fields(data))
    rows = [dict(_fields(value)) for number, value in fields if number == 1]
    trainer, normalizer = (dict(_fields(next((value for number, value in fields if number == one), b''))) for one in (2, 3))
    texts = [row[1].decode() for row in rows]
    scores = [struct.unpack('<f', row.get(2, b'\0' * 4))[0] for row in rows]
    kinds = [row.get(3, NORMAL) for row in rows]
  except (ValueError, KeyError, IndexError, struct.error, AttributeError, TypeError) as error:
    raise UserError(f'{path} is no SentencePiece model') from error
  if not texts: raise UserError(f'{path} is no SentencePiece model: it has no pieces')
  if trainer.get(3, 1) != BPE: raise UserError(f'{path} is a SentencePiece model of type {trainer.get(3, 1)}; only BPE (2) is read')
  if normalizer.get(4, 1) or normalizer.get(2): raise UserError(f'{path} normalises texts, which is not supported')
  return Pieces(texts, scores, kinds, bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """(number, value) of the fields of a protocol buffer message: whole numbers, or bytes. Raises ValueError for what is none."""
  at = 0
  def number():
    nonlocal at
    value = shift = 0
    while True:
      byte = data[at]
      at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
      if byte < 128: return value
      if shift > 63: raise ValueError('a number without an end')
  while at < len(data):
    tag = number()
    size = {1: 8, 5: 4}.get(tag & 7)
    if tag & 7 == 0:
      yield tag >> 3, number()
      continue
    if tag & 7 == 2: size = number()
    if size is None or at + size > len(data): raise ValueError('a field that is cut off')
    yield tag >> 3, data[at:at + size]
    at += size
