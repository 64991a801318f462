"""The token file of a split: memory-mapped, made once per text and tokenizer, checked whenever it is opened."""
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import zlib
from typing import Protocol

import numpy as np

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data.sources import Corpus, load_corpus
from memjax.data.tokenizers import Tokenizer, write_atomic

logger = logging.getLogger(__name__)

VERSION = 2
DTYPES = (np.uint8, np.uint16, np.uint32)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The tokens of a split in one row, and where its documents start."""
  token_N: np.ndarray    # uint8, uint16 or uint32; memory-mapped where it comes from `tokenize_split`
  starts: np.ndarray     # int64, sorted, the first is 0
  bytes: int             # UTF-8 bytes of the text that is scored
  fingerprint: str       # of the tokenizer
  vocabulary: int
  bos: int
  name: str = ''         # of the corpus
  split: str = ''
  sha256: str = ''       # of the text
  weight_N: np.ndarray | None = None    # bool: which tokens of conversations are trained on and scored; None = all
  labels: str = ''       # fingerprint of what decided that, '' = plain text

  def __len__(self) -> int:
    """Number of tokens."""
    return len(self.token_N)

  def __repr__(self) -> str:
    """The identity, not the contents."""
    return f'Tokens({self.identity})'

  @property
  def identity(self) -> dict:
    """What a checkpoint must agree with to continue on the same data; JSON."""
    return {'name': self.name, 'split': self.split, 'tokens': len(self), 'sha256': self.sha256,
            'fingerprint': self.fingerprint, **({'labels': self.labels} if self.labels else {})}

  @property
  def bytes_per_token(self) -> float:
    """UTF-8 bytes of the text a scored token."""
    return self.bytes / (len(self) if self.weight_N is None else max(int(np.count_nonzero(self.weight_N)), 1))


def cache_folder(data: DataConfig) -> pathlib.Path:
  """The folder of token files: `data.cache`, else memjax/ in the user's cache folder; made where it is missing."""
  folder = pathlib.Path(data.cache or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'memjax'))
  folder = folder.expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot use {folder} for token files ({error.strerror}); set data.cache') from error
  return folder


class Labels(Protocol):
  """Tokens of a document that is no plain text, and which of them are trained on."""
  fingerprint: str

  def __call__(self, document: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, bool weight of each, UTF-8 bytes of the text that is scored)."""


def tokenize_split(data: DataConfig, tokenizer: Tokenizer, split: str, corpus: Corpus | None = None, *,
                   labels: Labels | None = None) -> Tokens:
  """The tokens of a split, from the cache or made and left there.

  `corpus` is the split's text where the caller has it already; `labels` makes the tokens of conversations. A damaged cache is
  rebuilt with one line in the log. Two processes may do this at once: files appear whole, and both write the same. UserError as
  `load_corpus`, or for a cache folder that cannot be written.
  """
  corpus = corpus or load_corpus(data, split)
  borders = np.cumsum([0] + [len(document) for document in corpus.documents], dtype=np.int64)
  given = [VERSION, corpus.sha256, hashlib.sha256(borders.tobytes()).hexdigest(), tokenizer.fingerprint]
  key = json.dumps([*given, labels.fingerprint] if labels else given)
  stem = f'{_plain(corpus.name)}-{corpus.split}-{tokenizer.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}'
  path = cache_folder(data) / f'{stem}.bin'
  found = _open(path, key)
  if found is None:
    _build(path, key, corpus, tokenizer, labels=labels)
    found = _open(path, key)
    if found is None: raise UserError(f'the token file {path} does not read back as written; check the disk')
  record, starts, size = found
  token_N, weight_N = (record['token'], record['weight']) if labels else (record, None)
  return Tokens(token_N, starts, size, tokenizer.fingerprint, tokenizer.vocabulary, tokenizer.bos, corpus.name, corpus.split,
                corpus.sha256, weight_N, labels.fingerprint if labels else '')


def _plain(name: str) -> str:
  return ''.join(character if character.isalnum() or character in '-_' else '_' for character in name)[:40]


def _rows(token: str | np.dtype, has_labels: bool) -> np.dtype:
  """What the file holds a token: the token, and for conversations its weight."""
  return np.dtype([('token', token), ('weight', np.bool_)]) if has_labels else np.dtype(token)


def _build(path: pathlib.Path, key: str, corpus: Corpus, tokenizer: Tokenizer, *, labels: Labels | None) -> None:
  """Writes the tokens, then the sidecar that vouches for them."""
  token = np.dtype(next(d for d in DTYPES if tokenizer.vocabulary - 1 <= np.iinfo(d).max)).newbyteorder('<')
  dtype, starts, count, crc, size = _rows(token, labels is not None), [], 0, 0, 0
  try:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'{path.name}.')
    try:
      with os.fdopen(handle, 'wb') as file:
        for number, document in enumerate(corpus.documents, 1):
          if labels:
            try:
              token_L, weight_L, scored = labels(document)
            except UserError as error:
              raise UserError(f'{corpus.name}, conversation {number} of {corpus.split}: {error}') from None
            rows = np.empty(len(token_L), dtype)
            rows['token'], rows['weight'] = token_L, weight_L
          else: rows, scored = tokenizer.encode(document).astype(dtype), len(document.encode())
          raw, size = rows.tobytes(), size + scored
          if not raw: continue    # a document without words
          starts.append(count)
          count, crc = count + len(raw) // dtype.itemsize, zlib.crc32(raw, crc)
          file.write(raw)
      if not count: raise UserError(f'the {corpus.split} split of {corpus.name} has no tokens')
      os.replace(temporary, path)
    except BaseException:
      os.unlink(temporary)
      raise
    record = {'key': key, 'dtype': token.str, 'tokens': count, 'crc': crc, 'starts': starts, 'text': corpus.sha256,
              'vocabulary': tokenizer.fingerprint, 'bytes': size, 'labels': labels is not None}
    write_atomic(path.with_suffix('.json'), json.dumps({**record, 'hash': _hash(record)}).encode())
  except OSError as error:
    raise UserError(f'cannot write token files in {path.parent} ({error.strerror}); set data.cache') from error
  logger.info('%s: %d tokens in %d documents, kept as %s', corpus.name, count, len(starts), path)


def _hash(record: dict) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _open(path: pathlib.Path, key: str) -> tuple[np.ndarray, np.ndarray, int] | None:
  """(rows of the file, starts, bytes of the text that is scored); None where there are none, or none that are whole, which is said
  in the log."""
  try:
    record = json.loads(path.with_suffix('.json').read_bytes())
    stated = record.pop('hash')
    if stated != _hash(record) or record['key'] != key: raise ValueError('its sidecar is damaged')
    rows = np.memmap(path, _rows(record['dtype'], record['labels']), 'r')
    if len(rows) != record['tokens']: raise ValueError(f'{len(rows)} tokens, not {record["tokens"]}')
    if zlib.crc32(rows.view(np.uint8)) != record['crc']: raise ValueError('its tokens were changed')
    return rows, np.array(record['starts'], np.int64), record['bytes']
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    logger.warning('the token file %s is damaged (%s) and is made anew', path, error)
    return None
