"""WikiText-2 by words (33,278 of them, official splits): the hybrid, with dropout and early stopping.

python -m memjax.train --config configs/wikitext2.py --workdir runs/wikitext2            (text from the hub: extra `hub`)
python -m memjax.train --config configs/wikitext2.py:FOLDER --workdir runs/wikitext2     (train.tokens, valid.tokens, test.tokens)
"""
from memjax.config.codec import thaw
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.config.schema import (BlockConfig, Config, DataConfig, EvaluationConfig, GroupConfig, ModelConfig, OptimizerConfig,
                                  TokenizerConfig, TrainingConfig)


def get_config(arg: str = ''):
  """The configuration; `arg` is a local folder with the three files."""
  place = {'source': 'path', 'path': arg} if arg else {'source': 'hub', 'hub': 'Salesforce/wikitext:wikitext-2-v1'}
  return thaw(Config(
      name='wikitext2',
      model=ModelConfig(width=256, mixers={'swa': WindowConfig(heads=8, window=64), 'mem': HolographicConfig()},
                        pattern=('swa', 'mem'), repeats=2, block=BlockConfig(dropout=0.4)),
      data=DataConfig(separator='wikitext', tokenizer=TokenizerConfig(kind='word'), **place),
      training=TrainingConfig(steps=12_000, batch=32, length=256, log_every=50),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=2e-3, warmup=500, weight_decay=0.5)}),
      evaluation=EvaluationConfig(every=500, patience=4, stream=True, prompt='The history of')))
