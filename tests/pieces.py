"""A workdir put together from its pieces, without training: config, tokenizer, one checkpoint of fresh parameters."""
import dataclasses
import json

import jax

from memjax.config.codec import to_json
from memjax.config.mixers import WindowConfig
from memjax.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig, TokenizerConfig, TrainingConfig
from memjax.data.tokenizers import ByteTokenizer
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.checkpoint import Checkpoints
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import make_init

PLAYS = {'train': 'A rose by any other name\nwould smell as sweet.\n' * 40, 'val': 'What is in a name?\n' * 20,
         'test': 'Parting is such sweet sorrow.\n\n\nThat I shall say good night.\n' * 6}


def write_plays(folder):
  """The folder, now with train.txt, val.txt and test.txt."""
  folder.mkdir(exist_ok=True)
  for split, text in PLAYS.items(): (folder / f'{split}.txt').write_text(text)
  return folder


def small_config(text, mixers=None, pattern=('near',), *, tokenizer='bytes', **model):
  """A config on the plays in a folder; its defaults make the smallest model there is."""
  mixers = mixers or {'near': WindowConfig(heads=1, window=4)}
  return Config(
      name='pieces', model=ModelConfig(mixers=mixers, pattern=pattern, **{'width': 8, 'hidden': 8, 'repeats': 1, **model}),
      data=DataConfig(source='path', path=str(text), cache=f'{text}/cache', tokenizer=TokenizerConfig(kind=tokenizer)),
      training=TrainingConfig(batch=8, length=16, steps=7), evaluation=EvaluationConfig(batch=4))


def make_workdir(folder, config, tokenizer=None):
  """The folder, as a run of `config` would leave it at step 7."""
  tokenizer = tokenizer or ByteTokenizer()
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=tokenizer.vocabulary))
  folder.mkdir(exist_ok=True)
  tokenizer.save(folder / 'tokenizer')
  (folder / 'config.json').write_text(json.dumps(to_json(config)))
  model = build_decoder(config.model)
  optimizer = make_optimizer(config.optimizer, param_shapes(model)[0], config.training.steps)
  state = jax.jit(make_init(model, optimizer, config))()
  checkpoints = Checkpoints(str(folder), config.checkpoint)
  data = {'name': 'plays', 'fingerprint': tokenizer.fingerprint}
  checkpoints.save(7, state, {'data': data, 'config': to_json(config), 'early': {}}, loss=2.0)
  checkpoints.close()
  return folder
