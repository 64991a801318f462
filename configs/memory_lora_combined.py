"""A bank and LoRA together on a frozen SmolLM2-135M: 2,132,512 trainable of 136,647,520 parameters.

python -m memjax.train --config configs/memory_lora_combined.py:HOST --workdir runs/both

The preset of the Memory-Augmented Transformer: 1024 entries (factorised, rank 128) in 4 chapters, one of them read by each token after
every fourth layer, and LoRA of rank 16 on the queries and values of the host. The router's weights are those of all chapters, so
that a choice of one is trained. HOST, text and cost are as in `adapter_smollm2_135m`.
"""
import dataclasses
from pathlib import Path

from memjax.adapters.graft import graft, host_of
from memjax.adapters.lora import with_lora
from memjax.config.banks import BankShapeConfig, RouterConfig
from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.lora import LoraConfig
from memjax.config.placement import place, train_only
from memjax.config.schema import OptimizerConfig


def get_config(arg: str = ''):
  """The configuration of `adapter_smollm2_135m` with this bank, and low-rank changes."""
  base = load_file(f'{Path(__file__).with_name("adapter_smollm2_135m.py")}:{arg}')
  shape = BankShapeConfig(entries=1024, chapters=4, low_rank='factorized', rank=128)
  bank = dataclasses.replace(base.model.mixers['memory'], shape=shape, router=RouterConfig(top_k=1, weight_norm='full'))
  host = host_of(base.model)
  model = graft(host, bank, where=place(host.depth, 'every_n', n=4), sharing='shared')
  model = with_lora(model, LoraConfig(rank=16, alpha=32.0, dropout=0.05, targets=('/(attention|window)/(query|value)/kernel$',)))
  groups = base.optimizer.groups
  optimizer = OptimizerConfig(**train_only(model, {name: groups[name] for name in ('memory', 'memory_bank')} | {'lora': groups['memory']}))
  return thaw(dataclasses.replace(base, name='memory_lora_combined', model=model, optimizer=optimizer))
