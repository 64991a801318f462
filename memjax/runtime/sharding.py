"""Where arrays live: the mesh of a config, logical axis names to mesh axes, batches over devices. Plain JAX."""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.config.banks import split_chapters
from memjax.config.errors import UserError
from memjax.config.mesh import AXES, MeshConfig
from memjax.config.schema import Config, ModelConfig, TrainingConfig
from memjax.layers.axes import ROWS, SEQUENCE, spec_for
from memjax.runtime.distributed import data_shard


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """The mesh with axes data, fsdp, model and sequence (axis type Auto: Linen's logical names fail under Explicit).

  An axis of 0 takes all devices that remain, if it is the one of the preset; with that given, one process may use fewer
  devices than there are. Raises UserError if the devices do not divide or are too few.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes(len(devices))
  used, named = math.prod(sizes.values()), ' x '.join(f'mesh.{axis}={size}' for axis, size in sizes.items() if size > 1)
  if used > len(devices): raise UserError(f'{named} wants {used} devices, there are {len(devices)}')
  if used < len(devices) and (not getattr(config, config.rest) or jax.process_count() > 1):
    raise UserError(f'{named or "mesh of one device"} does not divide {len(devices)} devices')
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def check_batch(mesh: Mesh, training: TrainingConfig) -> None:
  """Raises UserError unless the rows of a micro-batch split over the data and fsdp axes of the mesh, and their tokens over the
  sequence axis."""
  batch, ways, pieces = training.batch, math.prod(mesh.shape[a] for a in ROWS), mesh.shape[SEQUENCE]
  if batch % (ways * training.accumulate):
    raise UserError(f'training.batch={batch} in {training.accumulate} micro-batches does not split over {ways} devices '
                    f'(mesh.data x mesh.fsdp); use a multiple of {ways * training.accumulate} or a smaller mesh.data')
  length, name = (training.bptt, 'bptt') if training.bptt else (training.length, 'length')
  if length % pieces: raise UserError(f'training.{name}={length} does not split over mesh.sequence={pieces} devices')


def placed(config: Config) -> ModelConfig:
  """The model as it is built on the mesh of a config: under 'bank_parallel' the chapters of banks lie on different devices."""
  if config.mesh.preset != 'bank_parallel': return config.model
  return dataclasses.replace(config.model, mixers=split_chapters(config.model.mixers, config.mesh.rest))


def shardings_for(axes_tree: Any, mesh: Mesh, shapes: Any) -> Any:
  """NamedSharding of every leaf of `shapes`; `axes_tree` has the same structure with axis names (tuple,
  PartitionSpec or None)."""
  axes = jax.tree.leaves(axes_tree, is_leaf=lambda x: x is None or isinstance(x, tuple | P))
  leaves, treedef = jax.tree.flatten(shapes)
  return treedef.unflatten([NamedSharding(mesh, spec_for(a, leaf.shape, mesh))
                            for a, leaf in zip(axes, leaves, strict=True)])


def batch_shardings(tree: Any, mesh: Mesh, axes: tuple[str, ...] = ('batch',)) -> Any:
  """NamedSharding of arrays whose first axes are those named: rows over data and fsdp, replicated where they do not divide."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec_for(axes[:x.ndim], x.shape, mesh)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, P())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """The global batch on the devices of the mesh, made of the rows that each process holds (`distributed.data_shard`)."""
  _, parts = data_shard(mesh)
  def put(x):
    whole = jax.ShapeDtypeStruct((x.shape[0] * parts, *x.shape[1:]), x.dtype)
    return jax.make_array_from_process_local_data(batch_shardings(whole, mesh, ('batch', 'tokens')), x, whole.shape)
  return jax.tree.map(put, batch)


def data_parallel(fn: Callable, mesh: Mesh) -> Callable:
  """`fn` compiled so that axis 0 of every array of every argument after the first is split over the devices.

  What `jax.pmap` was used for, without a leading device axis: the first argument (parameters) is replicated, means over
  the batch are means over all devices, and the result equals `jax.jit(fn)`.
  """
  compiled = jax.jit(fn)
  def call(params, *batch):
    params = jax.device_put(params, replicated(mesh))
    return compiled(params, *(jax.device_put(b, batch_shardings(b, mesh)) for b in batch))
  return call


def settle(tree: Any) -> Any:
  """`tree`, waited for where queued steps would deadlock: on the CPU with more than one device."""
  if jax.default_backend() == 'cpu' and jax.device_count() > 1: jax.block_until_ready(tree)
  return tree
