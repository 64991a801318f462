"""The table of memories: config kind -> module."""
from typing import Any

from memjax.config.errors import UserError
from memjax.memory.attention import Attention, Window
from memjax.memory.bank import Bank
from memjax.memory.base import Memory
from memjax.memory.context import Context
from memjax.memory.holographic import Holographic
from memjax.memory.holographic_seed import HolographicSeed
from memjax.memory.neural import Neural
from memjax.memory.neural_gated import NeuralGated
from memjax.memory.neural_tnt import NeuralTnt
from memjax.memory.neural_waiting import NeuralWaiting
from memjax.memory.product_key import ProductKey
from memjax.memory.table import EntryTable, ValueTable

MEMORIES: dict[str, type[Memory]] = {
    'attention': Attention, 'window': Window, 'holographic': Holographic, 'holographic_seed': HolographicSeed,
    'context': Context, 'neural': Neural, 'bank': Bank, 'product_key': ProductKey}
TABLES = {'bank': EntryTable, 'product_key': ValueTable}


def memory_class(config: Any) -> type[Memory]:
  """The module class of one mixer config."""
  if config.kind not in MEMORIES: raise UserError(f'no memory of kind {config.kind!r}; known: {", ".join(sorted(MEMORIES))}')
  if config.kind == 'neural' and config.rule.mode == 'tnt': return NeuralTnt
  if config.kind == 'neural' and config.waits: return NeuralWaiting
  if config.kind == 'neural' and config.gates.surprise: return NeuralGated
  return MEMORIES[config.kind]


def make_memory(config: Any, width: int, **options: Any) -> Memory:
  """The module of one mixer config; `options` are the fields of `Memory` (dtype, std, grafted, lora, name, parent)."""
  return memory_class(config)(config, width, **options)


def make_table(config: Any, width: int, **options: Any) -> Any:
  """The module of the table that a bank shares with others."""
  return TABLES[config.kind](config, width, **options)
