"""Eight fake CPU devices, a persistent compilation cache, strict rank promotion."""
import gc
import itertools
import logging as standard_logging
import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
CACHE = os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.expanduser('~/.cache/memjax-tests'))
if WORKER := os.environ.get('PYTEST_XDIST_WORKER'):     # a folder of its own: nobody reads what another process is writing
  os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(CACHE, WORKER)
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

from tests import without

without.take_away(without.wanted())


MAPS, MOST, TESTS = Path('/proc/self/maps'), 30_000, itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_code():
  """Compiled programs are dropped before they fill the memory maps that Linux allows a process (65,530), where jaxlib ends in a
  segmentation fault: each holds three for every piece of its code."""
  yield
  if next(TESTS) % 20 or not MAPS.exists() or MAPS.read_bytes().count(b'\n') < MOST: return
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def _log_level():
  """Commands run in a test set the level of the library's logger; the next test finds it as it was."""
  yield
  standard_logging.getLogger('memjax').setLevel(standard_logging.NOTSET)
