"""The folder of a training run: whose it is, and what it starts from."""
import dataclasses
import json
import os
from typing import Any

from memjax.config.codec import clashes, diff, read_config, to_json
from memjax.config.errors import UserError
from memjax.config.schema import Config
from memjax.data.labels import Labels
from memjax.data.messages import load_chats
from memjax.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from memjax.data.tokens import Tokens, tokenize_split

CONFIG, TOKENIZER = 'config.json', 'tokenizer'
BEFORE = {f'{CONFIG}.tmp', 'lr_finder.json', 'lr_finder.png'}    # what may lie in a folder before its run starts


def is_run(workdir: str) -> bool:
  """Whether a run was started in this folder."""
  return os.path.isfile(os.path.join(workdir, CONFIG))


def has_words(config: Config) -> bool:
  """Whether the tokenizer of a config may come with a chat template: that of a pretrained model, or a tokenizer.json."""
  return config.data.tokenizer.kind in ('host', 'file')


def open_words(config: Config, tokenizer: Tokenizer, *workdirs: str) -> Any:
  """The Words beside the tokenizer saved in the first of `workdirs` that has one, else those of the config."""
  from memjax.runtime import words  # needs the extra `text`
  for folder in (os.path.join(path, TOKENIZER) for path in workdirs if path):
    if os.path.isfile(os.path.join(folder, words.SETTINGS)): return words.saved_words(folder, tokenizer)
  if config.data.tokenizer.kind == 'host': return words.open_words(config.training.host)
  return words.beside(config.data.tokenizer.path, tokenizer)


def open_labels(config: Config, tokenizer: Tokenizer, *workdirs: str) -> Labels | None:
  """What makes tokens of conversations and says which are trained on; None where the run reads plain text."""
  return None if config.training.mode == 'pretraining' else open_chat(config, tokenizer, *workdirs)


def open_chat(config: Config, tokenizer: Tokenizer, *workdirs: str) -> Labels:
  """How a run writes conversations: by the template of its tokenizer, or by roles where it has none and was trained on them.

  Raises UserError for plain text without a template, and as `Labels` does.
  """
  words = open_words(config, tokenizer, *workdirs) if has_words(config) else None
  if words and words.template: return Labels(tokenizer, words.template, words.end_texts, config.data.chat)
  if config.training.mode == 'pretraining': raise UserError('the tokenizer of the run has no chat template')
  return Labels(tokenizer, None, (), config.data.chat)


def read_split(config: Config, tokenizer: Tokenizer, split: str, labels: Labels | None) -> Tokens:
  """The tokens of a split of the text or the conversations of a config."""
  corpus = load_chats(config.data, split) if labels else None
  return tokenize_split(config.data, tokenizer, split, corpus, labels=labels)


def save_tokenizer(config: Config, tokenizer: Tokenizer, workdir: str, source: str = '') -> None:
  """Leaves the tokenizer in the folder of a run, with its chat template, unless they are there."""
  folder = os.path.join(workdir, TOKENIZER)
  if os.path.isdir(folder): return
  words = open_words(config, tokenizer, source) if has_words(config) else None
  tokenizer.save(folder)
  if not words: return
  from memjax.runtime.words import save_words
  save_words(folder, words)


def open_tokenizer(config: Config, workdir: str, source: str = '') -> Tokenizer:
  """The tokenizer saved in `workdir`, else in the run `source`, else a new one from the config.

  Raises UserError if the saved one is damaged or of another kind than the config's.
  """
  kind = config.data.tokenizer.kind
  for folder in (os.path.join(path, TOKENIZER) for path in (workdir, source) if path):
    if not os.path.isdir(folder): continue
    tokenizer = load_tokenizer(folder)
    if tokenizer.name != ('file' if kind == 'host' else kind):
      raise UserError(f'config.data.tokenizer.kind={kind}, but {folder} holds one of kind {tokenizer.name}')
    return tokenizer
  if kind != 'host': return make_tokenizer(config.data)
  from memjax.runtime.words import open_words  # needs the extra `text`
  return open_words(config.training.host).tokenizer


def check_workdir(workdir: str, sources: dict[str, str]) -> None:
  """Raises UserError unless `workdir` is absent, empty or a run of ours, and empty if a flag of `sources` is given.

  sources: {'resume_from': W2, 'init_from': W2}, '' where the flag is not given.
  """
  given = [(flag, path) for flag, path in sources.items() if path]
  if len(given) > 1: raise UserError('--resume_from and --init_from exclude each other')
  if os.path.exists(workdir) and not os.path.isdir(workdir): raise UserError(f'workdir {workdir} is not a folder')
  for flag, path in given:
    if not is_run(path): raise UserError(f'--{flag} {path} is not a run: it holds no {CONFIG}')
    if is_run(workdir): raise UserError(f'--{flag} wants a new workdir; {workdir} holds a run already')
  if os.path.isdir(workdir) and {*os.listdir(workdir)} - BEFORE and not is_run(workdir):
    raise UserError(f'workdir {workdir} is not empty and holds no {CONFIG}; name a new folder')


def fill_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
  """The config with `model.vocabulary` taken from the tokenizer. Raises UserError if it is set and too small."""
  wanted = config.model.vocabulary
  if wanted and wanted < tokenizer.vocabulary:
    raise UserError(f'config.model.vocabulary={wanted} is below the {tokenizer.vocabulary} tokens of the tokenizer; 0 takes them')
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=wanted or tokenizer.vocabulary))


def claim(workdir: str, config: Config) -> None:
  """Makes the folder the run of `config`: writes config.json, or compares with the one that is there.

  Raises UserError naming the first field in which they differ, steps and intervals apart.
  """
  if is_run(workdir):
    saved = read_config(workdir)
    if paths := clashes(saved, config):
      raise UserError(f'{workdir} holds a run of another config: they differ in {paths[0]}; name a new workdir')
    if not diff(saved, config): return
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, CONFIG)
  with open(f'{path}.tmp', 'w', encoding='utf-8') as file: file.write(json.dumps(to_json(config), indent=2) + '\n')
  os.replace(f'{path}.tmp', path)
