"""The original HAMT model (codenlighten/holographic-ai, 2025), exact to the parameter: post-norm block, nonlinear write.

python -m memjax.train --config=configs/hamt_seed.py:quick --workdir W

variant    width / K / layers / slots   tokens x rows   parameters
quick      256 / 1024 / 4 / 8           128 x 8         33,665,832   500 steps on the bundled corpus (the default)
wikitext   512 / 2048 / 8 / 8           512 x 16        167,495,248  WikiText-2 raw from the hub, about 20 epochs
large      512 / 2048 / 8 / 16          1024 x 16       167,560,848  bf16, remat, same text
demo       256 / 1024 / 4 / 8           128 x 8         21,088,808   vocabulary 1,000, for --dry_run and a generation

The vocabulary of the original, 50,257, is kept where the tokens are bytes: the loss starts at ln 50,257 = 10.82. The
original never used its 256 tokens between stops of the gradient; here they work wherever a row is longer. wikitext and
large train a BPE of the same size; tokenizer.kind='file' takes the original's tokenizer.json.

Cost of quick: 0.21 TFLOP a step (--dry_run), and 5.3 CPU seconds a step for loss and gradient on two shared cores
(2026-11-22, jax 0.10.2). The trained loss, and the time of the other variants, have not been measured.
"""
from memjax.config.codec import thaw
from memjax.config.errors import UserError, nearest
from memjax.config.mixers import HolographicSeedConfig
from memjax.config.schema import (
  BlockConfig,
  Config,
  DataConfig,
  EmbeddingConfig,
  EvaluationConfig,
  GroupConfig,
  ModelConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)

VARIANTS = ('quick', 'wikitext', 'large', 'demo')


def model(*, width=256, key_width=1024, repeats=4, slots=8, vocabulary=50_257, positions=128, dtype='float32'):
  """The decoder of the original at some size."""
  return ModelConfig(
      width=width, hidden=3072, vocabulary=vocabulary, repeats=repeats, dtype=dtype,
      mixers={'seed': HolographicSeedConfig(key_width=key_width, slots=slots)}, pattern=('seed',),
      block=BlockConfig(norm='layernorm', placement='post', activation='gelu', bias=True, norm_epsilon=1e-5,
                        dropout=0.1, init_std=0.02),
      embedding=EmbeddingConfig(position='learned', max_position=positions))


def optimizer(**schedule):
  """AdamW at 3e-4 with decay .01 on every parameter."""
  return OptimizerConfig(groups={'main': GroupConfig(rate=3e-4, weight_decay=0.01, **schedule)}, no_decay='')


def small(name, steps, **size):
  """Rows of 128 bytes of the bundled corpus, constant rate."""
  return Config(name=f'hamt_seed_{name}', model=model(**size), optimizer=optimizer(schedule='constant'),
                training=TrainingConfig(steps=steps, batch=8, length=128, log_every=50),
                evaluation=EvaluationConfig(batch=8, batches=64, sample=100))


def long(name, steps, *, length, remat=False, **size):
  """WikiText-2 raw in a BPE of 50,257 pieces, 10 % warm-up, cosine to a tenth."""
  return Config(name=f'hamt_seed_{name}', model=model(width=512, key_width=2048, repeats=8, positions=2048, **size),
                optimizer=optimizer(schedule='cosine', warmup=steps // 10),
                data=DataConfig(source='hub', hub='Salesforce/wikitext:wikitext-2-raw-v1', separator='wikitext',
                                tokenizer=TokenizerConfig(kind='bpe', size=50_257)),
                training=TrainingConfig(steps=steps, batch=16, length=length, bptt=256, remat=remat, log_every=50),
                evaluation=EvaluationConfig(every=steps // 20))


def get_config(arg=''):
  """The ConfigDict of one variant: '' or quick, wikitext, large, demo."""
  if arg in ('', 'quick'): return thaw(small('quick', 500))
  if arg == 'demo': return thaw(small('demo', 100, vocabulary=1000, positions=256))
  if arg == 'wikitext': return thaw(long('wikitext', 5_800, length=512))
  if arg == 'large': return thaw(long('large', 2_900, length=1024, slots=16, dtype='bfloat16', remat=True))
  raise UserError(f'no variant {arg!r} of configs/hamt_seed.py; known: {", ".join(VARIANTS)}{nearest(arg, VARIANTS)}')
