"""Where arrays live: the mesh of a config, logical axis names to mesh axes, batches over devices. Plain JAX."""
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.config.errors import UserError
from memjax.config.schema import MeshConfig
from memjax.layers.axes import ROWS, spec_for

AXES = ('data', 'fsdp', 'model')


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """The mesh with axes data, fsdp and model (axis type Auto: Linen's logical names fail under Explicit).

  `data=0` takes all devices that remain; with `data` given, one process may use fewer devices than there are.
  Raises UserError if the devices do not divide or are too few.
  """
  devices = list(jax.devices() if devices is None else devices)
  inner = config.fsdp * config.model
  if not config.data and len(devices) % inner:
    raise UserError(f'mesh.fsdp={config.fsdp} x mesh.model={config.model} does not divide {len(devices)} devices')
  data = config.data or len(devices) // inner
  used = data * inner
  if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
    raise UserError(f'mesh {data} x {config.fsdp} x {config.model} (data x fsdp x model) wants {used} devices, '
                    f'there are {len(devices)}')
  return jax.make_mesh((data, config.fsdp, config.model), AXES, axis_types=(AxisType.Auto,) * 3,
                       devices=devices[:used])


def check_batch(mesh: Mesh, batch: int, accumulate: int = 1) -> None:
  """Raises UserError unless the rows of a micro-batch split evenly over the data and fsdp axes of the mesh."""
  ways = math.prod(mesh.shape[a] for a in ROWS)
  if batch % (ways * accumulate):
    raise UserError(f'training.batch={batch} in {accumulate} micro-batches does not split over {ways} devices '
                    f'(mesh.data x mesh.fsdp); use a multiple of {ways * accumulate} or a smaller mesh.data')


def shardings_for(axes_tree: Any, mesh: Mesh, shapes: Any) -> Any:
  """NamedSharding of every leaf of `shapes`; `axes_tree` has the same structure with axis names (tuple,
  PartitionSpec or None)."""
  axes = jax.tree.leaves(axes_tree, is_leaf=lambda x: x is None or isinstance(x, tuple | P))
  leaves, treedef = jax.tree.flatten(shapes)
  return treedef.unflatten([NamedSharding(mesh, spec_for(a, leaf.shape, mesh))
                            for a, leaf in zip(axes, leaves, strict=True)])


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedSharding of arrays whose axis 0 is the batch: rows over data and fsdp, replicated where they do not divide."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec_for(('batch', *(None,) * (x.ndim - 1)), x.shape, mesh)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, P())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """The global batch on the devices of the mesh, made of the rows that each process holds."""
  processes = jax.process_count()
  def put(x):
    whole = jax.ShapeDtypeStruct((x.shape[0] * processes, *x.shape[1:]), x.dtype)
    return jax.make_array_from_process_local_data(batch_shardings(whole, mesh), x, whole.shape)
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
