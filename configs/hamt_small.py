"""Holographic memory in every layer; `attention_small` is the same size with full attention.

python -m memjax.train --config configs/hamt_small.py --workdir runs/hamt_small
"""
from memjax.config.codec import thaw
from memjax.config.mixers import HolographicConfig
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  return thaw(Config(
      name='hamt_small',
      model=ModelConfig(width=256, hidden=704, mixers={'mem': HolographicConfig()}, pattern=('mem',), repeats=6),
      training=TrainingConfig(steps=2000, batch=32, length=512),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=2e-3, warmup=100)}),
      evaluation=EvaluationConfig(every=250, batches=8, context=256)))
