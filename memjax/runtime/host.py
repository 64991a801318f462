"""A pretrained model from disk, ready to write: a GGUF file or a folder as Hugging Face writes them."""
import os
from typing import Any, NamedTuple

import numpy as np

from memjax.adapters.families import Keys
from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.graft import open_host as open_tensors
from memjax.adapters.pretrained import Tensors, end_tokens, load_params, read_json
from memjax.adapters.quantized import packed
from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.data.chat import ChatTemplate, chat_tokens, folder_template, read_tokenizer_config
from memjax.data.gguf_tokenizer import begins_with_bos, gguf_tokenizer, special_text
from memjax.data.subword import FILE, SubwordTokenizer
from memjax.models.decoder import Decoder, inference_model
from memjax.models.quantized import kernel_quantization, with_quant
from memjax.models.unrolled import unrolled


class Host(NamedTuple):
  """What generation with a pretrained model starts from."""
  path: str
  config: ModelConfig
  model: Decoder
  params: Any
  tokenizer: SubwordTokenizer
  ends: tuple[int, ...]              # tokens that end a text
  has_bos: bool                      # whether a plain prompt begins with bos
  template: ChatTemplate | None
  context: int                       # tokens of the longest texts that it was made for, 0 = not said

  def encode(self, prompt: str) -> np.ndarray:
    """int32 tokens of a plain prompt."""
    tokens = self.tokenizer.encode(prompt)
    return np.concatenate([[self.tokenizer.bos], tokens]).astype(np.int32) if self.has_bos else tokens

  def encode_chat(self, prompt: str) -> np.ndarray:
    """int32 tokens of a conversation that begins with this message of its user, up to where the reply begins.

    Raises UserError for a model without a chat template.
    """
    if self.template is None: raise UserError(f'{self.path} has no chat template')
    return chat_tokens(self.tokenizer, self.template, [{'role': 'user', 'content': prompt}], add_generation_prompt=True)


def open_host(path: str, *, dtype: str = 'float32', quantize: str = '') -> Host:
  """The model in a GGUF file, a Hugging Face folder or a quantised one; `dtype` is that of its parameters and of computation.

  `quantize` ('int8', 'int4', 'nf4') packs the kernels of its linear maps as they are read.
  Raises UserError for what cannot be read exactly, and for a tokenizer with more tokens than the model.
  """
  host = _open_folder(path, dtype, quantize) if os.path.isdir(path) else _open_gguf(path, dtype, quantize)
  if host.tokenizer.vocabulary > host.config.vocabulary:
    raise UserError(f'{path}: the tokenizer has {host.tokenizer.vocabulary} tokens, the model {host.config.vocabulary}')
  return host


def _open_gguf(path: str, dtype: str, quantize: str) -> Host:
  file = GgufModel(path)
  try:
    tokenizer, has_bos = gguf_tokenizer(file.metadata), begins_with_bos(file.metadata)
    bos, eos = special_text(file.metadata, 'bos'), special_text(file.metadata, 'eos')
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  source, config = file.metadata.get('tokenizer.chat_template'), file.config(dtype)
  template = None if source is None else ChatTemplate(source, bos=bos, eos=eos, where=f'the chat template of {path}')
  config, params = _load(config, file, dtype, quantize)
  return Host(path, config, inference_model(config), params, tokenizer, file.ends, has_bos, template, file.context)


def _open_folder(path: str, dtype: str, quantize: str) -> Host:
  tokenizer, template = SubwordTokenizer.from_file(os.path.join(path, FILE)), folder_template(path)
  has_bos = read_tokenizer_config(path).get('add_bos_token')
  if has_bos is None:                # then tokenizer.json knows
    has_bos = tokenizer.bos in tokenizer.inner.encode('', add_special_tokens=True).ids[:1]
  where = os.path.join(path, 'config.json')
  context = Keys(read_json(where), where).get('max_position_embeddings', int, 0)
  config, params = _load(*open_tensors(path, dtype=dtype), dtype, quantize)
  return Host(path, config, inference_model(config), params, tokenizer, end_tokens(path), bool(has_bos), template, context)


def _load(config: ModelConfig, tensors: Tensors, dtype: str, quantize: str) -> tuple[ModelConfig, Any]:
  """(config, parameters), the layers unrolled."""
  stored = config.block.quant.storage
  if quantize and stored: raise UserError(f'--quantize={quantize}: {tensors.folder} is stored as {stored} already')
  if quantize: config = with_quant(config, kernel_quantization(quantize))
  config = unrolled(config)
  return config, load_params(config, packed(tensors, config), param_dtype=dtype)
