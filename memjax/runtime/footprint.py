"""What a model holds: parameters and bytes by part, state and gradients; of its banks also entries and their keys and values."""
import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from memjax.config.banks import BANKS, BankQuantConfig, shared_table
from memjax.config.errors import UserError
from memjax.config.layout import mixer_names
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import CHANGES, TABLE, share
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named, nbytes
from memjax.memory.registry import make_table
from memjax.models.decoder import param_shapes, prepare_memories
from memjax.models.quantized import SCHEMES
from memjax.ops.quantize import packed_shapes


def bank_layers(config: ModelConfig) -> dict[str, int]:
  """{mixer: layers that hold it} of the banks in use."""
  count = collections.Counter(name for layer in config.layers for name in mixer_names(layer))
  return {name: count[name] for name in config.mixers if count[name] and config.mixers[name].kind in BANKS}


def unshared(mixer_config: Any) -> Any:
  """A mixer whose table, if layers share it, is its own instead: it can be built alone, at the same cost."""
  return share(mixer_config, '') if shared_table(mixer_config) else mixer_config


def entries_of(mixer_config: Any) -> tuple[int, int]:
  """(entries of the table, entries that a token reads; those of a product key are values, at most)."""
  if mixer_config.kind == 'product_key': return mixer_config.keys ** 2, mixer_config.heads * mixer_config.top_k
  shape = mixer_config.shape
  if not shape.chapters: return shape.entries, shape.entries
  return shape.entries, (mixer_config.router.top_k + mixer_config.mixing.shared) * (shape.entries // shape.chapters)


def table_footprint(mixer_config: Any, width: int) -> dict[str, Any]:
  """{'entries', 'parameters', 'stored_bytes', 'bytes': {format: bytes}} of one table, from shapes alone.

  The formats are float32, bfloat16 and, for banks whose rows they divide, those of `--quantize`, scales included.
  """
  shapes = lambda config: jax.eval_shape(lambda: make_table(config, width, parent=None).init(jax.random.key(0)))
  plain = dataclasses.replace(mixer_config, quant=BankQuantConfig()) if mixer_config.kind == 'bank' else mixer_config
  arrays = jax.tree.leaves(shapes(plain))
  size = sum(math.prod(a.shape) for a in arrays)
  found = {'float32': 4 * size, 'bfloat16': 2 * size}
  for name, (bits, _, group) in SCHEMES.items() if mixer_config.kind == 'bank' else ():
    try: found[name] = sum(nbytes(packed_shapes(a.shape, bits=bits, group=group)) for a in arrays)
    except UserError: continue                         # rows that the format does not divide
  return {'entries': entries_of(mixer_config)[0], 'parameters': size, 'stored_bytes': nbytes(shapes(mixer_config)), 'bytes': found}


def bank_footprint(model: Any) -> dict[str, Any]:
  """{} for a model without banks, else totals and their parts, from shapes alone; nothing is computed.

  'tables': {name: `table_footprint` and 'copies'}, one that layers share as 'bank_NAME'. 'layers': {mixer: 'layers', 'table',
  'active_entries' (those that a token reads), 'prepared_bytes' (keys and values, or values, of all its layers)}. 'entries',
  'parameters', 'stored_bytes', 'active_entries', 'prepared_bytes' and 'bytes' by format are sums over the model.
  """
  config, used = model.config, bank_layers(model.config)
  if not used: return {}
  prepared = named(jax.eval_shape(functools.partial(prepare_memories, model), param_shapes(model)[0]))
  tables, layers = {}, {}
  for name, count in used.items():
    mixer = config.mixers[name]
    table = f'bank_{shared_table(mixer)}' if shared_table(mixer) else name
    if table not in tables: tables[table] = {**table_footprint(mixer, config.width), 'copies': 1 if shared_table(mixer) else count}
    size = nbytes([leaf for path, leaf in prepared.items() if path.split('/')[2] == name])
    layers[name] = {'layers': count, 'table': table, 'active_entries': entries_of(mixer)[1], 'prepared_bytes': size}
  total = lambda key: sum(table[key] * table['copies'] for table in tables.values())
  formats = [name for name in ('float32', 'bfloat16', *SCHEMES) if all(name in table['bytes'] for table in tables.values())]
  return {'tables': tables, 'layers': layers, **{key: total(key) for key in ('entries', 'parameters', 'stored_bytes')},
          'bytes': {name: sum(t['bytes'][name] * t['copies'] for t in tables.values()) for name in formats},
          'active_entries': sum(layer['active_entries'] * layer['layers'] for layer in layers.values()),
          'prepared_bytes': sum(layer['prepared_bytes'] for layer in layers.values())}


# The whole model --------------------------------------------------------------------------------------------------------------

PARTS = ('embedding', 'attention', 'feed-forward', 'norms', 'head', 'low-rank', 'memory', 'routers', 'banks')
TOP = {'embed': 'embedding', 'position': 'embedding', 'head': 'head', 'norm': 'norms'}
PACKED_NUMBERS = {'int8': 1, 'uint8': 2}       # numbers in one element of codes, by its type


def part_of(path: str, config: ModelConfig) -> str:
  """The one of `PARTS` that a parameter belongs to; whatever was grafted is memory, routers or banks, its norms included."""
  if re.search(CHANGES, path): return 'low-rank'
  if path.startswith('bank_') or re.search(TABLE, path): return 'banks'
  top, *rest = path.split('/')
  if top in TOP: return TOP[top]
  layer, module, *inner = rest
  layers = {'prefix': config.prefix, 'repeats': config.pattern, 'suffix': config.suffix}[top]
  names = mixer_names(layers[int(layer.removeprefix('layer_'))])
  if 'router' in inner: return 'routers'
  is_attention = lambda name: isinstance(config.mixers[name], AttentionConfig) and name not in config.grafted
  if not any(map(is_attention, names)) and any(name in config.grafted for name in names): return 'memory'
  if module.startswith('norm_'): return 'norms'
  if module == 'mlp': return 'feed-forward'
  if inner[0] not in names or not is_attention(inner[0]): return 'memory'
  return 'norms' if inner[1].endswith('_norm') else 'attention'


def parts_footprint(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, dict[str, int]]:
  """{part: {'parameters', 'bytes', 'packed_bytes'}} of parameters (arrays or shapes): every array in exactly one part.

  `packed_bytes` are those of codes and their scales. A code counts as the numbers that it stands for, a scale as none.
  """
  parts = {part: {'parameters': 0, 'bytes': 0, 'packed_bytes': 0} for part in PARTS}
  flat = named(params)
  for path, leaf in flat.items():
    part, size = parts[part_of(path, config)], math.prod(leaf.shape)
    is_scale, is_code = path.removesuffix('_scale') + '_codes' in flat and path.endswith('_scale'), path.endswith('_codes')
    part['bytes'] += size * leaf.dtype.itemsize
    part['packed_bytes'] += size * leaf.dtype.itemsize * (is_scale or is_code)
    part['parameters'] += 0 if is_scale else size * PACKED_NUMBERS.get(leaf.dtype.name, 1)
  return {part: counts for part, counts in parts.items() if counts['bytes']}


def _states(config: ModelConfig, state: Mapping[str, Any]) -> Iterator[tuple[bool, Any]]:
  """(whether it is that of an attention, leaf) of all leaves of a state."""
  for path, leaf in named(state).items():
    yield isinstance(config.mixers.get(path.split('/')[2]), AttentionConfig), leaf


def footprint(model: Any, params: Mapping[str, Any], *, batch: int, length: int, optimizer: Any = None) -> dict[str, Any]:
  """What a model takes at `batch` rows of `length` tokens, from shapes alone: JSON values.

  'parts', with sums 'parameters', 'bytes' and 'packed_bytes'; 'attention_bytes' (keys and values of the text) and 'memory_bytes'
  of the state; 'prepared_bytes', keys and values of banks; 'active_entries', those that a token reads, of 'effective_tokens', all
  that it can reach; 'compression', the bytes that attention would take for as many tokens by those of the banks (0 = no banks).
  With an optimiser also 'trainable', 'trainable_share', 'optimizer_bytes' and 'gradient_bytes'.
  """
  config, parts = model.config, parts_footprint(model.config, params)
  total = {key: sum(part[key] for part in parts.values()) for key in ('parameters', 'bytes', 'packed_bytes')}
  size_of_state = lambda tokens: [nbytes([leaf for is_attention, leaf in _states(
      config, jax.eval_shape(lambda: model.init_state(batch, tokens))) if is_attention == wanted]) for wanted in (True, False)]
  attention, memory = size_of_state(length)
  banks = bank_footprint(model)
  found = {'batch': batch, 'length': length, 'parts': parts, **total, 'attention_bytes': attention, 'memory_bytes': memory,
           'prepared_bytes': banks.get('prepared_bytes', 0), 'active_entries': banks.get('active_entries', 0),
           'effective_tokens': banks.get('entries', 0), 'compression': 0.0}
  if banks:
    stored = parts.get('banks', {}).get('bytes', 0)
    found['compression'] = size_of_state(banks['entries'])[0] / batch / stored
  if optimizer is None: return found
  trainable = optimizer.split(params)[0]
  counted = sum(math.prod(leaf.shape) for leaf in trainable.values())
  return found | {'trainable': counted, 'trainable_share': counted / total['parameters'], 'gradient_bytes': nbytes(trainable),
                  'optimizer_bytes': nbytes(jax.eval_shape(optimizer.init, params))}


def footprint_table(found: Mapping[str, Any]) -> str:
  """The lines that say what `footprint` found."""
  rows = [(part, *counts.values()) for part, counts in found['parts'].items()]
  rows.append(('total', found['parameters'], found['bytes'], found['packed_bytes']))
  lines = [f'{"part":14}{"parameters":>16}{"bytes":>18}{"of them packed":>18}']
  lines += [f'{part:14}{numbers:>16,}{size:>18,}{packed:>18,}' for part, numbers, size, packed in rows]
  names = {'attention_bytes': 'keys and values of texts', 'memory_bytes': 'state of memories', 'prepared_bytes': 'keys and values of banks',
           'gradient_bytes': 'gradients', 'optimizer_bytes': 'optimiser'}
  facts = {f'{text}': f'{found[name]:,} bytes' for name, text in names.items() if found.get(name)}
  if found['effective_tokens']:
    facts['entries read a token'] = f'{found["active_entries"]:,} of {found["effective_tokens"]:,}'
    facts['against attention'] = f'{found["compression"]:.3g} times smaller than keys and values of as many tokens'
  if 'trainable' in found: facts['trained'] = f'{found["trainable"]:,} parameters, {found["trainable_share"]:.3%}'
  head = f'at {found["batch"]} x {found["length"]:,} tokens'
  return '\n'.join([*lines, '', head, *(f'  {name + ":":28}{value}' for name, value in facts.items())])
