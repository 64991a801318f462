"""Full attention in every layer, with the parameters of `hamt_small` (910,464 parameters against 908,960): the transformer to
compare with.

python -m memjax.train --config configs/attention_small.py --workdir runs/attention_small

Cost: 2 million tokens; 2 s on an H200 besides compilation, about ten minutes on two CPU cores. Expected: 2.59 bits per byte
on the test split: this command on one H200 at commit 5232772, 2026-11-22 (three seeds by `benchmarks/language.py` at commit
e248148: 2.582 to 2.602).
"""
import dataclasses
from pathlib import Path

from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.mixers import AttentionConfig


def get_config():
  """The configuration of `hamt_small` with another mixer and a wider feed-forward network."""
  base = load_file(str(Path(__file__).with_name('hamt_small.py')))
  model = dataclasses.replace(base.model, hidden=400, mixers={'attention': AttentionConfig(heads=4)}, pattern=('attention',))
  return thaw(dataclasses.replace(base, name='attention_small', model=model))
