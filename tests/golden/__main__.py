"""Writes the golden values of the named configs, or of all."""
import sys
import tempfile

from tests import conftest  # noqa: F401  the compiler settings of the tests
from tests.golden import FOLDER, OVERRIDES, compute, json

with tempfile.TemporaryDirectory() as cache:
  for name in sys.argv[1:] or OVERRIDES:
    found = compute(name, cache)
    (FOLDER / f'{name}.json').write_text(json.dumps(found) + '\n')
    print(name, found)
