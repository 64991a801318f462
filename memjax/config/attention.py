"""Rotary frequencies of attention: as they are, or stretched to texts longer than those of training."""
from memjax.config.errors import refuse
from memjax.config.options import config, option

LLAMA3 = {'low_factor': 1.0, 'high_factor': 4.0}
YARN = {'beta_fast': 32.0, 'beta_slow': 1.0, 'attention_factor': 0.0}


@config
class RopeConfig:
  """How rotary frequencies are stretched (pretrained specification section 1.3)."""
  kind: str = option('default', 'none, all alike, Llama 3, or YaRN (Peng et al. 2023)', choices=('default', 'linear', 'llama3', 'yarn'))
  factor: float = option(1.0, 'how much longer the texts become', low=1.0)
  original: int = option(0, 'tokens of the texts before that, of llama3 and yarn', low=0)
  low_factor: float = option(1.0, 'llama3 stretches fully what turns less often than this in `original` tokens', low=1e-6)
  high_factor: float = option(4.0, 'llama3 leaves alone what turns more often than this', low=1e-6)
  beta_fast: float = option(32.0, 'yarn leaves alone what turns more often than this in `original` tokens', low=1e-6)
  beta_slow: float = option(1.0, 'yarn stretches fully what turns less often than this', low=1e-6)
  attention_factor: float = option(0.0, 'of yarn, on queries and keys; 0 = 0.1 ln(factor) + 1', low=0.0)

  def __post_init__(self):
    limits, kind = self.kind in ('llama3', 'yarn'), self.kind
    refuse(self.factor != 1 and kind == 'default', f'factor={self.factor:g} applies to a stretched kind, not to default')
    refuse(limits != (self.original > 0), f'original={self.original} goes with kind llama3 and yarn, and only with them')
    for name, default in LLAMA3.items():
      refuse(getattr(self, name) != default and kind != 'llama3', f'{name} applies to kind llama3, not to {kind}')
    for name, default in YARN.items():
      refuse(getattr(self, name) != default and kind != 'yarn', f'{name} applies to kind yarn, not to {kind}')
    refuse(self.high_factor <= self.low_factor, f'high_factor={self.high_factor:g} must be above low_factor={self.low_factor:g}')
    refuse(self.beta_fast < self.beta_slow, f'beta_fast={self.beta_fast:g} must not be below beta_slow={self.beta_slow:g}')
