"""LoRA (Hu et al. 2021): which kernels get a low-rank change, of which rank, scaled by what."""
import re
from collections.abc import Iterable

from memjax.config.errors import UserError, check_pattern, refuse
from memjax.config.options import config, option

QUERY_VALUE = ('/(query|value)/kernel$',)


@config
class LoraConfig:
  """Low-rank changes s A B of kernels, whose paths the regular expressions are searched in: 'repeats/layer_0/mlp/up/kernel'."""
  rank: int = option(0, 'R, rank of the changes; 0 = there are none', low=0)
  alpha: float = option(32.0, 'alpha; a change is scaled by s = alpha / rank', low=1e-6)
  stabilised: bool = option(False, 's = alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)')
  dora: bool = option(False, 'learn the magnitude of each output apart from its direction (DoRA, Liu et al. 2024)')
  dropout: float = option(0.0, 'of the input of the changes, in training', low=0.0, high=0.999)
  targets: tuple[str, ...] = option(QUERY_VALUE, 'regexes of the kernels that are changed; each must find one')
  exclude: tuple[str, ...] = option((), 'regexes of kernels that are left alone all the same')
  ranks: tuple[str, ...] = option((), "'regex=rank' rules for kernels of another rank; the first match wins")
  alphas: tuple[str, ...] = option((), "'regex=alpha' rules for kernels of another alpha; the first match wins")

  def __post_init__(self):
    for name, default in (('alpha', 32.0), ('stabilised', False), ('dora', False), ('dropout', 0.0), ('targets', QUERY_VALUE),
                          ('exclude', ()), ('ranks', ()), ('alphas', ())):
      refuse(not self.rank and getattr(self, name) != default, f'{name} applies to low-rank changes; rank is 0')
    refuse(not self.targets, 'targets is empty; no kernels are changed with rank=0')
    for name in ('targets', 'exclude'):
      for pattern in getattr(self, name): check_pattern(name, pattern)
    for name, number in (('ranks', r'[1-9]\d{0,5}'), ('alphas', r'(?=.*[1-9])\d{1,9}(\.\d+)?')):
      for rule in getattr(self, name):
        pattern, equals, value = rule.rpartition('=')
        is_rule = bool(equals and pattern and re.fullmatch(number, value))
        refuse(not is_rule, f"{name} holds {rule!r}, which is not of the form 'regex=number' with a number above 0")
        check_pattern(name, pattern)


def rank_of(lora: LoraConfig, path: str) -> int:
  """The rank of the change of the kernel at a path; 0 = it has none."""
  found = lambda patterns: any(re.search(pattern, path) for pattern in patterns)
  if not lora.rank or not found(lora.targets) or found(lora.exclude): return 0
  return int(_first(lora.ranks, path, lora.rank))


def alpha_of(lora: LoraConfig, path: str) -> float:
  """alpha of the kernel at a path."""
  return float(_first(lora.alphas, path, lora.alpha))


def scale_of(lora: LoraConfig, path: str) -> float:
  """s of an adapted kernel: alpha / rank, or alpha / sqrt(rank) where `stabilised`."""
  rank = rank_of(lora, path)
  return alpha_of(lora, path) / (rank ** 0.5 if lora.stabilised else rank)


def _first(rules: tuple[str, ...], path: str, default: float) -> float | str:
  """The value of the first 'regex=value' rule that is found in the path."""
  return next((value for pattern, _, value in map(split_rule, rules) if re.search(pattern, path)), default)


def split_rule(rule: str) -> tuple[str, str, str]:
  """('regex', '=', 'value') of a rule 'regex=value'; the last '=' divides."""
  return rule.rpartition('=')


def check_found(lora: LoraConfig, adapted: Iterable[str]) -> None:
  """None; raises UserError for a target or rule that matches none of the `adapted` kernels, given by path."""
  adapted = list(adapted)
  patterns = [('targets', pattern) for pattern in lora.targets if lora.rank]
  patterns += [(name, split_rule(rule)[0]) for name in ('ranks', 'alphas') for rule in getattr(lora, name)]
  for name, pattern in patterns:
    if any(re.search(pattern, path) for path in adapted): continue
    raise UserError(f'config.model.block.lora.{name} holds {pattern!r}, which matches no kernel of a linear map that is not excluded')
