"""Full attention in every layer, with the size of `hybrid_150m`: 148,392,960 parameters.

python -m memjax.train --config configs/attention_150m.py:FOLDER --workdir runs/attention_150m

Nine layers of 1024 channels and 8 heads of 128, by flash attention where there is a GPU. Cost: for accelerators. It was not trained to
the end here: no score is promised.
"""
import dataclasses
from pathlib import Path

from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.mixers import AttentionConfig


def get_config(arg: str = ''):
  """The configuration of `hybrid_150m` with another mixer."""
  base = load_file(f'{Path(__file__).with_name("hybrid_150m.py")}:{arg}')
  model = dataclasses.replace(base.model, mixers={'attention': AttentionConfig(heads=8)}, pattern=('attention',), repeats=9, suffix=())
  return thaw(dataclasses.replace(base, name='attention_150m', model=model))
