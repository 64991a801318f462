"""What kernels of our own can compute: whether it is theirs, or XLA's, the reference."""
import jax
import jax.numpy as jnp

from memjax.ops.sequence import has_whole_rows


def uses_kernels(backend: str, dtype: jnp.dtype) -> bool:
  """Whether what kernels can compute is theirs: where `backend` says so, with auto where they were timed; on the rows of a device."""
  if backend == 'xla' or not has_whole_rows(): return False
  return backend == 'pallas' or (dtype == jnp.bfloat16 and is_hopper())


def is_hopper() -> bool:
  """Whether this is a GPU with as much shared memory a multiprocessor as those that the kernels were timed on."""
  return jax.default_backend() == 'gpu' and getattr(jax.devices()[0], 'compute_capability', '') == '9.0'
