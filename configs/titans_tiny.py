"""Learning at test time in miniature: window attention gated by a neural memory (MAG), 176,984 parameters, under two minutes on a CPU.

python -m memjax.train --config configs/titans_tiny.py --workdir runs/titans_tiny

Each layer attends to 32 bytes and 4 persistent tokens, and reads a network of two layers that is trained by gradient descent on what
came before. Cost: 0.1 million tokens, 86 CPU seconds, mostly compilation (2026-11-22). Made for tests and a first look, on the
bundled Shakespeare corpus: it has no expected score beyond a falling loss.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  mixers = {'near': WindowConfig(heads=4, window=32, persistent=4),
            'mem': NeuralConfig(heads=4, chunk=16, net=NeuralNetConfig(expansion=2))}
  return thaw(Config(
      name='titans_tiny',
      model=ModelConfig(width=64, mixers=mixers, pattern=('near+mem:mag',), repeats=2),
      training=TrainingConfig(steps=100, batch=8, length=128),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=5e-3, warmup=10)}),
      evaluation=EvaluationConfig(batches=8, sample=100)))
