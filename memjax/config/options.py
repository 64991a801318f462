"""`option`: a dataclass field that knows its own documentation, choices and range; the codec enforces them."""
import dataclasses
from typing import Any


def option(default: Any, doc: str, *, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
  """A field of a config dataclass.

  `doc` is printed by `--list_fields`; `choices` are the legal values (of each element, for a tuple); `low` and `high` are inclusive.
  A default that is a dict becomes a default factory.
  """
  metadata = {'doc': doc, 'choices': choices, 'low': low, 'high': high}
  if isinstance(default, dict): return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def config(cls):
  """Class decorator of every config dataclass: frozen, keyword only."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
