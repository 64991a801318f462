"""Low-rank changes in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors` (specification section 7.3)."""
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax.adapters.families import tensor_places
from memjax.adapters.lora import Adapter, Factors, extract, with_lora
from memjax.adapters.pretrained import read_json
from memjax.adapters.safetensors import SafeTensors, write_described
from memjax.config.errors import ConfigError, UserError, shown
from memjax.config.lora import LoraConfig, alpha_of, scale_of
from memjax.config.quant import QuantConfig
from memjax.config.schema import ModelConfig
from memjax.models.decoder import build_decoder, param_shapes
from memjax.models.quantized import with_quant

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
STEM, SIDES, MAGNITUDE = 'base_model.model.', ('.lora_A.weight', '.lora_B.weight'), '.lora_magnitude_vector'
FIXED = {'bias': 'none', 'fan_in_fan_out': False}
READ = {'peft_type', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern', 'init_lora_weights',
        *FIXED}
# What a file may say besides: about its origin, and which modules were meant; the tensors say which there are.
SAID = {'task_type', 'base_model_name_or_path', 'revision', 'inference_mode', 'auto_mapping', 'peft_version', 'target_modules',
        'exclude_modules', 'layers_to_transform', 'layers_pattern', 'megatron_core', 'qalora_group_size'}
PLAIN_STARTS = (None, True, False, 'gaussian')     # other starts change the host as well


class Module(NamedTuple):
  """A linear map of a checkpoint: its name there, the path of its kernel here, and the repeat (-1: not scanned)."""
  name: str
  path: str
  repeat: int


def save_peft(folder: str, config: ModelConfig, params: dict, *, base: str = '') -> None:
  """None; writes the low-rank changes in `params` as PEFT does, for a host of the families of `family_config`.

  `base` is the name or folder of the host. Raises UserError without changes, and for one of a kernel that no checkpoint has.
  """
  modules, adapter = list(_modules(config)), extract(params, config.block.lora, config.block.quant)
  if not adapter: raise UserError('the parameters hold no low-rank changes; there is nothing to save')
  for path in sorted(set(adapter) - {module.path for module in modules}):
    raise UserError(f'{path} is no kernel of a Hugging Face model; PEFT has no name for it')
  changed, tensors = [module for module in modules if module.path in adapter], {}
  for name, path, repeat in changed:
    a, b, _, magnitude = adapter[path]
    for side, value in zip((*SIDES, MAGNITUDE), (a, b, magnitude), strict=True):
      if value is None: continue
      tensors[f'{STEM}{name}{side}'] = np.ascontiguousarray(np.asarray(value if repeat < 0 else value[repeat]).T)
  numbers = {name: (adapter[path].a.shape[-1], alpha_of(config.block.lora, path)) for name, path, _ in changed}
  settings = {'base_model_name_or_path': base} | _settings(config.block.lora, modules, numbers)
  write_described(folder, (TENSORS, tensors), (CONFIG, settings))


def load_peft(folder: str, config: ModelConfig) -> tuple[ModelConfig, Adapter]:
  """(config with the file's low-rank changes, the changes in float32) for the host `config`; `insert` puts them into its parameters.

  Raises UserError for a damaged file, for what is not LoRA or DoRA of linear maps (embeddings, whole modules, biases, starts that
  change the host), for modules that the host lacks, and for layers that are scanned together but changed differently.
  """
  path = os.path.join(folder, CONFIG)
  tree, file = read_json(path), SafeTensors(os.path.join(folder, TENSORS))
  _check_settings(tree, path)
  shapes, parts = param_shapes(build_decoder(with_quant(config, QuantConfig())))[0], {}
  known = {module.name: module for module in _modules(config)}
  for name, a, b, magnitude in _changes(file, bool(tree.get('use_dora'))):
    if name not in known: raise UserError(f'{file.path} changes {shown(name)}, which the model does not have')
    rank, alpha = (_pattern(tree[f'{key}_pattern'] or {}, name, tree[default]) for key, default in (('rank', 'r'), ('alpha', 'lora_alpha')))
    *_, inputs, features = functools.reduce(lambda node, key: node[key], known[name].path.split('/'), shapes).shape
    if a.shape != (rank, inputs) or b.shape != (features, rank):
      raise UserError(f'{file.path}: {name} has factors {list(b.shape)} x {list(a.shape)}; '
                      f'its kernel is {[features, inputs]}, its rank {rank}')
    if magnitude is not None and magnitude.shape != (features,):
      raise UserError(f'{file.path}: {name} has magnitudes {list(magnitude.shape)}; its kernel is {[features, inputs]}')
    parts.setdefault(known[name].path, {})[known[name].repeat] = (a, b, magnitude, rank, float(alpha))
  if not parts: raise UserError(f'{file.path} holds no changes')
  return _joined(config, tree, parts, file.path)


def _joined(config: ModelConfig, tree: dict, parts: Mapping[str, dict[int, tuple]], where: str) -> tuple[ModelConfig, Adapter]:
  """The layers of each kernel put together."""
  stacks: dict[str, list] = {}
  for path, rows in parts.items():
    wanted = range(config.repeats) if -1 not in rows else [-1]
    if set(rows) != set(wanted) or len({row[3:] for row in rows.values()}) > 1:
      raise UserError(f'{where} changes the layers of {path} differently; a pattern that repeats has one rank and alpha, '
                      'so write the layers out in config.model.prefix')
    stacks[path] = [rows[number] for number in wanted]
  exact = lambda path: f'^{re.escape(path)}$'
  numbers = {path: rows[0][3:] for path, rows in stacks.items()}
  try:
    lora = LoraConfig(
        rank=tree['r'], alpha=float(tree['lora_alpha']), stabilised=bool(tree.get('use_rslora')),
        dora=bool(tree.get('use_dora')), dropout=float(tree.get('lora_dropout') or 0), targets=tuple(map(exact, stacks)),
        ranks=tuple(f'{exact(path)}={rank}' for path, (rank, _) in numbers.items() if rank != tree['r']),
        alphas=tuple(f'{exact(path)}={_digits(alpha)}' for path, (_, alpha) in numbers.items() if alpha != tree['lora_alpha']))
  except ConfigError as error:
    raise UserError(f'{where}: {error}') from None
  def stack(path, side):
    if stacks[path][0][side] is None: return None
    rows = [np.asarray(row[side], np.float32).T for row in stacks[path]]
    return jnp.asarray(np.stack(rows) if -1 not in parts[path] else rows[0])
  return with_lora(config, lora), {path: Factors(stack(path, 0), stack(path, 1), scale_of(lora, path), stack(path, 2)) for path in stacks}


def _modules(config: ModelConfig) -> Iterator[Module]:
  """The linear maps of a checkpoint of this config."""
  for name, place in tensor_places(config).items():
    if place.path[-1] == 'kernel': yield Module(name.removesuffix('.weight'), '/'.join(place.path), place.repeat)


def _settings(lora: LoraConfig, modules: list[Module], numbers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
  """adapter_config.json; `numbers` are rank and alpha by the name of the changed modules.

  Modules go by the last part of their name where all that share it are alike, else by their whole name.
  """
  alike: dict[str, set] = {}
  for module in modules: alike.setdefault(module.name.rpartition('.')[2], set()).add(numbers.get(module.name))
  def short(name): return len(alike[name.rpartition('.')[2]]) == 1
  def pattern(side, usual):
    found = {(name.rpartition('.')[2] if short(name) else re.escape(name)): _plain(both[side]) for name, both in numbers.items()}
    return {name: value for name, value in found.items() if value != _plain(usual)}
  rank, alpha = (Counter(both[side] for both in numbers.values()).most_common(1)[0][0] for side in (0, 1))
  return {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': rank, 'lora_alpha': _plain(alpha), 'lora_dropout': lora.dropout,
      'target_modules': sorted({name.rpartition('.')[2] if short(name) else name for name in numbers}),
      'rank_pattern': pattern(0, rank), 'alpha_pattern': pattern(1, alpha), 'use_rslora': lora.stabilised, 'use_dora': lora.dora,
      **FIXED,      'init_lora_weights': True, 'inference_mode': True, 'modules_to_save': None}


def _check_settings(tree: dict, path: str) -> None:
  """Raises UserError for an adapter_config.json that says what is not done here."""
  if tree.get('peft_type') != 'LORA': raise UserError(f"{path}: peft_type is {shown(tree.get('peft_type'))}; only 'LORA' is read")
  for name, value in FIXED.items():
    if tree.get(name, value) not in (value, None): raise UserError(f'{path}: {name}={shown(tree[name])} is not supported')
  if tree.get('init_lora_weights') not in PLAIN_STARTS:
    raise UserError(f'{path}: init_lora_weights={shown(tree["init_lora_weights"])} changes the host as well, which is not supported')
  for name, value in tree.items():
    if name in READ | SAID or value in (None, False, '', 0, [], {}): continue
    raise UserError(f'{path}: {name}={shown(value)} is not supported')
  numbers = {'r': int, 'lora_alpha': (int, float)}
  for name, kinds in numbers.items():
    for value in (tree.get(name), *_table(tree, 'rank_pattern' if name == 'r' else 'alpha_pattern', path).values()):
      if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
        raise UserError(f'{path}: {name} must be a number above 0, not {shown(value)}')
  dropout = tree.get('lora_dropout') or 0
  if not isinstance(dropout, (int, float)): raise UserError(f'{path}: lora_dropout is no number: {shown(dropout)}')


def _table(tree: dict, name: str, path: str) -> dict:
  """A table of patterns, put into `tree` where it is missing."""
  table = tree.setdefault(name, {}) or {}
  if not isinstance(table, dict): raise UserError(f'{path}: {name} is no table: {shown(table)}')
  for pattern in table:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f'{path}: {name} holds {pattern!r}, which is not a regular expression: {error}') from None
  return table


def _pattern(table: Mapping[str, Any], name: str, usual: Any) -> Any:
  """The value of the first pattern that matches the end of a module's name, at a dot, as PEFT does it."""
  return next((value for pattern, value in table.items() if re.match(rf'(.*\.)?({pattern})$', name)), usual)


def _changes(file: SafeTensors, is_dora: bool) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
  """(module, A [R, in], B [out, R], m [out] or None). Raises UserError for a tensor that is none of these, or is alone."""
  sides = (*SIDES, MAGNITUDE) if is_dora else SIDES
  for key in sorted(file.entries):
    side = next((side for side in sides if key.endswith(side)), '')
    if not side or not key.startswith(STEM): raise UserError(f'{file.path} has a tensor that is no factor of a linear map: {shown(key)}')
    keys = [f'{STEM}{key.removeprefix(STEM).removesuffix(side)}{other}' for other in sides]
    for other in keys:
      if other not in file.entries: raise UserError(f'{file.path} lacks the tensor {other}')
    if side == SIDES[0]: yield key.removeprefix(STEM).removesuffix(side), *map(file.read, keys), *([] if is_dora else [None])


def _plain(value: float) -> int | float:
  return int(value) if value == int(value) else value


def _digits(value: float) -> str:
  """A number above 0 without an exponent."""
  return format(Decimal(repr(value)), 'f')
