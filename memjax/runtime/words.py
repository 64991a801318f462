"""The words of a pretrained model, without its weights: tokenizer, chat template, and what ends a text or a turn; kept with a run."""
import json
import os
import pathlib
from typing import NamedTuple

from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.pretrained import end_tokens
from memjax.config.errors import UserError, shown
from memjax.data.chat import ChatTemplate, folder_template, read_tokenizer_config
from memjax.data.gguf_tokenizer import gguf_tokenizer, special_text
from memjax.data.hub import local_model
from memjax.data.subword import FILE, SubwordTokenizer
from memjax.data.tokenizers import write_atomic

SETTINGS = 'tokenizer_config.json'


class Words(NamedTuple):
  """How a pretrained model reads and writes."""
  tokenizer: SubwordTokenizer
  template: ChatTemplate | None
  ends: tuple[int, ...]              # tokens that end a text or a turn

  @property
  def end_texts(self) -> tuple[str, ...]:
    """What ends a turn, as the template writes it."""
    eos = self.template.tokens['eos_token'] if self.template else ''
    found = [eos, *(self.tokenizer.inner.id_to_token(token) for token in self.ends)]
    return tuple(dict.fromkeys(text for text in found if text))


def open_words(path: str, file: GgufModel | None = None) -> Words:
  """The words of the model in a GGUF file (`file`, where it is open) or a Hugging Face folder, or of that name on the hub.

  Raises UserError for what cannot be read exactly.
  """
  path = local_model(path)
  if os.path.isdir(path):
    return Words(SubwordTokenizer.from_file(pathlib.Path(path) / FILE), folder_template(path), end_tokens(path))
  file = file or GgufModel(path)
  try:
    tokenizer = gguf_tokenizer(file.metadata)
    bos, eos = special_text(file.metadata, 'bos'), special_text(file.metadata, 'eos')
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  source = file.metadata.get('tokenizer.chat_template')
  template = None if source is None else ChatTemplate(source, bos=bos, eos=eos, where=f'the chat template of {path}')
  return Words(tokenizer, template, file.ends)


def beside(path: str, tokenizer: SubwordTokenizer) -> Words:
  """The words in the folder of a tokenizer.json, which is the tokenizer."""
  folder = os.path.dirname(os.path.expanduser(path)) or '.'
  return Words(tokenizer, folder_template(folder), end_tokens(folder))


def save_words(folder: str, words: Words) -> None:
  """Leaves the template and what ends a turn beside the tokenizer of a run: chat_template.jinja and tokenizer_config.json."""
  root = pathlib.Path(folder)
  if words.template: write_atomic(root / 'chat_template.jinja', words.template.source.encode())
  tokens = words.template.tokens if words.template else {}
  write_atomic(root / SETTINGS, json.dumps({**tokens, 'end_tokens': words.ends}, ensure_ascii=False).encode())


def saved_words(folder: str, tokenizer: SubwordTokenizer) -> Words:
  """What `save_words` left, and the tokenizer."""
  ends = read_tokenizer_config(folder).get('end_tokens', [])
  if not (isinstance(ends, list) and all(type(token) is int for token in ends)):
    raise UserError(f'{folder}/{SETTINGS}: end_tokens are no tokens: {shown(ends)}')
  return Words(tokenizer, folder_template(folder), tuple(ends))
