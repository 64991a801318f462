"""A finished (or running) training run as its readers see it: config, tokenizer and the parameters of one checkpoint."""
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.banks import sees_future
from memjax.config.codec import RESUMABLE, leaves, read_config, to_json
from memjax.config.errors import UserError
from memjax.config.schema import Config, ModelConfig
from memjax.data.messages import read_file
from memjax.data.sources import Corpus, read_documents
from memjax.data.tokenizers import Tokenizer, load_tokenizer
from memjax.data.tokens import Tokens, tokenize_split
from memjax.models.decoder import Decoder, build_decoder, inference_model, param_shapes
from memjax.models.quantized import quantize_model
from memjax.runtime.checkpoint import restore_for_reading
from memjax.runtime.seeded import check_keys
from memjax.runtime.workdir import CONFIG, TOKENIZER, fill_vocabulary, is_run, open_labels, read_split


class Run(NamedTuple):
  """What evaluate, generate and analyze start from."""
  workdir: str
  config: Config             # with the vocabulary filled in
  model: Decoder
  params: Any
  tokenizer: Tokenizer
  step: int
  record: dict[str, Any]     # what was saved beside the arrays
  name: str                  # hash of the config


def config_hash(config: Config) -> str:
  """Eight hexadecimal digits that name a configuration; equal for those that may resume each other."""
  fixed = {path: value for path, value in leaves(to_json(config)) if path not in RESUMABLE}
  return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]


def run_tags(config: ModelConfig) -> dict[str, bool]:
  """{'noncausal_routing': True} for a model whose router sees the future, else nothing: what its results must carry."""
  return {'noncausal_routing': True} if any(map(sees_future, config.mixers.values())) else {}


def open_run(workdir: str, step: int = 0, quantize: str = '') -> Run:
  """The run in a workdir at its best checkpoint, else the newest, or at `step`; nothing in it is changed.

  Routers use the strategy of their config for inference. `quantize` ('int8', 'int4', 'nf4', with '/kv') stores banks as integers.

  A float64 model switches jax to 64 bits, as its training did. Raises UserError for a folder that is missing or not a
  workdir, no usable checkpoint, and a tokenizer that is not the one of the checkpoint.
  """
  config = read_workdir(workdir)
  if config.model.dtype == 'float64': jax.config.update('jax_enable_x64', True)
  tokenizer = load_tokenizer(os.path.join(workdir, TOKENIZER))
  config = fill_vocabulary(config, tokenizer)
  step, params, record = restore_for_reading(workdir, param_shapes(build_decoder(config.model))[0], step)
  check_keys(config, record)
  trained_with = (record.get('data') or {}).get('fingerprint', tokenizer.fingerprint)
  if trained_with != tokenizer.fingerprint:
    raise UserError(f'the tokenizer in {workdir} does not match checkpoint {step}: its vocabulary hashes to '
                    f'{tokenizer.fingerprint[:16]}, the checkpoint was trained with {trained_with[:16]}')
  shown, params = config.model, jax.tree.map(jnp.asarray, params)
  if quantize: shown, params = quantize_model(shown, params, quantize)
  return Run(workdir, config, inference_model(shown), params, tokenizer, step, record, config_hash(config))


def read_workdir(workdir: str) -> Config:
  """The config of a workdir. Raises UserError for a folder that is missing or that no training run made."""
  if not os.path.isdir(workdir):
    raise UserError(f'no such workdir: {workdir}' if not os.path.exists(workdir) else f'{workdir} is a file, not a workdir')
  if not is_run(workdir): raise UserError(f'{workdir} is not the workdir of a run: it holds no {CONFIG}')
  return read_config(workdir)


def read_tokens(found: Run, split: str, file: str = '') -> Tokens:
  """The tokens of a split of the run's corpus, or of a file: text cut into documents as that corpus is. A run on conversations
  reads those, in a `.jsonl` file too.

  Raises UserError for a corpus that is gone, an unknown split, an empty or non-UTF-8 file, and a text without tokens.
  """
  labels = open_labels(found.config, found.tokenizer, found.workdir)
  if not file: return read_split(found.config, found.tokenizer, split, labels)
  if labels and file.endswith('.jsonl'):
    corpus = Corpus(pathlib.Path(file).stem, 'text', read_file(pathlib.Path(file)))
    return tokenize_split(found.config.data, found.tokenizer, 'text', corpus, labels=labels)
  documents = read_documents(pathlib.Path(file), found.config.data)
  rows = [row for row in map(found.tokenizer.encode, documents) if row.size]
  if not rows: raise UserError(f'{file} has no tokens')
  starts = np.cumsum([0] + [row.size for row in rows[:-1]])
  size = sum(len(document.encode()) for document in documents)
  return Tokens(np.concatenate(rows), starts, size, found.tokenizer.fingerprint, found.tokenizer.vocabulary,
                found.tokenizer.bos, pathlib.Path(file).name, 'text')
