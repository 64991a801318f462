"""The configuration: what is written is read back, what is refused is refused by path, what is asked for is applied."""
import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from memjax.config import attention, chat, lora, mesh, mixers, quant, schema
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import clashes, describe, diff, freeze, from_json, read_config, thaw, to_json
from memjax.config.errors import ConfigError, UserError
from memjax.config.flags import Answer, call, load, parse
from memjax.config.mixers import (
  MIXERS,
  AddressConfig,
  BindingConfig,
  HolographicConfig,
  HolographicSeedConfig,
  WindowConfig,
)
from memjax.config.options import config, option
from memjax.config.options import parse as parse_text
from memjax.config.schema import BlockConfig, Config, GroupConfig, ModelConfig, TrainingConfig
from tests.test_bad_input import BASE, FLAGS

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / 'configs').glob('*.py') if path.stem not in ('saved', 'from_file'))
EVERY_KIND = Config(model=ModelConfig(width=64, mixers={kind: cls(key_width=64) if kind == 'holographic_seed' else cls()
                                                         for kind, cls in MIXERS.items()}))
MEM, ADDRESS, KEEP = 'model.mixers.mem.', 'model.mixers.mem.address.', 'model.mixers.mem.keep.'
BINDING, TIERS, FORM = 'model.mixers.mem.binding.', 'model.mixers.mem.tiers.', 'model.mixers.mem.form.'
GROUP, ROPE, LORA, QUANT = 'optimizer.groups.main.', 'model.mixers.full.rope.', 'model.block.lora.', 'model.block.quant.'
CHATS = 'training.mode=instruction data.source=path data.path=a data.order=packed'

# Overrides of BASE in words, and the path and text of the refusal. Each rule of mixers.py and schema.py has one at least.
REFUSED = [
  ('mesh.preset=dp mesh.fsdp=2', "config.mesh.fsdp=2 does not go with preset='dp', which splits data"),
  ('mesh.preset=fsdp_tp mesh.model=1', "config.mesh.model=1 leaves nothing to preset='fsdp_tp'"),
  ('mesh.preset=bank_parallel', "config.mesh.preset='bank_parallel' splits the chapters of banks; model.mixers holds none"),
  ('model.mixers.full.kv_heads=3', 'config.model.mixers.full.kv_heads=3 does not divide heads=8'),
  ('model.mixers.full.head_width=5', 'config.model.mixers.full.head_width=5 is odd'),
  ('model.mixers.full.heads=7', 'config.model.mixers.full.heads=7 does not divide width=64'),
  ('model.mixers.full.heads=64', 'config.model.mixers.full.heads=64 leaves 1 channels a head'),
  ('model.mixers.full.backend=cudnn model.mixers.full.persistent=2', "full.backend='cudnn' has no persistent tokens; use xla or auto"),
  (f'{ROPE}kind=linear model.mixers.full.rotary=0', "config.model.mixers.full.rope.kind='linear' needs rotary"),
  (f'{ROPE}kind=yarn {ROPE}original=8 model.mixers.full.rotary_base=1', "full.rope.kind='yarn' needs rotary_base above 1"),
  (f'{ROPE}factor=2', 'config.model.mixers.full.rope.factor=2 applies to a stretched kind, not to default'),
  (f'{ROPE}kind=yarn', 'full.rope.original=0 goes with kind llama3 and yarn, and only with them'),
  (f'{ROPE}kind=linear {ROPE}original=8', 'full.rope.original=8 goes with kind llama3 and yarn, and only with them'),
  (f'{ROPE}low_factor=2', 'full.rope.low_factor applies to kind llama3, not to default'),
  (f'{ROPE}kind=llama3 {ROPE}original=8 {ROPE}beta_slow=2', 'full.rope.beta_slow applies to kind yarn, not to llama3'),
  (f'{ROPE}kind=llama3 {ROPE}original=8 {ROPE}low_factor=4', 'full.rope.high_factor=4 must be above low_factor=4'),
  (f'{ROPE}kind=yarn {ROPE}original=8 {ROPE}beta_slow=33', 'full.rope.beta_fast=32 must not be below beta_slow=33'),
  (f'{BINDING}transform=fft', 'config.model.mixers.mem.binding.transform='),
  (f'{BINDING}position=random {BINDING}kind=none', 'binding.position='),
  (f'{BINDING}position=fractional {BINDING}kind=bipolar', "binding.position='fractional' needs phases"),
  (f'{BINDING}squash=sign', "binding.squash='sign' applies to bipolar, not to phasor"),
  (f'{BINDING}position_heads=2', 'binding.position_heads is set but position is off'),
  (f'{BINDING}frequencies=geometric', "binding.frequencies='geometric' applies to position="),
  (f'{ADDRESS}source=key {ADDRESS}kind=softmax', "address.source='key' needs kind content"),
  (f'{ADDRESS}source=key {ADDRESS}tie=true', "address.source='key' has no router to tie"),
  (f'{ADDRESS}top_k=2', 'address.top_k applies to kind topk, not to content'),
  (f'{ADDRESS}temperature=2', 'address.temperature applies to softmax and scored, not to content'),
  (f'{ADDRESS}kind=copies {ADDRESS}rotary=1', 'address.kind copies has no addresses to tie or rotate'),
  (f'{KEEP}tie_strength=.2', 'keep.tie_strength applies to kind tied, not to head'),
  (f'{KEEP}form=exact', "keep.form='exact' applies to slot, tied and static keep"),
  (f'{KEEP}kind=none {KEEP}fast=.1', 'keep.fast and slow apply to log-spaced keep'),
  (f'{KEEP}kind=static {KEEP}bias=1', 'keep.bias does not apply to keep kind static'),
  (f'{KEEP}kind=none {KEEP}floor=-1', 'keep.floor does not apply to keep kind none'),
  (f'{TIERS}interval=32', "tiers.interval is set but kind is ''"),
  (f'{TIERS}kind=consolidate {TIERS}threshold=.6', 'tiers.threshold applies only with hard'),
  (f'{MEM}key_width=5', 'mem.key_width=5 is odd'),
  (f'{MEM}key_width=8 {MEM}slots=4 {ADDRESS}source=key', "mem.address.source='key' needs slots == key_width"),
  (f'{MEM}slots=4 {ADDRESS}source=key', "mem.address.source='key' needs slots == key_width, not 4 and 8"),
  (f'{MEM}slots=3 {ADDRESS}rotary=true', 'mem.address.rotary needs an even number of slots, not 3'),
  (f'{MEM}key_width=5 {BINDING}kind=none {ADDRESS}rotary=true', 'mem.address.rotary needs an even number of slots'),
  (f'{BINDING}position=random {BINDING}position_heads=9', 'mem.binding.position_heads=9 exceeds heads=8'),
  (f'{MEM}slots=4 {ADDRESS}kind=topk {ADDRESS}top_k=5', 'mem.address.top_k=5 exceeds slots=4'),
  (f'{ADDRESS}kind=topk {ADDRESS}top_k=9', 'mem.address.top_k=9 exceeds slots=8'),
  (f'{FORM}kind=scan {FORM}backend=pallas', "mem.form.backend='pallas' computes chunks, not kind='scan'"),
  (f'{ADDRESS}kind=copies {FORM}backend=pallas', "mem.form.backend='pallas' takes one read, a binding, addresses"),
  (f'{KEEP}kind=slot {KEEP}form=exact {FORM}backend=pallas', "mem.form.backend='pallas' takes one read"),
  (f'{KEEP}kind=channel {FORM}kind=chunk', "mem.form.kind='chunk' does not exist for channel keep"),
  (f'{FORM}kind=scan {FORM}chunk=32', 'mem.form.chunk=32 applies to the chunked form alone'),
  (f'{FORM}kind=associative {KEEP}kind=slot {KEEP}form=exact', "mem.keep.form='exact' applies to the chunked form alone"),
  (f'{FORM}kind=scan {FORM}remat=false', 'mem.form.remat does not apply to the sequential form'),
  (f'{TIERS}kind=consolidate {TIERS}controller=true {FORM}kind=associative', 'mem.tiers.controller depends on the state'),
  (f'{KEEP}erase=slot {ADDRESS}kind=softmax', "mem.keep.erase='slot' needs signed unit addresses"),
  (f'{KEEP}erase=slot {ADDRESS}gate=', "mem.keep.erase='slot' uses address.gate='head'"),
  (f'{KEEP}erase=slot {FORM}kind=associative', "mem.keep.erase='slot' runs as scan or chunk"),
  (f'{ADDRESS}kind=copies {KEEP}kind=static', "mem.address.kind='copies' takes keep none"),
  (f'{MEM}loss.gate=.1 {ADDRESS}gate=', 'mem.loss.gate needs a write gate'),
  (f'{MEM}loss.balance=.1 {ADDRESS}kind=copies', 'mem.loss.balance needs addresses'),
  (f'{ADDRESS}kind=scored {BINDING}kind=hrr', "mem.address.kind='scored' needs binding phasor"),
  (f'{TIERS}kind=consolidate {ADDRESS}kind=scored', "mem.tiers do not go with address.kind='scored'"),
  (f'{TIERS}kind=consolidate {KEEP}erase=slot', 'mem.tiers do not go with keep.erase'),
  (f'{TIERS}kind=consolidate {FORM}chunk=48', 'mem.tiers.interval=64 is not a multiple of form.chunk=48'),
  (f'{KEEP}kind=tied {KEEP}form=factored {FORM}chunk=128', 'mem.keep.form=factored needs chunk x |floor| <= 160, not 320'),
  ('model.mixers.seed.unitary=true', "config.model.mixers.seed.unitary applies to binding='hrr'"),
  ('model.mixers.seed.key_width=32', 'config.model.mixers.seed.key_width=32 is below width=64'),
  ('model.pattern=swa+swa', "config.model.pattern layer 'swa+swa' names a mixer twice"),
  ('model.pattern=swa:gate', "config.model.pattern layer 'swa:gate' gates 1 mixers; a gate needs two"),
  ('model.pattern=swa:bare model.hidden=-1', "config.model.pattern layer 'swa:bare' leaves out a feed-forward network; hidden is -1"),
  ('model.suffix=none', "config.model.suffix names 'none', which is not one of mixers"),
  ('model.grafted=none', "config.model.grafted names 'none', which is not one of mixers"),
  ('model.hidden=-1 model.block.mlp_out_std=1', 'config.model.block.mlp_out_std applies to a feed-forward network'),
  (f'{QUANT}head=1', "config.model.block.quant.head applies to kernels in fewer bits; storage is ''"),
  (f'{QUANT}storage=int8 {QUANT}targets=', "config.model.block.quant.targets is empty; kernels are left alone with storage=''"),
  (f'{QUANT}storage=int8 {QUANT}exclude=[', "config.model.block.quant.exclude holds '[', which is not a regular expression"),
  (f'{LORA}dora=1', 'config.model.block.lora.dora applies to low-rank changes; rank is 0'),
  (f'{LORA}alpha=8', 'config.model.block.lora.alpha applies to low-rank changes; rank is 0'),
  (f'{LORA}rank=2 {LORA}targets=', 'config.model.block.lora.targets is empty; no kernels are changed with rank=0'),
  (f'{LORA}rank=2 {LORA}exclude=[', "config.model.block.lora.exclude holds '[', which is not a regular expression"),
  (f'{LORA}rank=2 {LORA}ranks=query', "lora.ranks holds 'query', which is not of the form 'regex=number' with a number above 0"),
  (f'{LORA}rank=2 {LORA}ranks=query=1.5', "lora.ranks holds 'query=1.5', which is not of the form"),
  (f'{LORA}rank=2 {LORA}alphas=query=0.0', "lora.alphas holds 'query=0.0', which is not of the form"),
  ('model.repeats=0', 'config.model.pattern, prefix and suffix together hold no layers'),
  ('model.embedding.position=learned', "config.model.embedding.max_position > 0 goes with position='learned'"),
  ('model.embedding.max_position=9', "config.model.embedding.max_position > 0 goes with position='learned'"),
  ('data.tokenizer.kind=file', "config.data.tokenizer.path goes with kind 'file'"),
  ('data.tokenizer.kind=host', "config.data.tokenizer.kind='host' needs training.host"),
  ('data.tokenizer.size=300', 'config.data.tokenizer.size applies to kind bpe, not to bytes'),
  ('data.source=path', "config.data.path goes with source 'path'"),
  ('data.hub=a/b', "config.data.hub goes with source 'hub'"),
  ('data.column=body', 'config.data.column applies to tables; the bundled corpus has none'),
  ('training.accumulate=3', 'config.training.batch=16 is not a multiple of accumulate=3'),
  ('training.bptt=100', 'config.training.length=256 is not a multiple of bptt=100'),
  (f'{GROUP}decay_share=.5', 'config.optimizer.groups.main.decay_share applies to schedule wsd'),
  (f'{GROUP}decay_shape=cosine', 'config.optimizer.groups.main.decay_shape applies to schedule wsd'),
  (f'{GROUP}schedule=constant {GROUP}end=0', 'config.optimizer.groups.main.end does not apply'),
  ('optimizer.rules=main', "config.optimizer.rules holds 'main', which is not of the form"),
  ('optimizer.rules=.*=memory', "config.optimizer.rules holds '.*=memory', whose group 'memory' is not one of"),
  ('optimizer.no_decay=[', "config.optimizer.no_decay holds '[', which is not a regular expression"),
  ('evaluation.length=8 evaluation.context=8', 'config.evaluation.context=8 must be below length=8'),
  ('evaluation.stream=true evaluation.context=8', 'config.evaluation.context does not apply to stream'),
  ('evaluation.patience=2', 'config.evaluation.patience counts evaluations during training'),
  ('evaluation.every=5 evaluation.min_delta=.1', 'config.evaluation.min_delta applies to early stopping'),
  ('evaluation.context=256', 'config.evaluation.context=256 must be below its length 256'),
  ('training.carry=true', "config.training.carry needs data.order='lanes'"),
  ('data.chat.train_on=all data.chat.train_on_eot=false', "config.data.chat.train_on_eot=False applies to replies; train_on is 'all'"),
  ('data.chat.escape=false', "config.data.chat applies to training.mode='instruction'"),
  ('training.mode=instruction', "config.training.mode='instruction' needs conversations; data.source='shakespeare' has none"),
  (f'{CHATS} data.order=lanes', "config.training.mode='instruction' needs data.order='packed', not 'lanes'"),
  (f'{CHATS} data.tokenizer.kind=bpe', "training.mode='instruction' needs data.tokenizer.kind host, file or bytes, not bpe"),
  (f'{CHATS} data.separator=', "config.data.separator applies to plain text, not to training.mode='instruction'"),
  (f'{CHATS} evaluation.stream=true', "config.evaluation.stream does not go with training.mode='instruction'"),
  ('model.embedding.position=learned model.embedding.max_position=64', 'config.model.embedding.max_position=64 is below'),
  ('model.embedding.position=learned model.embedding.max_position=256 data.order=lanes',
   "config.data.order='lanes' has no longest row"),
  ('model.embedding.position=learned model.embedding.max_position=256 evaluation.stream=true',
   'config.evaluation.stream has no end'),
]
def bank(chapters=0, **shape):
  """A bank whose table has a name, or whose router sees the future."""
  router = RouterConfig(strategy='sequence', allow_noncausal=True) if chapters else RouterConfig()
  return BankConfig(shape=BankShapeConfig(share='common', chapters=chapters, **shape), router=router)


DIRECT = [(lambda: ModelConfig(mixers={'mem': HolographicConfig()}, pattern=('mem',), block=BlockConfig(mixer_out_std=1.0)),
           'block.mixer_out_std applies to attention and window; mixers holds neither'),
          (lambda: ModelConfig(mixers={'attention': BlockConfig()}), 'mixers.attention is not the config of a memory'),
          (lambda: ModelConfig(mixers={'a': bank(entries=8), 'b': bank(entries=9)}, pattern=('a',)),
           'mixers.b and mixers.a share the bank'),
          (lambda: ModelConfig(mixers={'a': BankConfig(dropout=.1), 'b': BankConfig()}, pattern=('b+a',)),
           "mixers.a.dropout goes with a stage of its own, not with 'b+a'"),
          (lambda: Config(model=ModelConfig(mixers={'attention': bank(chapters=4)})), 'attention.router.strategy sees the future')]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  path = tmp_path_factory.mktemp('configs') / 'base.py'
  path.write_text(BASE)
  return str(path)


def refusal(overrides, base):
  """What `load` says about the overrides."""
  with pytest.raises(UserError) as caught: load(base, *overrides.split())
  return str(caught.value)


@pytest.mark.parametrize('overrides, says', REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_combination_is_refused_by_path(overrides, says, base):
  message = refusal(overrides, base)
  assert says in message
  assert message.startswith('config.') and '\n' not in message


def message_of(build):
  """What a config class that is built directly says."""
  with pytest.raises(ConfigError) as caught: build()
  return f'config.{caught.value}'


def rules(module):
  """A regular expression for the message of each `refuse(...)` in the source of a module."""
  for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'refuse':
      parts = node.args[1].values if isinstance(node.args[1], ast.JoinedStr) else [node.args[1]]
      yield node.lineno, ''.join(re.escape(part.value) if isinstance(part, ast.Constant) else '.*' for part in parts)


MODULES = [attention, chat, lora, mesh, mixers, quant, schema]


@pytest.mark.parametrize('module', MODULES, ids=lambda module: module.__name__.rpartition('.')[2])
def test_every_rule_has_a_case(module, base):
  messages = [refusal(overrides, base) for overrides, _ in REFUSED]
  for build, says in DIRECT:
    messages.append(message_of(build))
    assert says in messages[-1]
  missing = [line for line, rule in rules(module) if not any(re.search(rf'\.{rule}$', text) for text in messages)]
  assert not missing, f'{module.__name__}: no case for the rules of lines {missing}'


def same(config):
  """Whether a config survives each of its writings."""
  return freeze(thaw(config)) == config and from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize('config', [Config(), EVERY_KIND], ids=['default', 'every kind'])
def test_round_trip(config):
  assert same(config)
  assert thaw(config).is_locked and thaw(config).model.mixers.is_locked


@pytest.mark.parametrize('path', SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_config_round_trips_and_builds_twice_the_same(path):
  config = load(path)
  assert same(config) and load(path) == config
  assert 'python -m memjax.' in ast.get_docstring(ast.parse(path.read_text()))


def test_tags_are_written_beside_fields_called_kind():
  tree = to_json(EVERY_KIND)['model']['mixers']
  assert {name: group['kind'] for name, group in tree.items()} == {name: name for name in MIXERS}
  assert tree['holographic']['binding']['kind'] == 'phasor'
  assert type(freeze({'model': {'width': 64, 'mixers': {'attention': {'kind': 'window', 'window': 9}}}}).model
              .mixers['attention']) is WindowConfig


def test_absent_fields_keep_their_defaults_and_types_are_mended():
  config = from_json({'optimizer': {'b1': 0}, 'model': {'suffix': ['attention']}})
  assert config == Config(optimizer=dataclasses.replace(Config().optimizer, b1=0.0), model=ModelConfig(suffix=('attention',)))
  assert type(config.optimizer.b1) is float and type(config.model.suffix) is tuple


def test_references_of_a_config_dict_are_followed():
  tree = thaw(Config())
  tree.evaluation.batch = tree.training.get_ref('batch')
  tree.training.batch = 8
  assert freeze(tree).evaluation.batch == 8


@pytest.mark.parametrize('build', [
  lambda: BlockConfig(dropout=2.0), lambda: BindingConfig(kind='fasor'), lambda: AddressConfig(tie=1),
  lambda: HolographicConfig(heads=2.0), lambda: HolographicConfig(binding='phasor'), lambda: GroupConfig(rate=float('nan')),
  lambda: TrainingConfig(steps=None), lambda: ModelConfig(pattern='attention'), lambda: ModelConfig(mixers=()),
  lambda: GroupConfig(rate=10**400), lambda: HolographicSeedConfig(key_width=0)])
def test_dataclasses_check_themselves(build):
  with pytest.raises(ConfigError): build()


@pytest.mark.parametrize('text, value', [
  ('', ()), ("('',)", ('',)), ('a', ('a',)), ('a,b', ('a', 'b')), (' a , b,', ('a', 'b')), ("('a','b')", ('a', 'b')),
  ("'a','b'", ('a', 'b')), ("['a,b']", ('a,b',)), ("'a,b'", ('a,b',)), ('(^|/)m=x', ('(^|/)m=x',)), ('[^/]*=x', ('[^/]*=x',))])
def test_tuple_of_text(text, value):
  assert parse_text('x', text, tuple[str, ...]) == value


@pytest.mark.parametrize('text, hint, value', [
  ('1,2', tuple[int, ...], (1, 2)), ('(1, 2)', tuple[int, ...], (1, 2)), ('.5,1', tuple[float, ...], (0.5, 1.0)),
  ('()', tuple[int, ...], ()), ('0x10', int, 16), ('-3', int, -3), ('1e3', float, 1000.0), ('TRUE', bool, True),
  ('0', bool, False), ('None', str, 'None')])
def test_text_of_other_types(text, hint, value):
  parsed = parse_text('x', text, hint)
  assert parsed == value and type(parsed) is type(value)


def test_load_applies_overrides_in_order(base):
  config = load(f'{base}:long', 'training.batch=4', 'training.batch=8', 'model.pattern=swa,mem', 'data.separator=a=b',
                'optimizer.groups.main.rate=1', 'model.block.bias=True', 'model.mixers.mem.binding.kind=bipolar')
  assert (config.training.steps, config.training.batch, config.model.pattern) == (200, 8, ('swa', 'mem'))
  assert config.data.separator == 'a=b' and config.model.block.bias and config.optimizer.groups['main'].rate == 1.0
  assert config.model.mixers['mem'].binding.kind == 'bipolar'
  assert len(diff(config, load(base))) == 7


def test_diff_and_what_may_change_on_resuming(base):
  saved = load(base)
  assert diff(saved, saved) == []
  wanted = load(base, 'training.steps=50', 'training.log_every=1', 'evaluation.every=5', 'checkpoint.every=5')
  assert diff(saved, wanted) == ['training.steps', 'training.log_every', 'evaluation.every', 'checkpoint.every']
  assert clashes(saved, wanted) == []
  assert clashes(saved, load(base, 'training.steps=50', 'seed=1')) == ['seed']
  renamed = dataclasses.replace(saved, optimizer=dataclasses.replace(
      saved.optimizer, groups={**saved.optimizer.groups, 'slow': GroupConfig()}))
  assert all(path.startswith('optimizer.groups.slow.') for path in diff(saved, renamed)) and diff(renamed, saved)


def test_saved_config_can_be_trained_again(tmp_path, base):
  config = load(base, 'training.steps=7', 'model.suffix=mem')
  (tmp_path / 'config.json').write_text(json.dumps(to_json(config)))
  assert read_config(str(tmp_path)) == config
  for source in (tmp_path, tmp_path / 'config.json'): assert load(f'{ROOT}/configs/saved.py:{source}') == config
  with pytest.raises(UserError, match='wants the run to repeat'): load(ROOT / 'configs' / 'saved.py')


def test_every_field_is_described():
  entries = describe(EVERY_KIND)
  assert all(entry.doc for entry in entries) and len({entry.path for entry in entries}) == len(entries)
  by_path = {entry.path: entry for entry in entries}
  assert by_path['config.model.mixers.window.window'].value == 128
  assert by_path['config.model.pattern'].type == 'tuple of str'
  assert "one of 'pre', 'post'" in by_path['config.model.block.placement'].doc
  assert 'at least 0.0; at most 0.999' in by_path['config.model.block.dropout'].doc


def test_new_config_classes_inherit_the_checks():
  @config
  class Sizes:
    widths: tuple[int, ...] = option((1, 2), 'widths', low=1)
  assert Sizes(widths=[3]).widths == (3,)
  with pytest.raises(ConfigError, match=r'widths\[1\] must be at least 1, not 0'): Sizes(widths=(1, 0))


# --- flags --------------------------------------------------------------------------------------------------------------

def test_flags_of_every_form(base):
  config, values = parse(['--config', base, '--workdir', 'w', '--dry_run', '--prompt=a b', '--prompt', '-c', '--split=val',
                          '--config.training.steps', '9', '--config.training.remat', '--noconfig.model.embedding.tie',
                          '--max_new_tokens=3', '--max_new_tokens=4', '--temperature', '0'], FLAGS)
  assert (config.training.steps, config.training.remat, config.model.embedding.tie) == (9, True, False)
  assert values == {'workdir': 'w', 'dry_run': True, 'prompt': ('a b', '-c'), 'split': 'val', 'max_new_tokens': 4,
                    'temperature': 0.0}


def test_flags_have_defaults_and_switches_can_be_turned_off(base):
  _, values = parse(['--config', base, '--workdir=', '--dry_run', '--nodry_run'], FLAGS)
  assert values == {'workdir': '', 'dry_run': False, 'prompt': (), 'split': 'test', 'max_new_tokens': 100, 'temperature': 1.0}
  assert parse(['--config', base, '--workdir=', '--dry_run=true'], FLAGS)[1]['dry_run'] is True


def test_command_without_config():
  assert parse(['--workdir=w'], FLAGS, takes_config=False)[0] is None
  for word in ('--config=x', '--config.training.steps=3', '--noconfig.training.remat'):
    with pytest.raises(UserError, match='does not apply: this command takes the configuration from the run'):
      parse(['--workdir=w', word], FLAGS, takes_config=False)
  with pytest.raises(UserError, match='unknown flag --list_fields'): parse(['--list_fields'], FLAGS, takes_config=False)


@pytest.mark.parametrize('words, says', [
  (['--help'], '--split=STR             split to read (one of train, val, test; default test)'),
  (['--workdir=x', '-h'], 'usage: python -m tests.test_config'),
  (['--list_fields'], '--config.model.mixers.<holographic>.binding.kind='),
  (['--config=BASE', '--list_fields', '--config.training.steps=77'], '--config.training.steps=77'),
  (['--config=BASE', '--print_config', '--config.training.steps=77'], '"steps": 77')])
def test_answers_end_with_status_0(words, says, base, capsys):
  assert call(command, flags=FLAGS, argv=[word.replace('BASE', base) for word in words]) == 0
  printed = capsys.readouterr()
  assert says in printed.out and printed.err == ''


def test_printed_config_is_a_config(base):
  with pytest.raises(Answer) as caught: parse(['--config', base, '--print_config'], FLAGS)
  assert from_json(json.loads(str(caught.value))) == load(base)


def command(config, values):
  """A command that does what its first prompt says."""
  if 'status' in values['prompt']: return 75
  if 'interrupt' in values['prompt']: raise KeyboardInterrupt
  if 'missing' in values['prompt']: Path('/nowhere/to/be/found').read_text()
  if 'fault' in values['prompt']: raise ValueError('a fault of ours')


@pytest.mark.parametrize('prompt, status, line', [
  ('', 0, ''), ('status', 75, ''), ('interrupt', 130, 'memjax: interrupted\n'),
  ('missing', 2, 'memjax: /nowhere/to/be/found: No such file or directory\n')])
def test_status_of_a_command(prompt, status, line, base, capsys):
  assert call(command, flags=FLAGS, argv=['--config', base, '--workdir=w', '--prompt', prompt]) == status
  assert capsys.readouterr().err == line


def test_our_own_faults_keep_their_traceback(base):
  with pytest.raises(ValueError): call(command, flags=FLAGS, argv=['--config', base, '--workdir=w', '--prompt=fault'])


SCRIPT = '''"""A command."""
import logging
import sys
from memjax.config.flags import Flag, run

def main(config, values):
  logging.getLogger('memjax.runtime').info('step %d', config.training.steps)
  logging.getLogger('other.module').info('not shown')
  print(sorted({'jax', 'flax', 'orbax', 'grain', 'numpy'} & set(sys.modules)))

if __name__ == '__main__': run(main, flags=(Flag('workdir'),))
'''


@pytest.fixture(scope='module')
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp('script') / 'command.py'
  path.write_text(SCRIPT)
  return str(path)


@pytest.mark.parametrize('words, status, out, err', [
  (['--config.training.steps=3'], 0, '[]\n', 'memjax: step 3\n'),
  (['--config.training.stepz=3'], 2, '', "memjax: unknown key config.training.stepz; did you mean 'steps'?\n"),
  (['false'], 2, '', "memjax: stray argument 'false'\n")], ids=['sound', 'unknown key', 'stray'])
def test_real_process(words, status, out, err, script, base):
  done = subprocess.run([sys.executable, '-W', 'error', script, '--config', base, *words], cwd=ROOT, capture_output=True,
                        text=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_config_dict_can_be_changed_in_a_config_file():
  tree = thaw(Config())
  tree.model.mixers.attention.heads = 4
  with tree.unlocked(): tree.model.mixers.mem = ConfigDict({'kind': 'holographic', 'slots': 8})
  tree.model.pattern = ('attention+mem',)
  assert freeze(tree).model.mixers['mem'] == HolographicConfig(slots=8)
