"""Context banks on disk, so that what a user's prompts left in them lives on: one .npz file, bound to one model.

The banks of all layers are found in any state. To go on with a loaded state at position 0, pass `reset_BxL` without resets.
"""
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.codec import to_json
from memjax.config.errors import UserError
from memjax.config.schema import Config
from memjax.layers.tree import named
from memjax.ops.context import Bank
from memjax.runtime.checksum import checksum, crc

FORMAT, RECORD = 1, 'record'
DAMAGE = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def fingerprint_of(config: Config, params: Any) -> str:
  """Eight hex digits that change with the model's config or with any bit of its parameters."""
  sums = {name: int(value) for name, value in jax.device_get(jax.jit(lambda p: jax.tree.map(checksum, p))(named(params))).items()}
  return f'{crc({"model": to_json(config)["model"], "params": sums}):08x}'


def banks_of(state: Any) -> dict[str, Bank]:
  """{path: bank} of the context banks in the state of a memory or a decoder; '' is the path of a bank alone."""
  return {path: bank for path, bank in named(state, is_leaf=_is_bank).items() if _is_bank(bank)}


def map_banks(change: Callable[[Bank], Bank], state: Any) -> Any:
  """The state with `change` applied to each context bank (`clear_bank` of ops/context for one); the rest is left alone."""
  return jax.tree.map(lambda leaf: change(leaf) if _is_bank(leaf) else leaf, state, is_leaf=_is_bank)


def save_bank(path: str | os.PathLike, state: Any, fingerprint: str) -> None:
  """None; the context banks of a state in one file, replaced whole or not at all.

  Raises UserError if the state holds no bank or the file cannot be written.
  """
  banks = named(banks_of(state))
  if not banks: raise UserError('the state holds no context bank; save_bank wants a model with a memory of kind context')
  record = {'format': FORMAT, 'fingerprint': fingerprint, 'leaves': sorted(banks)}
  arrays = {RECORD: np.array(json.dumps(record)), **{f'bank/{name}': np.asarray(leaf) for name, leaf in banks.items()}}
  folder, temporary = os.path.dirname(os.path.abspath(path)), ''
  try:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f'{os.path.basename(path)}.')
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from None
  finally:
    if temporary and os.path.exists(temporary): os.unlink(temporary)


def load_bank(path: str | os.PathLike, fingerprint: str, like: Any) -> Any:
  """The state `like` (an empty one, say) with the context banks of a file, bit for bit; its other leaves are left alone.

  Raises UserError if the file is missing or damaged, or its banks are another model's or of other shapes.
  """
  made_by, arrays = _read(path)
  if made_by != fingerprint: raise UserError(f'{path} holds the banks of another model: fingerprint {made_by}, not {fingerprint}')
  want = named(banks_of(like))
  for name in sorted(want.keys() | arrays.keys()):
    have, need = (f'{a.dtype}{list(a.shape)}' if a is not None else 'nothing' for a in (arrays.get(name), want.get(name)))
    if have != need: raise UserError(f'{path} does not fit: {name} is {have}, the state wants {need}')
  found = {place: Bank(**{n: jnp.asarray(arrays[f'{place}/{n}']) for n in vars(bank)}) for place, bank in banks_of(like).items()}
  return jax.tree_util.tree_map_with_path(
      lambda at, leaf: found[jax.tree_util.keystr(at, simple=True, separator='/')] if _is_bank(leaf) else leaf, like, is_leaf=_is_bank)


def _read(path):
  """(fingerprint, {name: array}) of a file; UserError if it cannot be."""
  try:
    with open(path, 'rb') as raw, np.load(raw, allow_pickle=False) as file:
      record = json.loads(str(file[RECORD]))
      if record['format'] != FORMAT: raise UserError(f'{path} is of format {record["format"]}, this version reads {FORMAT}')
      arrays = {name: file[f'bank/{name}'] for name in record['leaves']}
      return str(record['fingerprint']), arrays
  except FileNotFoundError:
    raise UserError(f'no such file: {path}') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}') from None
  except DAMAGE:
    raise UserError(f'{path} is damaged or no file of context banks') from None


def _is_bank(node: Any) -> bool:
  return isinstance(node, Bank)
