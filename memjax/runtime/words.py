"""The words of a pretrained model, without its weights: tokenizer, chat template, and what ends a text or a turn."""
import os
import pathlib
from typing import NamedTuple

from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.pretrained import end_tokens
from memjax.config.errors import UserError
from memjax.data.chat import ChatTemplate, folder_template
from memjax.data.gguf_tokenizer import gguf_tokenizer, special_text
from memjax.data.subword import FILE, SubwordTokenizer


class Words(NamedTuple):
  """How a pretrained model reads and writes."""
  tokenizer: SubwordTokenizer
  template: ChatTemplate | None
  ends: tuple[int, ...]              # tokens that end a text or a turn


def open_words(path: str) -> Words:
  """The words of the model in a GGUF file or a Hugging Face folder. Raises UserError for what cannot be read exactly."""
  if os.path.isdir(path):
    return Words(SubwordTokenizer.from_file(pathlib.Path(path) / FILE), folder_template(path), end_tokens(path))
  file = GgufModel(path)
  try:
    tokenizer = gguf_tokenizer(file.metadata)
    bos, eos = special_text(file.metadata, 'bos'), special_text(file.metadata, 'eos')
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  source = file.metadata.get('tokenizer.chat_template')
  template = None if source is None else ChatTemplate(source, bos=bos, eos=eos, where=f'the chat template of {path}')
  return Words(tokenizer, template, file.ends)
