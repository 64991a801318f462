"""Random keys are constants of a config: a checkpoint made with other keys is refused."""
import dataclasses

import pytest

from memjax.config.errors import UserError
from memjax.config.mixers import AddressConfig, BindingConfig, HolographicConfig, HolographicSeedConfig
from memjax.config.schema import Config, ModelConfig
from memjax.runtime.seeded import check_keys, key_fingerprints, key_seeds

MIXERS = {'plain': HolographicConfig(), 'placed': HolographicConfig(binding=BindingConfig(position='random', seed=3)),
          'copied': HolographicConfig(address=AddressConfig(kind='copies')), 'first': HolographicSeedConfig(key_seed=5)}
CONFIG = Config(model=ModelConfig(mixers=MIXERS, pattern=('plain', 'placed', 'copied', 'first')))


def test_only_mixers_with_random_keys_are_named():
  assert key_seeds(CONFIG) == {'placed': 3, 'copied': 0, 'first': 5}


def test_equal_keys_pass_and_other_keys_are_one_line():
  record = {'data': {'keys': key_fingerprints(CONFIG)}}
  check_keys(CONFIG, record)
  check_keys(CONFIG, {'data': None})
  changed = dataclasses.replace(MIXERS['placed'], binding=BindingConfig(position='random', seed=4))
  other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mixers={**MIXERS, 'placed': changed}))
  with pytest.raises(UserError, match=r'model\.mixers\.placed: random keys differ.*stored seed'): check_keys(other, record)
