"""The models that compare memories learning at test time with attention: a window with and without a memory, by the wirings of Titans."""
from typing import Any

import jax
import jax.numpy as jnp

from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralGatesConfig, NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig
from memjax.config.titans import TitansConfig

LAYERS = {                                 # name -> layer; the first sets the number of parameters
  'MAC': 'near+deep:mac', 'MAC, input': 'near+deep:mac', 'MAC, attention': 'near+deep:mac',
  'MAG': 'near+deep:mag', 'MAL': 'deep>near', 'LMM': 'deep',
  'window + linear exact': 'near+exact:mag', 'window + holographic': 'near+holographic:mag', 'window': 'near', 'attention': 'full',
}
WRITES = {'MAC': 'sum', 'MAC, input': 'input'}             # what the memory of ':mac' learns from; others: from what attention found
NAMES, MEMORIES = tuple(LAYERS), ('deep', 'exact', 'holographic')


def model_config(name: str, *, width: int, layers: int, heads: int, window: int, vocabulary: int, dtype: str, chunk: int = 64,
                 base: float = 1.0, bias: float = 0.0, lookahead: bool = False, aligned: bool = True, unroll: int = 0,
                 fuse: str = 'double_sigmoid', dropout: float = 0.0, hidden: int = 0,
                 embedding: EmbeddingConfig = EmbeddingConfig()) -> ModelConfig:
  """One of NAMES; all layers alike. `base` and `bias` set the step size of deep memories, `lookahead` how both neural ones pair tokens.

  `aligned`: rows are whole documents or whole chunks of one, so that the form token by token need not be compiled. `fuse`: how
  wirings of two join them.
  """
  shared = dict(heads=heads, chunk=chunk, proj=NeuralProjConfig(lookahead=lookahead), exec=NeuralExecConfig(aligned=aligned, unroll=unroll))
  every: dict[str, Any] = {
      'near': WindowConfig(heads=heads, window=window), 'full': AttentionConfig(heads=heads), 'holographic': HolographicConfig(heads=heads),
      'deep': NeuralConfig(gates=NeuralGatesConfig(theta_base=base, theta_bias=bias), **shared),
      'exact': NeuralConfig(net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'), **shared)}
  layer = LAYERS[name]
  titans = TitansConfig(fuse=fuse if ':' in layer else 'double_sigmoid', write=WRITES.get(name, 'attention'))
  mixers = {key: every[key] for key in layer.partition(':')[0].replace('>', '+').split('+')}
  return ModelConfig(width=width, hidden=hidden, vocabulary=vocabulary, mixers=mixers, pattern=(layer,), repeats=layers,
                     block=BlockConfig(dropout=dropout, titans=titans), embedding=embedding, dtype=dtype)


def ways(config: ModelConfig) -> tuple[str, ...]:
  """What `held` can do with one of NAMES: ('on', 'frozen', 'off'), less where no memory learns, or none has a step size."""
  return ('on', *('frozen' for name in ('deep', 'exact') if name in config.mixers), *('off' for name in MEMORIES if name in config.mixers))


def held(params: Any, way: str) -> Any:
  """The parameters of one of NAMES with which its memories never learn: 'frozen' with step sizes of zero, 'off' with reads of zero.

  One compiled program then serves all three; `off` gives the logits of `--test_time off`, `frozen` those of `--test_time frozen` but
  for the short convolution, which still sees the tokens before.
  """
  def of(path, leaf):
    keys = [key.key for key in path]
    if not {*MEMORIES, 'recall'}.intersection(keys): return leaf
    if way != 'on' and keys[-1] == 'theta_bias': return jnp.full_like(leaf, -1e9)
    return jnp.zeros_like(leaf) if way == 'off' and keys[-2:] == ['out', 'kernel'] else leaf
  return jax.tree_util.tree_map_with_path(of, params)
