"""How an exported model reads and writes: opened from a pretrained one or a run, written into a folder or as keys of GGUF."""
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from memjax.adapters.families import Keys
from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.pretrained import read_json
from memjax.adapters.safetensors import write_json
from memjax.config.errors import UserError
from memjax.data.chat import read_tokenizer_config
from memjax.data.gguf_tokenizer import PREFIX, begins_with_bos
from memjax.data.gguf_vocabulary import gguf_ends, gguf_vocabulary
from memjax.data.subword import FILE, SubwordTokenizer, library
from memjax.runtime.words import Words, open_words

SPECIAL = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}          # as tokenizer_config.json and as GGUF says it
COPIED = (FILE, 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', 'tokenizer.model',
          'LICENSE', 'LICENSE.txt', 'NOTICE')
TEMPLATE, GENERATION = 'chat_template.jinja', 'generation_config.json'
SAMPLING = {'do_sample': True, 'temperature': 0.7, 'top_p': 0.9, 'top_k': 50}        # where the model came without any
NAME = r'[\w.-]{1,60}'
LICENCE = re.compile(rf'\A---\n(?:.*\n)*?license:[ \t]*["\']?({NAME})["\']?[ \t]*\n')


class Texts(NamedTuple):
  """All that belongs to a model and is not a number of it."""
  words: Words
  has_bos: bool                    # whether a plain prompt begins with bos
  context: int                     # tokens of the longest texts that it was made for
  special: dict[str, int]          # tokens by 'bos', 'eos', 'pad', 'unk'; those that it has
  licence: str = ''                # '' = not said
  folder: str = ''                 # where the files are copied from; '' = they are made
  tree: Mapping[str, Any] = {}     # config.json of that folder
  keys: Mapping[str, Any] = {}     # tokenizer.* of the GGUF file that the model came from

  @property
  def ends(self) -> tuple[int, ...]:
    """Tokens that end a text: what the model says, else eos."""
    return self.words.ends or tuple(self.special[name] for name in ('eos',) if name in self.special)


def open_texts(path: str, file: GgufModel | None = None) -> Texts:
  """The texts of the model in a GGUF file (`file`, where it is open) or a Hugging Face folder.

  Raises UserError for what cannot be read exactly.
  """
  if not os.path.isdir(path): return _gguf_texts(path, file or GgufModel(path))
  words = open_words(path)
  where, inner = os.path.join(path, 'config.json'), words.tokenizer.inner
  tree, beside = read_json(where), read_tokenizer_config(path)
  special = {}
  for name in SPECIAL:
    text, token = beside.get(f'{name}_token'), tree.get(f'{name}_token_id')
    if isinstance(text, dict): text = text.get('content')
    if isinstance(text, str) and inner.token_to_id(text) is not None: token = inner.token_to_id(text)
    if type(token) is int: special[name] = token
  has_bos = beside.get('add_bos_token')
  if has_bos is None: has_bos = words.tokenizer.bos in inner.encode('', add_special_tokens=True).ids[:1]     # tokenizer.json knows
  context = Keys(tree, where).get('max_position_embeddings', int, 0)
  return Texts(words, bool(has_bos), context, special, _licence(path), path, tree)


def _gguf_texts(path: str, file: GgufModel) -> Texts:
  words = open_words(path, file)
  try: has_bos = begins_with_bos(file.metadata)
  except UserError as error: raise UserError(f'{path}: {error}') from None
  found = {name: file.metadata.get(f'{PREFIX}{theirs}_token_id') for name, theirs in SPECIAL.items()}
  special = {name: token for name, token in found.items() if type(token) is int}
  keys = {key: value for key, value in file.file.typed.items() if key.startswith('tokenizer.')}
  licence = file.metadata.get('general.license')
  licence = licence if isinstance(licence, str) and re.fullmatch(NAME, licence) else ''
  return Texts(words, has_bos, file.context, special, licence, keys=keys)


def own_texts(tokenizer: Any, context: int, words: Words | None = None) -> Texts:
  """The texts of a run that began without a pretrained model; `words` are those of its conversations.

  Raises UserError for a tokenizer that is not a tokenizer.json.
  """
  if not isinstance(tokenizer, SubwordTokenizer):
    raise UserError(f'a tokenizer of kind {tokenizer.name} has no tokenizer.json; only runs with kind bpe or file can be written so')
  words = words or Words(tokenizer, None, (tokenizer.bos,))
  return Texts(words, True, context, {'bos': tokenizer.bos, 'eos': next(iter(words.ends), tokenizer.bos)})


def _licence(folder: str) -> str:
  """What README.md says at its head."""
  try:
    found = LICENCE.match((pathlib.Path(folder) / 'README.md').read_text(encoding='utf-8'))
  except (OSError, UnicodeDecodeError):
    return ''
  return found[1] if found else ''


def write_texts(folder: str, texts: Texts) -> None:
  """Leaves the tokenizer, its settings, the chat template and generation_config.json in a folder."""
  root = pathlib.Path(folder)
  if texts.folder:
    for name in COPIED:
      if (path := pathlib.Path(texts.folder) / name).is_file(): shutil.copyfile(path, root / name)
  else: _make_tokenizer(root, texts)
  if texts.words.template is not None: (root / TEMPLATE).write_bytes(texts.words.template.source.encode())
  before = os.path.join(texts.folder, GENERATION) if texts.folder else ''
  given = read_json(before) if before and os.path.isfile(before) else SAMPLING
  write_json(str(root / GENERATION), {**given, **token_ids(texts)})


def token_ids(texts: Texts) -> dict[str, Any]:
  """The entries of config.json and generation_config.json about special tokens; several ends are a list."""
  found = {f'{name}_token_id': texts.special[name] for name in ('bos', 'pad') if name in texts.special}
  ends = list(texts.ends)
  return found | ({'eos_token_id': ends[0] if len(ends) == 1 else ends} if ends else {})


def _make_tokenizer(root: pathlib.Path, texts: Texts) -> None:
  """tokenizer.json and tokenizer_config.json of a tokenizer that came without them."""
  inner = library.Tokenizer.from_str(texts.words.tokenizer.inner.to_str())
  text = {name: inner.id_to_token(token) for name, token in texts.special.items()}
  if texts.has_bos and 'bos' in text:
    inner.post_processor = library.processors.TemplateProcessing(
        single=f'{text["bos"]} $A', special_tokens=[(text['bos'], texts.special['bos'])])
  (root / FILE).write_text(inner.to_str(), encoding='utf-8')
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': texts.has_bos, 'model_max_length': texts.context,
              'clean_up_tokenization_spaces': False}
  write_json(str(root / 'tokenizer_config.json'), settings | {f'{name}_token': value for name, value in text.items()})


def gguf_texts(texts: Texts, rows: int) -> dict[str, Any]:
  """The keys `tokenizer.*` of a GGUF file whose embedding has `rows` rows: those that the model came with, else new ones.

  Raises UserError for a tokenizer that GGUF cannot name, and for too many tokens that end a text.
  """
  if texts.keys: return dict(texts.keys)
  keys = gguf_vocabulary(texts.words.tokenizer, rows)
  keys |= {f'{PREFIX}{theirs}_token_id': texts.special[name] for name, theirs in SPECIAL.items() if name in texts.special and name != 'eos'}
  keys |= gguf_ends(texts.ends, texts.special.get('eos', -1)) | {f'{PREFIX}add_bos_token': texts.has_bos}
  if texts.words.template is not None: keys['tokenizer.chat_template'] = texts.words.template.source
  return keys
