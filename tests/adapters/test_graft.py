"""Memories grafted onto hosts: bit-equal at the start, moved alone by training, saved alone, and loaded onto the same host only."""
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters import graft as graft_module
from memjax.adapters.graft import (
  adapter_of,
  fingerprint,
  graft,
  graft_params,
  host_of,
  join_adapter,
  load_adapter,
  load_host,
  open_host,
  save_adapter,
  split_adapter,
)
from memjax.adapters.pretrained import load_pretrained
from memjax.adapters.safetensors import SafeTensors, write_safetensors
from memjax.config.banks import BankConfig, BankShapeConfig, ProductKeyConfig, RouterConfig
from memjax.config.errors import ConfigError, UserError
from memjax.config.lora import LoraConfig
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.config.placement import fold, parameter_rules, place
from memjax.config.schema import GroupConfig, ModelConfig, OptimizerConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.optim import assign_groups
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import write_case
from tests.adapters.make_references import LENGTH, ROWS, tokens

BANK = BankConfig(heads=4, shape=BankShapeConfig(entries=16, chapters=4), router=RouterConfig(top_k=2))
MEMORIES = {'bank': BankConfig(heads=4, shape=BankShapeConfig(entries=16)), 'holographic': HolographicConfig(heads=4), 'routed': BANK,
            'product_key': ProductKeyConfig(heads=2, keys=4, top_k=3, key_width=8)}
ALL = ('bank', 'holographic', 'product_key')
SLOW = [('qwen2_window', ('holographic',), (0,)), ('qwen3', ('product_key',), (1,)), ('mistral_window', ('routed',), (0, 1))]
GRAFTS = [('llama_plain', ALL, (0, 1)), *(pytest.param(*graft, marks=pytest.mark.slow) for graft in SLOW)]
POSITION = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('hosts')
  return functools.cache(lambda case: write_folder(root / case, cases()[case]['config'], tensors_of(case)))


@pytest.fixture(scope='module')
def hosts(folders):
  return functools.cache(lambda case: load_pretrained(folders(case)))


def forward(config, params, token_BxL):
  model = build_decoder(config)
  return model.apply({'params': params}, token_BxL, model.init_state(ROWS), position_BxL=POSITION)[0]


@pytest.fixture(scope='module')
def host_logits(hosts):
  def one(case):
    config, params = hosts(case)
    return np.asarray(jax.jit(functools.partial(forward, config))(params, jnp.asarray(tokens(case))))
  return functools.cache(one)


def grafted_all(config, kinds, where):
  """The config with a memory of each kind, called by it."""
  for kind in kinds: config = graft(config, MEMORIES[kind], where=where, name=kind)
  return config


def drawn(host_params, config, seed=0):
  """Parameters whose grafted part is random throughout."""
  rng, shapes = np.random.default_rng(seed), adapter_of(param_shapes(build_decoder(config))[0], config)
  return join_adapter(host_params, {path: .1 * rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}, config)


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(('case', 'kinds', 'where'), GRAFTS)
def test_the_logits_are_those_of_the_host(case, kinds, where, hosts, host_logits):
  """Bit for bit while the output projections are zero, and not when that of any memory is moved."""
  (config, params), token_BxL = hosts(case), jnp.asarray(tokens(case))
  new = grafted_all(config, kinds, where)
  assert new.depth == config.depth + len(kinds) * len(where) and host_of(new) == config
  params = graft_params(params, new, jax.random.key(0))
  call = jax.jit(functools.partial(forward, new))
  np.testing.assert_array_equal(call(params, token_BxL), host_logits(case))
  host, adapter = split_adapter(params, new)
  for kind in kinds:
    outs = [path for path in adapter if f'/{kind}/out/' in path]
    assert outs and not any(adapter[path].any() for path in outs)
    one = join_adapter(host, adapter | {path: adapter[path] + .1 for path in outs}, new)
    assert np.abs(call(one, token_BxL) - host_logits(case)).max() > 1e-3, kind


def test_where_the_memories_stand():
  config = ModelConfig(width=32, vocabulary=61, **fold(('attention',) * 6))
  every = graft(config, BANK, where=place(6, 'all'), sharing='shared')
  assert (every.pattern, every.repeats, every.grafted) == (('attention', 'memory:bare'), 6, ('memory',))
  assert every.mixers['memory'].shape.share == 'memory' and host_of(every) == config
  pairs = graft(config, BANK, where=(0, 2, 5), sharing='every_k_layers')
  assert [layer for layer in pairs.layers if layer != 'attention'] == ['memory_0:bare'] * 2 + ['memory_1:bare']
  assert pairs.layers[1] == pairs.layers[4] == 'memory_0:bare' and pairs.layers[8] == 'memory_1:bare'
  twice = graft(graft(config, BANK, where=(0, 5), name='first'), HolographicConfig(heads=4), where=(5, 4), name='second')
  assert twice.layers == ('attention', 'first:bare', *('attention',) * 4, 'second:bare', 'attention', 'first:bare', 'second:bare')
  assert host_of(twice) == config and host_of(config) is config
  assert parameter_rules(graft(config, HolographicConfig(heads=4), where=(5,))) == ('^suffix/layer_0/=memory', '.*=base')


@pytest.mark.parametrize(('changes', 'says'), [
    ({'where': ()}, 'indices of placement custom are missing'), ({'where': (2,)}, 'indices holds 2; the layers are 0 to 1'),
    ({'where': (0, 0)}, 'indices holds 0 twice'), ({'name': 'attention'}, "name='attention' is that of another mixer"),
    ({'sharing': 'shard'}, "sharing must be one of shared, per_layer, every_k_layers, not 'shard'; did you mean 'shared'?"),
    ({'sharing': 'every_k_layers', 'sharing_k': 0}, 'sharing_k=0 must be at least 1'),
    ({'memory': BankConfig(heads=5)}, 'mixers.memory.heads=5 does not divide width=32'),
    ({'memory': HolographicConfig(heads=4), 'sharing': 'shared'}, "sharing='shared' goes with the tables of bank and product_key")])
def test_bad_grafts_are_refused(changes, says, hosts):
  given = {'memory': BANK, 'where': (0,), **changes}
  with pytest.raises(ConfigError) as caught: graft(hosts('llama_plain')[0], given.pop('memory'), **given)
  assert says in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(('where', 'sharing'), [((0,), 'per_layer'), ((0, 1), 'shared')])
def test_parts_and_whole(where, sharing, hosts):
  """The host's arrays come back bit for bit, scanned or not, and its own are kept where they stay whole."""
  config, params = hosts('llama_plain')
  new = graft(config, BANK, where=where, sharing=sharing)
  assert config.repeats == 2 and new.repeats == (2 if len(where) == 2 else 0)
  grafted = drawn(params, new)
  shapes = named(param_shapes(build_decoder(new))[0])
  assert {path: x.shape for path, x in named(grafted).items()} == {path: x.shape for path, x in shapes.items()}
  host, adapter = split_adapter(grafted, new)
  same(host, params)
  same(join_adapter(host, adapter, new), grafted)
  assert grafted['embed']['table'] is params['embed']['table']
  if new.repeats: assert grafted['repeats']['layer_0']['mlp']['up']['kernel'] is params['repeats']['layer_0']['mlp']['up']['kernel']
  assert ('bank_memory/entries' in adapter) == (sharing == 'shared') and not any('mlp' in path for path in adapter)
  rules = parameter_rules(new)
  groups = {rule.rpartition('=')[2]: GroupConfig() for rule in rules}
  own = assign_groups(OptimizerConfig(rules=rules, groups=groups), list(shapes))
  assert {path for path, group in own.items() if group != 'base'} == set(adapter) == set(adapter_of(grafted, new))


def test_parts_that_do_not_fit(hosts):
  config, params = hosts('llama_plain')
  new = graft(config, BANK, where=(0,))
  adapter = adapter_of(param_shapes(build_decoder(new))[0], new)
  path = 'prefix/layer_1/mixers/memory/out/kernel'
  for host, own, says in [
      ({k: v for k, v in params.items() if k != 'norm'}, adapter, 'the host lacks the parameter norm/scale'),
      ({**params, 'more': params['norm']}, adapter, "the host has an unknown parameter 'more/scale'"),
      (params, {k: v for k, v in adapter.items() if k != path}, f'the adapter lacks the parameter {path}'),
      (params, adapter | {path: np.zeros((3, 3))}, f'the adapter has a parameter {path} of [3, 3]; the config makes it [32, 32]')]:
    with pytest.raises(UserError) as caught: join_adapter(host, own, new)
    assert says.replace("'", '') in str(caught.value).replace("'", '')


@pytest.mark.slow
def test_decoding_with_a_cache(hosts):
  config, params = hosts('llama_plain')
  new = graft(config, HolographicConfig(heads=4), where=(0,))
  params = drawn(params, new)
  model, token_BxL, cut = build_decoder(new), jnp.asarray(tokens('llama_plain')), 15
  def decode(params):
    call = lambda token, state, position: model.apply({'params': params}, token, state, position_BxL=position)[:2]
    head, state = call(token_BxL[:, :cut], model.init_state(ROWS, LENGTH), POSITION[:, :cut])
    def step(state, one):
      logits, state = call(one[0][:, None], state, one[1][:, None])
      return state, logits[:, 0]
    rest = jax.lax.scan(step, state, (token_BxL[:, cut:].T, POSITION[:, cut:].T))[1]
    return jnp.concatenate([head, jnp.swapaxes(rest, 0, 1)], 1), forward(new, params, token_BxL)
  stepped, whole = jax.jit(decode)(params)
  np.testing.assert_allclose(stepped, whole, atol=1e-4, rtol=0)


@pytest.fixture(scope='module')
def saved(hosts, tmp_path_factory):
  """(folder, config, parameters) of an adapter that was moved."""
  config, params = hosts('llama_plain')
  new = graft(config, BANK, where=(1,), sharing='shared')
  params = drawn(params, new)
  folder = tmp_path_factory.mktemp('saved') / 'adapter'
  save_adapter(str(folder), new, params)
  return folder, new, params


def test_files_hold_the_memories_alone_and_load_onto_a_fresh_host(saved, folders):
  folder, config, params = saved
  assert sorted(path.name for path in folder.iterdir()) == ['memory_adapter.safetensors', 'memory_config.json']
  assert set(SafeTensors(str(folder / 'memory_adapter.safetensors')).entries) == set(adapter_of(params, config))
  host_config, host = load_pretrained(folders('llama_plain'))
  again, loaded = load_adapter(str(folder), host_config, host)
  assert again == config
  same(loaded, params)
  half_config, half = load_pretrained(folders('llama_plain'), dtype='bfloat16', param_dtype='bfloat16')
  again, loaded = load_adapter(str(folder), half_config, half)
  assert again == dataclasses.replace(config, dtype='bfloat16') and loaded['bank_memory']['entries'].dtype == jnp.float32


def test_another_host_is_refused_in_one_line(saved, hosts):
  folder, _, params = saved
  config, host = hosts('llama_plain')
  for case, says in [('llama_linear', 'belongs to another host: they differ in mixers.attention.rotary_base'),
                     ('qwen2', 'belongs to another host: they differ in mixers.attention.bias')]:
    with pytest.raises(UserError, match=says) as caught: load_adapter(str(folder), *hosts(case), force=True)
    assert '\n' not in str(caught.value)
  kernel = host['repeats']['layer_0']['mlp']['down']['kernel']
  other = jax.tree.map(lambda x: x + 1 if x is kernel else x, host)
  assert fingerprint(config, other) != fingerprint(config, host)
  with pytest.raises(UserError, match='belongs to another host: its weights are not these'): load_adapter(str(folder), config, other)
  same(load_adapter(str(folder), config, other, force=True)[1]['repeats' if 'repeats' in params else 'prefix'].keys(),
       params['repeats' if 'repeats' in params else 'prefix'].keys())
  with pytest.raises(UserError, match='nothing is grafted'): save_adapter(str(folder), config, host)
  changed = dataclasses.replace(config, block=dataclasses.replace(config.block, lora=LoraConfig(rank=2)))
  with pytest.raises(UserError, match='strip or merge them first'): save_adapter(str(folder), changed, host)


def test_fields_at_their_default_leave_the_fingerprint(hosts, monkeypatch):
  """A file made before a field existed still belongs to its host."""
  config, host = hosts('llama_plain')
  now, facts = fingerprint(config, host), graft_module._facts
  assert facts(config)['block.norm'] == 'rmsnorm' and facts(config)['mixers.attention.heads'] != 8
  without = lambda *names: lambda config: {name: value for name, value in facts(config).items() if name not in names}
  monkeypatch.setattr(graft_module, '_facts', without('block.norm', 'mixers.attention.qk_norm'))
  assert fingerprint(config, host) == now
  monkeypatch.setattr(graft_module, '_facts', without('mixers.attention.heads'))
  assert fingerprint(config, host) != now


def test_damaged_files_are_refused_in_one_line(saved, hosts, tmp_path):
  folder, _, _ = saved
  tree = json.loads((folder / 'memory_config.json').read_text())
  arrays = (folder / 'memory_adapter.safetensors').read_bytes()
  write_safetensors(str(tmp_path / 'other.safetensors'), {'x': np.zeros((2, 3), np.float16)})
  for text, content, says in [
      (None, arrays, 'memory_config.json cannot be read'), ('[]', arrays, 'is not a JSON object'),
      (json.dumps({**tree, 'version': 2}), arrays, 'is not the description of a memory adapter of version 1'),
      (json.dumps({**tree, 'model': {'widht': 3}}), arrays, "unknown key model.widht; did you mean 'width'?"),
      (json.dumps({**tree, 'model': 7}), arrays, 'model is a group of fields, not 7'),
      (json.dumps(tree), arrays[:-4], 'is cut short'),
      (json.dumps(tree), (tmp_path / 'other.safetensors').read_bytes(), "memory_adapter.safetensors: the adapter lacks the parameter")]:
    for path in tmp_path.glob('memory_*'): path.unlink()
    if text is not None: (tmp_path / 'memory_config.json').write_text(text)
    (tmp_path / 'memory_adapter.safetensors').write_bytes(content)
    with pytest.raises(UserError) as caught: load_adapter(str(tmp_path), *hosts('llama_plain'))
    assert says in str(caught.value) and '\n' not in str(caught.value) and str(caught.value).startswith(str(tmp_path))
  with pytest.raises(UserError, match=r"'x' is int8; weights are F32, F16, BF16"):
    write_safetensors(str(tmp_path / 'x'), {'x': np.zeros(2, np.int8)})
  with pytest.raises(UserError, match='cannot be written: No such file or directory'): write_safetensors(str(tmp_path / 'no' / 'x'), {})


def test_a_host_is_read_into_the_layout_of_a_graft(hosts, folders):
  config, params = hosts('qwen2')
  new = graft(config, WindowConfig(heads=4, window=3), where=(0,))
  same(load_host(new, folders('qwen2')), without_memories(params, new))
  with pytest.raises(UserError, match='llama_plain is not the host of this config: they differ in mixers'):
    load_host(new, folders('llama_plain'))


def test_a_host_is_read_from_gguf(hosts, tmp_path):
  config, params = hosts('llama_plain')
  new = graft(config, BANK, where=(0,))
  path = write_case(tmp_path / 'host.gguf', 'llama_plain')
  assert open_host(path)[0] == config
  same(load_host(new, path), without_memories(params, new))


BFLOAT16 = """
import jax, jax.numpy as jnp, numpy as np
from memjax.adapters.graft import graft, graft_params
from memjax.adapters.pretrained import load_pretrained
from tests.adapters.test_graft import MEMORIES, forward, tokens
config, params = load_pretrained({folder!r}, dtype='bfloat16')
token_BxL = jnp.asarray(tokens('llama_plain'))
run = lambda config, params: np.asarray(jax.jit(lambda params: forward(config, params, token_BxL))(params))
for kind, memory in MEMORIES.items():
  new = graft(config, memory, where=(0,))
  np.testing.assert_array_equal(run(new, graft_params(params, new, jax.random.key(0))), run(config, params), err_msg=kind)
print('equal')
"""


@pytest.mark.slow
def test_bfloat16_without_excess_precision(folders):
  """XLA computes fused bfloat16 in float32 and would round elsewhere in the grafted program; this flag forbids it."""
  flags = '--xla_allow_excess_precision=false --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', BFLOAT16.format(folder=folders('llama_plain'))], capture_output=True, text=True, check=False,
                        cwd=Path(__file__).parent.parent.parent, env={**os.environ, 'XLA_FLAGS': flags})
  assert done.stdout.strip() == 'equal', done.stderr[-2000:]


def without_memories(params, new):
  """The host's parameters where `new` has them."""
  shapes = adapter_of(param_shapes(build_decoder(new))[0], new)
  grafted = join_adapter(params, {path: np.zeros(x.shape, np.float32) for path, x in shapes.items()}, new)
  for path in shapes:
    *above, last = path.split('/')
    del functools.reduce(lambda node, name: node[name], above, grafted)[last]
  return prune(grafted)


def prune(tree):
  """Nested dictionaries without empty ones."""
  if not isinstance(tree, dict): return tree
  found = {name: prune(node) for name, node in tree.items()}
  return {name: node for name, node in found.items() if not isinstance(node, dict) or node}
