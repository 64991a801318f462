"""Random inputs of the slot recurrence, float64 numpy, tiny."""
import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from tests.ops import oracle


def quick(f, **options):
  """jit without the expensive compiler passes: tests of exactness run each program once and wait for its compilation."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0}, **options)


def gpu_text(function, *arguments):
  """What the function is lowered to for an H200, which need not be there."""
  card = AbstractDevice(device_kind='NVIDIA H200', num_cores=None, platform='gpu')
  with use_abstract_mesh(AbstractMesh((1,), ('x',), axis_types=(AxisType.Auto,), abstract_device=card)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()


def make(*, keep='none', B=2, L=7, H=2, S=4, K=6, G=1, reset=False, mask=False, seed=0, decay=1.0):
  """(arguments, options): state, bound, address, pick of `slot_mix`, and log_keep, reset_BxL, mask_BxL."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  arguments = [draw(B, H, S, K), draw(B, L, H, K), draw(B, L, H, S), draw(B, L, G, H, S)]
  shape = {'none': None, 'head': (B, L, H, 1), 'slot': (B, L, H, S), 'static': (1, 1, H, S), 'static_head': (1, 1, H, 1),
           'channel': (B, L, H, 1, K)}[keep]
  options = {'log_keep': None if shape is None else -decay * rng.random(shape)}
  options['reset_BxL'] = rng.random((B, L)) < 0.25 if reset else None
  options['mask_BxL'] = rng.random((B, L)) < 0.7 if mask else None
  return arguments, options


def truth(arguments, options, **more):
  """The oracle on these inputs."""
  return oracle.mix(*arguments, log_keep=options['log_keep'], reset=options['reset_BxL'], mask=options['mask_BxL'], **more)


def cast(tree, dtype):
  """Floating leaves in another dtype."""
  return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == 'f' else x, tree)
