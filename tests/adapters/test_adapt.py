"""docs/adapt.md on a tiny host: what it shows runs, one step moves the memories alone, and the adapter loads onto a fresh host."""
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from memjax import evaluate, export, generate, train
from memjax.adapters.graft import adapter_of, load_adapter, save_adapter, split_adapter
from memjax.adapters.pretrained import load_pretrained
from memjax.config.codec import read_config
from memjax.config.flags import call, parse
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.checkpoint import restore_for_reading
from memjax.runtime.state import make_train_step
from tests.adapters.files import write_folder
from tests.adapters.make_references import BASE
from tests.pieces import write_plays

PAGE = (Path(__file__).parent.parent.parent / 'docs' / 'adapt.md').read_text(encoding='utf-8')
CONFIG, CODE = re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S)
COMMAND = re.search(r'^python -m memjax\.train (.*)$', PAGE, re.M)[1]
SMALL = ('--config.training.steps=1', '--config.training.length=16', '--config.training.batch=2', '--config.evaluation.batches=1',
         '--config.evaluation.sample=0', '--config.model.mixers.memory.form.kind=gather',
         '--config.mesh.data=1', '--config.data.source=path', '--nofigures')
TREE = {**BASE, 'model_type': 'llama', 'vocab_size': 264, 'tie_word_embeddings': True}


@pytest.fixture(scope='module')
def host(tmp_path_factory):
  """The folder of a random host with a tokenizer of bytes."""
  import tokenizers as library
  folder, rng, tensors = tmp_path_factory.mktemp('adapt') / 'host', np.random.default_rng(0), {}
  linear = {'q_proj': (32, 32), 'k_proj': (16, 32), 'v_proj': (16, 32), 'o_proj': (32, 32)}
  for number in range(2):
    shapes = {f'self_attn.{name}': shape for name, shape in linear.items()} | {'mlp.gate_proj': (40, 32), 'mlp.up_proj': (40, 32),
                                                                               'mlp.down_proj': (32, 40)}
    shapes |= {'input_layernorm': (32,), 'post_attention_layernorm': (32,)}
    tensors |= {f'model.layers.{number}.{name}.weight': .3 * rng.normal(size=shape) + (len(shape) == 1) for name, shape in shapes.items()}
  tensors |= {'model.embed_tokens.weight': .3 * rng.normal(size=(264, 32)), 'model.norm.weight': np.ones(32)}
  write_folder(folder, TREE, tensors)
  inner = library.Tokenizer(library.models.BPE(vocab={'<s>': 0} | {f'<0x{byte:02X}>': 1 + byte for byte in range(256)}, merges=[],
                                               byte_fallback=True))
  inner.add_special_tokens(['<s>'])
  inner.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Fuse()])
  inner.save(str(folder / 'tokenizer.json'))
  return folder


def words(host, name, *more):
  """The flags of the page's command, made small; its workdir is `name` beside the host."""
  root = host.parent
  (root / 'adapt.py').write_text(CONFIG)
  data, given = write_plays(root / f'plays_{name}'), COMMAND.replace('adapt.py:HOST', f'{root}/adapt.py:{host}').split()
  given[given.index('W')] = f'{root}/{name}'
  return [*given, *SMALL, f'--config.data.path={data}', f'--config.data.cache={root}/cache', *more]


def run(host, name, *more):
  """The workdir of a run of the page's command."""
  assert call(train.main, flags=train.FLAGS, argv=words(host, name, *more)) == 0
  return host.parent / name


def arrays(workdir):
  """The parameters of a run by path, and its model."""
  model = read_config(str(workdir)).model
  return named(restore_for_reading(str(workdir), param_shapes(build_decoder(model))[0])[1]), model


def use(host, name, monkeypatch):
  """What the page's code leaves, on the adapter in the folder `name` beside the host."""
  monkeypatch.chdir(host.parent)
  names = {}
  exec(compile(CODE.replace('HOST', 'host').replace("'W/", f"'{name}/"), 'docs/adapt.md', 'exec'), names)
  return names


def test_one_step_moves_the_memories_alone(host):
  """The page's config around one step of the trainer: the host is bit-equal, the adapter loads onto a fresh one."""
  config, _ = parse(words(host, 'step'), train.FLAGS)
  parts = train.build(config, None)
  with jax.set_mesh(parts.mesh):
    state = train.first_state(parts)
    before = {path: np.array(x) for path, x in named(state.params).items()}
    token = np.random.default_rng(0).integers(0, 257, (2, 17), dtype=np.int32)
    batch = {'token': token[:, :-1], 'target': token[:, 1:], 'position': np.tile(np.arange(16, dtype=np.int32), (2, 1)),
             'weight': np.ones((2, 16), bool)}
    state, _ = make_train_step(parts.model, parts.optimizer, config, parts.abstract)(state, batch)
  memories = adapter_of(before, config.model)
  assert config.model.layers == ('attention', 'attention', 'memory:bare') and int(state.skipped) == 0
  moved = {path for path, x in named(state.params).items() if not np.array_equal(x, before[path])}
  assert 'suffix/layer_0/mixers/memory/out/kernel' in moved <= set(memories) < set(before)
  assert set(parts.optimizer.frozen) == set(before) - set(memories)
  host_config, fresh = load_pretrained(str(host))
  jax.tree.map(np.testing.assert_array_equal, split_adapter(state.params, config.model)[0], fresh)
  save_adapter(f'{host.parent}/step/adapter', config.model, state.params)
  again, params = load_adapter(f'{host.parent}/step/adapter', host_config, fresh)
  assert again == config.model
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


OTHERS = [line.split(maxsplit=3)[2:] for line in re.findall(r'^python -m memjax\..*$', PAGE, re.M) if '.train ' not in line]
MODULES = {f'memjax.{module.__name__.rpartition(".")[2]}': module for module in (evaluate, export, generate)}


@pytest.mark.slow
def test_the_page_runs(host, monkeypatch, capsys):
  workdir = run(host, 'frozen')
  for name, rest in OTHERS:
    given = [word.replace('HOST', str(host)) for word in shlex.split(re.sub(r'(^| )W(?=/| |$)', rf'\1{workdir}', rest))]
    assert call(MODULES[name].main, flags=MODULES[name].FLAGS, argv=given, takes_config=False) == 0, (rest, capsys.readouterr().err)
  assert len(OTHERS) == 6 and (workdir / 'merged' / 'model.safetensors').exists() and (workdir / 'memory').is_dir()
  found, _ = arrays(workdir)
  names = use(host, 'frozen', monkeypatch)
  for path, x in named(names['params']).items(): np.testing.assert_array_equal(x, found[path], err_msg=path)
  jax.tree.map(np.testing.assert_array_equal, names['host_again'], load_pretrained(str(host))[1])
  assert names['memories']['suffix/layer_0/mixers/memory/out/kernel'].any() and names['logits'].shape == (1, 3, 264)


@pytest.mark.slow
def test_a_host_at_its_own_rate_moves_and_leaves_no_adapter(host):
  workdir = run(host, 'free', '--config.optimizer.groups.base.rate=1e-5')
  found, _ = arrays(workdir)
  assert not (workdir / 'adapter').exists()
  assert not np.array_equal(found['embed/table'], load_pretrained(str(host))[1]['embed']['table'])


@pytest.mark.slow
def test_a_host_that_is_not_that_of_the_config(host, tmp_path, capsys):
  other = write_folder(tmp_path / 'other', {**TREE, 'rms_norm_eps': 1e-3}, {'model.embed_tokens.weight': np.zeros((264, 32))})
  shutil.copy(host / 'tokenizer.json', other)
  assert call(train.main, flags=train.FLAGS, argv=words(host, 'other', f'--config.training.host={other}')) == 2
  assert f'{other} is not the host of this config: they differ in block.norm_epsilon' in capsys.readouterr().err.splitlines()[-1]
