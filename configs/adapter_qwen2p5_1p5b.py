"""A bank of 2048 entries on a frozen Qwen2.5-1.5B: 16,784,464 trainable of 1,560,498,768 parameters.

python -m memjax.train --config configs/adapter_qwen2p5_1p5b.py:HOST --workdir runs/adapter_qwen

HOST is the folder (or GGUF file) of Qwen2.5-1.5B or Qwen2.5-1.5B-Instruct; without it the same decoder starts from random numbers and
reads bytes, for a look at its size (--dry_run). The preset of the Memory-Augmented Transformer: one table (factorised, rank 256, 8
chapters of which a token reads 2), read after the first five and the last five layers by projections of rank 128. Text is given as
in `adapter_smollm2_135m`. Cost: 16 million tokens in 1000 steps, for accelerators: 6.2 GB of float32 parameters. Not run here.
"""
import dataclasses
from pathlib import Path

from memjax.adapters.families import family_config
from memjax.adapters.graft import graft, open_host
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.placement import place, train_only
from memjax.config.schema import OptimizerConfig, TokenizerConfig
from memjax.data.hub import local_model

SHAPE = {'model_type': 'qwen2', 'hidden_size': 1536, 'intermediate_size': 8960, 'num_hidden_layers': 28, 'num_attention_heads': 12,
         'num_key_value_heads': 2, 'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'vocab_size': 151_936, 'tie_word_embeddings': True}


def get_config(arg: str = ''):
  """The configuration; `arg` is the host."""
  base = load_file(str(Path(__file__).with_name('adapter_smollm2_135m.py')))
  host = open_host(local_model(arg), dtype='bfloat16')[0] if arg else family_config(SHAPE, dtype='bfloat16')
  bank = BankConfig(heads=next(iter(host.mixers.values())).heads, projection_rank=128, router=RouterConfig(top_k=2),
                    shape=BankShapeConfig(entries=2048, chapters=8, low_rank='factorized', rank=256))
  where = {*place(host.depth, 'first_k', k=5), *place(host.depth, 'last_k', k=5)}
  model = graft(host, bank, where=sorted(where), sharing='shared')
  return thaw(dataclasses.replace(
      base, name='adapter_qwen2p5_1p5b', model=model,
      data=dataclasses.replace(base.data, tokenizer=TokenizerConfig(kind='host' if arg else 'bytes')),
      training=dataclasses.replace(base.training, host=arg, length=1024, remat=True),
      optimizer=OptimizerConfig(**train_only(model, {name: base.optimizer.groups[name] for name in ('memory', 'memory_bank')}))))
