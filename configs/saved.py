"""The configuration of an earlier run, exactly as it was.

python -m memjax.train --config=configs/saved.py:W/config.json --workdir W2

The argument is the `config.json` of a run, or its workdir. Costs what that run cost.
"""
from memjax.config.codec import read_config, thaw
from memjax.config.errors import UserError


def get_config(arg=''):
  """The ConfigDict saved in the `config.json` at `arg`."""
  if not arg: raise UserError('configs/saved.py wants the run to repeat: --config=configs/saved.py:W/config.json')
  return thaw(read_config(arg))
