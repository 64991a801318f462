"""The table of memories: config kind -> module."""
from typing import Any

from memjax.config.errors import UserError
from memjax.memory.attention import Attention, Window
from memjax.memory.base import Memory
from memjax.memory.holographic import Holographic
from memjax.memory.holographic_seed import HolographicSeed

MEMORIES: dict[str, type[Memory]] = {
    'attention': Attention, 'window': Window, 'holographic': Holographic, 'holographic_seed': HolographicSeed}


def make_memory(config: Any, width: int, **options: Any) -> Memory:
  """The module of one mixer config; `options` are the fields of `Memory` (dtype, std, grafted, name, parent)."""
  if config.kind not in MEMORIES: raise UserError(f'no memory of kind {config.kind!r}; known: {", ".join(sorted(MEMORIES))}')
  return MEMORIES[config.kind](config, width, **options)
