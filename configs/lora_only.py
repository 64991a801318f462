"""LoRA of rank 16 on the queries and values of a frozen SmolLM2-135M, no memory: 921,600 trainable of 135,436,608 parameters.

python -m memjax.train --config configs/lora_only.py:HOST --workdir runs/lora

HOST, text and cost are as in `adapter_smollm2_135m`, with which it is to be compared.
"""
import dataclasses
from pathlib import Path

from memjax.adapters.graft import host_of
from memjax.adapters.lora import with_lora
from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.lora import LoraConfig
from memjax.config.placement import train_only
from memjax.config.schema import OptimizerConfig


def get_config(arg: str = ''):
  """The configuration of `adapter_smollm2_135m` with low-rank changes in place of the bank."""
  base = load_file(f'{Path(__file__).with_name("adapter_smollm2_135m.py")}:{arg}')
  model = with_lora(host_of(base.model), LoraConfig(rank=16, alpha=32.0, dropout=0.05))
  optimizer = OptimizerConfig(**train_only(model, {'lora': base.optimizer.groups['memory']}))
  return thaw(dataclasses.replace(base, name='lora_only', model=model, optimizer=optimizer))
