"""What the banks of a model hold: entries, parameters, bytes in several formats, bytes of their keys and values."""
import collections
import dataclasses
import functools
import math
from typing import Any

import jax

from memjax.config.banks import BANKS, BankQuantConfig, shared_table
from memjax.config.errors import UserError
from memjax.config.layout import mixer_names
from memjax.config.placement import share
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
