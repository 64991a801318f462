"""The export command on a tiny host and a run on it: what is written is what was there, what differs is seen, mistakes are one line."""
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from memjax import export
from memjax.adapters import graft
from memjax.adapters.gguf_model import GgufModel, load_gguf
from memjax.adapters.graft import load_adapter, split_adapter
from memjax.adapters.lora import extract, merge
from memjax.adapters.peft import load_peft
from memjax.adapters.pretrained import load_pretrained, open_pretrained
from memjax.adapters.quantized import TYPES, load_quantized
from memjax.adapters.safetensors import SafeTensors
from memjax.config.errors import UserError
from memjax.config.flags import call
from memjax.config.quant import QuantConfig
from memjax.config.schema import OptimizerConfig
from memjax.data.gguf_tokenizer import gguf_tokenizer
from memjax.data.subword import SubwordTokenizer
from memjax.layers.tree import named
from memjax.models.quantized import with_quant
from memjax.runtime import exporting, targets
from memjax.runtime.host import open_host
from memjax.runtime.reading import open_run
from memjax.runtime.selfcheck import forward_of
from memjax.runtime.texts import open_texts
from tests.adapters.export_runs import LORA, run_config, run_params, write_host, write_run
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import TEMPLATE, VOCABULARY, write_case
from tests.pieces import make_workdir, small_config, write_plays


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with host/, host.gguf, the run both/ (low-rank changes and a bank on that host), and plain/ (of its own)."""
  root = tmp_path_factory.mktemp('export')
  write_host(root / 'host')
  write_case(root / 'host.gguf', 'llama_plain', general__license='mit')
  config = run_config(root / 'host')
  write_run(root / 'both', config, run_params(config))
  return root


@pytest.fixture
def do(place, capsys, caplog):
  """The command: the last line of its output and what it said; with `status` 2 its complaint. PLACE is the folder of all."""
  def run(*words, status=0):
    words = [word.replace('PLACE', str(place)) for word in words]
    caplog.clear()
    done = call(export.main, flags=export.FLAGS, takes_config=False, argv=words)
    out, err = capsys.readouterr()
    assert done == status, err
    return err if status else (out.splitlines()[-1], caplog.text + err)
  return run


def stored(folder):
  """{name: array as it is stored} of a checkpoint."""
  tensors = open_pretrained(str(folder))[1]
  return {name: tensors.read(name) for name in tensors.names}


def same(one, other):
  one, other = named(one), named(other)
  return set(one) == set(other) and all(np.array_equal(x, other[path]) for path, x in one.items())


@pytest.mark.parametrize('dtype', ['mixed', *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ('bfloat16', 'float16'))])
def test_a_folder_comes_back_bit_for_bit(dtype, do, tmp_path):
  """Whatever the tensors are stored as; all that belongs to the model goes along (Q2.3, Q7.1)."""
  host = write_host(tmp_path / 'host', 'qwen2', dtype='bfloat16' if dtype == 'mixed' else dtype, chat_template=None)
  if dtype == 'mixed':
    kinds = {name: np.float32 if x.ndim == 1 else 'bfloat16' for name, x in tensors_of('qwen2').items()}
    write_folder(host, cases()['qwen2']['config'], tensors_of('qwen2'), dtype=kinds)
  (host / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 0], 'top_k': 7}))
  (host / 'LICENSE').write_text('All rights.')
  path, said = do('--to=hf', f'--model={host}', f'--output={tmp_path}/out', '--shard_bytes=9000')
  before, after = stored(host), stored(path)
  assert path == str(tmp_path / 'out') and set(before) == set(after) and 'shards' in said and 'differ by 0.0e+00' in said
  for name, x in before.items(): assert after[name].dtype == x.dtype and after[name].tobytes() == x.tobytes(), name
  assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == {
      'eos_token_id': [2, 0], 'top_k': 7, 'bos_token_id': 1, 'pad_token_id': 0}
  tree = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert tree['eos_token_id'] == [2, 0] and tree['torch_dtype'] == ('float16' if dtype == 'float16' else 'bfloat16')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'LICENSE'):
    assert (tmp_path / 'out' / name).read_bytes() == (host / name).read_bytes()
  readme = (tmp_path / 'out' / 'README.md').read_text()
  assert readme.startswith('---\nlicense: apache-2.0\n') and str(tmp_path) not in readme


def test_a_gguf_file_becomes_a_folder_and_the_folder_a_file(do, place, tmp_path):
  """Tokenizer, template, ends and licence go both ways."""
  path, _ = do('--to=hf', '--model=PLACE/host.gguf', f'--output={tmp_path}/m')
  texts = open_texts(path)
  assert (texts.ends, texts.has_bos, texts.context, texts.licence, texts.words.template.source) == ((2,), False, 128, 'mit', TEMPLATE)
  assert (tmp_path / 'm' / 'chat_template.jinja').read_text() == TEMPLATE
  assert json.loads((tmp_path / 'm' / 'generation_config.json').read_text()) == {
      'do_sample': True, 'temperature': 0.7, 'top_p': 0.9, 'top_k': 50, 'bos_token_id': 1, 'eos_token_id': 2}
  for name, x in tensors_of('llama_plain').items(): np.testing.assert_array_equal(stored(path)[name], x)
  again, _ = do('--to=gguf', '--type=F32', f'--model={path}', f'--output={tmp_path}/again.gguf')
  one, other = GgufModel(place / 'host.gguf'), GgufModel(again)
  assert one.config() == other.config() and same(load_gguf(one.folder)[1], load_gguf(again)[1])
  lists = ('tokenizer.ggml.tokens', 'tokenizer.ggml.token_type')             # with names for the rows that no token has
  for key in lists: assert list(other.metadata[key])[:55] == list(one.metadata[key]) and len(other.metadata[key]) == 61
  for key, value in one.metadata.items(): assert key in lists or other.metadata[key] == value, key
  assert other.metadata['general.name'] == 'm' and other.metadata['general.license'] == 'mit'


def test_prompts_that_begin_with_bos_still_do(do, tmp_path):
  """add_bos_token of a GGUF file becomes a rule of tokenizer.json, and a flag again."""
  write_case(tmp_path / 'b.gguf', 'llama_plain', tokenizer__ggml__add_bos_token=True, tokenizer__chat_template=None,
             tokenizer__ggml__eot_token_id=0)
  path, _ = do('--to=hf', f'--model={tmp_path}/b.gguf', f'--output={tmp_path}/b')
  assert SubwordTokenizer.from_file(f'{path}/tokenizer.json').inner.encode('at', add_special_tokens=True).ids[0] == 1
  assert open_host(path).has_bos and open_host(path).ends == (2, 0) and open_host(path).template is None
  again, _ = do('--to=gguf', f'--model={path}', f'--output={tmp_path}/c.gguf')
  assert GgufModel(again).metadata['tokenizer.ggml.add_bos_token'] is True and GgufModel(again).ends == (2, 0)


def test_a_run_becomes_a_folder_with_its_memories(do, place, tmp_path):
  """Low-rank changes are in the weights, other tensors as they were; host and memories together compute what the run does."""
  path, said = do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/m', f'--report={tmp_path}/r.json')
  assert '6 linear maps merged' in said and f'the memories are beside the host, in {tmp_path}/m/memory_adapter.safetensors' in said
  before, after, moved = stored(place / 'host'), stored(path), ('q_proj', 'v_proj', 'up_proj')
  for name, x in before.items(): assert np.array_equal(after[name], x) != any(part in name for part in moved), name
  run = open_run(str(place / 'both'))
  config, params = load_adapter(path, *load_pretrained(path))
  assert same(params, merge(run.params, [extract(run.params, run.config.model.block.lora)])) and config.grafted
  report = json.loads((tmp_path / 'r.json').read_text())
  assert report['bytes'] == sum(x.nbytes for x in jax.tree.leaves(run.params)) and report['trainable'] == 5508 and report['length'] == 128
  text = (tmp_path / 'm' / 'README.md').read_text()
  assert '6 low-rank changes merged; memories in memory_adapter.safetensors' in text and 'step 1' in text


def test_a_gguf_file_holds_the_host_and_says_where_the_memories_are(do, place, tmp_path):
  """In quantised blocks the memories belong to the host as the file has it (Q7.3)."""
  path, said = do('--to=gguf', '--type=Q8_0', '--workdir=PLACE/both', f'--output={tmp_path}/m.gguf')
  assert f'GGUF cannot hold the memories: {path} is the host alone, they are in {tmp_path}/m-memory' in said
  config, params = load_adapter(f'{tmp_path}/m-memory', *load_gguf(path))
  run = open_run(str(place / 'both'))
  merged = merge(run.params, [extract(run.params, run.config.model.block.lora)])
  assert same(graft.adapter_of(params, config), graft.adapter_of(merged, config)) and '6 linear maps merged' in said
  assert 'exists; name a new place' in do('--to=gguf', '--workdir=PLACE/both', f'--output={path}', status=2)
  (tmp_path / 'n-memory').mkdir()
  said = do('--to=gguf', '--workdir=PLACE/both', f'--output={tmp_path}/n.gguf', status=2)
  assert f'{tmp_path}/n-memory exists; the memories go there' in said


def test_parts_of_a_run(do, place, tmp_path):
  """Low-rank changes for the host, memories for the host."""
  run = open_run(str(place / 'both'))
  path, said = do('--to=peft', '--workdir=PLACE/both', f'--output={tmp_path}/changes')
  host_config, host = load_pretrained(str(place / 'host'))
  assert 'the memories are not in it; --to memory writes them' in said
  assert json.loads((tmp_path / 'changes' / 'adapter_config.json').read_text())['base_model_name_or_path'] == str(place / 'host')
  own = extract(run.params, run.config.model.block.lora)
  assert {name: x.scale for name, x in load_peft(path, host_config)[1].items()} == {name: x.scale for name, x in own.items()}
  memory, said = do('--to=memory', '--workdir=PLACE/both', f'--output={tmp_path}/memory')
  assert 'the low-rank changes of the host are not in it; --to peft writes them' in said
  config, params = load_adapter(memory, host_config, host)
  assert same(split_adapter(params, config)[0], host)


def kinds_of(path):
  """{name: type on disk} of the kernels of a packed folder."""
  entries = SafeTensors(f'{path}/quantized.safetensors', TYPES).entries
  return {name: entry.dtype for name, entry in entries.items() if 'proj' in name and not name.endswith('_scale')}


def test_fewer_bits(do, tmp_path):
  """The folder holds no float kernel that could be packed, and loads as it was, without one (Q7.5)."""
  path, said = do('--to=quantized', '--model=PLACE/host', f'--output={tmp_path}/m')
  kinds = kinds_of(path)
  assert '7 kernels in fewer bits' in said and len(kinds) == 14 and set(kinds.values()) == {'I8'}
  assert json.loads((tmp_path / 'm' / 'config.json').read_text())['vocab_size'] == 61 and open_texts(path).ends == (2,)


@pytest.mark.slow
@pytest.mark.parametrize('storage', ['int8', 'nf4'])
def test_fewer_bits_of_a_run(storage, do, tmp_path):
  """Merged before it is packed; banks are packed as well; what groups do not divide stays."""
  path, said = do('--to=quantized', f'--quantize={storage}', '--workdir=PLACE/both', f'--output={tmp_path}/m', '--report=-')
  assert 'of them packed' in said and '6 linear maps merged' in said and ('stay float32' in said) == (storage == 'nf4')
  codes = {'int8': 'I8', 'nf4': 'U8'}[storage]
  kinds = kinds_of(path)
  assert len(kinds) == 14 and {kind for name, kind in kinds.items() if storage == 'int8' or 'down' not in name} == {codes}
  table = SafeTensors(f'{path}/{graft.FILE}', TYPES).entries
  assert {entry.dtype for name, entry in table.items() if name.endswith('entries_codes')} == {codes}
  assert not [name for name in table if name.endswith('/entries')]


@pytest.mark.slow
def test_a_folder_with_its_memories_computes_what_the_run_does(do, place, tmp_path):
  path, _ = do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/m')
  run = open_run(str(place / 'both'))
  config, params = load_adapter(path, *load_pretrained(path))
  token = np.arange(24).reshape(2, 12) % 61
  want = forward_of(run.model.config)(run.params, token)
  np.testing.assert_allclose(forward_of(config)(params, token), want, atol=1e-5 * np.abs(want).max())
  assert np.abs(want - forward_of(load_pretrained(path)[0])(load_pretrained(path)[1], token)).max() > 0.1


@pytest.mark.slow
def test_parts_put_onto_the_host_again_are_the_whole(do, tmp_path):
  path, _ = do('--to=peft', '--workdir=PLACE/both', f'--output={tmp_path}/changes')
  memory, _ = do('--to=memory', '--workdir=PLACE/both', f'--output={tmp_path}/memory')
  one, _ = do('--to=hf', '--model=PLACE/host', f'--adapter={path}', f'--adapter={memory}', f'--output={tmp_path}/one')
  other, _ = do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/other')
  assert same(stored(one), stored(other))
  assert (tmp_path / 'one' / graft.FILE).read_bytes() == (tmp_path / 'other' / graft.FILE).read_bytes()


@pytest.mark.slow
def test_fewer_bits_compute_nearly_the_same(do, place, tmp_path):
  """int8 against the run; the folder becomes floats again, with its memory."""
  path, _ = do('--to=quantized', '--workdir=PLACE/both', f'--output={tmp_path}/m')
  run, token = open_run(str(place / 'both')), np.arange(24).reshape(2, 12) % 61
  want = forward_of(run.model.config)(run.params, token)
  config, params = load_adapter(path, *load_quantized(path))
  assert np.abs(forward_of(config)(params, token) - want).max() < 0.1 * np.abs(want).max()
  host = open_host(path, adapters=[path])                       # as generation does
  np.testing.assert_allclose(forward_of(host.config)(host.params, token), forward_of(config)(params, token), atol=1e-4)
  do('--to=quantized', f'--model={path}', f'--adapter={path}', f'--output={tmp_path}/again')
  for name in ('quantized.safetensors', graft.FILE): assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'm' / name).read_bytes()
  path, said = do('--to=hf', f'--model={path}', f'--adapter={path}', f'--output={tmp_path}/floats')
  assert len(stored(path)) == 21 and 'the memories are beside the host' in said


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'])
@pytest.mark.slow
def test_every_type_of_gguf(kind, do, tmp_path):
  """The check compares logits with those of the same rounding in memory, so that a wrong order of rows would show in any type."""
  path, said = do('--to=gguf', f'--type={kind}', '--model=PLACE/host', f'--output={tmp_path}/m.gguf')
  assert 'read back' in said and 'moves the logits' not in said             # 5e-3 and 3e-2 of the largest (Q7.2)
  assert GgufModel(path).file.tensors['blk.0.attn_q.weight'].type == kind


# What differs ------------------------------------------------------------------------------------------------------------------

def spoil_tensor(folder):
  data = bytearray((folder / 'model.safetensors').read_bytes())
  data[-2] ^= 1
  (folder / 'model.safetensors').write_bytes(data)


def spoil_json(name, **changes):
  return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def spoil_template(folder): (folder / 'chat_template.jinja').write_text(f'{TEMPLATE}{{{{ bos_token }}}}')


def spoil_merges(folder):
  tree = json.loads((folder / 'tokenizer.json').read_text())
  tree['model']['merges'].pop()
  (folder / 'tokenizer.json').write_text(json.dumps(tree))


SPOILT = [
  ('a tensor', spoil_tensor, 'tensor model.norm.weight differs from what was meant'),
  ('the template', spoil_template, 'the chat template differs'),
  ('the ends', spoil_json('generation_config.json', eos_token_id=0), 'the tokens that end a text were [2] and are [0]'),
  ('eos', spoil_json('tokenizer_config.json', eos_token='<|endoftext|>'), 'eos was token 2 and is 0'),
  ('bos', spoil_json('tokenizer_config.json', add_bos_token=True), 'whether prompts begin with bos was False and is True'),
  ('merges', spoil_merges, "the tokens of 'Hello world' were"),
  ('rope', spoil_json('config.json', rope_theta=1e4 + 1, rope_parameters=None), 'another model: its mixers.attention.rotary_base differs'),
]


@pytest.mark.parametrize(('spoil', 'message'), [row[1:] for row in SPOILT], ids=[row[0] for row in SPOILT])
def test_what_is_written_wrong_is_kept_under_another_name(spoil, message, do, place, tmp_path, monkeypatch):
  """Q7.1: whatever is spoilt between writing and checking, the export fails and its name stays free."""
  write = targets._write_readme
  monkeypatch.setattr(targets, '_write_readme', lambda folder, *rest: (write(folder, *rest), spoil(Path(folder))))
  if spoil is spoil_merges:                   # a text in which the last merge shows
    monkeypatch.setattr('memjax.runtime.selfcheck.SAMPLES', ('Hello world er',))
    message = "the tokens of 'Hello world er' were"
  said = do('--to=hf', '--model=PLACE/host', f'--output={tmp_path}/m', status=2)
  assert message in said and said.count('\n') == 1 and f'it is kept as {tmp_path}/m.failed' in said
  assert sorted(path.name for path in tmp_path.iterdir()) == ['m.failed'] and (tmp_path / 'm.failed' / 'config.json').exists()


def test_a_change_that_was_not_merged_is_seen(do, tmp_path, monkeypatch):
  """Whether it was forgotten or never counted; then nothing is written at all."""
  first = lambda changes: dict(list(changes.items())[1:])
  monkeypatch.setattr(exporting, 'merge', lambda params, adapters: merge(params, [first(adapters[0])]))
  assert '4 of 6 linear maps were merged' in do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/m', status=2)
  monkeypatch.setattr(exporting, 'extract', lambda *rest: first(extract(*rest)))
  monkeypatch.setattr(exporting, 'merge', merge)
  assert 'query/kernel is not among them' in do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/m', status=2)
  assert not list(tmp_path.iterdir())


def test_a_change_that_was_merged_wrong_is_seen(do, tmp_path, monkeypatch):
  twice = lambda changes: {path: change._replace(scale=2 * change.scale) for path, change in changes.items()}
  monkeypatch.setattr(exporting, 'merge', lambda params, adapters: merge(params, [twice(adapters[0])]))
  said = do('--to=hf', '--workdir=PLACE/both', f'--output={tmp_path}/m', status=2)
  assert 'the logits of the merged model differ by' in said and [path.name for path in tmp_path.iterdir()] == ['m.failed']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['magnitudes', 'int8', 'bfloat16'])
def test_other_changes_and_other_hosts(kind, do, place, tmp_path):
  """DoRA, and low-rank changes on a host that is packed or in half precision, reach every target."""
  config = run_config(place / 'host', lora=dataclasses.replace(LORA, dora=kind != 'int8'))
  if kind != 'magnitudes': config = dataclasses.replace(config, model=with_quant(config.model, QuantConfig(storage=kind)))
  write_run(tmp_path / 'run', config, run_params(config))
  for name in ('hf', 'gguf', 'quantized'):
    _, said = do(f'--to={name}', f'--workdir={tmp_path}/run', f'--output={tmp_path}/{name}.gguf')
    assert '6 linear maps merged' in said
  for name in ('peft', 'memory'): do(f'--to={name}', f'--workdir={tmp_path}/run', f'--output={tmp_path}/{name}')


def gguf_spoilt(**changes):
  """`write_gguf` with other metadata; a tensor is doubled where `tensor` says which."""
  from memjax.adapters.gguf_write import write_gguf
  name = changes.pop('tensor', '')
  def write(path, metadata, tensors):
    if name: tensors = tensors | {name: tensors[name]._replace(load=lambda load=tensors[name].load: 2 * load())}
    return write_gguf(path, metadata | {key.replace('__', '.'): value for key, value in changes.items()}, tensors)
  return write


@pytest.mark.parametrize(('changes', 'message'), [
  ({'tokenizer__ggml__eos_token_id': 0}, 'eos was token 2 and is 0'), ({'tokenizer__ggml__merges': ['t h']}, 'the tokens of'),
  ({'tokenizer__chat_template': 'x'}, 'the chat template differs'),
  ({'llama__rope__freq_base': 1e5}, 'another model: its mixers.attention.rotary_base differs'),
  ({'tensor': 'blk.1.ffn_up.weight'}, 'the logits of what was written differ by')])
def test_a_gguf_file_that_is_written_wrong(changes, message, do, tmp_path, monkeypatch):
  monkeypatch.setattr(targets, 'write_gguf', gguf_spoilt(**changes))
  said = do('--to=gguf', '--model=PLACE/host', f'--output={tmp_path}/m.gguf', status=2)
  assert message in said and said.count('\n') == 1 and [path.name for path in tmp_path.iterdir()] == ['m.gguf.failed']


def test_memories_that_are_written_wrong(do, tmp_path, monkeypatch):
  save = graft.save_adapter
  monkeypatch.setattr(graft, 'save_adapter', lambda folder, config, params: save(folder, config, params | {'suffix': jax.tree.map(
      lambda x: 2 * x, params['suffix'])}))
  assert 'the memories differ from what was meant' in do('--to=memory', '--workdir=PLACE/both', f'--output={tmp_path}/m', status=2)
  assert [path.name for path in tmp_path.iterdir()] == ['m.failed']


def test_a_full_disk_leaves_nothing(do, tmp_path, monkeypatch):
  def write(path, rows): raise UserError(f'{path} cannot be written: No space left on device')
  monkeypatch.setattr('memjax.adapters.export_hf.write_safetensors', write)
  said = do('--to=hf', '--model=PLACE/host', f'--output={tmp_path}/m', status=2)
  assert said.endswith('cannot be written: No space left on device\n') and not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  assert 'cannot be written: ' in do('--to=hf', '--model=PLACE/host', f'--output={tmp_path}/file/m', status=2)


# What is refused ---------------------------------------------------------------------------------------------------------------

REFUSED = [
  ('nothing', ('--to=hf',), 'give either --workdir, the folder of a training run, or --model'),
  ('both', ('--to=hf', '--workdir=PLACE/both', '--model=PLACE/host'), 'give either --workdir'),
  ('step', ('--to=hf', '--model=PLACE/host', '--step=1'), '--step goes with --workdir'),
  ('host', ('--to=hf', '--model=PLACE/host', '--host=x'), '--host goes with --workdir'),
  ('adapter', ('--to=hf', '--workdir=PLACE/both', '--adapter=x'), '--adapter goes with --model'),
  ('dtype', ('--to=gguf', '--model=PLACE/host', '--dtype=float16'), '--dtype goes with --to hf'),
  ('shards', ('--to=peft', '--model=PLACE/host', '--shard_bytes=9'), '--shard_bytes goes with --to hf'),
  ('type', ('--to=hf', '--model=PLACE/host', '--type=F16'), '--type goes with --to gguf'),
  ('quantize', ('--to=hf', '--model=PLACE/host', '--quantize=int8'), '--quantize goes with --to quantized or memory'),
  ('length', ('--to=hf', '--model=PLACE/host', '--length=9'), '--length goes with --report'),
  ('type that is read only', ('--to=gguf', '--model=PLACE/host', '--type=Q4_K'), '--type must be one of'),
  ('report', ('--to=hf', '--model=PLACE/host', '--report=PLACE'), 'is a folder'),
  ('suffix', ('--to=gguf', '--model=PLACE/host'), 'the name of a GGUF file ends in .gguf'),
  ('no model', ('--to=hf', '--model=PLACE/none'), 'PLACE/none cannot be read: No such file'),
  ('no run', ('--to=hf', '--workdir=PLACE/host'), 'memjax: '),
  ('no changes', ('--to=peft', '--model=PLACE/host'), 'the parameters hold no low-rank changes; there is nothing to save'),
  ('no memories', ('--to=memory', '--model=PLACE/host'), 'nothing is grafted; there is no adapter to save'),
  ('two of a kind', ('--to=hf', '--model=PLACE/host', '--adapter=PLACE/p', '--adapter=PLACE/p'), '--adapter names 2 folders of low-rank'),
  ('no adapter', ('--to=hf', '--model=PLACE/host', '--adapter=PLACE/none'), 'PLACE/none is no folder of an adapter'),
  ('memory of a run of its own', ('--to=hf', '--workdir=PLACE/bytes'), 'a tokenizer of kind bytes has no tokenizer.json'),
  ('host of a run of its own', ('--to=hf', '--workdir=PLACE/bytes', '--host=PLACE/host'), 'bytes began without a pretrained model'),
  ('host is gone', ('--to=hf', '--workdir=PLACE/moved'), 'which the run began with, is gone; --host says where it is now'),
  ('other tokenizer', ('--to=hf', '--workdir=PLACE/both', '--host=PLACE/other'), 'is not that of PLACE/other'),
]


def own(config):
  """The config of a run that began with nothing."""
  return dataclasses.replace(config, training=dataclasses.replace(config.training, host=''), optimizer=OptimizerConfig())


@pytest.fixture(scope='module')
def others(place):
  """Runs and folders that cannot be written."""
  write_plays(place / 'plays')
  (place / 'p').mkdir()
  (place / 'p' / 'adapter_config.json').write_text('{}')
  make_workdir(place / 'bytes', small_config(place / 'plays'))
  moved = json.loads((place / 'both' / 'config.json').read_text())
  (place / 'moved').mkdir()
  for name in ('checkpoints', 'tokenizer'): (place / 'moved' / name).symlink_to(place / 'both' / name)
  (place / 'moved' / 'config.json').write_text(json.dumps({**moved, 'training': {**moved['training'], 'host': str(place / 'gone')}}))
  write_host(place / 'other')
  swapped = [{'a': 'b', 'b': 'a'}.get(token, token) for token in VOCABULARY['tokenizer.ggml.tokens']]
  (place / 'other' / 'tokenizer.json').write_text(gguf_tokenizer({**VOCABULARY, 'tokenizer.ggml.tokens': swapped}).inner.to_str())


@pytest.mark.usefixtures('others')
@pytest.mark.parametrize(('words', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(words, message, do, place, tmp_path):
  said = do(*words, f'--output={tmp_path}/m', status=2)
  assert message.replace('PLACE', str(place)) in said and said.startswith('memjax: ') and said.count('\n') == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_of_its_own(do, place, tmp_path):
  """Attention alone, trained without a host: a folder of Llama that writes, with the template of its conversations."""
  config = run_config(place / 'host', lora=None, memory=False)
  config = own(config)
  write_run(tmp_path / 'run', config, load_pretrained(str(place / 'host'))[1])
  (tmp_path / 'run' / 'tokenizer' / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|im_end|>', 'end_tokens': [2, 0]}))
  (tmp_path / 'run' / 'tokenizer' / 'chat_template.jinja').write_text(TEMPLATE)
  path, said = do('--to=hf', f'--workdir={tmp_path}/run', f'--output={tmp_path}/m', '--dtype=float16', '--report=-')
  assert 'float16 moves the logits by' in said and 'of them packed' in said and 'trained: ' in said
  host = open_host(path)
  assert (host.ends, host.has_bos, host.context, host.template.source) == ((2, 0), True, 16, TEMPLATE)
  for name, x in tensors_of('llama_plain').items(): np.testing.assert_array_equal(stored(path)[name], x.astype(np.float16))
