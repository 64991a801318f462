"""LoRA as arithmetic on parameters: start, extract, insert, merge, take back. An adapter is {path of a kernel: Factors}.

The effective kernel is W + sum of weight s A B, or m (W + s A B) / ||W + s A B|| with magnitudes m (DoRA). Kernels that are scanned
are stacks [I, in, out], and so are A and B. `quant` says how the kernels of a host are stored (`config.block.quant`).
"""
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, scale_of
from memjax.config.quant import PACKED, QuantConfig
from memjax.config.schema import ModelConfig
from memjax.layers.lora import FLOAT
from memjax.layers.tree import named, nbytes
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.models.quantized import CODES, SCALE, Report, pack_kernel, relative_error, stored_kernel
from memjax.ops.low_rank import as_kernel, kernel_norms
from memjax.ops.quantize import Quantized

A, B, M, KERNEL = 'lora_a', 'lora_b', 'lora_m', 'kernel'


class Factors(NamedTuple):
  """A [.., in, R] and B [.., R, out] of one kernel, s, and for DoRA the magnitudes m [.., out] of its columns."""
  a: jax.Array
  b: jax.Array
  scale: float
  magnitude: jax.Array | None = None


Adapter = dict[str, Factors]


def with_lora(config: ModelConfig, lora: LoraConfig) -> ModelConfig:
  """The config with other low-rank changes; `LoraConfig()` for none, which is that of merged or stripped parameters."""
  return dataclasses.replace(config, block=dataclasses.replace(config.block, lora=lora))


def start(config: ModelConfig, params: dict, key: jax.Array) -> dict:
  """The parameters of a host with fresh changes as `config` says: B = 0, so that the model computes what the host does.

  The host's arrays are used as they are. Raises UserError if there are changes already, or none in the config.
  """
  if not config.block.lora.rank: raise UserError('config.model.block.lora.rank is 0: there are no low-rank changes to start')
  model = build_decoder(config)
  param_shapes(model)
  fresh = jax.jit(lambda key: {path: x for path, x in named(init_params(model, key)[0]).items() if path.endswith((A, B, M))})(key)
  modules: dict[str, dict] = {}
  for path, x in fresh.items(): modules.setdefault(path.rpartition('/')[0], {})[path.rpartition('/')[2]] = x
  for path, own in modules.items(): params = _with_change(params, f'{path}/{KERNEL}', own, config.block.quant)
  return params


def extract(params: dict, lora: LoraConfig, quant: QuantConfig = FLOAT) -> Adapter:
  """The changes that parameters hold, the same arrays, by the path of their kernel; s as `lora` says, m = ||W|| + how far it moved."""
  def magnitude(node): return _norms(stored_kernel(node, quant)) + node[M] if M in node else None
  return {path: Factors(node[A], node[B], scale_of(lora, path), magnitude(node)) for path, node in _modules(params) if A in node}


def insert(params: dict, adapter: Mapping[str, Factors], quant: QuantConfig = FLOAT) -> dict:
  """The parameters with the factors of `adapter` beside their kernels.

  Raises UserError for a kernel that is missing, of another shape, or changed already.
  """
  for path, factors in adapter.items():
    own = {A: factors.a, B: factors.b}
    if factors.magnitude is not None: own[M] = factors.magnitude - _norms(stored_kernel(module_at(params, path), quant))
    params = _with_change(params, path, own, quant)
  return params


def _with_change(params: dict, path: str, own: dict, quant: QuantConfig) -> dict:
  node = module_at(params, path)
  if A in node: raise UserError(f'{path} has a low-rank change already')
  _check_shapes(path, stored_kernel(node, quant), Factors(own[A], own[B], 0.0))
  return replaced(params, path, {**node, **own})


def strip(params: dict) -> dict:
  """The parameters without changes: those of the host, the same arrays."""
  return {name: strip(node) if isinstance(node, dict) else node for name, node in params.items() if name not in (A, B, M)}


def merge(params: dict, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> dict:
  """The host's parameters with W + sum_i weight_i s_i A_i B_i for W, summed in float32 at least and cast once.

  Changes inside `params` are left out unless `extract` gave them: merge(params, [extract(params, lora)]). The result has no
  changes of its own, so that merging twice is a mistake that cannot be made by accident.
  A change with magnitudes is no sum: it is merged alone, with weight 1.
  Raises UserError for changes that are not finite or do not fit, and for kernels of integers (`merge_quantized`); then nothing was made.
  """
  for path in (path for adapter in adapters for path in adapter):
    if CODES in module_at(params, path): raise UserError(f'{path} is stored as integers; merge_quantized merges there')
  params, parts = strip(params), _parts(params, adapters, weights)
  for path, changes in parts.items():
    node = module_at(params, path)
    params = replaced(params, path, {**node, KERNEL: _summed(node[KERNEL], changes)})
  return params


def merge_quantized(config: ModelConfig, params: dict, adapters: Sequence[Adapter],
                    weights: Sequence[float] | None = None) -> tuple[dict, Report]:
  """(parameters, report) of `merge` on kernels of integers: each that changes is written out, merged and packed again.

  The report's error is what packing the merged kernel loses, |W'' - W'| / |W'|; the codes had lost as much when the host was packed,
  so that merging into the float host and packing once is better where there is one. Raises UserError as `merge`.
  """
  quant, host = config.block.quant, params
  if quant.storage not in PACKED: raise UserError('the kernels are not stored as integers; merge does it')
  params, error = strip(params), {}
  for path, changes in _parts(params, adapters, weights, quant).items():
    node = module_at(params, path)
    kernel = _summed(as_kernel(stored_kernel(node, quant)), changes)
    if CODES not in node: new = {KERNEL: kernel.astype(node[KERNEL].dtype)}
    else:
      stored = pack_kernel(kernel, quant.storage)
      new, error[path] = {CODES: stored.codes, SCALE: stored.scale}, float(relative_error(stored, kernel))
    params = replaced(params, path, {**node, **new})
  return params, Report(nbytes(host), nbytes(params), error)


def _parts(params: dict, adapters: Sequence[Adapter], weights: Sequence[float] | None, quant: QuantConfig = FLOAT) -> dict[str, list]:
  """{path: [(A, B, weight s, m or None), ..]} of what is merged into each kernel, once all was checked."""
  weights, parts = [1.0] * len(adapters) if weights is None else list(weights), {}
  if len(weights) != len(adapters): raise UserError(f'{len(weights)} weights for {len(adapters)} adapters')
  for adapter, weight in zip(adapters, weights, strict=True):
    for path, factors in adapter.items():
      _check_finite(path, _check_shapes(path, stored_kernel(module_at(params, path), quant), factors))
      parts.setdefault(path, []).append((factors.a, factors.b, jnp.float32(factors.scale * weight), factors.magnitude))
      if any(m is not None for *_, m in parts[path]) and (len(parts[path]) > 1 or weight != 1):
        raise UserError(f'the change of {path} has magnitudes (DoRA); it is merged alone, with weight 1')
  return parts


def unmerge(merged: dict, host: dict) -> dict:
  """The merged parameters with the kernels of `host` put back, bit for bit; all other arrays are those of `merged`.

  Merging rounds, so a difference of parameters cannot be exact: keep the kernels (a tree of them is enough).
  """
  for path, node in _modules(host): merged = replaced(merged, path, {**module_at(merged, path), **_kernel_of(node)})
  return merged


def kernels_of(params: dict, adapters: Sequence[Adapter]) -> dict:
  """The tree of the kernels that adapters change and of nothing else: what `unmerge` needs."""
  kept: dict[str, Any] = {}
  for path in dict.fromkeys(path for adapter in adapters for path in adapter):
    functools.reduce(lambda tree, key: tree.setdefault(key, {}), path.split('/')[:-1], kept).update(_kernel_of(module_at(params, path)))
  return kept


def _kernel_of(module: dict) -> dict:
  return {name: x for name, x in module.items() if name in (KERNEL, CODES, SCALE)}


def size_of(adapter: Adapter) -> int:
  """The number of parameters."""
  return sum(x.size for a, b, _, m in adapter.values() for x in (a, b, m) if x is not None)


@jax.jit
def _summed(kernel: jax.Array, parts: list) -> jax.Array:
  wide = jnp.promote_types(jnp.float32, kernel.dtype)
  total = kernel.astype(wide)
  for a, b, scale, magnitude in parts:
    total += scale.astype(wide) * jnp.matmul(a.astype(wide), b.astype(wide), precision='highest')
    if magnitude is not None: total *= (magnitude.astype(wide) / kernel_norms(total))[..., None, :]
  return total.astype(kernel.dtype)


_norms = jax.jit(kernel_norms)


def _modules(tree: dict, path: str = '') -> list[tuple[str, dict]]:
  """(path of the kernel, module) of every module with a kernel, in order."""
  found = [(f'{path}{KERNEL}', tree)] if KERNEL in tree or CODES in tree else []
  return found + [pair for name, node in tree.items() if isinstance(node, dict) for pair in _modules(node, f'{path}{name}/')]


def module_at(params: dict, path: str) -> dict:
  """The module of the kernel at a path. Raises UserError where there is none."""
  node: Any = params
  for key in path.split('/')[:-1]: node = node.get(key) if isinstance(node, dict) else None
  is_there = isinstance(node, dict) and _kernel_of(node) and path.endswith(f'/{KERNEL}')
  if not is_there: raise UserError(f'the model has no kernel {path}')
  return node


def replaced(tree: dict, path: str, module: dict) -> dict:
  """The tree, copied along one path, with another module there."""
  name, _, rest = path.partition('/')
  return {**tree, name: replaced(tree[name], rest, module) if '/' in rest else module}


def _check_shapes(path: str, kernel: jax.Array | Quantized, factors: Factors) -> Factors:
  *stack, inputs, features = (*kernel.shape[:-2], *kernel.shape[-1:-3:-1]) if isinstance(kernel, Quantized) else kernel.shape
  (a, b, _, m), rank = factors, factors.a.shape[-1]
  if a.shape != (*stack, inputs, rank) or b.shape != (*stack, rank, features):
    raise UserError(f'{path} is {[*stack, inputs, features]}; a change {list(a.shape)} x {list(b.shape)} does not fit')
  if m is not None and m.shape != (*stack, features):
    raise UserError(f'{path} is {[*stack, inputs, features]}; magnitudes {list(m.shape)} do not fit')
  return factors


def _check_finite(path: str, factors: Factors) -> None:
  if all(x is None or bool(jnp.isfinite(x).all()) for x in (factors.a, factors.b, factors.magnitude)): return
  raise UserError(f'the change of {path} holds NaN or infinity')
