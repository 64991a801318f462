"""Memories over rows whose tokens lie on different devices: each reads its own piece, and the state is handed on."""
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from memjax.layers.axes import SEQUENCE, spec_for
from memjax.ops.sequence import in_turn


def mesh_of(length: int) -> AbstractMesh | None:
  """The mesh in force if it splits rows of `length` tokens into equal pieces, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  pieces = 1 if mesh.empty or mesh.manual_axes else mesh.shape.get(SEQUENCE, 1)
  return mesh if pieces > 1 and length > 1 and length % pieces == 0 else None


def over_pieces(memory: Any, mesh: AbstractMesh, state: Any, inputs: Any, **flow: Any) -> tuple[Any, jax.Array]:
  """(state, y [B, L, E]) of `memory.parallel`: by its `piece` where it `hands_over`, else by one piece after the other.

  `flow` are mask_BxL, write_mask_BxL and reset_BxL. Rows are split over data and fsdp, where they divide; parameters and states
  are whole on every device.
  """
  B, L = jax.tree.leaves(inputs)[0].shape[:2]
  alone, params = memory.clone(parent=None), memory.variables.get('params', {})
  is_linear = memory.hands_over(L // mesh.shape[SEQUENCE], **flow)
  def local(params, state, inputs, flow):
    call = lambda state, **more: alone.apply({'params': params}, state, inputs, **flow, **more)
    if is_linear: return call(state, axis=SEQUENCE, method='piece')
    return in_turn(lambda state: call(state, method='parallel'), state, SEQUENCE)
  rows = spec_for(('batch',), (B,), mesh)
  tokens = P(*rows, SEQUENCE)
  # A state is the same on all devices of the sequence axis, which check_vma cannot see through custom_vjp.
  run = jax.shard_map(local, mesh=mesh, in_specs=(P(), rows, tokens, tokens), out_specs=(rows, tokens), check_vma=False)
  return run(params, state, inputs, flow)
