"""The small Memory-Augmented Transformer (`base_small` of the original): every layer reads one shared bank, 169,455,552 parameters.

python -m memjax.train --config configs/mat_small.py:FOLDER --workdir runs/mat_small

12 layers of 768 channels, 12 heads, feed-forward 3072, vocabulary 32,000; 4096 entries in 16 chapters, of which each token reads 4.
The original routed whole sequences, which lets a token see the future; here each token chooses for itself.
FOLDER holds the text (train, val and test files, or any text files); without it the bundled Shakespeare corpus is read, far too
small for this model. A BPE of at most 32,000 pieces is trained on the text (extra `text`).
Cost: 6.6 billion tokens in 50,000 steps, for accelerators. What it reaches is in docs/numbers.md, as far as it was run.
"""
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import thaw
from memjax.config.mixers import AttentionConfig
from memjax.config.placement import arrange, parameter_rules, place
from memjax.config.schema import (
  BlockConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  GroupConfig,
  ModelConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)

DEPTH, VOCABULARY = 12, 32_000


def get_config(arg: str = ''):
  """The configuration; `arg` is a local folder or file of text, '' the bundled corpus."""
  bank = BankConfig(heads=12, shape=BankShapeConfig(entries=4096, chapters=16), router=RouterConfig(top_k=4))
  stack = arrange(DEPTH, place(DEPTH, 'all'), memory=bank, attention=AttentionConfig(heads=12))
  model = ModelConfig(width=768, hidden=3072, vocabulary=VOCABULARY, block=BlockConfig(init_std=0.02), dtype='bfloat16', **stack)
  place_of_text = {'source': 'path', 'path': arg} if arg else {}
  group = GroupConfig(rate=1e-4, warmup=1000)
  return thaw(Config(
      name='mat_small', model=model,
      data=DataConfig(tokenizer=TokenizerConfig(kind='bpe', size=VOCABULARY), **place_of_text),
      training=TrainingConfig(steps=50_000, batch=64, accumulate=8, length=2048, remat=True),
      optimizer=OptimizerConfig(rules=parameter_rules(model), groups={'memory_bank': group, 'memory': group, 'base': group}),
      evaluation=EvaluationConfig(every=1000, batches=64, batch=8, prompt='The'),
      checkpoint=CheckpointConfig(every=2000)))
