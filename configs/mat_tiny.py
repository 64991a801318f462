"""A memory bank in miniature: 64 learned entries in 8 chapters beside attention, 267,984 parameters, under a minute on a CPU.

python -m memjax.train --config configs/mat_tiny.py --workdir runs/mat_tiny

Four layers of attention; layers 0 and 2 also read the one bank that they share, each token the 2 chapters that its router chooses.
Table, memory and the rest have learning rates of their own. Cost: 0.1 million tokens, about 50 CPU seconds, mostly compilation.
Made for tests and a first look, on the bundled Shakespeare corpus; what banks are worth is in docs/numbers.md.
"""
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import thaw
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import arrange, parameter_rules, place
from memjax.config.schema import Config, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config():
  """The configuration."""
  bank = BankConfig(heads=4, shape=BankShapeConfig(entries=64, chapters=8), router=RouterConfig(top_k=2))
  model = ModelConfig(width=64, **arrange(4, place(4, 'every_n', n=2), memory=bank, attention=AttentionConfig(heads=4)))
  groups = {name: GroupConfig(rate=rate, warmup=10) for name, rate in (('memory_bank', 1e-2), ('memory', 5e-3), ('base', 5e-3))}
  return thaw(Config(
      name='mat_tiny', model=model,
      training=TrainingConfig(steps=100, batch=8, length=128),
      optimizer=OptimizerConfig(rules=parameter_rules(model), groups=groups),
      evaluation=EvaluationConfig(batches=8, sample=100)))
