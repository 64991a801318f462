"""What a model takes, counted from shapes: every byte in exactly one part, states as they are made (Q7.6)."""
import dataclasses
import math

import jax
import pytest

from memjax.adapters.families import family_config
from memjax.adapters.graft import adapter_of, graft
from memjax.adapters.lora import with_lora
from memjax.config.banks import BankConfig, BankQuantConfig, BankShapeConfig, ProductKeyConfig, RouterConfig
from memjax.config.lora import LoraConfig
from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.placement import parameter_rules
from memjax.config.quant import QuantConfig
from memjax.config.schema import BlockConfig, EmbeddingConfig, GroupConfig, ModelConfig, OptimizerConfig
from memjax.layers.tree import named, nbytes
from memjax.models.decoder import build_decoder, param_shapes
from memjax.models.quantized import with_quant
from memjax.runtime.footprint import PARTS, footprint, footprint_table, part_of, parts_footprint
from memjax.runtime.optim import make_optimizer
from tests.adapters.files import cases

BANK = BankConfig(heads=4, shape=BankShapeConfig(entries=16, chapters=4), router=RouterConfig(top_k=2))
PACKED = dataclasses.replace(BANK, quant=BankQuantConfig(bits=4, scheme='nf4', group=32))
LORA = LoraConfig(rank=2, targets=('/attention/query/kernel$',), dora=True)
HOST = family_config(cases()['qwen3']['config'])
GRAFTED = with_lora(graft(graft(HOST, BANK, where=(1,)), HolographicConfig(heads=2, slots=4), where=(0,), name='notes'), LORA)
OWN = ModelConfig(
    width=32, vocabulary=11, mixers={'near': WindowConfig(heads=4, kv_heads=2, window=6), 'far': AttentionConfig(heads=4), 'bank': BANK,
                                     'keys': ProductKeyConfig(heads=2, keys=4, top_k=2, key_width=4, share='both')},
    pattern=('near+far:gate>bank', 'keys'), repeats=3, block=BlockConfig(norm='layernorm', bias=True),
    embedding=EmbeddingConfig(tie=False, position='learned', max_position=9))
MODELS = {'grafted': GRAFTED, 'own': OWN, 'packed': with_quant(dataclasses.replace(graft(HOST, PACKED, where=(1,))), QuantConfig(
    storage='nf4', exclude=('/down/',)))}


@pytest.mark.parametrize('name', MODELS)
def test_every_byte_is_in_exactly_one_part(name):
  config = MODELS[name]
  shapes = param_shapes(build_decoder(config))[0]
  parts, found = parts_footprint(config, shapes), footprint(build_decoder(config), shapes, batch=2, length=8)
  for key in ('bytes', 'parameters', 'packed_bytes'): assert found[key] == sum(part[key] for part in parts.values())
  assert found['bytes'] == nbytes(shapes) and set(parts) <= set(PARTS) and found['parts'] == parts
  state = jax.eval_shape(lambda: build_decoder(config).init_state(2, 8))
  assert found['attention_bytes'] + found['memory_bytes'] == nbytes(state)
  if name != 'packed': assert found['parameters'] == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) and not found['packed_bytes']
  assert f'{found["bytes"]:,}' in footprint_table(found)


def test_parts_are_what_they_say():
  shapes = named(param_shapes(build_decoder(GRAFTED))[0])
  part = {path: part_of(path, GRAFTED) for path in shapes}
  mine = adapter_of(param_shapes(build_decoder(GRAFTED))[0], GRAFTED)
  assert {part[path] for path in mine} == {'memory', 'routers', 'banks'}
  assert not {part[path] for path in shapes if path not in mine} & {'memory', 'routers', 'banks'}
  ends = {'/query_norm/scale': 'norms', '/lora_m': 'low-rank', '/attention/query/kernel': 'attention', '/mlp/up/kernel': 'feed-forward',
          '/router/kernel': 'routers', '/bank/entries': 'banks', '/norm_mlp/scale': 'norms'}
  for path, wanted in ends.items():
    assert {part[found] for found in part if found.endswith(path)} == {wanted}, path
  assert (part['embed/table'], part['head/kernel'], part['norm/scale']) == ('embedding', 'head', 'norms')
  own = {path: part_of(path, OWN) for path in named(param_shapes(build_decoder(OWN))[0])}
  assert own['position/position'] == 'embedding' and own['bank_both/values'] == 'banks'
  assert {own[path] for path in own if '/mixers/gate' in path or '/mixers/norm_' in path} == {'memory'}


def test_keys_and_values_of_texts():
  """2 layers B S H_kv dh itemsize, windows no further than they see, and a count a row and layer."""
  found = footprint(build_decoder(HOST), param_shapes(build_decoder(HOST))[0], batch=3, length=10)
  assert found['attention_bytes'] == 2 * 2 * 3 * 10 * 2 * 16 * 4 + 2 * 3 * 4 and not found['memory_bytes']
  window = family_config(cases()['mistral_window']['config'])
  found = footprint(build_decoder(window), param_shapes(build_decoder(window))[0], batch=1, length=50)
  assert found['attention_bytes'] == 2 * 2 * 5 * 2 * 8 * 4 + 2 * 4


def test_banks_and_training():
  """Entries that are read, and what an optimiser keeps of what it trains alone."""
  model, shapes = build_decoder(GRAFTED), param_shapes(build_decoder(GRAFTED))[0]
  rules = parameter_rules(GRAFTED)
  groups = {name: GroupConfig(rate=0.0 if name == 'base' else 1e-3) for name in (rule.rpartition('=')[2] for rule in rules)}
  found = footprint(model, shapes, batch=1, length=8, optimizer=make_optimizer(OptimizerConfig(rules=rules, groups=groups), shapes, 5))
  assert (found['active_entries'], found['effective_tokens']) == (8, 16) and found['parts']['banks'] == {
      'parameters': 512, 'bytes': 2048, 'packed_bytes': 0}
  assert found['compression'] == pytest.approx((2 * 2 * 16 * 2 * 16 * 4 + 8) / 2048) and found['prepared_bytes'] == 2 * 16 * 32 * 4
  trained = sum(part['parameters'] for name, part in found['parts'].items() if name in ('low-rank', 'memory', 'routers', 'banks'))
  assert found['trainable'] == trained and found['gradient_bytes'] == 4 * trained
  assert found['trainable_share'] == trained / found['parameters']
  assert 0 <= found['optimizer_bytes'] - 8 * trained < 500                    # two moments of each, and counts
  assert f'{trained:,} parameters' in footprint_table(found)


def test_packed_numbers_count_as_what_they_stand_for():
  plain = param_shapes(build_decoder(graft(HOST, BANK, where=(1,))))[0]
  packed = MODELS['packed']
  found, wide = parts_footprint(packed, param_shapes(build_decoder(packed))[0]), parts_footprint(packed, plain)
  for part, counts in wide.items(): assert found[part]['parameters'] == counts['parameters'], part
  assert found['banks'] == {'parameters': 512, 'bytes': 256 + 16 * 2, 'packed_bytes': 256 + 16 * 2}
  assert found['attention']['bytes'] == found['attention']['packed_bytes'] < wide['attention']['bytes'] / 6
  assert 0 < found['feed-forward']['packed_bytes'] < found['feed-forward']['bytes']
