"""Titans with memory as context (MAC), 12 layers of 768 channels and 16 heads: 163,545,408 parameters.

python -m memjax.train --config configs/titans_mac_170m.py:FOLDER --workdir runs/titans_mac_170m

Shapes after Table 7 of ATLAS (Behrouz et al. 2025), recipe after Titans: 15 billion tokens of 32,000 pieces in rows of 4096, half a
million a step. Attention sees segments of 512 tokens, what the memory recalls for them and 16 persistent tokens; the memory, a
network of two layers a head, takes gradients every 64 tokens. FOLDER holds the text (train, val and test files, or any text files);
without it the bundled Shakespeare corpus is read, far too small for this model. The pieces are trained on the text (extra `text`).
Cost: for accelerators. It was not trained to the end here: no score is promised.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import WindowConfig
from memjax.config.neural import NeuralConfig
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

VOCABULARY = 32_000


def get_config(arg: str = ''):
  """The configuration; `arg` is a local folder or file of text, '' the bundled corpus."""
  place_of_text = {'source': 'path', 'path': arg} if arg else {}
  mixers = {'near': WindowConfig(heads=16, window=512, persistent=16), 'mem': NeuralConfig(heads=16, chunk=64)}
  model = ModelConfig(width=768, vocabulary=VOCABULARY, mixers=mixers, pattern=('near+mem:mac',), repeats=12, dtype='bfloat16',
                      block=BlockConfig(init_std=0.02))
  return thaw(Config(
      name='titans_mac_170m', model=model,
      data=DataConfig(tokenizer=TokenizerConfig(kind='bpe', size=VOCABULARY), **place_of_text),
      training=TrainingConfig(steps=28_610, batch=128, accumulate=16, length=4096, remat=True),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=4e-4, warmup=1000)}),
      evaluation=EvaluationConfig(every=500, batches=16, batch=16, prompt='The'),
      checkpoint=CheckpointConfig(every=500)))
