"""Checkpoints that can be trusted: checksums inside an atomic save, inspection before use, fall-back without deleting.

A step is saved as a flat dict name -> array (empty leaves are left out) and a JSON record: shapes, dtypes and checksums
of the arrays, the data position, early-stopping counters, the evaluation loss, and the config.
"""
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from memjax.config.errors import UserError
from memjax.config.schema import CheckpointConfig
from memjax.layers.tree import is_empty, named, unnamed
from memjax.runtime import checksum

logger = logging.getLogger(__name__)
FOLDER = 'checkpoints'
PARAMS = 'params/'


@contextlib.contextmanager
def machine_trouble(action: str) -> Iterator[None]:
  """Turns what the machine refuses (rights, space, a vanished folder) into one UserError; the rest passes."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # orbax wraps OSError into ValueError and bare Exception
    if not isinstance(e, OSError) and not checksum.is_trouble(e): raise
    raise UserError(f'cannot {action}: {checksum.one_line(e)}') from e


def list_steps(workdir: str) -> list[int]:
  """Steps that look saved, ascending; folders half-written or put aside have other names."""
  folder = os.path.join(workdir, FOLDER)
  if not os.path.isdir(folder): return []
  return sorted(int(name) for name in os.listdir(folder) if re.fullmatch('0|[1-9][0-9]*', name))


def saved(tree: Any) -> dict[str, Any]:
  """The flat dict that is written: every leaf that holds something, by name."""
  return {name: x for name, x in named(tree).items() if not is_empty(x)}


class Keep:
  """Which steps stay: the newest `latest` and the `best` lowest losses (orbax's own best_fn drops the newest)."""

  def __init__(self, latest: int, best: int):
    self.latest, self.best, self.losses = latest, best, {}

  def should_preserve(self, checkpoints, *, context=None) -> list[bool]:
    """One flag for each of orbax's checkpoint infos, which come in ascending order."""
    steps = sorted(info.step for info in checkpoints)
    scored = sorted((self.losses[step], step) for step in steps if step in self.losses)
    kept = {*steps[-self.latest:], *(step for _, step in scored[:self.best])}
    return [info.step in kept for info in checkpoints]


class Checkpoints:
  """Writes the checkpoints of one run. Make it after `restore`, which puts damaged steps aside."""

  def __init__(self, workdir: str, config: CheckpointConfig):
    import orbax.checkpoint as ocp
    self.folder = os.path.abspath(os.path.join(workdir, FOLDER))
    self.keep = Keep(config.keep, config.best)
    with machine_trouble(f'write to {self.folder}'):
      for step in list_steps(workdir):
        loss = _loss(self.folder, step)
        if loss is not None: self.keep.losses[step] = loss
      self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
          create=True, cleanup_tmp_directories=True, preservation_policy=self.keep,
          enable_async_checkpointing=config.asynchronous))
    self.sums = jax.jit(lambda flat: jax.tree.map(checksum.checksum, flat))

  def save(self, step: int, state: Any, record: dict[str, Any], loss: float | None = None) -> None:
    """Saves `state` as `step`, in the background if so configured; a step already saved stays as it is.

    record: JSON values `data`, `config` and `early`. Raises UserError where the machine refuses; what was saved before
    stays whole.
    """
    import orbax.checkpoint as ocp
    if step in self.manager.all_steps(): return
    flat = saved(state)
    sums = jax.device_get(self.sums(flat))
    arrays = {name: [*entry, int(sums[name])] for name, entry in checksum.shapes(flat).items()}
    loss = float(loss) if loss is not None and np.isfinite(loss) else None
    record = json.loads(json.dumps({**record, 'arrays': arrays, 'loss': loss}))
    record['crc'] = checksum.crc(record)
    if loss is not None: self.keep.losses[step] = loss
    with machine_trouble(f'save checkpoint {step} in {self.folder}'):
      done = self.manager.save(step, force=True, args=ocp.args.Composite(
          state=ocp.args.StandardSave(flat), record=ocp.args.JsonSave(record)))
    if not done: raise UserError(f'checkpoint {step} was not saved: {self.folder} holds a later one')

  def wait(self) -> None:
    """Returns when everything is on disk. Raises UserError where the machine refused a save in the background."""
    with machine_trouble(f'save in {self.folder}'): self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    self.wait()
    self.manager.close()


def _loss(folder: str, step: int) -> float | None:
  """Evaluation loss in the record of a step; None if it has none or cannot be read."""
  try: return checksum.read_record(os.path.join(folder, str(step)))['loss']
  except Exception as e:  # a damaged record is reported where the step is used
    if checksum.is_trouble(e): raise
    return None


def restore(workdir: str, abstract: Any, *, put_aside: bool = True) -> tuple[int, Any, dict] | None:
  """(step, state, record) of the newest whole checkpoint, placed by the shardings of `abstract`; None before the first.

  Damaged steps are renamed to N.corruptK (never deleted), or, with put_aside=False, only passed over; one warning each.
  Raises UserError if a whole checkpoint does not fit `abstract`, if none is whole, or if the machine is in trouble.
  """
  folder, want = os.path.abspath(os.path.join(workdir, FOLDER)), checksum.shapes(saved(abstract))
  for step in reversed(list_steps(workdir)):
    root = os.path.join(folder, str(step))
    with machine_trouble(f'read checkpoint {step} in {folder}'):
      verdict = checksum.inspect(root, want) if jax.process_index() == 0 else checksum.Verdict()
      code = int(multihost_utils.broadcast_one_to_all(np.int32(2 if verdict.mismatch else 1 if verdict.fault else 0)))
      if code == 2: raise UserError(f'checkpoint {step} does not fit: {verdict.mismatch or "see process 0"}')
      if code == 0: return step, _place(root, abstract), checksum.read_record(root)
      if jax.process_index() == 0: _report(folder, step, verdict.fault, put_aside)
      multihost_utils.sync_global_devices(f'inspected {step}')
  aside = os.path.isdir(folder) and any('.corrupt' in name for name in os.listdir(folder))
  if aside or list_steps(workdir): raise UserError(f'no usable checkpoint in {folder}; all are damaged')
  return None


def _report(folder: str, step: int, fault: str, put_aside: bool) -> None:
  if not put_aside: return logger.warning('checkpoint %d is damaged (%s); passed over', step, fault)
  old = os.path.join(folder, str(step))
  new = next(f'{old}.corrupt{n}' for n in range(1, 10**6) if not os.path.exists(f'{old}.corrupt{n}'))
  os.rename(old, new)
  return logger.warning('checkpoint %d is damaged (%s); kept as %s', step, fault, os.path.basename(new))


def _place(root: str, abstract: Any) -> Any:
  import orbax.checkpoint as ocp
  from etils import epath
  flat = saved(abstract)
  args = ocp.args.PyTreeRestore(item=flat, restore_args=ocp.checkpoint_utils.construct_restore_args(flat))
  arrays = ocp.PyTreeCheckpointHandler().restore(epath.Path(root) / 'state', args=args)
  empty = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) if is_empty(x) else x
  return unnamed(arrays, jax.tree.map(empty, abstract))


def restore_for_reading(workdir: str, abstract: Any, step: int = 0) -> tuple[int, Any, dict]:
  """(step, parameters as numpy arrays in the structure of `abstract`, record): the best checkpoint, else the newest.

  `step` asks for one in particular. Nothing is renamed: a damaged checkpoint is passed over with one warning.
  Raises UserError for no (usable) checkpoint, an absent or damaged `step`, or parameters that do not fit.
  """
  folder, steps = os.path.abspath(os.path.join(workdir, FOLDER)), list_steps(workdir)
  if not steps: raise UserError(f'{workdir} holds no checkpoint')
  if step and step not in steps: raise UserError(f'{workdir} holds no checkpoint {step}; there are {steps}')
  want = checksum.shapes({PARAMS + name: x for name, x in named(abstract).items()})
  with machine_trouble(f'read checkpoints in {folder}'):
    for candidate in [step] if step else _by_loss(folder, steps):
      verdict = checksum.inspect(os.path.join(folder, str(candidate)), want, PARAMS)
      if verdict.mismatch: raise UserError(f'checkpoint {candidate} does not fit: {verdict.mismatch}')
      if not verdict.fault:
        flat = {name.removeprefix(PARAMS): x for name, x in verdict.arrays.items()}
        return candidate, unnamed(flat, abstract), verdict.record
      if step: raise UserError(f'checkpoint {step} in {folder} is damaged ({verdict.fault})')
      _report(folder, candidate, verdict.fault, put_aside=False)
  raise UserError(f'no usable checkpoint in {folder}; all are damaged')


def _by_loss(folder: str, steps: list[int]) -> list[int]:
  """Steps from the best loss to the worst, then those without one, newest first."""
  losses = {step: _loss(folder, step) for step in steps}
  scored = sorted((step for step in steps if losses[step] is not None), key=lambda step: (losses[step], -step))
  return scored + [step for step in reversed(steps) if losses[step] is None]
