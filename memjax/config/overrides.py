"""Overrides `a.b=text` on a Config: found by their dotted path, read by the type of the field, frozen again."""
import dataclasses
from collections.abc import Iterable
from typing import Any

from memjax.config.codec import ROOT, TAG, freeze, leaves, to_tree, unknown
from memjax.config.errors import ConfigError
from memjax.config.mixers import MIXERS
from memjax.config.options import hints, parse, type_name
from memjax.config.schema import Config


def override(config: Config, pairs: Iterable[tuple[str, str]]) -> Config:
  """`config` with each (dotted path, text) applied in order; the last of a path wins. Raises ConfigError."""
  tree = to_tree(config)
  for path, text in pairs:
    value = parse(f'{ROOT}.{path}', text, locate(config, path))
    *groups, name = path.split('.')
    node = tree
    for group in groups: node = node[group]
    node[name] = value
  return freeze(tree)


def locate(config: Config, path: str) -> Any:
  """Type of the field at a dotted path. Raises ConfigError for a group, for an unknown key, and for the tag `kind`."""
  node, hint, where = config, Config, ROOT
  for key in path.split('.'):
    if isinstance(node, dict): types = dict.fromkeys(node)
    elif dataclasses.is_dataclass(node): types = hints(type(node))
    else: raise ConfigError(f'{where} is {_article(hint)}, it has no field {key!r}')
    if key == TAG and type(node) in MIXERS.values():
      raise ConfigError(f'{where}.{TAG} is {node.kind!r} in this config; a flag cannot change the kind of a memory')
    if key not in types: raise ConfigError(_elsewhere(config, where, key) or unknown(where, key, list(types)))
    node = node[key] if isinstance(node, dict) else getattr(node, key)
    hint, where = types[key], f'{where}.{key}'
  if dataclasses.is_dataclass(node) or isinstance(node, dict):
    raise ConfigError(f'{where} is a group; set its fields one by one')
  return hint


def _elsewhere(config: Config, where: str, key: str) -> str:
  """The message for a key that another group has, '' where none or several do."""
  known = [path for path, _ in leaves(to_tree(config)) if path.rpartition('.')[2] == key]
  return f'unknown key {where}.{key}; did you mean {f"{ROOT}.{known[0]}"!r}?' if len(known) == 1 else ''


def _article(hint: Any) -> str:
  name = type_name(hint)
  return f'an {name}' if name[0] in 'aeiou' else f'a {name}'
