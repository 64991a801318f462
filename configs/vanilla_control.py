"""The plain transformer beside `mat_small`: the same without any memory, 137,841,408 parameters.

python -m memjax.train --config configs/vanilla_control.py:FOLDER --workdir runs/vanilla_control

It has fewer parameters than `mat_small`, whose bank and readers it lacks, and takes fewer operations: a control of the recipe.
Transformers of equal parameters and of equal operations are those of `benchmarks/`; their numbers are in docs/numbers.md.
FOLDER and cost are as in `mat_small`.
"""
import dataclasses
from pathlib import Path

from memjax.config.codec import thaw
from memjax.config.files import load_file
from memjax.config.placement import arrange, parameter_rules


def get_config(arg: str = ''):
  """The configuration of `mat_small` with attention alone."""
  base = load_file(str(Path(__file__).with_name('mat_small.py')) + (f':{arg}' if arg else ''))
  attention = base.model.mixers['attention']
  model = dataclasses.replace(base.model, **arrange(base.model.depth, (), memory=None, attention=attention))
  optimizer = dataclasses.replace(base.optimizer, rules=parameter_rules(model), groups={'base': base.optimizer.groups['base']})
  return thaw(dataclasses.replace(base, name='vanilla_control', model=model, optimizer=optimizer))
