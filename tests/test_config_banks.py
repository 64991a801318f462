"""The configuration of memory banks: every refusal of its modules has a case, and what is derived from it is as written."""
import ast
import dataclasses
import re
from pathlib import Path

import pytest

from memjax.config import banks, context
from memjax.config.banks import (
  BankConfig,
  BankFormConfig,
  BankLossConfig,
  BankQuantConfig,
  BankShapeConfig,
  MixingConfig,
  ProductKeyConfig,
  RouterConfig,
  for_inference,
  read_only_banks,
  sees_future,
  shared_table,
  table_of,
)
from memjax.config.codec import freeze, from_json, thaw, to_json
from memjax.config.context import ContextConfig
from memjax.config.errors import ConfigError, UserError
from memjax.config.flags import load
from memjax.config.layout import mixer_names, stages
from memjax.config.mixers import WindowConfig
from memjax.config.schema import Config, EvaluationConfig, ModelConfig
from tests.test_config import EVERY_KIND, message_of, rules

CHAPTERS = BankShapeConfig(entries=20, chapters=5)
SEQUENCE = RouterConfig(strategy='sequence', allow_noncausal=True)


def routed(**options): return BankConfig(**{'shape': CHAPTERS, **options})


def model(width=64, **mixer): return ModelConfig(width=width, mixers={'mem': BankConfig(**mixer)}, pattern=('mem',))


def quantised(entry=64, heads=8, **quant):
  return model(heads=heads, shape=BankShapeConfig(width=entry), quant=BankQuantConfig(**quant))


# One case at least for each `refuse` and each `_unused` of the two modules.
REFUSED = [
  (lambda: BankShapeConfig(chapters=3), 'entries=1024 is not a multiple of chapters=3'),
  (lambda: BankShapeConfig(low_rank='reduced', width=8), "width=8 does not apply to low_rank='reduced', whose width is rank"),
  (lambda: BankShapeConfig(rank=8), "rank=8 applies to low_rank; low_rank is ''"),
  (lambda: BankShapeConfig(share='a/b'), "share='a/b' is not a name"),
  (lambda: RouterConfig(strategy='hybrid'), "strategy='hybrid' knows the length of a prompt"),
  (lambda: RouterConfig(strategy='chunk', inference='token'), "strategy='chunk' has a learned start"),
  (lambda: RouterConfig(strategy='sequence'), "strategy='sequence' lets a token see the future; set allow_noncausal=true"),
  (lambda: RouterConfig(strategy='sequence-rolling'), "strategy='sequence-rolling' lets a token see the future"),
  (lambda: RouterConfig(window=9), 'window=9 applies to rolling, hybrid and sequence-rolling'),
  (lambda: RouterConfig(block=9), 'block=9 applies to strategy chunk, not to token'),
  (lambda: RouterConfig(allow_noncausal=True), 'allow_noncausal=True is not needed by strategy token'),
  (lambda: MixingConfig(norm='rms'), "norm='rms' needs shared chapters beside the routed ones"),
  (lambda: MixingConfig(norm_epsilon=.1), "norm_epsilon=0.1 applies to norm; norm is ''"),
  (lambda: BankLossConfig(balance=0, balance_form='legacy'), "balance_form='legacy' applies to the balance loss, which is 0"),
  (lambda: BankLossConfig(auxiliary_form='cv2'), "auxiliary_form='cv2' applies to the auxiliary loss, which is 0"),
  *((lambda field=field, value=value: BankQuantConfig(**{field: value}), f'{field}={value!r} applies to quantised banks; bits is 0')
    for field, value in (('scheme', 'nf4'), ('group', 0), ('target', 'kv'), ('train', 'straight'))),
  (lambda: BankQuantConfig(bits=8, scheme='nf4'), "scheme='nf4' needs bits=4"),
  (lambda: BankQuantConfig(bits=8, target='kv', train='straight'), "train='straight' applies to target 'bank'"),
  (lambda: BankQuantConfig(bits=8, train='learned'), "train='learned' has one step a row: scheme absmax, group 0"),
  (lambda: BankQuantConfig(bits=4, scheme='nf4', group=0, train='learned'), "train='learned' has one step a row"),
  (lambda: BankFormConfig(kind='scan', block=8), 'block=8 applies to tiles, not to scan'),
  (lambda: BankFormConfig(kind='tiles', gather_limit_mb=1), 'gather_limit_mb=1 applies to kind auto, not to tiles'),
  (lambda: BankFormConfig(kind='dense', token_chunk=2), 'token_chunk=2 does not apply to kind dense'),
  (lambda: BankFormConfig(kind='dense', remat=False), 'remat=False does not apply to kind dense'),
  (lambda: BankConfig(kv_heads=3), 'kv_heads=3 does not divide heads=8'),
  (lambda: BankConfig(dropout=-.5), 'dropout=-0.5 is neither -1 (inherit) nor a share'),
  (lambda: BankConfig(shape=BankShapeConfig(low_rank='reduced', rank=12)), 'shape.rank=12 is not a multiple of heads=8'),
  (lambda: BankConfig(shape=BankShapeConfig(low_rank='reduced'), projection_rank=2), 'projection_rank does not go with'),
  (lambda: BankConfig(router=RouterConfig(top_k=2)), 'router applies to chapters; shape.chapters is 0'),
  (lambda: BankConfig(mixing=MixingConfig(shared=1)), 'mixing applies to chapters; shape.chapters is 0'),
  (lambda: BankConfig(loss=BankLossConfig(z=.1)), 'loss applies to chapters; shape.chapters is 0'),
  (lambda: routed(router=RouterConfig(top_k=6)), 'router.top_k=6 exceeds the 5 routed of 5 chapters'),
  (lambda: routed(mixing=MixingConfig(shared=2)), 'router.top_k=4 exceeds the 3 routed of 5 chapters'),
  (lambda: routed(router=RouterConfig(kind='product_key')), "router.kind='product_key' needs a square number of chapters, not 5"),
  (lambda: routed(mixing=MixingConfig(combine='joint'), loss=BankLossConfig(balance=0)), 'the router gets no gradient'),
  (lambda: routed(router=RouterConfig(top_k=1), loss=BankLossConfig(balance=0)), 'the router gets no gradient'),
  (lambda: routed(form=BankFormConfig(kind='dense'), mixing=MixingConfig(combine='legacy_scale')), "form.kind='dense' does not go with"),
  (lambda: BankConfig(form=BankFormConfig(axis='model')), "form.axis='model' splits chapters; shape.chapters is 0"),
  (lambda: routed(form=BankFormConfig(axis='fsdp'), mixing=MixingConfig(combine='legacy_scale')), 'form.axis does not go with'),
  (lambda: ProductKeyConfig(key_width=7), 'key_width=7 is odd; a query has two halves'),
  (lambda: ProductKeyConfig(keys=4, top_k=17), 'top_k=17 exceeds the 16 values'),
  (lambda: ProductKeyConfig(dropout=-.5), 'dropout=-0.5 is neither -1 (inherit) nor a share'),
  (lambda: ProductKeyConfig(share='1'), "share='1' is not a name"),
  (lambda: model(heads=7), 'mixers.mem.heads=7 does not divide width=64'),
  (lambda: quantised(48, bits=8), 'mixers.mem.quant.group=32 does not divide the 48 numbers of a row'),
  (lambda: quantised(bits=8, target='kv'), 'mixers.mem.quant.group=32 does not divide the 8 numbers of a row'),
  (lambda: quantised(9, bits=4, group=0), 'mixers.mem.quant.bits=4 packs pairs; a row has 9 numbers'),
  (lambda: quantised(heads=64, bits=4, group=0, target='kv'), 'mixers.mem.quant.bits=4 packs pairs; a row has 1 numbers'),
  (lambda: ContextConfig(kv_heads=3), 'kv_heads=3 does not divide heads=8'),
  (lambda: ContextConfig(slots=4, clusters=4), 'clusters=4 must be below slots=4: a cluster is for several slots'),
  (lambda: ContextConfig(clusters=3), 'top_k=4 exceeds clusters=3'),
  (lambda: ContextConfig(top_k=2), 'top_k=2 applies to clusters; clusters is 0'),
  (lambda: ContextConfig(iterations=2), 'iterations=2 applies to clusters; clusters is 0'),
]


@pytest.mark.parametrize('build, says', REFUSED, ids=[says for _, says in REFUSED])
def test_combination_is_refused(build, says):
  message = message_of(build)
  assert message.startswith(f'config.{says}') and '\n' not in message


def unused_rules(module):
  """The same of each `_unused(part, {name: default, ..}, reason)`, one for each name."""
  for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
    if not (isinstance(node, ast.Call) and getattr(node.func, 'id', '') == '_unused'): continue
    parts = node.args[2].values if isinstance(node.args[2], ast.JoinedStr) else [node.args[2]]
    reason = ''.join(re.escape(part.value) if isinstance(part, ast.Constant) else '.*' for part in parts)
    for key in node.args[1].keys: yield node.lineno, f'{key.value}=.* {reason}'


@pytest.mark.parametrize('module', [banks, context], ids=['banks', 'context'])
def test_every_rule_has_a_case(module):
  messages = [message_of(build) for build, _ in REFUSED]
  every = [*rules(module), *unused_rules(module)]
  missing = [line for line, rule in every if not any(re.search(rf'\.{rule}$', text) for text in messages)]
  assert len(every) > 4 and not missing, f'{module.__name__}: no case for the rules of lines {missing}'


def test_what_is_next_to_a_refusal_is_allowed():
  """The largest and the smallest values that each rule of arithmetic lets through."""
  routed(router=RouterConfig(top_k=5)), routed(mixing=MixingConfig(shared=1)), BankConfig(dropout=0.0), ProductKeyConfig(keys=4, top_k=16)
  BankConfig(shape=BankShapeConfig(entries=16, chapters=4), router=RouterConfig(kind='product_key'))
  routed(router=RouterConfig(top_k=1, weight_norm='full'), loss=BankLossConfig(balance=0))
  routed(mixing=MixingConfig(combine='joint'), loss=BankLossConfig(balance=0, z=.1))
  model(heads=7, head_width=3), quantised(bits=8, group=8, target='kv'), quantised(bits=4, group=0, target='kv')
  model(width=60, shape=BankShapeConfig(low_rank='reduced', rank=16))              # heads divide the rank, not the width


def test_every_kind_of_bank_is_written_and_read_back():
  """With no field at its default where a choice exists; tests/test_config.py does so for the defaults of every kind."""
  assert {'bank', 'product_key', 'context'} <= set(EVERY_KIND.model.mixers)
  router = RouterConfig(strategy='rolling', inference='hybrid', window=5, top_k=1, weight_norm='full', kind='product_key', input='stream')
  mixing, loss = MixingConfig(combine='joint_bias', shared=1, norm='rms'), BankLossConfig(bias_rate=.1, auxiliary=.1, auxiliary_form='cv2')
  bank = BankConfig(heads=2, shape=BankShapeConfig(entries=18, chapters=9, share='common'), router=router, mixing=mixing, loss=loss,
                    quant=BankQuantConfig(bits=4, group=8, train='straight'))
  config = Config(model=ModelConfig(width=8, mixers={'mem': bank}, pattern=('mem',)))
  assert freeze(thaw(config)) == config == from_json(to_json(config))
  assert to_json(config)['model']['mixers']['mem']['router']['kind'] == 'product_key'


def test_overrides_reach_into_a_bank_and_are_refused_by_path(tmp_path):
  path = tmp_path / 'bank.py'
  path.write_text('from memjax.config.banks import BankConfig, BankShapeConfig\n'
                  'from memjax.config.codec import thaw\nfrom memjax.config.schema import Config, ModelConfig\n\n'
                  "def get_config(arg=''):\n"
                  "  mixers = {'mem': BankConfig(shape=BankShapeConfig(entries=20, chapters=5))}\n"
                  "  return thaw(Config(model=ModelConfig(width=64, mixers=mixers, pattern=('mem',))))\n")
  where = 'model.mixers.mem.'
  found = load(str(path), f'{where}router.strategy=chunk', f'{where}router.block=3', f'{where}mixing.shared=1', f'{where}heads=4')
  bank = found.model.mixers['mem']
  assert (bank.router.strategy, bank.router.block, bank.mixing.shared, bank.heads) == ('chunk', 3, 1, 4)
  for words, says in (('shape.chapters=3', 'shape.entries=20 is not a multiple of chapters=3'),
                      ('router.top_k=6', 'router.top_k=6 exceeds'), ('heads=7', 'heads=7 does not divide width=64'),
                      ('router.strategy=hybrid', "router.strategy='hybrid' knows")):
    with pytest.raises(UserError, match=rf'^config\.model\.mixers\.mem\.{re.escape(says)}'): load(str(path), where + words)


def test_stages_of_a_layer():
  assert stages('swa') == ((('swa',), ''),)
  assert stages('swa+mem:gate>bank') == ((('swa', 'mem'), ':gate'), (('bank',), ''))
  assert mixer_names('swa+mem:gate>bank') == ('swa', 'mem', 'bank')
  near = {'near': WindowConfig(), 'mem': BankConfig()}
  for layer, says in (('near>near', 'names a mixer twice'), ('near>mem:gate', 'gates 1 mixers'), ('near>other', "names 'other'")):
    with pytest.raises(ConfigError, match=says): ModelConfig(mixers=near, pattern=(layer,))


def test_mixers_that_share_a_table_agree_on_it():
  """The table alone: chapters, routers and how keys and values are stored may differ."""
  shape = BankShapeConfig(entries=20, chapters=5, share='common')
  one = BankConfig(shape=shape)
  for change in ({'shape': dataclasses.replace(shape, chapters=4)}, {'router': RouterConfig(strategy='rolling')}, {'heads': 4},
                 {'quant': BankQuantConfig(bits=8, group=0, target='kv')}):
    other = dataclasses.replace(one, **change)
    assert table_of(one) == table_of(other) and ModelConfig(mixers={'a': one, 'b': other}, pattern=('a', 'b'))
  for change in ({'shape': dataclasses.replace(shape, entries=40)}, {'shape': dataclasses.replace(shape, std=.1)},
                 {'quant': BankQuantConfig(bits=8)}):
    with pytest.raises(ConfigError, match=r"^mixers\.b and mixers\.a share the bank 'common', but"):
      ModelConfig(mixers={'a': one, 'b': dataclasses.replace(one, **change)}, pattern=('a', 'b'))
  with pytest.raises(ConfigError, match='describe it differently'):
    ModelConfig(mixers={'a': one, 'b': ProductKeyConfig(share='common')}, pattern=('a', 'b'))
  assert shared_table(one) == 'common' == shared_table(ProductKeyConfig(share='common')) and shared_table(WindowConfig()) == ''


def test_a_router_that_sees_the_future_is_named_and_does_not_generate():
  ahead = routed(router=SEQUENCE)
  assert sees_future(ahead) and not sees_future(routed()) and not sees_future(WindowConfig()) and not sees_future(ProductKeyConfig())
  shown = ModelConfig(mixers={'mem': ahead}, pattern=('mem',))
  with pytest.raises(ConfigError, match=r'^model\.mixers\.mem\.router\.strategy sees the future and cannot generate'): Config(model=shown)
  Config(model=shown, evaluation=EvaluationConfig(sample=0))
  causal = routed(router=dataclasses.replace(SEQUENCE, inference='prefix-mean'))
  Config(model=ModelConfig(mixers={'mem': causal}, pattern=('mem',)))
  after = for_inference({'mem': causal, 'near': WindowConfig(), 'same': routed()})
  assert after['mem'].router.strategy == 'prefix-mean' and not sees_future(after['mem']) and after['same'] == routed()


def test_a_bank_of_integers_is_read_only_unless_it_trains_through_rounding():
  assert read_only_banks(model(quant=BankQuantConfig(bits=8))) == 'mem'
  assert not read_only_banks(model(quant=BankQuantConfig(bits=8, train='straight'))) and not read_only_banks(model())
