"""Text by split, cut into documents: the bundled corpus, a local file or folder, or the hub."""
import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import json
import logging
import lzma
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data import hub

logger = logging.getLogger(__name__)

SPLITS = {'train': ('train',), 'val': ('val', 'valid', 'validation', 'dev'), 'test': ('test',)}
SUFFIXES = ('.txt', '.tokens', '.md', '.jsonl')
BUNDLED = {
    'train': '61f4c8598c8a1876e40d64f29747892d7017312b01e8ae060513a8cb2b47349c',
    'val': 'b6471b98b237fd98ecf897feeeb7e8a62c77699ea027fc20972d00f75595f17f',
    'test': '836e3d85e4125432464f5e3db55427db93dafb81f9af055417aaf3048c5a3efc'}
WIKITEXT = 'wikitext'
# The empty line before an article heading ' = Title = '; a section has two or more '='. Without the empty lines on both
# sides 31 lines of WikiText-2 that are no titles would match.
HEADING = re.compile(r'^[ ]*\n(?= = (?!= )[^\n]* = \n[ ]*(?:\n|\Z))', re.MULTILINE)
FEW = 20    # below so many documents or files a split of its own would be empty or odd


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One split of a text. The documents in a row are the text, byte for byte: a separator ends its document."""
  name: str
  split: str
  documents: list[str]

  @functools.cached_property
  def bytes(self) -> int:
    """UTF-8 bytes of the text."""
    return sum(len(document.encode()) for document in self.documents)

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of the text, hexadecimal; that of the file where the split is one file."""
    digest = hashlib.sha256()
    for document in self.documents: digest.update(document.encode())
    return digest.hexdigest()


def split_name(name: str) -> str:
  """'train', 'val' or 'test' for any usual name of a split; UserError for another."""
  for split, names in SPLITS.items():
    if name in names: return split
  raise UserError(f'unknown split {name!r}; there are train, val and test')


def load_corpus(data: DataConfig, split: str, fetch: Callable[..., list[pathlib.Path]] = hub.fetch) -> Corpus:
  """The documents of one split of the configured text.

  `fetch(name, configuration, splits)` returns the parquet files of a hub dataset. UserError, one line, for a missing,
  empty or non-UTF-8 file, a folder without the split, an unknown split, a damaged installation, a missing extra or
  network.
  """
  split = split_name(split)
  if data.source == 'path': return read_path(data.path, split, Format(lambda path: read_documents(path, data), divide, SUFFIXES))
  if data.source == 'shakespeare': name, documents = 'shakespeare', cut(bundled(split), data.separator)
  else: name, documents = data.hub, read_hub(data, split, fetch)
  return filled(Corpus(name, split, documents))


class Format(NamedTuple):
  """How files hold documents."""
  read: Callable[[pathlib.Path], list[str]]              # the documents of a file
  divide: Callable[[list[str], str, str], list[str]]     # those of a split, of documents that have none, and where they are
  suffixes: tuple[str, ...]                              # of the files of a folder


def read_path(where: str, split: str, format: Format) -> Corpus:
  """The documents of one split of a file or folder. UserError where there are none."""
  path = pathlib.Path(where).expanduser()
  if not path.exists(): raise UserError(f'no such file or folder: {where}')
  if path.is_dir(): return filled(Corpus(path.resolve().name, split, read_folder(path, split, format)))
  return filled(Corpus(path.stem, split, format.divide(format.read(path), split, str(path))))


def filled(corpus: Corpus) -> Corpus:
  """The corpus; UserError where it is empty."""
  if not any(corpus.documents): raise UserError(f'the {corpus.split} split of {corpus.name} is empty')
  return corpus


def bundled(split: str) -> str:
  """The text of a split of the Shakespeare corpus inside the package, hash-checked."""
  packed = importlib.resources.files('memjax.data.corpora') / f'shakespeare.{split}.xz'
  try:
    text = lzma.decompress(packed.read_bytes())
  except (OSError, lzma.LZMAError) as error:
    raise UserError(f'the bundled corpus cannot be read ({packed}: {error}); install memjax again') from error
  found = hashlib.sha256(text).hexdigest()
  if found != BUNDLED[split]:
    raise UserError(f'the bundled corpus was changed: {packed} has sha256 {found[:16]}, not {BUNDLED[split][:16]}; '
                    'install memjax again')
  return text.decode()


def cut(text: str, separator: str) -> list[str]:
  """The documents of a text; ''.join of them is the text. Separator '' gives one, 'wikitext' one an article heading."""
  if separator == WIKITEXT:
    borders = [match.end() for match in HEADING.finditer(text)][1:]    # what precedes the first heading belongs to it
  elif separator:
    borders = [match.end() for match in re.finditer(re.escape(separator), text)]
  else:
    borders = []
  ends = [0, *borders, len(text)]
  return [text[start:end] for start, end in itertools.pairwise(ends) if end > start]


def read_text(path: pathlib.Path) -> str:
  """A UTF-8 file as it is, carriage returns included; a byte order mark at its start is dropped."""
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error
  try:
    return raw.decode().removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    byte = f'byte {error.start} (0x{raw[error.start]:02x})'
    raise UserError(f'{path} is not UTF-8 at {byte}; convert it to UTF-8') from error


def read_documents(path: pathlib.Path, data: DataConfig) -> list[str]:
  """The documents of one text or .jsonl file; UserError where it is empty."""
  text = read_text(path)
  is_table = path.suffix == '.jsonl'
  documents = join_rows(read_rows(path, text, data.column), data.separator) if is_table else cut(text, data.separator)
  if not any(documents): raise UserError(f'{path} is empty')
  return documents


def read_rows(path: pathlib.Path, text: str, column: str) -> list[str]:
  """The text column of the rows of a .jsonl file."""
  rows = []
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip(): continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(f'{path} line {number} is not JSON: {error.msg}') from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
      found = ', '.join(sorted(row)) if isinstance(row, dict) else type(row).__name__
      raise UserError(f'{path} line {number} has no text in column {column!r}; it has {found}')
    rows.append(row[column])
  return rows


def join_rows(rows: list[str], separator: str) -> list[str]:
  """The documents of a table's text column: one a row, or articles where the rows are lines (separator 'wikitext')."""
  if separator != WIKITEXT:
    return [row + separator for row in rows[:-1]] + rows[-1:]
  # The hub's copy stores empty lines as '', the official files as ' \n'; the line ends of the others are there.
  return cut(''.join(row if row.endswith('\n') else f'{row or " "}\n' for row in rows), WIKITEXT)


def read_hub(data: DataConfig, split: str, fetch: Callable[..., list[pathlib.Path]]) -> list[str]:
  """The documents of a split of a dataset on the hub."""
  name, _, configuration = data.hub.partition(':')
  return join_rows(hub.read_column(fetch(name, configuration, SPLITS[split]), data.column), data.separator)


def split_of_file(path: pathlib.Path) -> str:
  """'train', 'val' or 'test' for train.txt or wiki.valid.tokens, '' for a file that names no split."""
  last = path.stem.split('.')[-1].lower()
  return next((split for split, names in SPLITS.items() if last in names), '')


def read_folder(folder: pathlib.Path, split: str, format: Format) -> list[str]:
  """The documents of a split of a folder: its train/val/test file, or a share of its many text files."""
  named = {}
  for path in sorted(folder.iterdir()):
    found = split_of_file(path)
    if found and path.suffix in format.suffixes and path.is_file(): named.setdefault(found, []).append(path)
  if split in named:
    if len(named[split]) > 1:
      raise UserError(f'{folder} has two files of split {split}: ' + ', '.join(path.name for path in named[split]))
    return format.read(named[split][0])
  if named:
    found = ', '.join(path.name for paths in named.values() for path in paths)
    raise UserError(f'{folder} has no {split} split; it has {found}')
  paths = sorted(p for p in folder.rglob('*') if p.suffix in format.suffixes and p.is_file() and not p.name.startswith('.'))
  if not paths: raise UserError(f'{folder} holds no text files ({", ".join(format.suffixes)})')
  if len(paths) < FEW:
    return format.divide([document for path in paths for document in format.read(path)], split, str(folder))
  # In the order of their hashes the names and dates of files say nothing about their split.
  paths = sorted(paths, key=lambda path: (hashlib.sha256(read_text(path).encode()).digest(), str(path)))
  kept = [path for index, path in enumerate(paths) if share(index) == split]
  logger.info('%s has no splits: in the order of their hashes, of 20 files the 10th is val, the 20th test, the others '
              'train; %s is %d of %d files', folder, split, len(kept), len(paths))
  return [document for path in sorted(kept) for document in format.read(path)]


def share(index: int) -> str:
  """The split of item `index` where 18 of 20 go to train."""
  return {9: 'val', 19: 'test'}.get(index % 20, 'train')


def divide(documents: list[str], split: str, where: str) -> list[str]:
  """A split of a text that has none: 18 : 1 : 1 by documents from 20 on, else 90 : 5 : 5 by text, at line ends."""
  if len(documents) >= FEW:
    logger.info('%s has no splits: of 20 documents the 10th is val, the 20th test, the others train', where)
    return [document for index, document in enumerate(documents) if share(index) == split]
  text, ends, first = ''.join(documents), [], 0
  for part in (0.9, 0.95):
    aim = int(len(text) * part)
    line = text.rfind('\n', first, aim) + 1
    first = line if line > first + (aim - first) // 2 else aim
    ends.append(first)
  start, end = {'train': (0, ends[0]), 'val': tuple(ends), 'test': (ends[1], len(text))}[split]
  logger.info('%s has no splits: train is its first 90 %%, val the next 5 %%, test the rest; %s is characters %d to %d',
              where, split, start, end)
  borders = [0]
  for document in documents: borders.append(borders[-1] + len(document))
  pieces = [document[max(start - at, 0):max(end - at, 0)] for document, at in zip(documents, borders, strict=False)]
  return [piece for piece in pieces if piece]
