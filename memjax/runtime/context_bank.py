"""Context banks on disk, so that what a user's prompts left in them lives on: one .npz file, bound to one model.

The banks of all layers are found in any state. To go on with a loaded state at position 0, pass `reset_BxL` without resets.
"""
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax.config.codec import to_json
from memjax.config.errors import UserError
from memjax.config.schema import Config
from memjax.layers.tree import named
from memjax.ops.context import Bank
from memjax.runtime.arrays import check_fit, read_arrays, write_arrays
from memjax.runtime.checksum import checksum, crc


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
  write_arrays(path, banks, {'fingerprint': fingerprint}, prefix='bank')


def load_bank(path: str | os.PathLike, fingerprint: str, like: Any) -> Any:
  """The state `like` (an empty one, say) with the context banks of a file, bit for bit; its other leaves are left alone.

  Raises UserError if the file is missing or damaged, or its banks are another model's or of other shapes.
  """
  record, arrays = read_arrays(path, prefix='bank', what='context banks')
  made_by = record['fingerprint']
  if made_by != fingerprint: raise UserError(f'{path} holds the banks of another model: fingerprint {made_by}, not {fingerprint}')
  check_fit(path, arrays, named(banks_of(like)))
  found = {place: Bank(**{n: jnp.asarray(arrays[f'{place}/{n}']) for n in vars(bank)}) for place, bank in banks_of(like).items()}
  return jax.tree_util.tree_map_with_path(
      lambda at, leaf: found[jax.tree_util.keystr(at, simple=True, separator='/')] if _is_bank(leaf) else leaf, like, is_leaf=_is_bank)


def _is_bank(node: Any) -> bool:
  return isinstance(node, Bank)
