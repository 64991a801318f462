"""A hybrid of window attention, holographic and neural memory for long rows on one large GPU: 146,893,452 parameters.

python -m memjax.train --config configs/hybrid_150m.py:FOLDER --workdir runs/hybrid_150m

Nine layers of 1024 channels: four times window attention (512 tokens, 8 heads of 128) followed by holographic memory (16 heads of
64, 8 slots), and last a neural memory (4 heads of 64, gradients every 128 tokens). 32.8 million parameters are the table of 32,000
pieces, which is also the head. Rows of 4096 tokens, half a million a step. FOLDER holds the text (train, val and test files, or any
text files); without it the bundled Shakespeare corpus is read, far too small for this model. The pieces are trained on the text (extra
`text`). `benchmarks/hybrid.py` times its training step beside that of `attention_150m`; where rows are one text each, as there,
model.mixers.learns.exec.aligned=true leaves out the form token by token.
Cost: for accelerators. It was not trained to the end here: no score is promised.
"""
from memjax.config.codec import thaw
from memjax.config.mixers import HolographicConfig, WindowConfig
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
  mixers = {'near': WindowConfig(heads=8, window=512), 'slots': HolographicConfig(heads=16, slots=8),
            'learns': NeuralConfig(heads=4, key_width=64, chunk=128)}
  model = ModelConfig(width=1024, hidden=2816, vocabulary=VOCABULARY, mixers=mixers, pattern=('near', 'slots'), repeats=4,
                      suffix=('learns',), dtype='bfloat16', block=BlockConfig(init_std=0.02))
  return thaw(Config(
      name='hybrid_150m', model=model,
      data=DataConfig(tokenizer=TokenizerConfig(kind='bpe', size=VOCABULARY), **place_of_text),
      training=TrainingConfig(steps=28_610, batch=128, accumulate=8, length=4096, unroll=True),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=4e-4, warmup=1000)}),
      evaluation=EvaluationConfig(every=500, batches=16, batch=16, prompt='The'),
      checkpoint=CheckpointConfig(every=500)))
