"""Faults of what we build on, and the way round them."""
import os


def avoid_crash() -> None:
  """Turns off, before JAX starts its CPU, the fused products with which jaxlib 0.10.2 crashes in training steps of neural memories.

  Seen as a segmentation fault in a thread of Eigen with 24 rows of 128 tokens; other versions know other flags, and keep theirs.
  """
  import jax
  flags = os.environ.get('XLA_FLAGS', '')
  if jax.lib.__version__ == '0.10.2' and 'ynn' not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_experimental_ynn_fusion_type='.strip()
