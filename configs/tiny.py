"""A first look and the tests' model: the hybrid in miniature, 133,256 parameters, well under a minute on a CPU.

python -m memjax.train --config configs/tiny.py --workdir runs/tiny

Cost: 0.1 million tokens, about 40 CPU seconds, mostly compilation (2026-11-22). Made for tests and a first look: it has no
expected score beyond a falling loss.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  return thaw(Config(
      name='tiny',
      model=ModelConfig(width=64, mixers={'swa': WindowConfig(heads=4, window=32), 'mem': HolographicConfig(heads=4)},
                        pattern=('swa', 'mem'), repeats=1),
      training=TrainingConfig(steps=100, batch=8, length=128),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=5e-3, warmup=10)}),
      evaluation=EvaluationConfig(batches=8, sample=100)))
