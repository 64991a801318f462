"""One job of several processes: how they find each other, which rows are whose, who writes, and how they stop together."""
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from memjax.config.errors import UserError
from memjax.layers.axes import ROWS

VARIABLES = ('MEMJAX_COORDINATOR', 'MEMJAX_NUM_PROCESSES', 'MEMJAX_PROCESS_ID')
ALONE = ('coordinator_address should be defined', 'before any JAX calls')      # jax found no cluster; or a notebook, long at work
logger = logging.getLogger(__name__)


def maybe_initialize() -> None:
  """Joins the job that MEMJAX_COORDINATOR (host:port), MEMJAX_NUM_PROCESSES and MEMJAX_PROCESS_ID name, else the one that jax detects.

  Without either this is a single process. To be called before any device is used; a second call does nothing. Processes other
  than the first log errors only. Raises UserError for variables that are set in part or make no sense, and where nobody answers.
  """
  if jax.distributed.is_initialized(): return
  job = _named()
  try:
    if job: jax.distributed.initialize(*job)
    else: jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    if not job and any(words in str(error) for words in ALONE): return
    raise UserError(f'cannot join the job{f" at {job[0]}" if job else ""}: {str(error).splitlines()[0]}') from None
  if not is_leader(): logging.getLogger('memjax').setLevel(logging.ERROR)
  logger.info('%d processes, %d devices', jax.process_count(), jax.device_count())


def _named() -> tuple[str, int, int] | None:
  """(address, processes, number of this one) of the variables, None where none is set."""
  given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
  if not given: return None
  if missing := [name for name in VARIABLES if name not in given]:
    raise UserError(f'{" and ".join(given)} without {" and ".join(missing)}; set all of {", ".join(VARIABLES)} or none')
  address, *numbers = (given[name] for name in VARIABLES)
  if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
    raise UserError(f'{VARIABLES[2]}={numbers[1]} is not one of the {VARIABLES[1]}={numbers[0]} processes, counted from 0')
  if not address.rpartition(':')[2].isdecimal(): raise UserError(f'{VARIABLES[0]}={address} is not of the form HOST:PORT')
  return address, int(numbers[0]), int(numbers[1])


def is_leader() -> bool:
  """Whether this is process 0, which alone prints, writes and renames."""
  return jax.process_index() == 0


@contextlib.contextmanager
def leader_first(what: str) -> Iterator[None]:
  """Context that process 0 passes before the others enter: files that it writes are there for them to read."""
  if not is_leader(): multihost_utils.sync_global_devices(what)
  yield
  if is_leader() and jax.process_count() > 1: multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
  """Context in which an error of one process of several ends that process at once.

  An orderly exit would wait for the others, and they for it; so does whoever started the job see the status, and end them.
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or isinstance(error, SystemExit | KeyboardInterrupt): raise
    if isinstance(error, UserError): logger.error('%s', ' '.join(str(error).split()))
    else: traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def asked_to_stop(step: int, asked: bool) -> bool:
  """Whether all processes stop after this step: `asked` for a single one, else that one of them got SIGTERM some steps ago.

  jax takes the signal itself in a job of several processes, and agrees on a step that none of them has passed. Every process
  must call this at every step.
  """
  if not jax.distributed.is_initialized(): return asked
  return multihost_utils.reached_preemption_sync_point(step)


def data_shard(mesh: Mesh) -> tuple[int, int]:
  """(number of this process's part, parts) of the rows of a batch, in order; (0, 1) where a process needs all rows.

  Processes whose devices hold the same rows (of other heads, or other pieces) read the same part.
  """
  if jax.process_count() == 1: return 0, 1
  ways = int(np.prod([mesh.shape[axis] for axis in ROWS]))
  grid = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices).reshape(ways, -1)
  held = {process: tuple(int(n) for n in np.nonzero((grid == process).any(1))[0]) for process in np.unique(grid).tolist()}
  parts = sorted(set(held.values()))
  if sum(parts, ()) != tuple(range(ways)) or len({len(part) for part in parts}) > 1: return 0, 1
  return parts.index(held[jax.process_index()]), len(parts)


def check_rows(mesh: Mesh, batch: int, name: str) -> None:
  """Raises UserError where several processes cannot split the rows of a batch over the devices."""
  ways = int(np.prod([mesh.shape[axis] for axis in ROWS]))
  if jax.process_count() > 1 and batch % ways:
    raise UserError(f'{name}={batch} does not split over {ways} devices; several processes need a multiple of that')


def alone() -> contextlib.AbstractContextManager:
  """Context in which process 0 computes without the others, on its first device; nothing changes for a single process."""
  if jax.process_count() == 1: return contextlib.nullcontext()
  one = np.asarray(jax.local_devices()[:1], object).reshape(1, 1)
  return jax.set_mesh(Mesh(one, ROWS, axis_types=(AxisType.Auto,) * 2))
