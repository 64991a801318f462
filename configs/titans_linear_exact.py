"""Window attention after a linear memory under the exact online rule, on the bundled Shakespeare corpus, byte level: 923,824 parameters.

python -m memjax.train --config configs/titans_linear_exact.py --workdir runs/titans_linear_exact

The simplest memory that learns at test time: one matrix a head, whose error is taken after every token by one triangular solve a
chunk, so that the chunk is pure tuning. The size is near that of `hamt_small` and `attention_small`, to compare with.
Cost: 2 million tokens. No score has been measured yet.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  memory = NeuralConfig(heads=4, chunk=32, net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'))
  mixers = {'mem': memory, 'near': WindowConfig(heads=4, window=64)}
  model = ModelConfig(width=128, hidden=176, mixers=mixers, pattern=('mem>near',), repeats=4)
  return thaw(Config(
      name='titans_linear_exact', model=model,
      training=TrainingConfig(steps=500, batch=16, length=256),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=3e-3, warmup=50)}),
      evaluation=EvaluationConfig(every=100, batches=16, context=128)))
