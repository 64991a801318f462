"""Tokenizers: bytes, white-space words, a BPE trained on the corpus, a tokenizer.json; saved to a folder."""
import abc
import codecs
import collections
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data.sources import load_corpus

META = 'meta.json'
EOS, UNK = '<eos>', '<unk>'


class Tokenizer(abc.ABC):
  """Text to tokens and back. `bos` is the input before the first token of a document."""
  name: str          # kind: bytes, word, bpe or file
  vocabulary: int    # A, number of tokens
  bos: int
  fingerprint: str   # sha256 of the vocabulary: equal for equal tokenizers only

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """int32 tokens of the text, without bos."""

  @abc.abstractmethod
  def stream(self) -> 'Stream':
    """A decoder of one token at a time."""

  @abc.abstractmethod
  def state(self) -> dict:
    """What meta.json holds beside name and fingerprint; enough for `load_tokenizer`."""

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of the tokens; bytes that are not UTF-8 become U+FFFD. UserError for a token outside the vocabulary."""
    stream = self.stream()
    return ''.join([stream.push(int(token)) for token in tokens]) + stream.finish()

  def check(self, token: int) -> int:
    """The token, if it is one; UserError otherwise."""
    if 0 <= token < self.vocabulary: return token
    raise UserError(f'token {token} is outside the vocabulary of {self.vocabulary}')

  def save(self, folder: str | os.PathLike) -> None:
    """Leaves meta.json (and what else the kind needs) in the folder, which is made."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {'name': self.name, 'fingerprint': self.fingerprint, **self.state()}
    write_atomic(folder / META, json.dumps(meta, ensure_ascii=False).encode())


class Stream:
  """Decodes token by token: text comes out as soon as its UTF-8 is complete. Constant memory."""

  def __init__(self, tokenizer: Tokenizer, pieces):
    self.tokenizer, self.pieces, self.decoder = tokenizer, pieces, codecs.getincrementaldecoder('utf-8')('replace')

  def push(self, token: int) -> str:
    """The text that this token completes, possibly ''. UserError for a token outside the vocabulary."""
    return self.decoder.decode(self.pieces(self.tokenizer.check(token)))

  def finish(self) -> str:
    """What is left: '' or U+FFFD for a character that was never completed."""
    return self.decoder.decode(b'', final=True)


class ByteTokenizer(Tokenizer):
  """256 bytes of UTF-8; bos is the newline."""
  name, vocabulary, bos = 'bytes', 256, 10
  fingerprint = hashlib.sha256(bytes(range(256))).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """int32 bytes of the text."""
    return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

  def stream(self) -> Stream:
    """A decoder of one byte at a time."""
    return Stream(self, lambda token: bytes((token,)))

  def state(self) -> dict:
    """Nothing."""
    return {}


class WordTokenizer(Tokenizer):
  """Words between white space and an <eos> a line end, as in word-level WikiText (Merity et al. 2016); bos is <eos>.

  A word outside the vocabulary is <unk>, where the vocabulary has it, else a UserError.
  """
  name = 'word'

  def __init__(self, words: Iterable[str]):
    self.words = list(words)
    self.ids = {word: index for index, word in enumerate(self.words)}
    if len(self.ids) != len(self.words): raise UserError('the word vocabulary holds a word twice')
    if EOS not in self.ids: raise UserError(f'the word vocabulary lacks {EOS}')
    self.vocabulary, self.bos, self.unk = len(self.words), self.ids[EOS], self.ids.get(UNK)
    self.fingerprint = hashlib.sha256('\n'.join(self.words).encode()).hexdigest()

  @classmethod
  def train(cls, documents: Iterable[str]) -> 'WordTokenizer':
    """The tokenizer of all words of the documents, frequent ones first, equal ones in order of their code points."""
    counts = collections.Counter({EOS: 0})
    for document in documents:
      counts.update(document.split())
      counts[EOS] += document.count('\n')
    return cls(sorted(counts, key=lambda word: (-counts[word], word)))

  def encode(self, text: str) -> np.ndarray:
    """int32 tokens of the words and line ends."""
    tokens = []
    for number, line in enumerate(text.split('\n')):
      if number: tokens.append(self.bos)
      tokens += [self.ids.get(word, self.unk) for word in line.split()]
    if self.unk is None and None in tokens:
      unknown = next(word for word in text.split() if word not in self.ids)
      raise UserError(f'word {unknown!r} is not in the vocabulary of {self.vocabulary} words, which has no {UNK}')
    return np.array(tokens, np.int32)

  def stream(self) -> Stream:
    """A decoder of one word at a time, each followed by a space or, for <eos>, a line end."""
    return Stream(self, lambda token: b'\n' if token == self.bos else f'{self.words[token]} '.encode())

  def state(self) -> dict:
    """The words in order."""
    return {'words': self.words}


def utf8(text: str) -> bytes:
  """The text in UTF-8; UserError for lone surrogates, which an undecodable command line leaves."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'the text is not valid Unicode at character {error.start}') from error


def write_atomic(path: pathlib.Path, content: bytes) -> None:
  """Leaves the file whole or not at all, also when two processes write it at once."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as file: file.write(content)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def make_tokenizer(data: DataConfig, documents: Iterable[str] | None = None) -> Tokenizer:
  """The tokenizer of a config. `bpe` and `word` are trained on `documents`, by default those of the train split."""
  kind = data.tokenizer.kind
  if kind == 'bytes': return ByteTokenizer()
  if kind == 'file': return _subword().from_file(data.tokenizer.path)
  if kind == 'host': raise UserError("data.tokenizer.kind='host' comes with the pretrained model: memjax.runtime.words.open_words")
  if documents is None: documents = load_corpus(data, 'train').documents
  return WordTokenizer.train(documents) if kind == 'word' else _subword().train(documents, data.tokenizer.size)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` left in the folder; UserError where it is missing or damaged."""
  path = pathlib.Path(folder) / META
  try:
    meta = json.loads(path.read_bytes().decode())
    name, fingerprint = meta['name'], meta['fingerprint']
    if name == 'bytes': tokenizer = ByteTokenizer()
    elif name == 'word': tokenizer = WordTokenizer(meta['words'])
    elif name in ('bpe', 'file'): tokenizer = _subword().load(path.parent, meta)
    else: raise UserError(f'{path}: unknown kind of tokenizer {name!r}')
  except OSError as error:
    raise UserError(f'cannot read the tokenizer {path}: {error.strerror or error}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'the tokenizer {path} is damaged ({type(error).__name__}: {error})') from error
  if tokenizer.fingerprint != fingerprint:
    raise UserError(f'the tokenizer {path} is damaged: its vocabulary has the hash {tokenizer.fingerprint[:16]}, '
                    f'not {fingerprint[:16]}')
  return tokenizer


def _subword():
  from memjax.data import subword  # needs the extra `text`, which bytes and words do without

  return subword.SubwordTokenizer
