"""Kernels of linear maps that are stored in fewer bits: which ones, and how. Such kernels are read, never trained."""
import re
from collections.abc import Iterable

from memjax.config.errors import UserError, check_pattern, refuse
from memjax.config.options import config, option

PACKED = {'int8': (8, 'absmax', 0), 'int4': (4, 'absmax', 32), 'nf4': (4, 'nf4', 32)}     # name -> bits, scheme, group
STORAGES = (*PACKED, 'bfloat16', 'float16')
HEAD = 'head/kernel'


@config
class QuantConfig:
  """Storage of kernels, whose paths the regular expressions are searched in, as for low-rank changes; grafted memories keep theirs.

  int8 has one scale for each output channel, int4 and nf4 one for each 32 neighbours along the input. Norms, biases, embeddings
  and, unless `head` says so, the output head stay as they are.
  """
  storage: str = option('', "of the kernels; '' = float32, which can be trained", choices=('', *STORAGES))
  targets: tuple[str, ...] = option(('kernel$',), 'regexes of the kernels that are stored so; each must find one')
  exclude: tuple[str, ...] = option((), 'regexes of kernels that are left alone all the same')
  head: bool = option(False, 'the kernel of an output head of its own as well')

  def __post_init__(self):
    for name, default in (('targets', ('kernel$',)), ('exclude', ()), ('head', False)):
      refuse(not self.storage and getattr(self, name) != default, f"{name} applies to kernels in fewer bits; storage is ''")
    refuse(not self.targets, "targets is empty; kernels are left alone with storage=''")
    for name in ('targets', 'exclude'):
      for pattern in getattr(self, name): check_pattern(name, pattern)


def storage_of(quant: QuantConfig, path: str) -> str:
  """How the kernel at a path is stored: one of `STORAGES`, or '' for float32."""
  found = lambda patterns: any(re.search(pattern, path) for pattern in patterns)
  if not quant.storage or (path == HEAD and not quant.head): return ''
  return quant.storage if found(quant.targets) and not found(quant.exclude) else ''


def check_stored(quant: QuantConfig, stored: Iterable[str]) -> None:
  """None; raises UserError for a target that matches none of the kernels in fewer bits, given by path, and for `head` without one."""
  stored = list(stored)
  for pattern in quant.targets if quant.storage else ():
    if any(re.search(pattern, path) for path in stored): continue
    raise UserError(f'config.model.block.quant.targets holds {pattern!r}, which matches no kernel of a linear map that is not excluded')
  if quant.head and HEAD not in stored: raise UserError('config.model.block.quant.head is set, but no head of its own is stored so')
