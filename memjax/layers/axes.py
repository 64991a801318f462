"""The logical axis names of parameters and batches, and the axes of a mesh that they are split over."""
import math
from collections.abc import Iterable

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

ROWS, SEQUENCE = ('data', 'fsdp'), 'sequence'
FIXED = 'fixed'                      # names an axis of a parameter that stays as it was made: nothing may decay it
RULES = {'batch': ROWS, 'tokens': SEQUENCE, 'embed': 'fsdp', 'heads': 'model', 'hidden': 'model', 'vocabulary': 'model',
         'chapters_model': 'model', 'chapters_fsdp': 'fsdp'}


def spec_for(axes: Iterable | None, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """Partition of one array: each named axis on its mesh axes, where they divide it and are not used before."""
  used, spec = set(), []
  names = tuple(axes or ())
  for name, size in zip(names + (None,) * (len(shape) - len(names)), shape, strict=True):
    target = RULES.get(name)
    names = (target,) if isinstance(target, str) else target or ()
    ways = math.prod(mesh.shape.get(n, 1) for n in names)
    fits = ways > 1 and size % ways == 0 and size > 0 and not used.intersection(names)
    used.update(names if fits else ())
    spec.append(target if fits else None)
  return P(*spec)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """x, in a program for a mesh that is in force placed as the names of its axes say; axes without a name are not split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes: return x
  return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh))
