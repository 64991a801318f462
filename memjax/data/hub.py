"""Datasets and models on the Hugging Face hub, in its cache on this machine; extra `hub`, imported when used."""
import fnmatch
import logging
import os
import pathlib
import re

from memjax.config.errors import UserError

logger = logging.getLogger(__name__)

CONVERTED = 'refs/convert/parquet'    # where the hub keeps its own parquet copy of datasets in other formats

MODEL = re.compile(r'(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<file>[\w.-][\w./-]*\.gguf))?')       # owner/name, owner/name:FILE.gguf
MODEL_FILES = ('config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'chat_template.jinja',
               'model.safetensors', 'model.safetensors.index.json', 'model-*-of-*.safetensors')


def missing(extra: str, module: str) -> UserError:
  """The line for an extra that is not installed."""
  return UserError(f"{module} is not installed; pip install 'memjax[{extra}]'")


def patterns(configuration: str, splits: tuple[str, ...]) -> list[str]:
  """Globs of the parquet files of a split, as datasets on the hub name them."""
  folders = (f'{configuration}/',) if configuration else ('', 'data/', 'default/')
  rests = ('.parquet', '-*.parquet', '/*.parquet')
  return [folder + split + rest for folder in folders for split in splits for rest in rests]


def match(root: pathlib.Path, globs: list[str]) -> list[pathlib.Path]:
  """The files under `root` that fit one of the globs, sorted."""
  paths = sorted(path for path in root.rglob('*.parquet') if path.is_file())
  return [path for path in paths if any(fnmatch.fnmatchcase(path.relative_to(root).as_posix(), glob) for glob in globs)]


def fetch(name: str, configuration: str, splits: tuple[str, ...]) -> list[pathlib.Path]:
  """Local copies of the parquet files of a split, in order, from the hub or its cache.

  `splits` are the names under which the split may go. UserError where the extra, the network, the dataset or the
  split is missing.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise missing('hub', 'huggingface_hub') from error
  globs = patterns(configuration, splits)
  for revision in (None, CONVERTED):
    try:
      root = huggingface_hub.snapshot_download(name, repo_type='dataset', revision=revision, allow_patterns=globs)
    except Exception as error:    # the client raises its own errors, those of its transport and the system's
      said = _said(error)
      if not revision:
        raise UserError(f'cannot get {name} from the hub ({said}); check its name and the network, '
                        "or use data.source='path'") from error
      logger.info('%s has no converted copy (%s)', name, said)
      break
    if found := match(pathlib.Path(root), globs): return found
  kind = f'configuration {configuration!r}' if configuration else "none given as in 'owner/name:configuration'"
  raise UserError(f'{name} on the hub has no parquet files of split {splits[0]} ({kind})')


def local_model(name: str) -> str:
  """The path of a model: `name` where that is a path, else the folder or GGUF file of owner/name or owner/name:FILE.gguf, from
  the hub or its cache.

  A name is taken for a path if something is there, if it ends like a GGUF file without saying whose, and if its first part is a
  folder here. UserError where the extra, the network, the model or its files are missing.
  """
  found = MODEL.fullmatch(name)
  if os.path.exists(name) or not found or os.path.isdir(name.partition('/')[0]): return name
  if name.endswith('.gguf') and not found['file']: return name
  try:
    import huggingface_hub
  except ImportError as error:
    raise missing('hub', 'huggingface_hub') from error
  try:
    if found['file']: return huggingface_hub.hf_hub_download(found['name'], found['file'])
    folder = huggingface_hub.snapshot_download(found['name'], allow_patterns=list(MODEL_FILES))
  except Exception as error:      # as above
    raise UserError(f'there is no file or folder {name}, and the hub does not give it ({_said(error)}); check the name and the '
                    'network') from error
  files = os.listdir(folder)
  if 'config.json' in files and any(file.endswith('.safetensors') for file in files): return folder
  raise UserError(f'{name} on the hub has no config.json with safetensors; a GGUF file in it is {found["name"]}:FILE.gguf')


def _said(error: Exception) -> str:
  return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:100]}'


def read_column(paths: list[pathlib.Path], column: str) -> list[str]:
  """The text column of parquet files, row by row; UserError where it is missing or not text."""
  rows = [row[column] for row in read_rows(paths, (column,))]
  wrong = next((row for row in rows if row is not None and not isinstance(row, str)), None)
  if wrong is not None: raise UserError(f'column {column!r} holds {type(wrong).__name__}, not text')
  return [row or '' for row in rows]


def read_rows(paths: list[pathlib.Path], *wanted: tuple[str, ...]) -> list[dict]:
  """The rows of parquet files, of the first of some groups of columns that a file has; UserError where it has none."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise missing('hub', 'pyarrow') from error
  rows = []
  for path in paths:
    try:
      names = pyarrow.parquet.read_schema(path).names
      columns = next((group for group in wanted if set(group) <= set(names)), None)
      if columns is None:
        said = ' nor '.join(' and '.join(map(repr, group)) for group in wanted)
        raise UserError(f'{path.name} has no column {said}; it has {", ".join(names)}')
      rows += pyarrow.parquet.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
      raise UserError(f'{path} is not a parquet file: {(str(error).splitlines() or [""])[0]}') from error
  return rows
