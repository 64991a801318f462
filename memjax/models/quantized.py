"""A trained model whose banks are stored as integers: for evaluation, generation and deployment."""
import dataclasses
import re
from typing import Any

import jax

from memjax.config.banks import BankQuantConfig, shared_table
from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.ops.quantize import quantize

SCHEMES = {'int8': (8, 'absmax', 0), 'int4': (4, 'absmax', 32), 'nf4': (4, 'nf4', 32)}     # name -> bits, scheme, group


def parse_quantization(name: str) -> BankQuantConfig:
  """The config of 'int8', 'int4' or 'nf4'; with '/kv' that of the keys and values instead of the entries. UserError otherwise."""
  scheme, _, target = name.partition('/')
  if scheme not in SCHEMES or target not in ('', 'kv', 'bank'):
    raise UserError(f"--quantize={name} is not one of {', '.join(SCHEMES)}, each with '/kv' for keys and values")
  bits, kind, group = SCHEMES[scheme]
  return BankQuantConfig(bits=bits, scheme=kind, group=group, target=target or 'bank')


def quantize_banks(config: ModelConfig, params: dict, quant: BankQuantConfig) -> tuple[ModelConfig, dict]:
  """(config, parameters) with the tables of all banks stored as `quant` says; other parameters are the same arrays.

  Raises UserError for a model without banks, or one whose rows the groups do not divide.
  """
  banks = {name: mixer for name, mixer in config.mixers.items() if mixer.kind == 'bank'}
  if not banks: raise UserError('there is nothing to quantise: the model has no mixer of kind bank')
  changed = {name: dataclasses.replace(mixer, quant=quant) for name, mixer in banks.items()}
  config = dataclasses.replace(config, mixers={**config.mixers, **changed})
  if quant.target == 'kv': return config, params
  owners = [f'bank_{shared_table(mixer)}' for mixer in banks.values() if shared_table(mixer)]
  inside = re.compile(rf"(^|/)({'|'.join([rf'{name}/bank' for name in banks] + owners)})$")
  return config, _store(params, '', lambda path: bool(inside.search(path)), quant)


def _store(tree: dict, path: str, is_table: Any, quant: BankQuantConfig) -> dict:
  """The tree with every leaf of a table as its codes and scale."""
  out: dict[str, Any] = {}
  for name, leaf in tree.items():
    if isinstance(leaf, dict): out[name] = _store(leaf, f'{path}/{name}' if path else name, is_table, quant)
    elif is_table(path) and name in ('entries', 'mix'):
      stored = jax.jit(lambda x: quantize(x, bits=quant.bits, scheme=quant.scheme, group=quant.group))(leaf)
      out[f'{name}_codes'], out[f'{name}_scale'] = stored.codes, stored.scale
    elif not (is_table(path) and name.endswith('_step')): out[name] = leaf
  return out
