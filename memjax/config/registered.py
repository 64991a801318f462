"""Python functions that a config may name; they are registered by `memjax.ops.neural_custom` and known to this process alone."""
from typing import Any

from memjax.config.errors import nearest, refuse

NETWORKS: dict[str, Any] = {}           # memory networks
FEATURES: dict[str, Any] = {}           # feature maps


def check_registered(path: str, name: str, table: dict[str, Any]) -> None:
  """Refuses a name that is not in the table."""
  refuse(name not in table, f'{path}={name!r} is not registered (memjax.ops.neural_custom){nearest(name, tuple(table))}')
