"""The Mixture of Chapters of 371 million parameters (2026) with causal routing: 371,292,932 parameters.

python -m memjax.train --config configs/moc_371m.py:FOLDER --workdir runs/moc_371m

part             parameters
backbone         147,874,560    16 layers of 768 channels, 12 heads on 4, feed-forward 2304, vocabulary 49,152
memory layers    22,042,628     at layers 2, 6, 10 and 14: projections, norm, router of 4097 chapters
bank             201,375,744    262,208 entries in 4097 chapters; a token reads the first and 64 others, 4160 entries

The original routed whole sequences, in training and in evaluation, which lets a token see the future; here each token chooses
for itself. FOLDER holds the text (train, val and test files, or any text files); the original read 9.6 billion tokens of
FineWeb-Edu. Without FOLDER the bundled Shakespeare corpus is read, far too small for this model. A BPE of at most 49,152 pieces is
trained on the text (extra `text`); data.tokenizer.kind='file' takes the original's tokenizer.json.
Cost: 10 billion tokens in 9600 steps of 1024 rows, for accelerators. What it reaches is in docs/numbers.md, as far as it was run.
"""
from memjax.config.banks import BankConfig, BankLossConfig, BankShapeConfig, MixingConfig, RouterConfig
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

DEPTH, VOCABULARY, STEPS, DECAY_FROM = 16, 49_152, 9600, 8160


def decoder():
  """The model of the original, each token routed by itself."""
  bank = BankConfig(heads=12, kv_heads=12, shape=BankShapeConfig(entries=262_208, chapters=4097), router=RouterConfig(top_k=64),
                    mixing=MixingConfig(shared=1, scale=2.5, norm='rms', norm_epsilon=1e-5), loss=BankLossConfig(balance=0.01, z=0.001))
  stack = arrange(DEPTH, place(DEPTH, 'custom', indices=(2, 6, 10, 14)), memory=bank,
                  attention=AttentionConfig(heads=12, kv_heads=4, rotary_base=1e5))
  return ModelConfig(width=768, hidden=2304, vocabulary=VOCABULARY, dtype='bfloat16', **stack,
                     block=BlockConfig(norm_epsilon=1e-5, init_std=0.02, mixer_out_std=0.00378, mlp_out_std=0.00378))


def get_config(arg: str = ''):
  """The configuration; `arg` is a local folder or file of text, '' the bundled corpus."""
  model, place_of_text = decoder(), {'source': 'path', 'path': arg} if arg else {}
  group = lambda rate: GroupConfig(rate=rate, schedule='wsd', warmup=250, decay_share=(STEPS - DECAY_FROM) / STEPS, decay_shape='cosine')
  groups = {'memory_bank': group(6e-4), 'memory': group(6e-4), 'base': group(3e-4)}
  return thaw(Config(
      name='moc_371m', model=model,
      data=DataConfig(tokenizer=TokenizerConfig(kind='bpe', size=VOCABULARY), **place_of_text),
      training=TrainingConfig(steps=STEPS, batch=1024, accumulate=32, length=1024, remat=True),
      optimizer=OptimizerConfig(rules=parameter_rules(model), groups=groups),
      evaluation=EvaluationConfig(every=100, batches=32, batch=32, prompt='The'),
      checkpoint=CheckpointConfig(every=100)))
