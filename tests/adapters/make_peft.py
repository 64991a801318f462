"""Writes data/peft: adapters as PEFT writes them for the case llama_plain, and the logits of the model with them.

python -m tests.adapters.make_peft FOLDER       needs torch, transformers and peft; FOLDER is for the host; the tests need none of it

The factors are drawn here, N(0, 0.2^2), so that the adapted model is far from its host.
"""
import os
import sys
from pathlib import Path

import numpy as np

from tests.adapters.files import cases, tensors_of, write_folder

CASE, HERE = 'llama_plain', Path(__file__).parent / 'data' / 'peft'
TOKEN = np.arange(24).reshape(2, 12) % 61
METHODS = {'lora': dict(use_rslora=True), 'dora': dict(use_dora=True)}


def main(root: str) -> None:
  """Both methods, each in a folder of its own."""
  import torch
  from peft import LoraConfig, get_peft_model
  from transformers import AutoModelForCausalLM
  write_folder(Path(root) / CASE, cases()[CASE]['config'], tensors_of(CASE))
  os.chdir(root)                                         # PEFT writes the name of the host
  for name, options in METHODS.items():
    host = AutoModelForCausalLM.from_pretrained(CASE, attn_implementation='eager', dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=['q_proj', 'o_proj', 'gate_proj'], task_type='CAUSAL_LM',
                        rank_pattern={'o_proj': 2}, alpha_pattern={'gate_proj': 3}, **options)
    model = get_peft_model(host, config).eval()
    for path, value in model.named_parameters():
      if 'lora_B' in path: value.data.normal_(0, 0.2)
      if 'magnitude' in path: value.data += 0.2 * torch.randn_like(value)
    with torch.no_grad(): logits = model(torch.tensor(TOKEN)).logits.numpy()
    model.save_pretrained(HERE / name)
    (HERE / name / 'README.md').unlink(missing_ok=True)
    np.save(HERE / name / 'logits.npy', logits)


if __name__ == '__main__': main(sys.argv[1])
