"""A bank of 1024 entries on a frozen SmolLM2-135M: 898,528 trainable of 135,413,536 parameters.

python -m memjax.train --config configs/adapter_smollm2_135m.py:HOST --workdir runs/adapter

HOST is the GGUF file or the folder of the model (any Llama, Mistral, Qwen2 or Qwen3 will do: shape and tokenizer are read from it);
without it the same decoder starts from random numbers and reads bytes, for a look at its size (--dry_run).
The one table (factorised, rank 64, 16 chapters of which a token reads 4) is read after every fifth layer, by projections of rank 32:
about as many trainable parameters as `lora_only`. Text: --config.data.source=path --config.data.path=FOLDER; docs/finetune.md has chats.
Cost: 8 million tokens in 1000 steps. What it reaches is in docs/numbers.md, as far as it was run.
"""
from memjax.adapters.families import family_config
from memjax.adapters.graft import graft, open_host
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import thaw
from memjax.config.placement import train_only
from memjax.config.schema import Config, DataConfig, EvaluationConfig, GroupConfig, OptimizerConfig, TokenizerConfig, TrainingConfig
from memjax.data.hub import local_model

SHAPE = {'model_type': 'llama', 'hidden_size': 576, 'intermediate_size': 1536, 'num_hidden_layers': 30, 'num_attention_heads': 9,
         'num_key_value_heads': 3, 'rms_norm_eps': 1e-5, 'rope_theta': 1e5, 'vocab_size': 49_152, 'tie_word_embeddings': True}


def get_config(arg: str = ''):
  """The configuration; `arg` is the host."""
  host = open_host(local_model(arg))[0] if arg else family_config(SHAPE)
  attention = next(iter(host.mixers.values()))
  bank = BankConfig(heads=attention.heads, kv_heads=attention.kv_heads, projection_rank=32, router=RouterConfig(top_k=4),
                    shape=BankShapeConfig(entries=1024, chapters=16, low_rank='factorized', rank=64))
  model = graft(host, bank, where=range(host.depth)[4::5] or (host.depth - 1,), sharing='shared')
  group = lambda rate: GroupConfig(rate=rate, warmup=100, weight_decay=0.01)
  return thaw(Config(
      name='adapter_smollm2_135m', model=model, data=DataConfig(tokenizer=TokenizerConfig(kind='host' if arg else 'bytes')),
      training=TrainingConfig(host=arg, steps=1000, batch=16, length=512),
      optimizer=OptimizerConfig(**train_only(model, {'memory': group(1e-4), 'memory_bank': group(1e-3)})),
      evaluation=EvaluationConfig(every=250, batches=16)))
