"""`option`: a dataclass field that knows its documentation, choices and range; `config`: what enforces them."""
import ast
import dataclasses
import functools
import math
import re
import typing
from typing import Any

from memjax.config.errors import ConfigError, nearest, shown

BOOLEANS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}


def option(default: Any, doc: str, *, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
  """A field of a config dataclass.

  `doc` is printed by `--list_fields`; `choices` are the legal values (of each element, for a tuple); `low` and `high`
  are inclusive. A default that is a dict becomes a default factory.
  """
  metadata = {'doc': doc, 'choices': choices, 'low': low, 'high': high}
  if isinstance(default, dict): return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def config(cls):
  """Class decorator of every config dataclass: frozen, keyword only, its options checked before its own rules."""
  rules = getattr(cls, '__post_init__', None)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      checked = check(field.name, value, hints(type(self))[field.name], field.metadata)
      if checked is not value: object.__setattr__(self, field.name, checked)
    if rules: rules(self)

  cls.__post_init__ = __post_init__
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
  """Type of each field of a config dataclass by name."""
  return typing.get_type_hints(cls)


def element(hint: Any) -> Any:
  """X of `tuple[X, ...]`, None for any other type."""
  return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def members(hint: Any) -> Any:
  """X of `dict[str, X]`, None for any other type."""
  return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None


def type_name(hint: Any) -> str:
  """'int', 'tuple of str' and the like: a type as messages say it."""
  if element(hint): return f'tuple of {type_name(element(hint))}'
  if members(hint): return 'dict of groups'
  return hint.__name__


def check(name: str, value: Any, hint: Any, limits: typing.Mapping) -> Any:
  """`value` as type `hint`, inside the `choices`, `low` and `high` of `limits`.

  An int becomes a float and a list a tuple where those are wanted. Raises ConfigError, the message starting at `name`.
  """
  if value is None: raise ConfigError(f"{name} is None; off is written 0, '', False or ()")
  inner = element(hint)
  if inner:
    if not isinstance(value, (tuple, list)): raise ConfigError(f'{name} wants {type_name(hint)}, got {shown(value)}')
    return tuple(check(f'{name}[{i}]', item, inner, limits) for i, item in enumerate(value))
  if members(hint): return _check_names(name, value)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, hint): raise ConfigError(f'{name} wants {hint.__name__}, got {shown(value)}')
    return value
  if hint is float and type(value) is int: value = _as_float(name, value)
  if type(value) is not hint: raise ConfigError(f'{name} wants {type_name(hint)}, got {shown(value)}')
  _check_limits(name, value, limits)
  return value


def parse(name: str, text: str, hint: Any) -> Any:
  """The value of type `hint` that a command line writes as `text`: `20`, `1e-3`, `true`, `a,b`, `('a', 'b')`, ''.

  Raises ConfigError, the message starting at `name`. Ranges and choices are `check`'s.
  """
  try:
    if element(hint): return _parse_tuple(name, text, element(hint))
    if hint is bool: return BOOLEANS[text.strip().lower()]
    if hint is int: return int(text, 16 if text.strip().lower().startswith('0x') else 10)
    if hint is float: return float(text)
  except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError):
    raise ConfigError(f'{name} wants {type_name(hint)}, got {shown(text)}') from None
  return text


def _parse_tuple(name: str, text: str, inner: Any) -> tuple:
  """Elements split at commas; text written as Python quotes or brackets its elements is read as Python."""
  text = text.strip()
  if re.match(r"""[(\[]?\s*['"]|[(\[][\s\d.,+-]*[)\]]$""", text):
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  return tuple(parse(name, item.strip(), inner) for item in text.split(',') if item.strip())


def _as_float(name: str, value: int) -> float:
  try:
    return float(value)
  except OverflowError:
    raise ConfigError(f'{name} is too large, got {shown(value)}') from None


def _check_names(name: str, value: Any) -> dict:
  if not isinstance(value, dict): raise ConfigError(f'{name} wants a dict of groups, got {shown(value)}')
  for key in value:
    if not (isinstance(key, str) and key.isidentifier()):
      raise ConfigError(f'{name} holds the name {shown(key)}; names are letters, digits and underscores')
  return value


def _check_limits(name: str, value: Any, limits: typing.Mapping) -> None:
  choices, low, high = limits.get('choices'), limits.get('low'), limits.get('high')
  if choices and value not in choices:
    known = ', '.join(map(repr, choices))
    raise ConfigError(f'{name} must be one of {known}, not {shown(value)}{nearest(value, choices)}')
  if isinstance(value, float) and not math.isfinite(value): raise ConfigError(f'{name} must be finite, not {value}')
  if low is not None and value < low: raise ConfigError(f'{name} must be at least {low}, not {shown(value)}')
  if high is not None and value > high: raise ConfigError(f'{name} must be at most {high}, not {shown(value)}')
