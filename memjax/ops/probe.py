"""Whether the default device can compute something: tried on a tiny input, once a process, also while a program is traced."""
import logging
from collections.abc import Callable

import jax

logger = logging.getLogger(__name__)


def works(name: str, attempt: Callable[[], bool]) -> bool:
  """Whether `attempt` runs on the device and says that its result is right; where not, one warning names what is missing."""
  try:
    with jax.ensure_compile_time_eval(): fine = bool(attempt())
    reason = 'the result is wrong'
  except Exception as error:  # a missing operation is whatever error its plugin raises
    fine, reason = False, (str(error).strip().splitlines() or [type(error).__name__])[0]
  if not fine: logger.warning('this device has no %s (%s); the path that needs none is taken', name, reason[:100])
  return fine
