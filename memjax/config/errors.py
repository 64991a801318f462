"""The one exception that users are meant to see: bad input, said in one line."""


class UserError(Exception):
  """Bad input of the user: config, file, checkpoint or prompt. Commands print it as one line and exit with status 2."""


class ConfigError(UserError):
  """A value of the configuration that cannot be used; the message starts at the field, the codec adds the path."""
