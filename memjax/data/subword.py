"""Subword tokenizers of the library `tokenizers` (extra `text`): byte-level BPE trained here, or any tokenizer.json."""
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from memjax.config.errors import UserError
from memjax.data.hub import missing
from memjax.data.tokenizers import Stream, Tokenizer, utf8, write_atomic

try:
  import tokenizers as library
except ImportError as error:
  raise missing('text', 'tokenizers') from error

END = '<|endoftext|>'
DEFAULT_SIZE = 4096
FILE = 'tokenizer.json'
USUAL_BOS = ('<|begin_of_text|>', '<s>', '<bos>', '[BOS]', END, '<|im_start|>', '</s>', '[CLS]')
LONGEST = 32    # tokens after which a stream no longer waits for the rest of a character


def byte_of_character() -> dict[str, int]:
  """The byte behind each character of the byte-level alphabet (Radford et al. 2019): printable ones are themselves."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


class SubwordTokenizer(Tokenizer):
  """A tokenizer.json with a token that begins a document."""

  def __init__(self, inner: library.Tokenizer, name: str, bos: str):
    self.inner, self.name, self.bos_token = inner, name, bos
    ids = inner.get_vocab(with_added_tokens=True)
    if bos not in ids: raise UserError(f'the tokenizer has no token {bos!r} to begin a document with')
    self.vocabulary, self.bos = max(ids.values()) + 1, ids[bos]
    rules = json.loads(inner.to_str())
    rules = {key: rules[key] for key in ('model', 'normalizer', 'pre_tokenizer', 'added_tokens', 'decoder')}
    self.fingerprint = hashlib.sha256(json.dumps([rules, bos], sort_keys=True).encode()).hexdigest()
    self._bytes = self._byte_pieces(ids, rules) if (rules['decoder'] or {}).get('type') == 'ByteLevel' else {}

  @staticmethod
  def _byte_pieces(ids: dict[str, int], rules: dict) -> dict[int, bytes]:
    alphabet, added = byte_of_character(), {token['id'] for token in rules['added_tokens']}
    return {index: token.encode() if index in added or not all(character in alphabet for character in token)
            else bytes(alphabet[character] for character in token) for token, index in ids.items()}

  @classmethod
  def train(cls, documents: Iterable[str], size: int = 0) -> 'SubwordTokenizer':
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `size` tokens; deterministic."""
    size, alphabet = size or DEFAULT_SIZE, library.pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 1
    if size < least: raise UserError(f'tokenizer size {size} is too small: {least - 1} bytes and {END} need {least}')
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=sorted(alphabet),
                                          show_progress=False)
    inner.train_from_iterator(documents, trainer)
    return cls(inner, 'bpe', END)

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> 'SubwordTokenizer':
    """The tokenizer of a tokenizer.json, or of the tokenizer.model that lies there instead.

    Its bos is that of the tokenizer_config.json beside it, else one of the usual names.
    """
    path = pathlib.Path(path).expanduser()
    inner, bos = _read_either(path), ''
    try:
      beside = json.loads((path.parent / 'tokenizer_config.json').read_bytes())
      for key in ('bos_token', 'eos_token'):
        token = beside.get(key)
        bos = bos or (token.get('content', '') if isinstance(token, dict) else token or '')
    except FileNotFoundError:
      pass    # optional
    except (OSError, ValueError, AttributeError) as error:
      raise UserError(f'{path.parent / "tokenizer_config.json"} cannot be read: {error}') from error
    bos = bos or next((token for token in USUAL_BOS if inner.token_to_id(token) is not None), '')
    if not bos:
      raise UserError(f'{path} has no token to begin a document with ({", ".join(USUAL_BOS)}); '
                      'name it as bos_token in tokenizer_config.json')
    return cls(inner, 'file', bos)

  @classmethod
  def load(cls, folder: pathlib.Path, meta: dict) -> 'SubwordTokenizer':
    """The tokenizer that `save` left."""
    return cls(read(folder / FILE), meta['name'], meta['bos'])

  def save(self, folder: str | os.PathLike) -> None:
    """Leaves tokenizer.json and meta.json in the folder, which is made."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, self.inner.to_str().encode())
    super().save(folder)

  def state(self) -> dict:
    """The token that begins a document."""
    return {'bos': self.bos_token}

  def encode(self, text: str) -> np.ndarray:
    """int32 tokens of the text, without special ones except those written in it."""
    utf8(text)
    return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

  def stream(self) -> Stream:
    """A decoder of one token at a time."""
    return Stream(self, lambda token: self._bytes.get(token, b'')) if self._bytes else WindowStream(self)


class WindowStream(Stream):
  """Decodes tokens whose text depends on their neighbours, as leading spaces and byte fallback do.

  The new text is that of the last tokens that gave text and those since, less that of the former.
  """

  def __init__(self, tokenizer: SubwordTokenizer):
    self.tokenizer, self.context, self.pending = tokenizer, [], []

  def _text(self, tokens: list[int]) -> str:
    return self.tokenizer.inner.decode(tokens, skip_special_tokens=False)

  def push(self, token: int) -> str:
    """The text that this token completes, possibly ''. UserError for a token outside the vocabulary."""
    self.pending.append(self.tokenizer.check(token))
    text = self._text(self.context + self.pending)
    return '' if text.endswith('\ufffd') and len(self.pending) < LONGEST else self._emit(text)

  def _emit(self, text: str) -> str:
    piece = text[len(self._text(self.context)):]
    self.context, self.pending = self.pending, []
    return piece

  def finish(self) -> str:
    """What is left: '' or U+FFFD for a character that was never completed."""
    return self._emit(self._text(self.context + self.pending)) if self.pending else ''


def _read_either(path: pathlib.Path) -> library.Tokenizer:
  """The tokenizer of a tokenizer.json, else of the tokenizer.model in its place, with which a plain prompt begins with bos."""
  pieces = path.with_name('tokenizer.model')
  if path.exists() or not pieces.exists(): return read(path)
  from memjax.data.sentencepiece import build, read_model
  try:
    inner = build(read_model(pieces))
  except UserError as error:
    raise UserError(str(error) if str(pieces) in str(error) else f'{pieces}: {error}') from None
  begin = next((token for token in USUAL_BOS if inner.token_to_id(token) is not None), None)
  if begin:
    special = [(begin, inner.token_to_id(begin))]
    inner.post_processor = library.processors.TemplateProcessing(single=f'{begin} $A', special_tokens=special)
  return inner


def read(path: pathlib.Path) -> library.Tokenizer:
  """The tokenizer of a tokenizer.json; UserError where it is missing or none."""
  try:
    text = path.read_bytes().decode()
  except OSError as error:
    raise UserError(f'cannot read the tokenizer {path}: {error.strerror or error}') from error
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 at byte {error.start}') from error
  try:
    inner = library.Tokenizer.from_str(text)
  except Exception as error:    # the library raises bare Exception
    raise UserError(f'{path} is no tokenizer.json: {(str(error).splitlines() or [""])[0][:100]}') from error
  inner.no_truncation()
  inner.no_padding()
  return inner
