"""The configuration of the wirings of Titans: every refusal has a case."""
import re

import pytest

from memjax.config import titans
from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig
from memjax.config.schema import BlockConfig, ModelConfig
from memjax.config.titans import TitansConfig
from tests.test_config import message_of, rules

MIXERS = {'flash': WindowConfig(heads=2, window=8, backend='cudnn'),
          'near': WindowConfig(heads=2, window=8), 'att': AttentionConfig(heads=2), 'wide': AttentionConfig(heads=2, head_width=64),
          'mem': NeuralConfig(heads=2, chunk=4), 'odd': NeuralConfig(heads=2, chunk=3), 'slots': HolographicConfig(heads=2),
          'block': NeuralConfig(heads=2, chunk=16, rule=NeuralRuleConfig(mode='block')),
          'stream': NeuralConfig(heads=2, chunk=4, proj=NeuralProjConfig(source='stream')),
          'wait': NeuralConfig(heads=2, chunk=8, rule=NeuralRuleConfig(mode='block'), net=NeuralNetConfig(kind='attention'))}


def model(layer, grafted=(), **options):
  return ModelConfig(width=64, mixers=MIXERS, pattern=(layer,), grafted=grafted, block=BlockConfig(titans=TitansConfig(**options)))


REFUSED = [
  (lambda: model('near+mem', fuse='silu'), 'block.titans.fuse applies to :mag and :mac, which no layer has'),
  (lambda: model('near+mem:mag', lookback=1), 'block.titans.lookback applies to :mac, which no layer has'),
  (lambda: model('near+mem:mag', learned=2), 'block.titans.learned applies to :mac, which no layer has'),
  (lambda: model('near+mem:mag', read='segment'), 'block.titans.read applies to :mac, which no layer has'),
  (lambda: model('near+mem:mag', asked='previous'), 'block.titans.asked applies to :mac, which no layer has'),
  (lambda: model('near+mem:mag', write='sum'), 'block.titans.write applies to :mac, which no layer has'),
  (lambda: model('near+mem:mac', write='input', asked='previous'),
   "block.titans.asked does not apply to write='input', where each token"),
  (lambda: model('near+mem:mac', learned=2, asked='previous'), "block.titans.learned=2 leaves no queries to asked='previous'"),
  (lambda: model('near:mag'), "pattern layer 'near:mag' puts 1 mixers into :mag; it joins an attention and a memory"),
  (lambda: model('near+mem+slots:mac'), "pattern layer 'near+mem+slots:mac' puts 3 mixers into :mac"),
  (lambda: model('mem+near:mag'), "pattern layer 'mem+near:mag' begins with 'mem' of kind neural; :mag begins with attention"),
  (lambda: model('wide+mem:mag'), 'needs mixers.wide.heads times head_width to be width=64, not 128'),
  (lambda: model('near+att:mag'), "ends with 'att' of kind attention; :mag ends with a memory"),
  (lambda: model('near+mem:mag', ('mem',), fuse='mix'), "grafts 'mem'; only block.titans.fuse=double_sigmoid leaves a host undisturbed"),
  (lambda: model('near+block:mag'), "leaves tokens unseen: mixers.block.rule.mode='block' needs mixers.near.window of at least its chunk"),
  (lambda: model('near+slots:mac'), "ends with 'slots' of kind holographic; :mac ends with kind neural"),
  (lambda: model('att+mem:mac'), "begins with 'att' of kind attention; :mac begins with window, its segment"),
  (lambda: model('near+wait:mac'), "ends with 'wait', whose writes wait for the end of a chunk; :mac reads every token"),
  (lambda: model('near+stream:mac'), "writes what block.titans.write says; mixers.stream.proj.source='stream' does not apply"),
  (lambda: model('near+odd:mac'), 'needs mixers.near.window=8, its segment, to be a multiple of mixers.odd.chunk=3'),
  (lambda: model('flash+mem:mac'), "attends also to what was recalled, which mixers.flash.backend='cudnn' does not have"),
  (lambda: model('near+mem:mac', ('mem',)), 'cannot be grafted: :mac puts more keys into the softmax, which disturbs the host'),
]


@pytest.mark.parametrize('build, says', REFUSED, ids=[says for _, says in REFUSED])
def test_combination_is_refused(build, says):
  assert says in message_of(build)


def test_every_rule_has_a_case():
  messages = [message_of(build) for build, _ in REFUSED]
  missing = [line for line, rule in rules(titans) if not any(re.search(rf'\.{rule}', text) for text in messages)]
  assert not missing, f'no case for the rules of lines {missing}'


def test_what_goes_together_is_taken():
  assert model('near+mem:mag', ('mem',)).grafted == ('mem',)
  for layer in ('att+slots:mag', 'near+mem:mac', 'att+block:mag', 'near+mem:mac>slots'): assert model(layer).pattern == (layer,)
  assert model('near+mem:mac', fuse='mix', lookback=1, learned=3, read='segment').block.titans.lookback == 1
