"""Hosts in fewer bits: which kernels, what they lose, folders of packed tensors alone, training through them, merging into them."""
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.families import family_config, tensor_places
from memjax.adapters.graft import graft, graft_params, load_host
from memjax.adapters.lora import insert, kernels_of, merge, merge_quantized, start, unmerge, with_lora
from memjax.adapters.pretrained import load_params, load_pretrained, open_pretrained
from memjax.adapters.quantized import DESCRIPTION, FILE, TYPES, PackedTensors, load_quantized, packed, save_quantized
from memjax.adapters.safetensors import SafeTensors, write_safetensors
from memjax.config.errors import UserError
from memjax.config.placement import train_only
from memjax.config.quant import QuantConfig
from memjax.config.schema import Config, EmbeddingConfig, GroupConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from memjax.layers.tree import named, nbytes
from memjax.models.decoder import build_decoder, param_shapes
from memjax.models.quantized import dequantize_host, quantize_host, quantize_model, with_quant
from memjax.runtime.optim import make_optimizer
from memjax.runtime.sharding import make_mesh, shardings_for
from memjax.runtime.state import abstract_state, init_state, make_gradient, make_train_step
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.test_lora import MIXERS, POSITION, QUERY_VALUE, TOKEN, A, logits, random_adapter, random_params, same

D = 32
HOST = ModelConfig(width=D, hidden=64, vocabulary=A, mixers={'attention': MIXERS['attention']}, pattern=('attention',), repeats=2,
                   embedding=EmbeddingConfig(tie=False))
INT8, NF4 = QuantConfig(storage='int8', head=True), QuantConfig(storage='nf4')
KERNELS = {f'repeats/layer_0/{name}/kernel' for name in (
    'mlp/gate', 'mlp/up', 'mlp/down', *[f'mixers/attention/{one}' for one in ('query', 'key', 'value', 'out')])}
CASE = 'llama_plain'
LLAMA = family_config(cases()[CASE]['config'])
FITS = QuantConfig(storage='int4', exclude=('/down/',))              # whose rows groups of 32 divide
# storage: most relative error of a kernel, bytes of a weight
ERRORS = {'int8': (0.007, 1 + 4 / D), 'int4': (0.1, 0.5 + 2 / 32), 'nf4': (0.1, 0.5 + 2 / 32), 'bfloat16': (0.002, 2), 'float16': (3e-4, 2)}


@pytest.fixture(scope='module')
def host(): return random_params(HOST)


@pytest.mark.parametrize('storage', ERRORS)
def test_kernels_shrink_and_the_rest_stays(storage, host):
  config, params, report = quantize_host(HOST, host, QuantConfig(storage=storage))
  most, size = ERRORS[storage]
  assert set(report.error) == KERNELS and all(most / 4 < error < most for error in report.error.values())
  assert (report.before, report.after) == (nbytes(host), nbytes(params))
  flat, plain = named(params), named(host)
  assert all(flat[path] is x for path, x in plain.items() if path not in KERNELS)
  rows = {path: x for path, x in flat.items() if path not in plain or path in KERNELS}
  weights = sum(plain[path].size for path in KERNELS)
  assert nbytes(rows) == pytest.approx(size * weights, rel=0.02) and all(x.dtype != jnp.float32 for path, x in rows.items()
                                                                           if not path.endswith('_scale'))
  shapes = named(param_shapes(build_decoder(config))[0])
  assert {path: (x.shape, x.dtype) for path, x in shapes.items()} == {path: (x.shape, x.dtype) for path, x in flat.items()}
  assert f'{len(KERNELS)} kernels in fewer bits: {report.before:,} -> {report.after:,} bytes' in report.line()


@pytest.mark.slow
@pytest.mark.parametrize('quant', [INT8, NF4], ids=['int8', 'nf4'])
def test_the_model_computes_with_the_numbers_that_are_stored(quant, host):
  config, params, _ = quantize_host(HOST, host, quant)
  plain, numbers = dequantize_host(config, params)
  assert plain == HOST and named(numbers).keys() == named(host).keys()
  kernel = np.asarray(host['repeats']['layer_0']['mlp']['up']['kernel'], np.float64)
  if quant is INT8:                                                  # one scale for each output: the largest of its column / 127
    scale = np.abs(kernel).max(-2, keepdims=True) / 127
    np.testing.assert_allclose(numbers['repeats']['layer_0']['mlp']['up']['kernel'], np.round(kernel / scale) * scale, atol=1e-6)
    assert params['head']['kernel_codes'].shape == (A, D)
  else: assert 'kernel' in params['head']
  found, exact = logits(config, params), logits(HOST, numbers)
  np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
  assert 1e-3 < np.abs(found - logits(HOST, host)).max() / np.abs(exact).max() < 0.3


def test_patterns_choose_kernels_and_memories_keep_theirs(host):
  quant = QuantConfig(storage='int8', targets=('/mlp/', '/query/'), exclude=('/up/',))
  assert set(quantize_host(HOST, host, quant)[2].error) == {path for path in KERNELS if re.search('/(gate|down|query)/', path)}
  grafted = graft(HOST, MIXERS['bank'], where=(0,))
  params = graft_params(host, grafted, jax.random.key(0))
  config, stored, report = quantize_host(grafted, params, QuantConfig(storage='int8'))
  assert not [path for path in report.error if '/memory/' in path] and len(report.error) == 2 * len(KERNELS)
  assert stored['prefix']['layer_1'] is not None and named(stored['prefix']['layer_1']).keys() == named(params['prefix']['layer_1']).keys()
  assert quantize_model(grafted, params, 'int8/host')[0] == config and quantize_model(grafted, params, 'int8')[0] != config


REFUSED = {
    'already': (lambda c, p: quantize_host(with_quant(c, NF4), p, INT8), 'the kernels are stored as nf4 already'),
    'no kernel': (lambda c, p: quantize_host(c, p, QuantConfig(storage='int8', targets=('/q_proj/',))),
                  "quant.targets holds '/q_proj/', which matches no kernel"),
    'no head': (lambda c, p: param_shapes(build_decoder(with_quant(dataclasses.replace(c, embedding=EmbeddingConfig()), INT8))),
                'quant.head is set, but no head of its own'),
    'rows': (lambda c, p: param_shapes(build_decoder(with_quant(LLAMA, NF4))),
             'mlp/down/kernel cannot be stored as nf4: quantisation groups of 32'),
    'how': (lambda c, p: insert(quantize_host(c, p, NF4)[1], random_adapter(with_lora(c, QUERY_VALUE))), 'say how, with quant='),
    'merge': (lambda c, p: merge(quantize_host(c, p, NF4)[1], [random_adapter(with_lora(c, QUERY_VALUE))]), 'merge_quantized merges there'),
    'merge of numbers': (lambda c, p: merge_quantized(c, p, []), 'are not stored as integers; merge does it'),
    'not quantised': (lambda c, p: save_quantized('nowhere', c, p), 'the host is not quantised'),
    'changes': (lambda c, p: save_quantized('nowhere', with_lora(with_quant(c, NF4), QUERY_VALUE), p), 'low-rank changes; merge or strip'),
    'memories': (lambda c, p: save_quantized('nowhere', *quantize_host(g := graft(c, MIXERS['bank'], where=(0,)),
                                                                       graft_params(p, g, jax.random.key(0)), INT8)[:2]),
                 'belongs to no checkpoint of a host; save the memories')}


@pytest.mark.parametrize('name', REFUSED)
def test_refusal(name, host):
  call, says = REFUSED[name]
  with pytest.raises(UserError) as caught: call(HOST, host)
  assert says in str(caught.value) and '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A float checkpoint."""
  return write_folder(tmp_path_factory.mktemp('host') / CASE, cases()[CASE]['config'], tensors_of(CASE))


@pytest.mark.parametrize('quant', [FITS, pytest.param(INT8, marks=pytest.mark.slow),
                                   pytest.param(QuantConfig(storage='bfloat16'), marks=pytest.mark.slow)], ids=['int4', 'int8', 'bfloat16'])
def test_a_folder_holds_the_packed_tensors_alone(quant, folder, tmp_path):
  """Q7.5: what is saved is read back bit for bit, no kernel is there as float32, and a checkpoint packed as it is read is the same."""
  config, params, report = quantize_host(*load_pretrained(folder), quant)
  assert save_quantized(str(tmp_path), config, params) == [FILE, DESCRIPTION]
  again, loaded = load_quantized(str(tmp_path))
  assert again == config and same(loaded, params)
  file = SafeTensors(str(tmp_path / FILE))
  places = {'/'.join(place.path): name for name, place in tensor_places(LLAMA).items()}
  for path in report.error:
    name = places[path]
    assert file.entries[name].dtype == 'BF16' if quant.storage == 'bfloat16' else {f'{name}_codes', f'{name}_scale'} < set(file.entries)
  assert sum(entry.end - entry.begin for entry in file.entries.values()) == nbytes(params)
  text = json.loads((tmp_path / DESCRIPTION).read_text())
  assert text['storage'] == quant.storage and text['tensors'].keys() < file.entries.keys()
  tensors = packed(open_pretrained(folder)[1], config)
  for found in (load_params(config, tensors), load_host(config, str(tmp_path))): assert same(found, params)
  if quant.storage == 'bfloat16': return
  assert isinstance(tensors, PackedTensors) and all(0 < error < 0.1 for error in tensors.error.values())
  assert tensors.error.keys() == {name for name, place in tensor_places(LLAMA).items() if '/'.join(place.path) in report.error}


@pytest.fixture(scope='module')
def saved(folder, tmp_path_factory):
  """(tensors, description) of a quantised folder."""
  root = tmp_path_factory.mktemp('packed')
  save_quantized(str(root), *quantize_host(*load_pretrained(folder), FITS)[:2])
  file = SafeTensors(str(root / FILE), TYPES)
  return {name: file.read(name) for name in file.entries}, json.loads((root / DESCRIPTION).read_text())


Q = 'model.layers.0.self_attn.q_proj.weight_{}'
# changes of the tensors, of the description (by dotted path), what is said
BAD = {
    'codes missing': ({Q.format('codes'): None}, {}, f'lacks the tensor {Q.format("codes")}'),
    'unknown': ({'model.x': np.ones(3, np.float32)}, {}, "an unknown tensor 'model.x'"),
    'shape of codes': ({Q.format('codes'): np.ones((32, 15), np.uint8)}, {}, 'q_proj.weight_codes is [32, 15]; config.json makes it [32,'),
    'signed codes': ({Q.format('codes'): np.ones((32, 16), np.int8)}, {}, 'q_proj.weight_codes\' is I8; int4 wants uint8'),
    'wide scale': ({Q.format('scale'): np.ones((32, 1), np.float32)}, {}, 'q_proj.weight_scale\' is F32; int4 wants float16'),
    'infinite scale': ({Q.format('scale'): np.full((32, 1), np.inf, np.float16)}, {}, 'q_proj.weight_scale\' holds NaN or infinity'),
    'integers for numbers': ({'model.norm.weight': np.ones(32, np.uint8)}, {}, "'model.norm.weight' is U8; int4 wants float32"),
    'another version': ({}, {'version': 2}, 'is not the description of a quantised model of version 1'),
    'no model': ({}, {'model': 3}, 'model is no table: 3'),
    'unknown field': ({}, {'model.block.quant.bits': 4}, 'model.block.quant.bits'),
    'other storage': ({}, {'model.block.quant.storage': 'int8'}, "weight_codes' is U8; int8 wants int8"),
    'nothing packed': ({}, {'model.block.quant': {}}, 'model.block.quant.storage is missing'),
    'changes': ({}, {'model.block.lora': {'rank': 2}}, 'holds no low-rank changes'),
    'not JSON': ({}, '{', 'is not JSON'), 'cut short': (-4, {}, 'is cut short'), 'no tensors': (None, {}, f'{FILE} cannot be read')}


@pytest.mark.parametrize('name', BAD)
def test_bad_folder_is_one_line(name, saved, tmp_path):
  changes, description, says = BAD[name]
  tensors, text = saved[0], json.loads(json.dumps(saved[1]))
  tensors = {key: x for key, x in (tensors | (changes if isinstance(changes, dict) else {})).items() if x is not None}
  if changes is not None: write_safetensors(str(tmp_path / FILE), tensors, TYPES)
  if isinstance(changes, int): (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:changes])
  for path, value in description.items() if isinstance(description, dict) else ():
    *above, last = path.split('.')
    node = text
    for key in above: node = node[key]
    node[last] = value
  (tmp_path / DESCRIPTION).write_text(description if isinstance(description, str) else json.dumps(text))
  with pytest.raises(UserError) as caught: load_quantized(str(tmp_path))
  assert says in str(caught.value) and str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_run_refuses_another_packing_than_that_of_the_folder(saved, tmp_path):
  write_safetensors(str(tmp_path / FILE), saved[0], TYPES)
  (tmp_path / DESCRIPTION).write_text(json.dumps(saved[1]))
  for config in (LLAMA, with_quant(LLAMA, INT8)):
    with pytest.raises(UserError, match=r'is stored as int4; config\.model\.block\.quant must say what it says'):
      load_host(config, str(tmp_path))


# Training -------------------------------------------------------------------------------------------------------------------------

BATCH = {'token': TOKEN, 'target': (TOKEN + 1) % A, 'weight': jnp.ones((2, 6), bool), 'position': POSITION}


def run_of(config, groups):
  """(run, model, optimiser) of a few steps that train some groups alone."""
  rates = {name: GroupConfig(rate=0.1, schedule='constant', end=0.1) for name in groups}
  run = Config(model=config, optimizer=OptimizerConfig(**train_only(config, rates)), mesh=MeshConfig(data=1),
               training=TrainingConfig(steps=6, batch=2, length=6))
  model = build_decoder(config)
  shapes, axes = param_shapes(model)
  return run, model, make_optimizer(run.optimizer, shapes, 6, axes=axes)


def train(config, groups, given):
  """({path: array} before, after, losses, trained paths) of six steps that begin with some parameters."""
  run, model, optimizer = run_of(config, groups)
  abstract = abstract_state(model, optimizer, run, make_mesh(run.mesh))
  state = init_state(model, optimizer, run, abstract, given=jax.tree.map(jnp.copy, named(given)))
  step, before, losses = make_train_step(model, optimizer, run, abstract), named(jax.tree.map(np.array, state.params)), []
  for _ in range(6):
    state, metrics = step(state, BATCH)
    losses.append(float(metrics['loss']))
  assert int(state.skipped) == 0
  return before, named(state.params), losses, set(optimizer.split(state.params)[0])


def check_frozen(before, after, given, trained):
  """All that is trained moved, and nothing else, least of all a bit of what is packed."""
  for path, x in before.items():
    assert np.array_equal(x, after[path]) != (path in trained), path
    if path in given and path not in trained: assert np.array_equal(given[path], after[path])
  codes = [path for path in before if path.endswith('_codes')]
  assert codes and not set(codes) & trained and all(after[path].dtype == jnp.uint8 for path in codes)


@pytest.mark.slow
def test_changes_are_trained_through_packed_kernels(host):
  config, params, _ = quantize_host(HOST, host, NF4)
  lora = dataclasses.replace(QUERY_VALUE, targets=('/(query|down)/kernel$',), dora=True)
  before, after, losses, trained = train(with_lora(config, lora), ('lora',), params)
  assert losses[-1] < 0.9 * losses[0] and len(trained) == 6
  check_frozen(before, after, named(params), trained)


@pytest.mark.slow
def test_memories_are_trained_beside_packed_kernels(host):
  """Memories and changes at once, with dropout; the memory's kernels are float32 and have changes as well."""
  grafted = graft(HOST, MIXERS['bank'], where=(0,))
  config, params, _ = quantize_host(grafted, graft_params(host, grafted, jax.random.key(1)), NF4)
  lora = dataclasses.replace(QUERY_VALUE, dropout=0.1)
  before, after, losses, trained = train(with_lora(config, lora), ('lora', 'memory', 'memory_bank'), params)
  assert losses[-1] < 0.8 * losses[0] and {path for path in trained if '/lora_' not in path} == {
      path for path in before if path.startswith('prefix/layer_1/') and '/lora_' not in path}
  check_frozen(before, after, named(params), trained)


def test_no_float_copy_is_kept_for_the_gradient():
  """The backward pass of the scanned layers keeps codes, not the kernels that they stand for."""
  run, model, optimizer = run_of(with_quant(with_lora(HOST, QUERY_VALUE), NF4), ('lora',))
  text = str(jax.make_jaxpr(make_gradient(model, optimizer, run))(param_shapes(model)[0], (), BATCH, jax.random.key(0)))
  assert 'u8[2,64,16]' in text and not re.search(r'f32\[2,(64,32|32,64)\]', text)


def test_packed_kernels_are_not_trained():
  with pytest.raises(UserError) as caught: run_of(with_quant(with_lora(HOST, QUERY_VALUE), NF4), ('lora', 'base'))
  assert re.search(r'^optimizer\.groups\.base trains \S+/kernel, which model\.block\.quant stores in fewer bits', str(caught.value))


@pytest.mark.parametrize('quant', [INT8, pytest.param(NF4, marks=pytest.mark.slow)], ids=['int8', 'nf4'])
def test_changes_are_merged_into_packed_kernels(quant, host):
  config, params, _ = quantize_host(HOST, host, quant)
  own = with_lora(config, QUERY_VALUE)
  np.testing.assert_array_equal(logits(own, start(own, params, jax.random.key(0))), logits(config, params))
  adapter = random_adapter(with_lora(HOST, QUERY_VALUE), 3)
  merged, report = merge_quantized(config, params, [adapter])
  exact = logits(own, insert(params, adapter, quant))
  error = np.abs(logits(config, merged) - exact).max() / np.abs(exact).max()
  assert set(report.error) == set(adapter) and all(0 < value < (0.01 if quant is INT8 else 0.1) for value in report.error.values())
  assert error < (0.02 if quant is INT8 else 0.3) < 0.5 < np.abs(exact - logits(config, params)).max() / np.abs(exact).max()
  assert same(unmerge(merged, kernels_of(params, [adapter])), params)


@pytest.mark.slow
@pytest.mark.parametrize('quant', [INT8, NF4], ids=['int8', 'nf4'])
def test_a_packed_host_on_a_mesh(quant, host):
  """Eight devices compute what one does."""
  config, params, _ = quantize_host(HOST, host, quant)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  model, (shapes, axes) = build_decoder(config), param_shapes(build_decoder(config))
  places = shardings_for(axes, mesh, shapes)
  assert not places['repeats']['layer_0']['mlp']['up']['kernel_codes'].is_fully_replicated
  with jax.set_mesh(mesh):
    call = lambda params: model.apply({'params': params}, TOKEN, model.init_state(2), position_BxL=POSITION)[0]
    found = jax.jit(call)(jax.device_put(params, places))
  np.testing.assert_allclose(found, logits(config, params), atol=2e-5)
