"""Arrays as plain lists of short numbers, as they go into JSON."""
from typing import Any

import numpy as np


def round_list(x: Any, digits: int = 5) -> Any:
  """Nested lists of numbers with so many significant digits: small and readable in JSON."""
  x = np.asarray(x, np.float64)
  return np.vectorize(lambda v: float(f'{v:.{digits}g}'), otypes=[float])(x).tolist() if x.size else x.tolist()
