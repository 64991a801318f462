"""Arrays and what is to be known of them in one .npz file, replaced whole or not at all."""
import json
import os
import tempfile
import zipfile
import zlib
from typing import Any

import numpy as np

from memjax.config.errors import UserError

FORMAT, RECORD = 1, 'record'
DAMAGE = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def write_arrays(path: str | os.PathLike, arrays: dict[str, Any], record: dict[str, Any], *, prefix: str) -> None:
  """None; arrays by name, under `prefix`/, and a record. UserError if the file cannot be written."""
  record = {'format': FORMAT, **record, 'leaves': sorted(arrays)}
  content = {RECORD: np.array(json.dumps(record)), **{f'{prefix}/{name}': np.asarray(leaf) for name, leaf in arrays.items()}}
  folder, temporary = os.path.dirname(os.path.abspath(path)), ''
  try:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f'{os.path.basename(path)}.')
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, **content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from None
  finally:
    if temporary and os.path.exists(temporary): os.unlink(temporary)


def read_arrays(path: str | os.PathLike, *, prefix: str, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(record, {name: array}) of a file of `what`; UserError if it is missing, damaged or of another format."""
  try:
    with open(path, 'rb') as raw, np.load(raw, allow_pickle=False) as file:
      record = json.loads(str(file[RECORD]))
      if record['format'] != FORMAT: raise UserError(f'{path} is of format {record["format"]}, this version reads {FORMAT}')
      return {**record, 'fingerprint': str(record['fingerprint'])}, {name: file[f'{prefix}/{name}'] for name in record['leaves']}
  except FileNotFoundError:
    raise UserError(f'no such file: {path}') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
  except DAMAGE:
    raise UserError(f'{path} is damaged or no file of {what}') from None


def check_fit(path: str | os.PathLike, have: dict[str, Any], want: dict[str, Any]) -> None:
  """None. Raises UserError, of the first name that differs, unless both hold the same names, dtypes and shapes."""
  for name in sorted(want.keys() | have.keys()):
    found, need = (f'{a.dtype}{list(a.shape)}' if a is not None else 'nothing' for a in (have.get(name), want.get(name)))
    if found != need: raise UserError(f'{path} does not fit: {name} is {found}, the state wants {need}')
