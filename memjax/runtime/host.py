"""A pretrained model from disk, ready to write: a GGUF file or a folder as Hugging Face writes them."""
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.graft import DESCRIPTION, load_adapter
from memjax.adapters.graft import open_host as open_tensors
from memjax.adapters.lora import merge, merge_quantized
from memjax.adapters.peft import CONFIG as PEFT
from memjax.adapters.peft import load_peft
from memjax.adapters.pretrained import Tensors, load_params
from memjax.adapters.quantized import packed
from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.data.chat import ChatTemplate, chat_tokens
from memjax.data.subword import SubwordTokenizer
from memjax.models.decoder import Decoder, inference_model
from memjax.models.quantized import kernel_quantization, with_quant
from memjax.models.unrolled import unroll_params, unrolled
from memjax.runtime.texts import open_texts


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
    return self.encode_messages([{'role': 'user', 'content': prompt}])

  def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """int32 tokens of a conversation up to where the next reply begins. Raises UserError for a model without a chat template."""
    if self.template is None: raise UserError(f'{self.path} has no chat template')
    return chat_tokens(self.tokenizer, self.template, messages, add_generation_prompt=True)


class Wanted(NamedTuple):
  """How a model is to be opened: the dtype of parameters and computation, how kernels are packed, folders of adapters on it."""
  dtype: str = 'float32'
  quantize: str = ''
  adapters: tuple[str, ...] = ()


def open_host(path: str, *, dtype: str = 'float32', quantize: str = '', adapters: Sequence[str] = ()) -> Host:
  """The model in a GGUF file, a Hugging Face folder or a quantised one; `dtype` is that of its parameters and of computation.

  `quantize` ('int8', 'int4', 'nf4') packs the kernels of its linear maps as they are read. `adapters` are folders of low-rank
  changes in PEFT's format, which are merged, all of them, and at most one of memories (`save_adapter`).
  Raises UserError for what cannot be read exactly, for a tokenizer with more tokens than the model, and for adapters that are
  none or belong to another model.
  """
  file = None if os.path.isdir(path) else GgufModel(path)
  texts = open_texts(path, file)
  config, tensors = (file.config(dtype), file) if file else open_tensors(path, dtype=dtype)
  config, params = _load(config, tensors, Wanted(dtype, quantize, tuple(adapters)))
  words = texts.words
  if words.tokenizer.vocabulary > config.vocabulary:
    raise UserError(f'{path}: the tokenizer has {words.tokenizer.vocabulary} tokens, the model {config.vocabulary}')
  return Host(path, config, inference_model(config), params, words.tokenizer, words.ends, texts.has_bos, words.template, texts.context)


def _load(config: ModelConfig, tensors: Tensors, wanted: Wanted) -> tuple[ModelConfig, Any]:
  """(config, parameters), the layers unrolled."""
  stored, quantize = config.block.quant.storage, wanted.quantize
  if quantize and stored: raise UserError(f'--quantize={quantize}: {tensors.folder} is stored as {stored} already')
  memories, changes = sort_adapters(wanted.adapters)
  if memories and quantize: raise UserError(f'{memories[0]} goes with the host as it is stored, not with --quantize={quantize}')
  if quantize: config = with_quant(config, kernel_quantization(quantize))
  if memories:
    config, params = load_adapter(memories[0], config, load_params(config, tensors, param_dtype=wanted.dtype))
    config, params = unrolled(config), unroll_params(params, config)
  else:
    config = unrolled(config)
    params = load_params(config, packed(tensors, config), param_dtype=wanted.dtype)
  found = [load_peft(folder, config)[1] for folder in changes]
  if not found: return config, params
  return config, merge_quantized(config, params, found)[0] if quantize or stored else merge(params, found)


def sort_adapters(folders: Sequence[str]) -> tuple[list[str], list[str]]:
  """(folders of memories, folders of low-rank changes). Raises UserError for what is neither, and for two of memories."""
  memories = [folder for folder in folders if os.path.exists(os.path.join(folder, DESCRIPTION))]
  changes = [folder for folder in folders if folder not in memories]
  for folder in changes:
    if os.path.exists(os.path.join(folder, PEFT)): continue
    raise UserError(f'{folder} is no folder of an adapter: it holds neither {PEFT} nor {DESCRIPTION}')
  if len(memories) > 1: raise UserError(f'{memories[0]} and {memories[1]} both hold memories; a model takes those of one folder')
  return memories, changes
