"""`generate --model HOST --adapter FOLDER`: low-rank changes and memories on a host, alone and together, compute what they did apart."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import generate
from memjax.adapters import graft, lora
from memjax.adapters.peft import save_peft
from memjax.adapters.pretrained import load_params
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.errors import UserError
from memjax.config.flags import call
from memjax.config.lora import LoraConfig
from memjax.models.decoder import build_decoder
from memjax.models.routing import rerouted
from memjax.runtime.host import open_host
from tests.adapters.gguf_files import write_case

TOKENS = np.array([[5, 17, 3, 40, 8, 22, 9, 30]], np.int32)


def filled(params, ending):
  """The parameters with random numbers in what starts at zero."""
  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return 0.3 * jax.random.normal(jax.random.key(len(name)), leaf.shape) if name.endswith(ending) else leaf
  return jax.tree_util.tree_map_with_path(one, params)


def logits(config, params):
  model = build_decoder(config)
  return jax.jit(lambda p: model.apply({'params': p}, TOKENS, model.init_state(1), position_BxL=jnp.arange(8)[None])[0])(params)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """(folder with m.gguf, `memory` and `low` on it, {what: logits})."""
  root = tmp_path_factory.mktemp('adapters')
  config, tensors = graft.open_host(write_case(root / 'm.gguf', 'llama_plain'))
  params, wanted = load_params(config, tensors), {}
  wanted['host'] = logits(config, params)
  memory = BankConfig(heads=2, shape=BankShapeConfig(entries=8, chapters=4), router=RouterConfig(top_k=2))
  grafted = graft.graft(config, memory, where=(0, 1))
  with_memory = filled(graft.graft_params(params, grafted, jax.random.key(1)), 'memory/out/kernel')
  graft.save_adapter(str(root / 'memory'), grafted, with_memory)
  wanted['memory'] = logits(grafted, with_memory)
  changed = lora.with_lora(config, LoraConfig(rank=2, alpha=4.0, targets=('query/kernel$', 'mlp/down/kernel$')))
  low = filled(lora.start(changed, params, jax.random.key(2)), 'lora_b')
  save_peft(str(root / 'low'), changed, low)
  wanted['low'] = logits(changed, low)
  return root, wanted


@pytest.mark.parametrize('names', [('memory',), ('low',), ('low', 'low'), ('low', 'memory')])
def test_logits(names, place):
  root, wanted = place
  host = open_host(str(root / 'm.gguf'), adapters=[str(root / name) for name in names])
  found = logits(host.config, host.params)
  if len(names) == 1:
    np.testing.assert_allclose(found, wanted[names[0]], atol=1e-4)
    assert np.abs(found - wanted['host']).max() > 1e-2
  else:
    for name in {'host', *names}: assert np.abs(found - wanted[name]).max() > 1e-2


@pytest.mark.slow
def test_routing(place, capsys):
  root = place[0]
  host = open_host(str(root / 'm.gguf'), adapters=[str(root / 'memory')])
  found = {rerouted(host.config, name).mixers['memory'].router.inference for name in ('token', 'prefix-mean', 'rolling', 'hybrid')}
  assert found == {'token', 'prefix-mean', 'rolling', 'hybrid'}
  with pytest.raises(UserError, match=r"routing 'tokn' is not one of token, .*did you mean 'token'"): rerouted(host.config, 'tokn')
  words = [f'--model={root}/m.gguf', '--prompt=at', '--max_new_tokens=2', f'--adapter={root}/memory', '--routing=hybrid',
           f'--output={root}/o.json']
  assert call(generate.main, flags=generate.FLAGS, takes_config=False, argv=words) == 0
  report = json.loads((root / 'o.json').read_text())
  assert report['routing'] == 'hybrid' and report['adapter'] == [f'{root}/memory'] and capsys.readouterr().out.startswith('at')


REFUSED = [
  ('none', ('--adapter=PLACE',), 'PLACE is no folder of an adapter: it holds neither adapter_config.json nor memory_config.json'),
  ('two memories', ('--adapter=PLACE/memory', '--adapter=PLACE/./memory'), 'both hold memories; a model takes those of one folder'),
  ('packed', ('--adapter=PLACE/memory', '--quantize=int8'), 'goes with the host as it is stored, not with --quantize=int8'),
  ('routing of a host', ('--routing=token',), "routing 'token' chooses nothing"),
  ('system', ('--system=a',), '--system goes with --chat'),
]


@pytest.mark.parametrize(('words', 'message'), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(words, message, place, capsys):
  words = [word.replace('PLACE', str(place[0])) for word in ('--model=PLACE/m.gguf', '--prompt=at', *words)]
  assert call(generate.main, flags=generate.FLAGS, takes_config=False, argv=words) == 2
  err = capsys.readouterr().err
  assert message.replace('PLACE', str(place[0])) in err and err.count('\n') == 1


def test_adapters_go_with_models(capsys):
  assert call(generate.main, flags=generate.FLAGS, takes_config=False, argv=['--workdir=x', '--adapter=y', '--prompt=z']) == 2
  assert '--adapter goes with --model' in capsys.readouterr().err
