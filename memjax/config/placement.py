"""Where memories stand in a stack: placements, block variants and sharing become named patterns (specification section 3)."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memjax.config.banks import BANKS
from memjax.config.errors import ConfigError, nearest, refuse
from memjax.config.layout import MAG, stacks, stages, suffix_of
from memjax.config.mixers import AttentionConfig
from memjax.config.schema import GroupConfig, ModelConfig

PLACEMENTS = ('all', 'first_k', 'last_k', 'every_n', 'custom', 'none')
SHARINGS = ('shared', 'per_layer', 'every_k_layers')
VARIANTS = ('A', 'B')
ATTENTION, BANK = 'attention', 'bank'
TABLE = r'(^bank_\w+|/bank)/(entries|mix|values)\w*$'     # parameters of tables, those of a layer and those that layers share
CHANGES = '/lora_[abm]$'


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices: raise ConfigError(f'{name} must be one of {", ".join(choices)}, not {value!r}{nearest(value, choices)}')


def place(depth: int, kind: str, *, k: int = 0, n: int = 0, indices: Sequence[int] = ()) -> tuple[int, ...]:
  """The layers, counted from 0, of `depth` that a placement names, in order.

  all; the first or last k (all where k exceeds depth); every n-th from 0; custom, those of `indices`; none.
  Raises ConfigError for another kind, k or n below 1 where they count, and indices that are absent, twice or outside.
  """
  refuse(depth < 1, f'depth={depth} leaves no layer')
  _choose('placement', kind, PLACEMENTS)
  refuse(kind in ('first_k', 'last_k') and k < 1, f'k={k} of placement {kind} must be at least 1')
  refuse(kind == 'every_n' and n < 1, f'n={n} of placement every_n must be at least 1')
  if kind == 'custom': return _check_indices(depth, indices)
  first = {'all': 0, 'first_k': 0, 'last_k': max(depth - k, 0), 'every_n': 0, 'none': depth}[kind]
  return tuple(range(first, min(k, depth) if kind == 'first_k' else depth, n if kind == 'every_n' else 1))


def _check_indices(depth: int, indices: Sequence[int]) -> tuple[int, ...]:
  refuse(not indices, 'indices of placement custom are missing')
  for index in indices:
    refuse(not 0 <= index < depth, f'indices holds {index}; the layers are 0 to {depth - 1}')
    refuse(list(indices).count(index) > 1, f'indices holds {index} twice')
  return tuple(sorted(indices))


def arrange(depth: int, where: Sequence[int], *, memory: Any, attention: AttentionConfig | None = None, variant: str = 'A',
            sharing: str = 'shared', sharing_k: int = 2) -> dict[str, Any]:
  """Changes to a ModelConfig (mixers, prefix, pattern, repeats, suffix): attention in `depth` layers, the bank `memory` in some.

  Variant A: attention, memory, feed-forward network. B: a layer of memory, with a feed-forward network of its own, after the
  layer of attention. The i-th memory layer reads table 0 (shared), i (per_layer) or i // sharing_k (every_k_layers).
  The shortest pattern that repeats becomes `pattern`, which is scanned; without `where` there is no memory at all.
  """
  where = _check_indices(depth, where) if where else ()
  _choose('variant', variant, VARIANTS)
  names, tables = shared_out(memory, len(where), name=BANK, sharing=sharing, sharing_k=sharing_k) if where else ((), {})
  mixers = {ATTENTION: attention or AttentionConfig(), **tables}
  layers, given = [], dict(zip(where, names, strict=True))
  for index in range(depth):
    if index not in given: layers.append(ATTENTION)
    elif variant == 'A': layers.append(f'{ATTENTION}>{given[index]}')
    else: layers += [ATTENTION, given[index]]
  return {'mixers': mixers, **fold(layers)}


def shared_out(memory: Any, count: int, *, name: str, sharing: str, sharing_k: int = 2) -> tuple[list[str], dict[str, Any]]:
  """(the mixer of each of `count` layers, {mixer: config}) of a memory whose table layers share as `sharing` says.

  Raises ConfigError for another sharing, one of a memory that has no table, and sharing_k below 1.
  """
  _choose('sharing', sharing, SHARINGS)
  has_table = memory.kind in BANKS
  refuse(sharing != 'per_layer' and not has_table, f'sharing={sharing!r} goes with the tables of {" and ".join(BANKS)}')
  refuse(sharing == 'every_k_layers' and sharing_k < 1, f'sharing_k={sharing_k} must be at least 1')
  names = [f'{name}_{number // sharing_k}' if sharing == 'every_k_layers' else name for number in range(count)]
  return names, {own: share(memory, '' if sharing == 'per_layer' else own) if has_table else memory for own in names}


def share(memory: Any, name: str) -> Any:
  """The config of a bank (or product-key table) whose table has the shared name, '' = one in each layer."""
  if not hasattr(memory, 'shape'): return dataclasses.replace(memory, share=name)
  return dataclasses.replace(memory, shape=dataclasses.replace(memory.shape, share=name))


def fold(layers: Sequence[str]) -> dict[str, Any]:
  """{'prefix', 'pattern', 'repeats', 'suffix'} of the layers with the fewest written out: only those are compiled one by one.

  Without a repetition all layers are the prefix.
  """
  layers, found = tuple(layers), []
  for start in range(len(layers)):
    for period in range(1, (len(layers) - start) // 2 + 1):
      pattern, repeats = layers[start:start + period], 1
      while layers[start + period * repeats:start + period * (repeats + 1)] == pattern: repeats += 1
      if repeats > 1: found.append((period * (1 - repeats), period, start, repeats))
  if not found: return {'prefix': layers, 'pattern': (), 'repeats': 0, 'suffix': ()}
  _, period, start, repeats = min(found)
  end = start + period * repeats
  return {'prefix': layers[:start], 'pattern': layers[start:start + period], 'repeats': repeats, 'suffix': layers[end:]}


def parameter_rules(model: ModelConfig) -> tuple[str, ...]:
  """`optimizer.rules` that sort parameters into the groups lora (low-rank changes), memory_bank (tables), memory and base; only
  those that exist.

  memory: banks, context banks and what is grafted, their routers and norms, and the feed-forward networks of layers that hold
  nothing else.
  """
  rules = [rule for part, layers in stacks(model).items() for number, layer in enumerate(layers)
           for rule in _layer_rules(f'^{part}/layer_{number}', layer, model)]
  tables = any(model.mixers[name].kind in BANKS for layer in model.layers for names, _ in stages(layer) for name in names)
  changes = [f'{CHANGES}=lora'] if model.block.lora.rank else []
  return (*changes, *([f'{TABLE}=memory_bank'] if tables else []), *(f'{rule}=memory' for rule in rules), '.*=base')


def train_only(model: ModelConfig, trained: Mapping[str, GroupConfig]) -> dict[str, Any]:
  """Fields of an OptimizerConfig, rules and groups, that train the named groups of `parameter_rules` and freeze all others.

  Raises ConfigError for a group that the model does not have.
  """
  rules = parameter_rules(model)
  names = list(dict.fromkeys(rule.rpartition('=')[2] for rule in rules))
  for name in trained: refuse(name not in names, f'trained names {name!r}; the groups of the model are {", ".join(names)}')
  return {'rules': rules, 'groups': {name: trained.get(name, GroupConfig(rate=0.0)) for name in names}}


def _layer_rules(path: str, layer: str, model: ModelConfig) -> list[str]:
  """The regular expression of the memory's parameters in one layer; none where it has no memory."""
  found, is_whole = [], True
  for number, (names, wiring) in enumerate(stages(layer)):
    suffix = suffix_of(number)
    memories = [name for name in names if model.mixers[name].kind in (*BANKS, 'context') or name in model.grafted]
    found += [f'mixers{suffix}/{name}' for name in memories] + ([f'norm_mixer{suffix}'] if len(memories) == len(names) else [])
    if wiring == MAG and names[1] in model.grafted: found.append(f'mixers{suffix}/fuse')
    is_whole = is_whole and len(memories) == len(names)
  if not found: return []
  return [f'{path}/' if is_whole else f'{path}/({"|".join(found)})/']
