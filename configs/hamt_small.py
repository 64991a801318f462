"""Holographic memory in every layer, on the bundled Shakespeare corpus, byte level: 908,960 parameters.

python -m memjax.train --config configs/hamt_small.py --workdir runs/hamt_small

Cost: 2 million tokens; 3 s on an H200 besides compilation, about ten minutes on two CPU cores. Expected: 2.58 bits per byte
on the test split, the transformer `attention_small` 2.59: this command on one H200 at commit 5232772, 2026-11-22. With three
seeds (2.601 to 2.604 against 2.582 to 2.602, `benchmarks/language.py`, commit e248148) the two cannot be told apart.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import HolographicConfig
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  return thaw(Config(
      name='hamt_small',
      model=ModelConfig(width=128, hidden=304, mixers={'mem': HolographicConfig(heads=4)}, pattern=('mem',), repeats=4),
      training=TrainingConfig(steps=500, batch=16, length=256),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=3e-3, warmup=50)}),
      evaluation=EvaluationConfig(every=100, batches=16, context=128)))
