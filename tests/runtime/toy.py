"""A tiny decoder config and a hand-written recurrent model with the decoder's interface."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.mixers import WindowConfig
from memjax.config.schema import Config, DataConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig

VOCABULARY = 11
MODEL = ModelConfig(width=8, hidden=16, vocabulary=VOCABULARY, mixers={'near': WindowConfig(heads=2, window=4)},
                    pattern=('near',), repeats=1)
OPTIMIZER = OptimizerConfig(groups={'main': GroupConfig(rate=1e-2, schedule='constant')})
CONFIG = Config(model=MODEL, training=TrainingConfig(batch=8, length=8, steps=6), optimizer=OPTIMIZER)


def tiny(**training) -> Config:
  """CONFIG with other training fields; lanes where the memory is carried."""
  order = 'lanes' if training.get('carry') else 'shuffle'
  training = dataclasses.replace(CONFIG.training, **training)
  return dataclasses.replace(CONFIG, training=training, data=DataConfig(order=order))


def batch(seed=0, rows=8, length=8, ragged=True):
  """Random tokens; positions restart inside some rows, and some targets are not scored."""
  draw = np.random.default_rng(seed)
  position = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  position[1, 3:] -= 3
  weight = draw.random((rows, length)) < 0.7 if ragged else np.ones((rows, length), bool)
  tokens = draw.integers(0, VOCABULARY, (2, rows, length), dtype=np.int32)
  return {'token': tokens[0], 'target': tokens[1], 'position': position, 'weight': weight}


class Recurrent:
  """s <- tanh(A s + e(token)), logits = W s; reset at position 0; token 10 gives NaN logits where `poison`."""

  def __init__(self, poison=False): self.poison, self.config = poison, MODEL

  def init_state(self, rows, max_len=0): return {'s': jnp.zeros((rows, 4))}

  def apply(self, variables, token, state, *, position_BxL, mask_BxL=None, key=None, remat=False, unroll=False, rngs=None):
    p = variables['params']
    def body(s, token):
      x, first = token
      s = jnp.tanh(jnp.where(first[:, None], 0, s) @ p['a'] + p['e'][x])
      return s, s
    s, out = jax.lax.scan(body, state['s'], (token.T, position_BxL.T == 0))
    logits = jnp.swapaxes(out, 0, 1) @ p['w']
    if self.poison: logits = jnp.where((token == 10).any(), jnp.nan, logits)
    return logits, {'s': s}, {'penalty': 0.1 * jnp.mean(p['a'] ** 2)}

  def params(self):
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = {'a': (4, 4), 'e': (VOCABULARY, 4), 'w': (4, VOCABULARY)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
