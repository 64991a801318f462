"""LoRA as arithmetic on parameters: start, extract, insert, merge, take back. An adapter is {path of a kernel: Factors}.

The effective kernel is W + sum of weight s A B. Kernels that are scanned are stacks [I, in, out], and so are A and B.
"""
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, scale_of
from memjax.config.schema import ModelConfig
from memjax.models.decoder import build_decoder, init_params, param_shapes

A, B, KERNEL = 'lora_a', 'lora_b', 'kernel'


class Factors(NamedTuple):
  """A [.., in, R] and B [.., R, out] of one kernel, and s."""
  a: jax.Array
  b: jax.Array
  scale: float


Adapter = dict[str, Factors]


def with_lora(config: ModelConfig, lora: LoraConfig) -> ModelConfig:
  """The config with other low-rank changes; `LoraConfig()` for none, which is that of merged or stripped parameters."""
  return dataclasses.replace(config, block=dataclasses.replace(config.block, lora=lora))


def start(config: ModelConfig, params: dict, key: jax.Array) -> dict:
  """The parameters of a host with fresh changes as `config` says: B = 0, so that the model computes what the host does.

  The host's arrays are used as they are. Raises UserError if there are changes already, or none in the config.
  """
  if not config.block.lora.rank: raise UserError('config.model.block.lora.rank is 0: there are no low-rank changes to start')
  model, lora = build_decoder(config), config.block.lora
  param_shapes(model)
  return insert(params, jax.jit(lambda key: _arrays(extract(init_params(model, key)[0], lora)))(key))


def _arrays(adapter: Adapter) -> dict[str, tuple[jax.Array, jax.Array]]:
  return {path: factors[:2] for path, factors in adapter.items()}


def extract(params: dict, lora: LoraConfig) -> Adapter:
  """The changes that parameters hold, the same arrays, by the path of their kernel; s as `lora` says."""
  return {path: Factors(node[A], node[B], scale_of(lora, path)) for path, node in _modules(params) if A in node}


def insert(params: dict, adapter: Mapping[str, Sequence]) -> dict:
  """The parameters with the factors (A, B, ..) of `adapter` beside their kernels.

  Raises UserError for a kernel that is missing, of another shape, or changed already.
  """
  for path, factors in adapter.items():
    node = _module_at(params, path)
    if A in node: raise UserError(f'{path} has a low-rank change already')
    _check_shapes(path, node[KERNEL], factors)
    params = _replaced(params, path, {**node, A: factors[0], B: factors[1]})
  return params


def strip(params: dict) -> dict:
  """The parameters without changes: those of the host, the same arrays."""
  return {name: strip(node) if isinstance(node, dict) else node for name, node in params.items() if name not in (A, B)}


def merge(params: dict, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> dict:
  """The host's parameters with W + sum_i weight_i s_i A_i B_i for W, summed in float32 at least and cast once.

  Changes inside `params` are left out unless `extract` gave them: merge(params, [extract(params, lora)]). The result has no
  changes of its own, so that merging twice is a mistake that cannot be made by accident.
  Raises UserError for changes that are not finite or do not fit; then nothing was made.
  """
  weights = [1.0] * len(adapters) if weights is None else list(weights)
  if len(weights) != len(adapters): raise UserError(f'{len(weights)} weights for {len(adapters)} adapters')
  params, kernels = strip(params), {}
  for adapter in adapters:
    for path, factors in adapter.items(): _check_finite(path, _check_shapes(path, _module_at(params, path)[KERNEL], factors))
  for adapter, weight in zip(adapters, weights, strict=True):
    for path, (a, b, scale) in adapter.items(): kernels.setdefault(path, []).append((a, b, jnp.float32(scale * weight)))
  for path, parts in kernels.items():
    node = _module_at(params, path)
    params = _replaced(params, path, {**node, KERNEL: _summed(node[KERNEL], parts)})
  return params


def unmerge(merged: dict, host: dict) -> dict:
  """The merged parameters with the kernels of `host` put back, bit for bit; all other arrays are those of `merged`.

  Merging rounds, so a difference of parameters cannot be exact: keep the kernels (a tree of them is enough).
  """
  for path, node in _modules(host):
    params_node = _module_at(merged, path)
    merged = _replaced(merged, path, {**params_node, KERNEL: node[KERNEL]})
  return merged


def kernels_of(params: dict, adapters: Sequence[Adapter]) -> dict:
  """The tree of the kernels that adapters change and of nothing else: what `unmerge` needs."""
  kept: dict[str, Any] = {}
  for path in dict.fromkeys(path for adapter in adapters for path in adapter):
    *above, last = path.split('/')
    functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, kept)[last] = _module_at(params, path)[KERNEL]
  return kept


def size_of(adapter: Adapter) -> int:
  """The number of parameters."""
  return sum(factors.a.size + factors.b.size for factors in adapter.values())


@jax.jit
def _summed(kernel: jax.Array, parts: list) -> jax.Array:
  wide = jnp.promote_types(jnp.float32, kernel.dtype)
  total = kernel.astype(wide)
  for a, b, scale in parts:
    total += scale.astype(wide) * jnp.matmul(a.astype(wide), b.astype(wide), precision='highest')
  return total.astype(kernel.dtype)


def _modules(tree: dict, path: str = '') -> list[tuple[str, dict]]:
  """(path of the kernel, module) of every module with a kernel, in order."""
  found = [(f'{path}{KERNEL}', tree)] if KERNEL in tree else []
  return found + [pair for name, node in tree.items() if isinstance(node, dict) for pair in _modules(node, f'{path}{name}/')]


def _module_at(params: dict, path: str) -> dict:
  node: Any = params
  for key in path.split('/')[:-1]: node = node.get(key) if isinstance(node, dict) else None
  if not isinstance(node, dict) or KERNEL not in node or not path.endswith(f'/{KERNEL}'): raise UserError(f'the model has no kernel {path}')
  return node


def _replaced(tree: dict, path: str, module: dict) -> dict:
  """The tree, copied along one path, with another module there."""
  name, _, rest = path.partition('/')
  return {**tree, name: _replaced(tree[name], rest, module) if '/' in rest else module}


def _check_shapes(path: str, kernel: jax.Array, factors: Sequence) -> Sequence:
  (*stack, inputs, features), (a, b) = kernel.shape, factors[:2]
  rank = a.shape[-1]
  if a.shape != (*stack, inputs, rank) or b.shape != (*stack, rank, features):
    raise UserError(f'{path} is {list(kernel.shape)}; a change {list(a.shape)} x {list(b.shape)} does not fit')
  return factors


def _check_finite(path: str, factors: Sequence) -> None:
  if not all(bool(jnp.isfinite(x).all()) for x in factors[:2]): raise UserError(f'the change of {path} holds NaN or infinity')
