"""Layers that are scanned together as layers of their own: for generation, where the scan would copy each layer's weights and
the stack of all states at every token."""
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from memjax.config.layout import walk_layers
from memjax.config.schema import ModelConfig


def unrolled(config: ModelConfig) -> ModelConfig:
  """The config of the same function without repeats: all its layers stand in `prefix`."""
  if not config.repeats: return config
  return dataclasses.replace(config, prefix=config.layers, pattern=(), repeats=0, suffix=())


def unroll_params(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Parameters of `config` laid out as `unrolled(config)`; arrays that were not scanned are the same."""
  if not config.repeats: return dict(params)
  out = {name: node for name, node in params.items() if name not in ('prefix', 'repeats', 'suffix')}
  out['prefix'] = {f'layer_{number}': _layer(params[part][layer], repeat)
                   for number, ((part, layer), repeat, _) in enumerate(walk_layers(config))}
  return out


def _layer(node: Any, repeat: int) -> Any:
  return node if repeat < 0 else jax.tree.map(lambda stack: stack[repeat], node)
