"""What enters shard_maps: an array of no elements makes jaxlib 0.11.2 end in a segmentation fault."""
from jax.extend.core import jaxprs_in_params


def shard_maps(jaxpr):
  """The equations of shard_maps in a jaxpr, whatever they are in."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'shard_map': yield eqn
    else: yield from (found for inner in jaxprs_in_params(eqn.params) for found in shard_maps(inner))


def empty(eqns):
  """The types of arrays of no elements among the inputs of equations."""
  return [v.aval for eqn in eqns for v in eqn.invars if 0 in v.aval.shape]
