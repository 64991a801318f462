"""The models that compare memories learning at test time with attention: a window with and without a memory, by the wirings of Titans."""
from typing import Any

from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralGatesConfig, NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig

LAYERS = {                                 # name -> layer; the first sets the number of parameters
  'MAC': 'near+deep:mac', 'MAG': 'near+deep:mag', 'MAL': 'deep>near', 'LMM': 'deep', 'window + linear exact': 'near+exact:mag',
  'window + holographic': 'near+holographic:mag', 'window': 'near', 'attention': 'full',
}
NAMES = tuple(LAYERS)


def model_config(name: str, *, width: int, layers: int, heads: int, window: int, vocabulary: int, dtype: str, chunk: int = 64,
                 base: float = 1.0, bias: float = 0.0, lookahead: bool = False, dropout: float = 0.0, hidden: int = 0,
                 embedding: EmbeddingConfig = EmbeddingConfig()) -> ModelConfig:
  """One of NAMES; all layers alike. `base` and `bias` set the step size of deep memories, `lookahead` how both neural ones pair tokens."""
  shared = dict(heads=heads, chunk=chunk, proj=NeuralProjConfig(lookahead=lookahead))
  every: dict[str, Any] = {
      'near': WindowConfig(heads=heads, window=window), 'full': AttentionConfig(heads=heads), 'holographic': HolographicConfig(heads=heads),
      'deep': NeuralConfig(gates=NeuralGatesConfig(theta_base=base, theta_bias=bias), **shared),
      'exact': NeuralConfig(net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'), **shared)}
  layer = LAYERS[name]
  mixers = {key: every[key] for key in layer.partition(':')[0].replace('>', '+').split('+')}
  return ModelConfig(width=width, hidden=hidden, vocabulary=vocabulary, mixers=mixers, pattern=(layer,), repeats=layers,
                     block=BlockConfig(dropout=dropout), embedding=embedding, dtype=dtype)
