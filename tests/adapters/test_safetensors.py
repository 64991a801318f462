"""Reading safetensors: what is right is read bit for bit, what is wrong is one line, and the host holds one tensor at a time."""
import json
import os
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters import pretrained
from memjax.adapters.families import HEAD, family_config
from memjax.adapters.pretrained import end_tokens, load_pretrained
from memjax.adapters.safetensors import HEADER_LIMIT, INDEX, Checkpoint, SafeTensors
from memjax.config.errors import UserError
from memjax.config.schema import MeshConfig
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.sharding import make_mesh, shardings_for
from tests.adapters.files import cases, framed, safetensors, tensors_of, write_folder

CASE = 'llama_plain'
CONFIG, TENSORS = cases()[CASE]['config'], tensors_of(CASE)
TWO = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.arange(4, dtype=np.float16)}
NORM = 'model.norm.weight'


def entry(**changes): return {**{'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}, **changes}
def line(text): return framed(text.encode(), bytes(24))


def test_reads_what_was_written(tmp_path):
  values = {**TWO, 'c': np.asarray(TWO['a']).astype(jnp.bfloat16), 'scalar': np.array(2.5, np.float32),
            'none': np.zeros((0, 3), np.float32)}
  (tmp_path / 'x.safetensors').write_bytes(safetensors(values))
  file = SafeTensors(str(tmp_path / 'x.safetensors'))
  assert set(file.entries) == set(values)
  for name, value in values.items():
    found = file.read(name)
    assert found.dtype == value.dtype and found.shape == value.shape and found.tobytes() == value.tobytes()
    assert not found.flags.writeable


GOOD = safetensors(TWO)
MALFORMED = {
    'empty': (b'', 'is cut short: 0 bytes'), 'seven bytes': (b'1234567', 'is cut short: 7 bytes'),
    'header past the end': (struct.pack('<Q', 99) + b'{}', 'is cut short: its header has 99 bytes, the file 2'),
    'huge header': (struct.pack('<Q', 1 << 63) + b'{}', f'has a header of {1 << 63} bytes; {HEADER_LIMIT} at most'),
    'another format': (b'GGUF' + bytes(60), 'has a header of'),
    'no JSON': (line('{"a": '), 'has a header that is not JSON'), 'no UTF-8': (framed(b'{"\xff": 1}'), 'has a header that is not JSON'),
    'deep JSON': (line('[' * 100_000), 'has a header that is not JSON'), 'huge number': (line('{"a": ' + '9' * 5000 + '}'), 'not JSON'),
    'a list': (line('[]'), 'has a header that is not a JSON object'),
    'name twice': (line('{"a": {}, "a": {}}'), "has a header that names 'a' twice"),
    'field twice': (line('{"a": {"dtype": "F32", "dtype": "F32"}}'), "has a header that names 'dtype' twice"),
    'metadata': (safetensors(TWO, __metadata__={'format': 1}), 'has a __metadata__ that is not a table of texts'),
    'entry a number': (safetensors(TWO, a=5), "has a bad entry 'a': it wants dtype, shape and data_offsets"),
    'no dtype': (safetensors(TWO, a={'shape': [], 'data_offsets': [0, 4]}), "has a bad entry 'a': it wants dtype"),
    'unknown dtype': (safetensors(TWO, a=entry(dtype='F33')), "has a bad entry 'a': unknown dtype 'F33'; did you mean 'F32'?"),
    'dtype a list': (safetensors(TWO, a=entry(dtype=['F32'])), "unknown dtype ['F32']"),
    'negative size': (safetensors(TWO, a=entry(shape=[-2, -3])), "shape [-2, -3] is no list of sizes"),
    'real size': (safetensors(TWO, a=entry(shape=[2.0, 3])), 'shape [2.0, 3] is no list of sizes'),
    'true size': (safetensors(TWO, a=entry(shape=[True, 6])), 'shape [True, 6] is no list of sizes'),
    'many sizes': (safetensors(TWO, a=entry(shape=[1] * 10_000)), 'is no list of sizes'),
    'overflow': (safetensors(TWO, a=entry(shape=[1 << 40, 1 << 40])), 'is too large'),
    'three offsets': (safetensors(TWO, a=entry(data_offsets=[0, 24, 32])), 'are not two'),
    'backward offsets': (safetensors(TWO, a=entry(data_offsets=[24, 0])), "takes 24 bytes, its offsets span -24"),
    'wrong span': (safetensors(TWO, a=entry(data_offsets=[0, 20])), 'F32 [2, 3] takes 24 bytes, its offsets span 20'),
    'overlap': (safetensors(TWO, b={'dtype': 'F16', 'shape': [4], 'data_offsets': [20, 28]}), "overlapping tensors: 'b' begins inside 'a'"),
    'same bytes': (safetensors(TWO, b={'dtype': 'F32', 'shape': [6], 'data_offsets': [0, 24]}), 'has overlapping tensors'),
    'hole': (safetensors(TWO, a=None), "has 24 bytes between the header and 'b' that belong to no tensor"),
    'more data': (GOOD + b'x', "has 1 bytes after 'b' that belong to no tensor"),
    'less data': (GOOD[:-1], "is cut short: 'b' ends at byte"), 'far offsets': (
        safetensors(TWO, b={'dtype': 'F16', 'shape': [1 << 40], 'data_offsets': [24, 24 + (1 << 41)]}), "is cut short: 'b' ends at byte"),
    'long name': (safetensors(TWO, **{'x' * 10_000: 5}), 'has a bad entry'),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_file_is_one_line(name, tmp_path):
  content, says = MALFORMED[name]
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError) as caught: SafeTensors(str(path))
  message = str(caught.value).removeprefix(f'{path} ')
  assert says in message and '\n' not in message and len(message) < 300


def test_every_cut_is_noticed(tmp_path):
  path = tmp_path / 'x.safetensors'
  for length in range(len(GOOD)):
    path.write_bytes(GOOD[:length])
    with pytest.raises(UserError, match='is cut short'): SafeTensors(str(path))


def test_flipped_bits_never_end_in_anything_but_a_user_error(tmp_path):
  rng, path = np.random.default_rng(0), tmp_path / 'x.safetensors'
  refused = 0
  for _ in range(300):
    content = bytearray(GOOD)
    for at in rng.integers(0, len(GOOD) - 32, 2): content[at] = rng.integers(0, 256)
    path.write_bytes(content)
    try:
      file = SafeTensors(str(path))
      for name, value in file.entries.items():
        assert value.end <= len(GOOD)
        if value.dtype in ('F32', 'F16'): file.read(name).sum()
    except UserError as error:
      refused += 1
      assert '\n' not in str(error)
  assert refused > 150


def failure(folder):
  with pytest.raises(UserError) as caught: load_pretrained(str(folder))
  message = str(caught.value)
  assert '\n' not in message and len(message) < 400
  return message


def changed(**changes):
  """The tensors with some replaced, None removing one; '__' in a name stands for a dot."""
  given = {name.replace('__', '.'): value for name, value in changes.items()}
  return {name: value for name, value in {**TENSORS, **given}.items() if value is not None}


@pytest.mark.parametrize('tensors, says', [
  (changed(model__norm__weight=None), f'lacks the tensor {NORM}'),
  (changed(model__layers__2__mlp__up_proj__weight=TENSORS[NORM]),
   "has an unknown tensor 'model.layers.2.mlp.up_proj.weight'; did you mean"),
  (changed(model__layers__0__self_attn__q_proj__bias=TENSORS[NORM]), "unknown tensor 'model.layers.0.self_attn.q_proj.bias'"),
  (changed(model__norm__weight=np.ones(31, np.float32)), f'{NORM} is [31]; config.json makes it [32]'),
  (changed(model__layers__1__mlp__up_proj__weight=TENSORS['model.layers.1.mlp.down_proj.weight']),
   'up_proj.weight is [32, 40]; config.json makes it [40, 32]'),
  (changed(model__norm__weight=np.ones(32, np.int8)), f"'{NORM}' is I8; weights are F32, F16, BF16"),
  (changed(model__norm__weight=np.ones(32, np.float64)), f"'{NORM}' is F64"),
], ids=['missing', 'layer too many', 'bias', 'length', 'transposed', 'int8', 'float64'])
def test_tensor_that_does_not_fit(tensors, says, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  (tmp_path / 'model.safetensors').write_bytes(safetensors(tensors))
  assert says in failure(tmp_path)


def test_bad_folders(tmp_path):
  assert 'config.json cannot be read: No such file' in failure(tmp_path / 'none')
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  assert f'has neither model.safetensors nor {INDEX}' in failure(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'x')
  assert 'pytorch_model.bin is of another format' in failure(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"')
  assert 'config.json has content that is not JSON' in failure(tmp_path)
  with pytest.raises(UserError, match='no such folder'): Checkpoint(str(tmp_path / 'none'))


def index(**homes):
  return json.dumps({'weight_map': homes})


X, Y = 'x.safetensors', 'y.safetensors'
INDICES = {
    'no JSON': ('{', 'has content that is not JSON'), 'no map': ('{}', 'has no weight_map'), 'empty map': (index(), 'has no weight_map'),
    'twice': (index(a=X, b=Y).replace('"b"', '"a"'), "names 'a' twice"),
    'outside': (index(a=f'../{X}'), "puts 'a' into '../x.safetensors', which is no safetensors file of its folder"),
    'other file': (index(a='config.json'), "puts 'a' into 'config.json', which is no safetensors file"),
    'number': (index(a=1), "puts 'a' into 1"), 'no shard': (index(a='z.safetensors'), 'z.safetensors cannot be read'),
    'lacks': (index(a=X, b=X, c=X), "lacks 'c', which the index puts there"),
    'holds': (index(a=X), "holds 'b', which the index does not put there"),
    'in two': (index(a=X, b=Y), "x.safetensors holds 'b', which the index does not put there"),
}


@pytest.mark.parametrize('name', INDICES)
def test_bad_index(name, tmp_path):
  text, says = INDICES[name]
  (tmp_path / INDEX).write_text(text)
  for shard in 'xy': (tmp_path / f'{shard}.safetensors').write_bytes(GOOD)
  with pytest.raises(UserError) as caught: Checkpoint(str(tmp_path))
  assert says in str(caught.value) and '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def rounded():
  """Weights that float16 and bfloat16 hold exactly."""
  round_off = lambda value: np.asarray(value).astype(jnp.bfloat16).astype(np.float32) * (np.abs(value) > 2e-3)
  return {name: round_off(value) for name, value in TENSORS.items()}


@pytest.fixture(scope='module')
def whole(rounded, tmp_path_factory):
  return load_pretrained(write_folder(tmp_path_factory.mktemp('whole'), CONFIG, rounded))


def equal(one, other): jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('shards, dtype', [(3, 'float32'), (1, 'bfloat16'), (3, 'float16')])
def test_shards_and_types_load_equal(shards, dtype, rounded, whole, tmp_path):
  config, params = load_pretrained(write_folder(tmp_path, CONFIG, rounded, shards=shards, dtype=dtype))
  assert config == whole[0]
  equal(params, whole[1])
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_types_of_parameters_and_computation(rounded, whole, tmp_path):
  folder = write_folder(tmp_path, CONFIG, rounded)
  config, params = load_pretrained(folder, dtype='bfloat16', param_dtype='bfloat16')
  assert config.dtype == 'bfloat16' and all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
  equal(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), whole[1])
  with pytest.raises(UserError, match="param_dtype 'int8' is not one of"): load_pretrained(folder, param_dtype='int8')
  with pytest.raises(UserError, match='dtype must be one of'): load_pretrained(folder, dtype='int8')


def test_onto_a_mesh(rounded, whole, tmp_path):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  config, params = load_pretrained(write_folder(tmp_path, CONFIG, rounded), mesh=mesh)
  shapes, axes = param_shapes(build_decoder(config))
  jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted, leaf.ndim) or pytest.fail(str(leaf.sharding)),
               params, shardings_for(axes, mesh, shapes))
  assert len({str(shard.index) for shard in params['repeats']['layer_0']['mlp']['up']['kernel'].addressable_shards}) == 4
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  equal(params, whole[1])


def test_tied_heads(tmp_path):
  tied, embed = {**CONFIG, 'tie_word_embeddings': True}, TENSORS['model.embed_tokens.weight']
  config, params = load_pretrained(write_folder(tmp_path / 'equal', tied, {**TENSORS, HEAD: embed}))
  assert config.embedding.tie and 'head' not in params
  assert 'tie_word_embeddings is true, but lm_head.weight differs' in failure(write_folder(tmp_path / 'other', tied, TENSORS))
  without = {name: value for name, value in TENSORS.items() if name != HEAD}
  config, params = load_pretrained(write_folder(tmp_path / 'without', CONFIG, without))
  assert config.embedding.tie and 'head' not in params and not family_config(CONFIG).embedding.tie
  old = {**TENSORS, 'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}
  assert 'head' in load_pretrained(write_folder(tmp_path / 'old', CONFIG, old))[1]


def test_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
  size, depth = 8000, 8
  wide = {**CONFIG, 'vocab_size': size, 'intermediate_size': size, 'num_hidden_layers': depth}
  tensors = {}
  for name, value in TENSORS.items():
    value = np.resize(value, [size if side in (40, 61) else side for side in value.shape])
    names = [name.replace('.1.', f'.{layer}.', 1) for layer in range(1, depth)] if '.layers.1.' in name else [name]
    tensors |= dict.fromkeys(names, value)
  folder, largest = write_folder(tmp_path, wide, tensors, shards=3), size * 32 * 4
  load_pretrained(folder)                                    # compiles
  held = []
  monkeypatch.setattr(pretrained.jax, 'device_put', lambda row, where, put=jax.device_put: held.append(row.nbytes) or put(row, where))
  tracemalloc.start()
  load_pretrained(folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert max(held) == largest and len(held) == len(tensors)
  assert peak <= 2.5 * largest < sum(held) / 10


def test_end_tokens(tmp_path):
  (tmp_path / 'config.json').write_text('{"eos_token_id": 2}')
  assert end_tokens(str(tmp_path)) == (2,)
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [7, 2, 7]}')
  assert end_tokens(str(tmp_path)) == (7, 2)
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": null}')
  assert end_tokens(str(tmp_path)) == (2,)
  (tmp_path / 'config.json').write_text('{}')
  assert end_tokens(str(tmp_path)) == ()
  (tmp_path / 'config.json').write_text('{"eos_token_id": "x"}')
  with pytest.raises(UserError, match='eos_token_id is no token'): end_tokens(str(tmp_path))


def test_views_outlive_their_reader(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(GOOD)
  view = SafeTensors(str(path)).read('a')
  os.unlink(path)
  np.testing.assert_array_equal(view, TWO['a'])
