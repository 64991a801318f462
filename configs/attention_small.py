"""Full attention in every layer, with the parameters of `hamt_small` (5,729,024 against 5,729,120): the transformer to compare with.

python -m memjax.train --config configs/attention_small.py --workdir runs/attention_small
"""
import dataclasses
from pathlib import Path

from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.mixers import AttentionConfig


def get_config():
  """The configuration of `hamt_small` with another mixer and a wider feed-forward network."""
  base = load_file(str(Path(__file__).with_name('hamt_small.py')))
  model = dataclasses.replace(base.model, hidden=887, mixers={'attention': AttentionConfig()}, pattern=('attention',))
  return thaw(dataclasses.replace(base, name='attention_small', model=model))
