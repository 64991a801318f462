"""A tiny host with a tokenizer and a chat template, and a run that began with it: low-rank changes and a bank of entries."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from memjax.adapters.graft import graft, load_host
from memjax.adapters.lora import with_lora
from memjax.adapters.pretrained import load_pretrained
from memjax.config.banks import BankConfig, BankShapeConfig, RouterConfig
from memjax.config.codec import to_json
from memjax.config.lora import LoraConfig
from memjax.config.placement import parameter_rules
from memjax.config.schema import Config, DataConfig, GroupConfig, OptimizerConfig, TokenizerConfig, TrainingConfig
from memjax.data.gguf_tokenizer import gguf_tokenizer
from memjax.data.subword import SubwordTokenizer
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.checkpoint import Checkpoints
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import TrainState
from tests.adapters.files import cases, tensors_of, write_folder
from tests.adapters.gguf_files import TEMPLATE, VOCABULARY

BANK = BankConfig(heads=4, shape=BankShapeConfig(entries=16, chapters=4), router=RouterConfig(top_k=2))
LORA = LoraConfig(rank=2, alpha=4.0, targets=('/attention/(query|value)/kernel$', '/mlp/up/kernel$'))
SPECIAL = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}


def write_host(folder, case='llama_plain', *, dtype='float32', **settings):
  """The folder of a reference model, now with all that a model for chats has; keywords go into tokenizer_config.json."""
  write_folder(folder, cases()[case]['config'], tensors_of(case), dtype=dtype)
  (folder / 'tokenizer.json').write_text(gguf_tokenizer(VOCABULARY).inner.to_str())
  (folder / 'tokenizer_config.json').write_text(json.dumps(SPECIAL | {'add_bos_token': False, 'chat_template': TEMPLATE} | settings))
  (folder / 'README.md').write_text('---\ntags: [x]\nlicense: apache-2.0\n---\nA model.\n')
  return folder


def run_params(config, seed=0):
  """The parameters of the run: the host's, and random ones for whatever was added to it."""
  rng, shapes = np.random.default_rng(seed), param_shapes(build_decoder(config.model))[0]
  host = named(load_host(config.model, config.training.host))
  return unnamed({path: host[path] if path in host else jnp.asarray(.2 * rng.normal(size=like.shape), like.dtype)
                  for path, like in named(shapes).items()}, shapes)


def run_config(host, *, lora=LORA, memory=True):
  """The config of a run on the host in a folder: a bank after its last layer, low-rank changes."""
  model, _ = load_pretrained(str(host))
  if memory: model = graft(model, BANK, where=(model.depth - 1,))
  if lora: model = with_lora(model, lora)
  rates = {'lora': 1e-3, 'memory_bank': 1e-3, 'memory': 1e-4, 'base': 0.0}
  rules = parameter_rules(model)
  groups = {rule.rpartition('=')[2]: GroupConfig(rate=rates[rule.rpartition('=')[2]]) for rule in rules}
  return Config(model=model, training=TrainingConfig(host=str(host), steps=1, batch=2, length=16),
                data=DataConfig(tokenizer=TokenizerConfig(kind='file', path=f'{host}/tokenizer.json')),
                optimizer=OptimizerConfig(rules=rules, groups=groups))


def write_run(folder, config, params):
  """The folder, as a run of `config` leaves it with these parameters."""
  tokenizer = SubwordTokenizer.from_file(config.data.tokenizer.path)
  folder.mkdir()
  tokenizer.save(folder / 'tokenizer')
  (folder / 'config.json').write_text(json.dumps(to_json(config)))
  optimizer = make_optimizer(config.optimizer, params, config.training.steps)
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero + 1, params, optimizer.init(params), jax.random.key_data(jax.random.key(0)), (), zero)
  checkpoints = Checkpoints(str(folder), dataclasses.replace(config.checkpoint, asynchronous=False))
  checkpoints.save(1, state, {'data': {'name': 'x', 'fingerprint': tokenizer.fingerprint}, 'config': to_json(config), 'early': {}})
  checkpoints.close()
  return folder
