"""The one exception that users are meant to see: bad input, said in one line."""
import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
  """Bad input of the user: config, file, checkpoint or prompt. Commands print it as one line and exit with status 2."""


class ConfigError(UserError):
  """A value of the configuration that cannot be used; the message starts at the field, the codec adds the path."""


def refuse(condition: bool, message: str) -> None:
  """None; raises ConfigError(message) where `condition` holds. The message starts at the field that is wrong."""
  if condition: raise ConfigError(message)


def check_pattern(name: str, pattern: str) -> None:
  """None; raises ConfigError for a `pattern` of the field `name` that is not a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ConfigError(f'{name} holds {pattern!r}, which is not a regular expression: {error}') from None


def nearest(word: str, names: Iterable[str]) -> str:
  """"; did you mean 'x'?" for the name closest to `word`, '' where none is close."""
  close = difflib.get_close_matches(str(word), list(names), 1)
  return f'; did you mean {close[0]!r}?' if close else ''


def shown(value: object, limit: int = 60) -> str:
  """The repr of a value on one line, its middle left out beyond `limit` characters."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= limit else f'{text[:limit // 2]} ... {text[-(limit // 2):]}'
