"""Whether a checkpoint on disk is whole and fits: checksums of arrays and record, read before anything is restored."""
import contextlib
import errno
import io
import json
import os
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TROUBLE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS,
           errno.ENOMEM, errno.ESTALE}
TROUBLE_WORDS = ('PERMISSION_DENIED', 'RESOURCE_EXHAUSTED', 'Permission denied', 'No space left', 'Input/output error',
                 'Too many open files', 'Read-only file system', 'Disk quota exceeded', 'Cannot allocate memory')
BLOCK = 1 << 22


class Verdict(NamedTuple):
  """What an inspection found; `fault` and `mismatch` are '' for a checkpoint that is whole and fits."""
  fault: str = ''                      # the files are damaged
  mismatch: str = ''                   # the files are whole, but of another model
  record: dict | None = None
  arrays: dict | None = None           # name -> numpy array


def checksum(x: jax.Array) -> jax.Array:
  """sum of bits_i (2 i + 1) modulo 2**32 over row-major elements i; numbers of 8 bytes count as two of 4.

  Equal under every sharding; changed by any one flipped bit, since 2 i + 1 is odd.
  """
  if x.dtype.itemsize == 8: x = jax.lax.bitcast_convert_type(x, jnp.uint32)
  elif jnp.issubdtype(x.dtype, jnp.floating):
    x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
  x, place = x.astype(jnp.uint32), jnp.zeros((1,) * x.ndim, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(x * (2 * place + 1), dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
  """`checksum` of a numpy array, block by block, compiling nothing."""
  flat = np.ascontiguousarray(x).reshape(-1)
  if x.dtype.itemsize == 8: flat = flat.view(np.uint32)
  elif jnp.issubdtype(x.dtype, jnp.floating): flat = flat.view(f'u{x.dtype.itemsize}')
  total = 0
  for start in range(0, flat.size, BLOCK):
    part = flat[start:start + BLOCK].astype(np.uint32)
    place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
    total += int(np.sum(part * (2 * place + np.uint32(1)), dtype=np.uint32))
  return total % 2**32


def shapes(flat: dict[str, Any]) -> dict[str, list]:
  """{name: [shape, dtype]} as JSON knows it."""
  return {name: [list(x.shape), str(x.dtype)] for name, x in flat.items()}


def crc(record: dict) -> int:
  """Checksum of a record's contents."""
  return zlib.crc32(json.dumps({k: v for k, v in record.items() if k != 'crc'}, sort_keys=True).encode())


def is_trouble(error: BaseException) -> bool:
  """Whether the machine is at fault (rights, space, disk), not the files: then nothing may be renamed."""
  return (isinstance(error, PermissionError | MemoryError) or getattr(error, 'errno', None) in TROUBLE
          or any(words in str(error) for words in TROUBLE_WORDS))


def one_line(error: BaseException) -> str:
  """'Type: first line of its message', short."""
  first = (str(error).strip().splitlines() or [''])[0]
  return f'{type(error).__name__}: {first[:100]}' if first else type(error).__name__


def read_record(root: str) -> dict:
  """The JSON record of a checkpoint folder; raises ValueError if its checksum does not hold."""
  import orbax.checkpoint as ocp
  from etils import epath
  record = ocp.JsonCheckpointHandler(multiprocessing_options=_alone()).restore(epath.Path(root) / 'record')
  if not isinstance(record, dict) or crc(record) != record.get('crc'): raise ValueError('checksum mismatch in record')
  return record


def inspect(root: str, want: dict[str, list], prefix: str = '') -> Verdict:
  """The verdict on one checkpoint folder, read by this process alone.

  want: `shapes` that the config asks for; names and arrays that do not start with `prefix` are left unread.
  Raises OSError and its like if the machine is in trouble.
  """
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      record = read_record(root)
      sums = {name: entry for name, entry in record['arrays'].items() if name.startswith(prefix)}
      have = {name: entry[:2] for name, entry in sums.items()}
      if wrong := [name for name in sorted(want.keys() | have.keys()) if want.get(name) != have.get(name)]:
        return Verdict(mismatch=_mismatch(wrong[0], want.get(wrong[0]), have.get(wrong[0])), record=record)
      arrays = _read(root, list(sums))
    bad = [name for name, entry in sums.items() if name not in arrays or host_checksum(arrays[name]) != entry[2]]
    return Verdict(fault=f'checksum mismatch in {bad[0]}' if bad else '', record=record, arrays=arrays)
  except Exception as e:  # orbax raises bare Exception, KeyError, ValueError, FileNotFoundError and more
    if is_trouble(e) or not os.path.isdir(os.path.dirname(root)): raise
    return Verdict(fault=str(e) if str(e).startswith('checksum') else one_line(e))


def _mismatch(name: str, want: list | None, have: list | None) -> str:
  say = lambda entry: f'{entry[1]}{entry[0]}' if entry else 'nothing'
  return f'{name}: the config wants {say(want)}, the checkpoint holds {say(have)}'


def _read(root: str, names: list[str]) -> dict[str, np.ndarray]:
  import orbax.checkpoint as ocp
  from etils import epath
  handler, folder, arrays = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()), epath.Path(root) / 'state', {}
  if not (folder / '_METADATA').exists(): raise FileNotFoundError('_METADATA is missing')
  for name in names:  # one at a time: where several fail at once, orbax's event loop litters stderr
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    arrays.update(handler.restore(folder, args=ocp.args.PyTreeRestore(item={name: 0}, restore_args=as_numpy, partial_restore=True)))
  return arrays


def _alone():
  """Options that keep orbax from waiting for other processes."""
  import orbax.checkpoint as ocp
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me},
                                            barrier_sync_key_prefix=f'inspect{me}')
