"""A YAML file of the Memory-Augmented Transformer or the Mixture of Chapters, mapped onto our configuration.

python -m memjax.train --config configs/from_file.py:FILE.yaml --workdir runs/from_file

The file has the sections memory, model, training and context, with the names and defaults of the originals (and some keys of our
own). An unknown key, a wrong type or an impossible combination is an error; a known key that cannot be honoured is one warning.
Costs what the file asks for.
"""
from memjax.config.codec import thaw
from memjax.config.errors import UserError
from memjax.config.seed_file import load_seed


def get_config(arg: str = ''):
  """The ConfigDict of the YAML file at `arg`."""
  if not arg: raise UserError('configs/from_file.py wants a YAML file: --config configs/from_file.py:FILE.yaml')
  return thaw(load_seed(arg))
