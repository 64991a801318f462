"""The models that `benchmarks.language` compares, with equal numbers of parameters."""
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from memjax.config.mixers import AddressConfig, AttentionConfig, BindingConfig, HolographicConfig, WindowConfig
from memjax.config.schema import BlockConfig, ModelConfig
from memjax.models.decoder import build_decoder, param_shapes

NAMES = ('hybrid', 'attention', 'holographic', 'holographic, no binding', 'hybrid, no binding', 'window')


def model_config(name: str, *, width: int, layers: int, heads: int, window: int, vocabulary: int, dropout: float, dtype: str,
                 hidden: int = 0) -> ModelConfig:
  """One of NAMES; layers are unrolled. Without binding, the key and query streams are the addresses (gated linear attention)."""
  free = dict(binding=BindingConfig(kind='none'), address=AddressConfig(source='key'))
  memory = HolographicConfig(heads=heads, **(free if name.endswith('no binding') else {}))
  mixers = {'swa': WindowConfig(heads=heads, window=window), 'mem': memory, 'attention': AttentionConfig(heads=heads)}
  pattern = {'hybrid': ('swa', 'mem'), 'holographic': ('mem',), 'attention': ('attention',), 'window': ('swa',)}[name.split(',')[0]]
  stack = (pattern * layers)[:layers]
  return ModelConfig(width=width, hidden=hidden, vocabulary=vocabulary, mixers={n: mixers[n] for n in sorted(set(stack))}, pattern=(),
                     repeats=0, prefix=stack, block=BlockConfig(dropout=dropout), dtype=dtype)


def parameters(config: ModelConfig) -> int:
  """Number of parameters, nothing computed."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(build_decoder(config))[0]))


def matched(config: ModelConfig, count: int) -> ModelConfig:
  """The config with the hidden width, a multiple of 8, that brings it nearest to `count` parameters.

  The count is linear in the hidden width. Raises ValueError where the mixers alone exceed it.
  """
  low, high = (parameters(dataclasses.replace(config, hidden=hidden)) for hidden in (8, 16))
  hidden = 8 * round((count - low) / (high - low) + 1)
  if hidden < 8: raise ValueError(f'{count} parameters are fewer than the mixers need')
  return dataclasses.replace(config, hidden=hidden)


def decays(params: Any) -> Any:
  """A tree of bools: the matrices, which alone decay; not tables, taps, biases or scales."""
  def of(path, leaf):
    last, stacked = jax.tree_util.keystr(path[-1:]), 'repeats' in jax.tree_util.keystr(path[:1])
    return bool(np.ndim(leaf) > 1 + stacked and not any(word in last for word in ('table', 'taps', 'bias', 'scale')))
  return jax.tree_util.tree_map_with_path(of, params)
