"""Loss-free balancing: the selection bias of each router moves with the use of its chapters, after the optimiser step."""
from typing import Any

import jax
import jax.numpy as jnp

from memjax.config.layout import mixer_path
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named, unnamed

BIAS = 'selection_bias'
LOAD = 'load'                          # what the model's aux calls the use of chapters


def is_bias(path: str) -> bool:
  """Whether a parameter is a selection bias: no gradient, no optimiser state."""
  return path.endswith(f'/{BIAS}')


def move_biases(config: ModelConfig, params: Any, load: dict[str, jax.Array]) -> Any:
  """Parameters with e_i + rate * sign(mean c - c_i) for every bias e (DeepSeek-AI 2024), c the use of the chapters in `load`.

  `load` names a memory 'part/layer/mixer', as the model's aux does; arrays are [P] or, of scanned layers, [I, P].
  """
  flat = named(params)
  for place, use in load.items():
    part, layer, mixer = place.split('/')
    path = f'{mixer_path(config, part, layer, mixer)}/router/{BIAS}'
    step = jnp.sign(use.mean(-1, keepdims=True) - use)
    flat[path] = flat[path] + config.mixers[mixer].loss.bias_rate * step.astype(flat[path].dtype)
  return unnamed(flat, params)
