"""Memories put after chosen layers of a loaded model: its config, its parameters, and files that hold the memories alone.

Each memory is a layer of its own without feed-forward network, h + Mem(norm h), whose output projection starts at zero, or stands at
the gate of an attention (':mag'), where the gain of its norm starts at zero: the logits are bit-equal to those of the host until the
first update (float32; bfloat16 with XLA's excess precision off).
"""
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import memjax
from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.pretrained import Tensors, load_params, open_pretrained, read_json
from memjax.adapters.quantized import TYPES, QuantizedTensors, is_quantized, packed
from memjax.adapters.safetensors import SafeTensors, write_described
from memjax.config.codec import freeze, leaves, to_json
from memjax.config.errors import ConfigError, UserError, refuse, shown
from memjax.config.layout import BARE, MAG, mixer_names, stages, suffix_of, walk_layers
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import fold, place, shared_out
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, init_params, param_shapes, shared_tables

PARTS = ('prefix', 'repeats', 'suffix')
FILE, DESCRIPTION, VERSION = 'memory_adapter.safetensors', 'memory_config.json', 1
FREE = ('dtype', 'block.dropout', 'block.init_std', 'block.mixer_out_std', 'block.mlp_out_std', 'block.lora', 'block.quant',
        'embedding.std')
LAYOUT = ('prefix', 'pattern', 'repeats', 'suffix')      # and FREE: fields in which equal hosts may differ
SAMPLES = 64                           # numbers of each array of the host that its fingerprint looks at

Home = tuple[tuple[str, str], int]     # part and layer in the parameters, repeat (-1: not scanned)


def graft(config: ModelConfig, memory: Any, *, where: Sequence[int], name: str = 'memory', wiring: str = '', sharing: str = 'per_layer',
          sharing_k: int = 2) -> ModelConfig:
  """The config with a memory after each of the layers `where`, counted from 0 among those of the host, or with `wiring=':mag'` at the
  gate of their first attention that stands alone.

  `place(depth, kind, ...)` gives `where` for a placement. The tables of banks are shared as in `arrange`. May be used again on
  its result, under another name: a later memory stands after an earlier one. Raises ConfigError for layers that are not there,
  a name in use, a sharing of what has no table, a memory that does not go with the width of the host, another wiring, and layers
  without such an attention.
  """
  where = place(host_of(config).depth, 'custom', indices=where)
  names, tables = shared_out(memory, len(where), name=name, sharing=sharing, sharing_k=sharing_k)
  for new in tables: refuse(new in config.mixers, f'name={name!r} is that of another mixer of the model ({new})')
  refuse(wiring not in ('', MAG), f"wiring must be '' or {MAG!r}, not {wiring!r}")
  layers, number, given = [], -1, dict(zip(where, names, strict=True))
  for layer in (*config.layers, ''):
    if not _is_inserted(config, layer):
      if number in given and not wiring: layers.append(f'{given[number]}{BARE}')
      number += 1
      if number in given and wiring: layer = _at_gate(config, layer, given[number])
    layers.append(layer)
  return dataclasses.replace(config, mixers=config.mixers | tables, grafted=(*config.grafted, *tables), **fold(layers[:-1]))


def _at_gate(config: ModelConfig, layer: str, memory: str) -> str:
  """'near+memory:mag>bank' for 'near>bank'."""
  found, bare = layer.removesuffix(BARE).split('>'), BARE if layer.endswith(BARE) else ''
  alone = [n for n, stage in enumerate(found) if isinstance(config.mixers.get(stage), AttentionConfig) and stage not in config.grafted]
  refuse(not alone, f'where names a layer {layer!r} in which no attention stands alone; {MAG!r} joins one')
  return '>'.join(f'{stage}+{memory}{MAG}' if n == alone[0] else stage for n, stage in enumerate(found)) + bare


def _gates(config: ModelConfig, layer: str) -> list[tuple[str, str]]:
  """The modules of a layer, (stage, name), that belong to memories grafted at gates."""
  return [(f'mixers{suffix_of(number)}', name) for number, (names, wiring) in enumerate(stages(layer))
          if wiring == MAG and names[1] in config.grafted for name in (names[1], 'fuse')]


def _without_gates(config: ModelConfig, layer: str) -> str:
  """'near>bank' for 'near+memory:mag>bank'."""
  for names, wiring in stages(layer):
    if wiring == MAG and names[1] in config.grafted: layer = layer.replace(f'+{names[1]}{MAG}', '')
  return layer


def _is_inserted(config: ModelConfig, layer: str) -> bool:
  return layer.endswith(BARE) and set(mixer_names(layer)) <= set(config.grafted)


def host_of(config: ModelConfig) -> ModelConfig:
  """The config without what was grafted; the config itself where nothing was."""
  layers = tuple(_without_gates(config, layer) for layer in config.layers if not _is_inserted(config, layer))
  if layers == config.layers: return config
  gone = {name for layer in config.layers for name in mixer_names(layer)}.difference(*map(mixer_names, layers))
  return dataclasses.replace(config, mixers={name: mixer for name, mixer in config.mixers.items() if name not in gone},
                             grafted=tuple(name for name in config.grafted if name not in gone), **fold(layers))


def adapter_of(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """{path: array} of the memories' parameters: their layers and the tables that they share."""
  inserted = {home for home, _, layer in walk_layers(config) if _is_inserted(config, layer)}
  gates = {(*home, *module) for home, _, layer in walk_layers(config) for module in _gates(config, layer)}
  own = {f'bank_{table}' for table in set(shared_tables(config)) - set(shared_tables(host_of(config)))}
  found = {tuple(path.split('/')): leaf for path, leaf in named(params).items()}
  return {'/'.join(path): leaf for path, leaf in found.items() if path[:2] in inserted or path[:4] in gates or path[0] in own}


def graft_params(host_params: Mapping[str, Any], config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """The parameters of a grafted config: the host's arrays as they are, those of the memories fresh.

  `host_params` are laid out as `host_of(config)`, which is how `load_pretrained` gives them; only where layers are no longer
  scanned together are they cut and joined again. Raises UserError for parameters of another layout.
  """
  fresh = jax.jit(lambda key: adapter_of(init_params(build_decoder(config), key)[0], config))(key)
  return join_adapter(host_params, fresh, config)


def split_adapter(params: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """(the host's parameters in the layout of `host_of(config)`, {path: array} of the memories)."""
  return _laid_out(params, config, host_of(config)), adapter_of(params, config)


def join_adapter(host_params: Mapping[str, Any], adapter: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """The parameters of a grafted config from what `split_adapter` gave. Raises UserError for parts that do not fit it."""
  _compare(named(host_params), named(param_shapes(build_decoder(host_of(config)))[0]), 'the host')
  _compare(adapter, adapter_of(param_shapes(build_decoder(config))[0], config), 'the adapter')
  params = _laid_out(host_params, host_of(config), config)
  def put(node, path, leaf): return {**node, path[0]: put(node.get(path[0], {}), path[1:], leaf)} if path else leaf
  for path, leaf in adapter.items(): params = put(params, path.split('/'), leaf)
  return params


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
  for path in sorted(set(found) ^ set(wanted)):
    raise UserError(f'{what} {"has an unknown" if path in found else "lacks the"} parameter {shown(path)}')
  for path, like in wanted.items():
    if tuple(found[path].shape) != tuple(like.shape):
      raise UserError(f'{what} has a parameter {path} of {list(found[path].shape)}; the config makes it {list(like.shape)}')


def _laid_out(params: Mapping[str, Any], source: ModelConfig, target: ModelConfig) -> dict[str, Any]:
  """The host's part of parameters, laid out as `target` scans its layers. Arrays that stay whole are the same."""
  params = _emptied(params, source)
  homes = [(home, repeat) for home, repeat, layer in walk_layers(source) if not _is_inserted(source, layer)]
  wanted: dict[tuple[str, str], list[Home]] = {}
  kept = [home for home, _, layer in walk_layers(target) if not _is_inserted(target, layer)]
  for home, origin in zip(kept, homes, strict=True): wanted.setdefault(home, []).append(origin)
  tables = {f'bank_{table}' for table in shared_tables(host_of(source))}
  out = {name: node for name, node in params.items() if name not in PARTS and (not name.startswith('bank_') or name in tables)}
  for (part, layer), origins in wanted.items(): out.setdefault(part, {})[layer] = _gather(params, origins, part == 'repeats')
  return out


def _emptied(params: Mapping[str, Any], config: ModelConfig) -> Mapping[str, Any]:
  """The parameters without those of memories at gates."""
  for (part, layer), _, text in walk_layers(config):
    for stage, name in _gates(config, text):
      kept = {n: a for n, a in params[part][layer][stage].items() if n != name}
      params = {**params, part: {**params[part], layer: {**params[part][layer], stage: kept}}}
  return params


def _gather(params: Mapping[str, Any], origins: list[Home], is_scanned: bool) -> Any:
  """One layer of the target: a layer of the source as it is, a slice of one, or slices joined."""
  part, layer = origins[0][0]
  node = params[part][layer]
  length = len(jax.tree.leaves(node)[0])
  if is_scanned and origins == [((part, layer), number) for number in range(length)]: return node
  rows = [params[p][name] if repeat < 0 else jax.tree.map(lambda a, n=repeat: a[n], params[p][name]) for (p, name), repeat in origins]
  return jax.tree.map(lambda *pieces: jnp.stack(pieces), *rows) if is_scanned else rows[0]


def open_host(path: str, *, dtype: str = 'float32') -> tuple[ModelConfig, Tensors]:
  """(config, tensors) of the checkpoint in a Hugging Face folder, a quantised one or a GGUF file; no tensor is moved yet."""
  if is_quantized(path):
    tensors = QuantizedTensors(path, dtype=dtype)
    return tensors.config, tensors
  if os.path.isdir(path): return open_pretrained(path, dtype=dtype)
  file = GgufModel(path)
  return file.config(dtype), file


def load_host(config: ModelConfig, path: str, *, mesh: Mesh | None = None) -> dict[str, Any]:
  """The parameters of the checkpoint at `path`, laid out as the grafted `config`; the memories' are not in the tree.

  Kernels that the config stores in fewer bits are packed as they are read, unless they are packed in the folder.
  Raises UserError for a checkpoint that cannot be read, and for one of another config than the host's.
  """
  found, tensors = open_host(path)
  if name := _difference(found, host_of(config)): raise UserError(f'{path} is not the host of this config: they differ in {name}')
  return load_params(config, packed(tensors, config), mesh=mesh)


def _facts(config: ModelConfig) -> dict[str, Any]:
  """What decides the function and the tensors of a host, however its layers are scanned."""
  tree = {name: value for name, value in leaves(to_json(config)) if not name.startswith((*FREE, *LAYOUT))}
  return tree | {'layers': list(config.layers)}


def _difference(one: ModelConfig, other: ModelConfig) -> str:
  """The first field in which two hosts differ, '' for none."""
  a, b = _facts(one), _facts(other)
  return next((name for name in {**a, **b} if name not in a or name not in b or a[name] != b[name]), '')


def fingerprint(config: ModelConfig, params: Mapping[str, Any]) -> str:
  """A hash of a host: its config and some numbers of each of its arrays, which count in bfloat16, so that the type they
  were loaded in does not. Fields at their default do not count, so that a new field leaves older files valid. `params` are laid out
  as `config`, which has no memories."""
  usual = {**to_json(ModelConfig()), 'mixers': {name: to_json(type(mixer)()) for name, mixer in config.mixers.items()}}
  usual = {name: value for name, value in leaves(usual) if not name.endswith('.kind')}
  facts = {name: value for name, value in _facts(config).items() if name not in usual or usual[name] != value}
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for path, leaf in sorted(named(params).items(), key=lambda item: item[0]):
    size = int(np.prod(leaf.shape))
    at = np.unravel_index(np.arange(0, size, max(1, size // SAMPLES))[:SAMPLES], leaf.shape)
    digest.update(path.encode() + np.asarray(leaf[at]).astype(jnp.bfloat16).tobytes())
  return digest.hexdigest()


def save_adapter(folder: str, config: ModelConfig, params: Mapping[str, Any]) -> None:
  """Writes the memories of grafted parameters: their arrays, tables of banks also in fewer bits, and what they belong to.

  Raises UserError for low-rank changes, which have files of their own, and where the machine refuses.
  """
  if config.block.lora.rank: raise UserError('the adapter would hold low-rank changes; strip or merge them first')
  host, adapter = split_adapter(params, config)
  if not adapter: raise UserError('nothing is grafted; there is no adapter to save')
  text = {'version': VERSION, 'memjax': memjax.__version__, 'host': fingerprint(host_of(config), host), 'model': to_json(config)}
  write_described(folder, (FILE, adapter), (DESCRIPTION, text), TYPES)


def load_adapter(folder: str, host_config: ModelConfig, host_params: Mapping[str, Any], *,
                 force: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
  """(grafted config, parameters) of an adapter in a folder on its host; computed in the host's dtype.

  Raises UserError for files that are missing or damaged and for another host than the one it was made for; `force` allows
  other weights, not another config.
  """
  path = os.path.join(folder, DESCRIPTION)
  tree = read_json(path)
  if tree.get('version') != VERSION: raise UserError(f'{path} is not the description of a memory adapter of version {VERSION}')
  try:
    config = freeze(tree.get('model'), path='model', cls=ModelConfig)
    block = dataclasses.replace(config.block, quant=host_config.block.quant)
    config = dataclasses.replace(config, dtype=host_config.dtype, block=block)
  except ConfigError as error:
    raise UserError(f'{path}: {error}') from None
  if name := _difference(host_config, host_of(config)): raise UserError(f'{path} belongs to another host: they differ in {name}')
  if not force and tree.get('host') != fingerprint(host_config, host_params):
    raise UserError(f'{path} belongs to another host: its weights are not these')
  file = SafeTensors(os.path.join(folder, FILE), TYPES)
  try:
    return config, join_adapter(host_params, {name: jnp.array(file.read(name)) for name in file.entries}, config)
  except UserError as error:
    raise UserError(f'{file.path}: {error}') from None
