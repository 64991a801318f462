"""Memories where rows, or the tokens of a row, lie on different devices: each reads its own, and the state is handed on.

Gathers by row and kernels of our own are opaque to the compiler, which would read all rows on every device.
"""
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from memjax.layers.axes import ROWS, SEQUENCE, spec_for
from memjax.ops.sequence import in_turn


def mesh_of(rows: int, length: int) -> AbstractMesh | None:
  """The mesh in force if it splits so many rows, or rows of `length` tokens, into equal pieces and nothing else; else None."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes: return None
  pieces, ways = mesh.shape.get(SEQUENCE, 1), math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
  if pieces > 1: return mesh if length % pieces == 0 else None
  return mesh if ways > 1 and ways == mesh.size and rows % ways == 0 else None


def over_pieces(memory: Any, mesh: AbstractMesh, state: Any, inputs: Any, **flow: Any) -> tuple[Any, jax.Array]:
  """(state, y [B, L, E]) of `memory.parallel` on each device's rows; pieces of rows by `piece` where it `hands_over`, else in turn.

  `flow` are mask_BxL, write_mask_BxL and reset_BxL. Rows are split over data and fsdp, where they divide; parameters and states
  are whole on every device.
  """
  B, L = jax.tree.leaves(inputs)[0].shape[:2]
  alone, params = memory.clone(parent=None), memory.variables.get('params', {})
  pieces = mesh.shape.get(SEQUENCE, 1)
  is_linear = pieces > 1 and memory.hands_over(L // pieces, **flow)
  def local(params, state, inputs, flow):
    call = lambda state, **more: alone.apply({'params': params}, state, inputs, **flow, **more)
    if is_linear: return call(state, axis=SEQUENCE, method='piece')
    whole = lambda state: call(state, method='parallel')
    return in_turn(whole, state, SEQUENCE) if pieces > 1 else whole(state)
  rows = spec_for(('batch',), (B,), mesh)
  tokens = P(*rows, SEQUENCE if pieces > 1 else None)
  # A state is the same on all devices of the sequence axis, which check_vma cannot see through custom_vjp.
  run = jax.shard_map(local, mesh=mesh, in_specs=(P(), rows, tokens, tokens), out_specs=(rows, tokens), check_vma=False)
  return run(params, state, inputs, flow)
