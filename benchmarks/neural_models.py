"""The models that compare memories learning at test time with attention: a window with and without a memory, by the wirings of Titans."""
from typing import Any

from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralGatesConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import BlockConfig, ModelConfig

LAYERS = {                                 # name -> layer; the first sets the number of parameters
  'MAC': 'near+deep:mac', 'MAG': 'near+deep:mag', 'MAL': 'deep>near', 'LMM': 'deep', 'window + linear exact': 'near+exact:mag',
  'window + holographic': 'near+holographic:mag', 'window': 'near', 'attention': 'full',
}
NAMES = tuple(LAYERS)


def deep_memory(*, heads: int, chunk: int, base: float, bias: float, expansion: int = 4) -> NeuralConfig:
  """A network of two layers a head; `base` and `bias` set its step size."""
  return NeuralConfig(heads=heads, chunk=chunk, net=NeuralNetConfig(expansion=expansion),
                      gates=NeuralGatesConfig(theta_base=base, theta_bias=bias))


def exact_memory(*, heads: int, chunk: int) -> NeuralConfig:
  """One matrix a head under the online rule."""
  return NeuralConfig(heads=heads, chunk=chunk, net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'))


def model_config(name: str, *, width: int, layers: int, heads: int, window: int, vocabulary: int, dtype: str, chunk: int = 64,
                 base: float = 1.0, bias: float = 0.0, dropout: float = 0.0, hidden: int = 0) -> ModelConfig:
  """One of NAMES; all layers alike."""
  every: dict[str, Any] = {
      'near': WindowConfig(heads=heads, window=window), 'full': AttentionConfig(heads=heads), 'holographic': HolographicConfig(heads=heads),
      'deep': deep_memory(heads=heads, chunk=chunk, base=base, bias=bias), 'exact': exact_memory(heads=heads, chunk=chunk)}
  layer = LAYERS[name]
  mixers = {key: every[key] for key in layer.partition(':')[0].replace('>', '+').split('+')}
  return ModelConfig(width=width, hidden=hidden, vocabulary=vocabulary, mixers=mixers, pattern=(layer,), repeats=layers,
                     block=BlockConfig(dropout=dropout), dtype=dtype)
