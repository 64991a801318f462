"""`generate --model`: a GGUF file and the folder of the same model write the same, plainly and in a chat."""
import json

import numpy as np
import pytest

from memjax import generate
from memjax.adapters.pretrained import load_pretrained
from memjax.adapters.quantized import save_quantized
from memjax.config.flags import call
from memjax.config.quant import QuantConfig
from memjax.data.gguf_tokenizer import gguf_tokenizer
from memjax.layers.tree import named
from memjax.models.quantized import quantize_host
from memjax.runtime.host import open_host
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import TEMPLATE, VOCABULARY, write_case
from tests.pieces import make_workdir, small_config

CASE = 'llama_plain'
WORDS = ('--max_new_tokens=12', '--temperature=0')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with m.gguf and the same model as m/."""
  root = tmp_path_factory.mktemp('models')
  write_case(root / 'm.gguf', CASE)
  write_folder(root / 'm', cases()[CASE]['config'], tensors_of(CASE))
  (root / 'm' / 'tokenizer.json').write_text(gguf_tokenizer(VOCABULARY).inner.to_str())
  config = {'bos_token': '<|im_start|>', 'eos_token': {'content': '<|im_end|>'}, 'chat_template': TEMPLATE}
  (root / 'm' / 'tokenizer_config.json').write_text(json.dumps(config))
  return root


@pytest.fixture(scope='module')
def packed(place):
  """The folder packed/: the same model as save_quantized writes it, with what belongs beside it."""
  folder = place / 'packed'
  save_quantized(str(folder), *quantize_host(*load_pretrained(str(place / 'm')), QuantConfig(storage='int8'))[:2])
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'): (folder / name).write_text((place / 'm' / name).read_text())


@pytest.fixture
def do(place, capsys):
  """The command: its output, or with `status` 2 its complaint."""
  def run(*words, status=0):
    words = [word.replace('PLACE', str(place)) for word in words]
    assert call(generate.main, flags=generate.FLAGS, takes_config=False, argv=words) == status
    out, err = capsys.readouterr()
    return err if status else out
  return run


def test_a_gguf_file_and_its_folder_write_the_same(do, place):
  out = do('--model=PLACE/m.gguf', '--prompt=the bat', '--prompt=at', *WORDS, '--output=PLACE/o.json')
  assert do('--model=PLACE/m', '--prompt=the bat', '--prompt=at', *WORDS) == out
  assert out.startswith('--- 1 of 2 ---\nthe bat')
  report = json.loads((place / 'o.json').read_text())
  assert report['model'] == f'{place}/m.gguf' and not report['chat'] and 'workdir' not in report
  assert out == ''.join(f'--- {i} of 2 ---\n{row["prompt"]}{row["text"]}\n' for i, row in enumerate(report['continuations'], 1))


def test_a_chat_prints_replies_alone(do, place):
  out = do('--model=PLACE/m.gguf', '--chat', '--prompt=the bat', *WORDS, '--output=PLACE/o.json')
  [row] = json.loads((place / 'o.json').read_text())['continuations']
  assert out == f'{row["text"]}\n' and row['prompt'] == 'the bat' and row['text']
  assert do('--model=PLACE/m', '--chat', '--prompt=the bat', *WORDS) == out
  template = '<|im_start|>user\nthe bat<|im_end|>\n<|im_start|>assistant\n'
  assert do('--model=PLACE/m.gguf', f'--prompt={template}', *WORDS) == template + out


def test_a_quantised_host_writes_the_same_from_its_folder(do, place, packed):
  """Packed as a file or a folder is read, or read packed: the same model, which is not the float one."""
  del packed
  out = do('--model=PLACE/m.gguf', '--quantize=int8', '--prompt=the bat', *WORDS)
  assert do('--model=PLACE/m', '--quantize=int8/host', '--prompt=the bat', *WORDS) == out
  assert do('--model=PLACE/packed', '--prompt=the bat', *WORDS) == out
  float_params, own = open_host(str(place / 'm')).params, open_host(str(place / 'packed')).params
  kernels = {path for path in named(float_params) if path.endswith('/kernel') and path != 'head/kernel'}
  assert {f'{path}_codes' for path in kernels} < set(named(own)) and not kernels & set(named(own))


def test_what_enters_the_model(place):
  """bos only where the tokenizer says so, in a chat never twice; ends from the metadata and from config.json."""
  hosts = {name: open_host(str(place / name)) for name in ('m.gguf', 'm')}
  for host in hosts.values():
    assert not host.has_bos and host.ends == (2,) and host.context == 128
    np.testing.assert_array_equal(host.encode('bat'), host.tokenizer.encode('bat'))
    with_bos = host._replace(has_bos=True)
    assert with_bos.encode('bat').tolist() == [1, *host.encode('bat')]
    assert with_bos.encode_chat('bat').tolist() == host.encode_chat('bat').tolist()
  assert hosts['m'].encode_chat('a<|im_end|>').tolist() == hosts['m.gguf'].encode_chat('a<|im_end|>').tolist()
  config = json.loads((place / 'm' / 'tokenizer_config.json').read_text())
  (place / 'm' / 'tokenizer_config.json').write_text(json.dumps(config | {'add_bos_token': True}))
  assert open_host(str(place / 'm')).has_bos
  (place / 'm' / 'tokenizer_config.json').write_text(json.dumps(config))


REFUSED = [
  ('both', ('--model=PLACE/m.gguf', '--workdir=PLACE'), 'give either --workdir, the folder of a training run, or --model'),
  ('chat with a run', ('--workdir=PLACE/run', '--chat'), 'the tokenizer of the run has no chat template'),
  ('step', ('--model=PLACE/m', '--step=1'), '--step goes with --workdir'),
  ('quantize tables', ('--model=PLACE/m', '--quantize=int8/kv'), '--quantize=int8/kv is for the tables of memories; a pretrained'),
  ('quantize to', ('--model=PLACE/m', '--quantize=int3'), '--quantize=int3 is not one of int8, int4, nf4'),
  ('quantize rows', ('--model=PLACE/m.gguf', '--quantize=nf4'), 'mlp/down/kernel cannot be stored as nf4: quantisation groups'),
  ('quantize twice', ('--model=PLACE/packed', '--quantize=int8'), 'quantized.safetensors is stored as int8 already'),
  ('missing', ('--model=PLACE/no.gguf',), 'PLACE/no.gguf cannot be read: No such file'),
  ('no model', ('--model=PLACE/m/config.json',), 'is not a GGUF file'),
  ('folder without a model', ('--model=PLACE',), 'PLACE/tokenizer.json: No such file'),
  ('too long for the model', ('--model=PLACE/m.gguf', '--max_new_tokens=127'), '129 tokens, exceed the limit of 128'),
  ('too long as asked', ('--model=PLACE/m.gguf', '--max_new_tokens=8', '--max_len=9'), '10 tokens, exceed the limit of 9'),
  ('no template', ('--model=PLACE/plain.gguf', '--chat'), 'PLACE/plain.gguf has no chat template'),
  ('tokenizer', ('--model=PLACE/pre.gguf',), "PLACE/pre.gguf: tokenizer.ggml.pre 'other' is not one of"),
  ('vocabulary', ('--model=PLACE/large.gguf',), 'PLACE/large.gguf: the tokenizer has 62 tokens, the model 61'),
]


@pytest.fixture(scope='module')
def spoilt(place, packed):
  del packed
  make_workdir(place / 'run', small_config(place))
  write_case(place / 'plain.gguf', CASE, tokenizer__chat_template=None)
  write_case(place / 'pre.gguf', CASE, tokenizer__ggml__pre='other')
  tokens = [*VOCABULARY['tokenizer.ggml.tokens'], 'I', 'J', 'K', 'L', 'M', 'N', 'O', 'P', 'Q']
  write_case(place / 'large.gguf', CASE, tokenizer__ggml__tokens=tokens[:62], tokenizer__ggml__token_type=None)


@pytest.mark.usefixtures('spoilt')
@pytest.mark.parametrize(('words', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(words, message, do, place):
  said = do(*words, '--prompt=at.', status=2)
  assert message.replace('PLACE', str(place)) in said and said.startswith('memjax: ') and said.count('\n') == 1
