"""Titans with memory as gate (MAG): the sizes, text and recipe of `titans_mac_170m` with another wiring, 149,343,552 parameters.

python -m memjax.train --config configs/titans_mag_170m.py:FOLDER --workdir runs/titans_mag_170m

The memory gates attention to the last 512 tokens and to 16 persistent tokens.
Cost: for accelerators. It was not trained to the end here: no score is promised.
"""
import dataclasses
from pathlib import Path

from memjax.config.codec import thaw
from memjax.config.files import load_file


def get_config(arg: str = ''):
  """The configuration; `arg` is a local folder or file of text, '' the bundled corpus."""
  base = load_file(f'{Path(__file__).with_name("titans_mac_170m.py")}:{arg}')
  return thaw(dataclasses.replace(base, name='titans_mag_170m', model=dataclasses.replace(base.model, pattern=('near+mem:mag',))))
