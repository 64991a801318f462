"""Config dataclasses <-> ConfigDict and JSON. Reading is strict: what is wrong is one line with its dotted path."""
import dataclasses
import json
import os
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from memjax.config.errors import ConfigError, UserError, nearest, shown
from memjax.config.mesh import AXES
from memjax.config.mixers import MIXERS
from memjax.config.options import hints, members, type_name
from memjax.config.schema import Config

ROOT = 'config'
TAG = 'kind'
RESUMABLE = frozenset({'training.steps', 'training.log_every', 'evaluation.every', 'checkpoint.every', 'mesh.preset',
                       *(f'mesh.{axis}' for axis in AXES)})


class Entry(NamedTuple):
  """One field of the configuration: dotted path, type, value and documentation."""
  path: str
  type: str
  value: object
  doc: str


def thaw(config: Any) -> ConfigDict:
  """A locked ConfigDict with the values of a config dataclass; memories carry their tag `kind`."""
  return ConfigDict(to_tree(config)).lock()


def freeze(tree: Any, *, path: str = ROOT, cls: type = Config) -> Any:
  """The Config (or part of one, by its class) that a ConfigDict or a nested dict describes; what is absent keeps its default.

  Raises ConfigError for unknown keys, wrong types, kinds, choices, ranges and combinations.
  """
  return _build(cls, tree, path)


def to_json(config: Any) -> dict:
  """Nested dict of plain JSON types (tuples as lists) that `from_json` reads back to an equal config."""
  return json.loads(json.dumps(to_tree(config), allow_nan=False))


def from_json(tree: Any) -> Config:
  """The Config written by `to_json`; as strict as `freeze`."""
  return freeze(tree)


def read_config(path: str) -> Config:
  """The Config saved in a `config.json`, or in that of a workdir. Raises UserError that begins with the path."""
  path = os.path.join(path, 'config.json') if os.path.isdir(path) else path
  try:
    with open(path, encoding='utf-8') as file: tree = json.load(file)
  except FileNotFoundError:
    raise UserError(f'no such file: {path}') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {shown(str(error))[1:-1]}') from None
  try:
    return from_json(tree)
  except ConfigError as error:
    raise UserError(f'{path}: {error}') from None


def diff(one: Config, other: Config) -> list[str]:
  """Dotted paths (`training.steps`) at which two configs differ, in the order of the fields."""
  a, b = (dict(leaves(to_tree(config))) for config in (one, other))
  return [path for path in {**a, **b} if path not in a or path not in b or a[path] != b[path]]


def clashes(saved: Config, wanted: Config) -> list[str]:
  """What forbids to resume a run of `saved` under `wanted`: their differences outside of RESUMABLE."""
  return [path for path in diff(saved, wanted) if path not in RESUMABLE]


def describe(config: Any, path: str = ROOT) -> list[Entry]:
  """Every field below a config dataclass (or class: its defaults) as `--list_fields` prints it."""
  if isinstance(config, type): config = config()
  entries = []
  for field in dataclasses.fields(config):
    value, where = getattr(config, field.name), f'{path}.{field.name}'
    if dataclasses.is_dataclass(value): entries += describe(value, where)
    elif isinstance(value, dict):
      for name, group in value.items(): entries += describe(group, f'{where}.{name}')
    else: entries.append(Entry(where, type_name(hints(type(config))[field.name]), value, _explain(field.metadata)))
  return entries


def to_tree(value: Any) -> Any:
  """Nested dict of a config dataclass, tuples kept, memories tagged with their kind."""
  if dataclasses.is_dataclass(value):
    tag = {TAG: value.kind} if type(value) in MIXERS.values() else {}
    return tag | {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
  return {name: to_tree(item) for name, item in value.items()} if isinstance(value, dict) else value


def leaves(tree: dict, path: str = ''):
  """Pairs of dotted path and value, depth first."""
  for name, value in tree.items():
    if isinstance(value, dict): yield from leaves(value, f'{path}{name}.')
    else: yield f'{path}{name}', value


def unknown(path: str, key: object, names: list[str]) -> str:
  """The message for a key that a group does not have."""
  return f'unknown key {path}.{key}' + (nearest(key, names) or f'; {path} has {", ".join(names)}')


def _build(cls: type, tree: Any, path: str) -> Any:
  if not isinstance(tree, (ConfigDict, dict)): raise ConfigError(f'{path} is a group of fields, not {shown(tree)}')
  if cls is object or cls in MIXERS.values(): cls = _tagged(cls, tree, path)
  types = hints(cls)
  for key in tree:
    if key in types or (key == TAG and cls in MIXERS.values()): continue
    raise ConfigError(unknown(path, key, list(types)) + (f' (of kind {cls.kind!r})' if cls in MIXERS.values() else ''))
  given = {key: _value(types[key], tree[key], f'{path}.{key}') for key in types if key in tree}
  try:
    return cls(**given)
  except ConfigError as error:
    raise ConfigError(f'{path}.{error}') from None


def _value(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint): return _build(hint, value, path)
  if not members(hint): return value
  if not isinstance(value, (ConfigDict, dict)): raise ConfigError(f'{path} holds named groups, not {shown(value)}')
  return {name: _build(members(hint), value[name], f'{path}.{name}') for name in value}


def _tagged(cls: type, tree: Any, path: str) -> type:
  """The class that the tag selects. Raises where there is no tag, or one of another family."""
  kinds = {kind: member for kind, member in MIXERS.items() if issubclass(member, cls)}
  if TAG not in tree and cls is not object: return cls
  if TAG not in tree: raise ConfigError(f'{path}.{TAG} is missing; it is one of {", ".join(kinds)}')
  tag = tree[TAG]
  if not isinstance(tag, str) or tag not in kinds:
    known = ', '.join(map(repr, kinds))
    raise ConfigError(f'{path}.{TAG} must be one of {known}, not {shown(tag)}{nearest(tag, kinds)}')
  return kinds[tag]


def _explain(limits: Any) -> str:
  notes = []
  if limits.get('choices'): notes.append('one of ' + ', '.join(map(repr, limits['choices'])))
  if limits.get('low') is not None: notes.append(f'at least {limits["low"]}')
  if limits.get('high') is not None: notes.append(f'at most {limits["high"]}')
  return limits.get('doc', '') + (f' ({"; ".join(notes)})' if notes else '')
