"""Eight fake CPU devices, a persistent compilation cache, strict rank promotion."""
import logging as standard_logging
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.expanduser('~/.cache/memjax-tests'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')     # half the compile time, same results to rounding
os.environ.setdefault('MPLBACKEND', 'agg')
import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
from absl import flags, logging

logging.set_verbosity(logging.WARNING)
if not flags.FLAGS.is_parsed(): flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _log_level():
  """Commands run in a test set the level of the library's logger; the next test finds it as it was."""
  yield
  standard_logging.getLogger('memjax').setLevel(standard_logging.NOTSET)


@pytest.hookimpl(tryfirst=True)      # before xdist reads the groups
def pytest_collection_modifyitems(items):
  """What one process runs (`--dist loadgroup`): a file, or of the laws one memory, so that compiled fixtures are shared."""
  for item in items:
    memory = item.callspec.params.get('name', '') if 'laws' in item.path.parts and hasattr(item, 'callspec') else ''
    item.add_marker(pytest.mark.xdist_group(f'{item.path.stem}-{memory}' if memory else str(item.path)))
