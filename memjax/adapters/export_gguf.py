"""A decoder as the metadata and tensors of a GGUF file: the inverse of `gguf_model`. What GGUF cannot say is refused by name."""
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from memjax.adapters.families import ATTENTION
from memjax.adapters.gguf_model import LAYER, NEEDED, OPTIONAL, ROPE_FACTORS, SCALING, TOP
from memjax.adapters.gguf_types import interleave_rows, type_named
from memjax.adapters.gguf_write import TensorSource, fitting_type, source
from memjax.config.attention import LLAMA3
from memjax.config.errors import UserError
from memjax.config.schema import ModelConfig
from memjax.ops.rope import frequencies

FILE_TYPES = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q8_0': 7, 'Q5_0': 8, 'Q5_1': 9, 'BF16': 32}      # general.file_type
TABLES = ('token_embd.weight', 'output.weight')
QUANTISATION = 2                   # version of the block formats
IN_LAYER = re.compile(r'model\.layers\.(\d+)\.(.+)\.(weight|bias)')
GGUF_TOP = {theirs: ours for ours, theirs in TOP.items()}
GGUF_LAYER = {theirs: ours for ours, theirs in LAYER.items()}
ARCHITECTURE = {'mistral': 'llama'}


def gguf_name(name: str) -> str:
  """The name in GGUF of a tensor by its Hugging Face name."""
  found = IN_LAYER.fullmatch(name)
  return f'blk.{found[1]}.{GGUF_LAYER[found[2]]}.{found[3]}' if found else GGUF_TOP[name]


def gguf_metadata(tree: Mapping[str, Any], config: ModelConfig, kind: str) -> dict[str, Any]:
  """The keys of the architecture, and 'general.*', of the decoder that a config.json (`config_json`) describes.

  `config` is the same decoder as `plain_config` gives it, without windows. Raises UserError for a stretching of rope that GGUF
  has no keys for.
  """
  family = ARCHITECTURE.get(tree['model_type'], tree['model_type'])
  own = {key: tree[name] for name, key in (NEEDED | OPTIONAL).items()}
  width, rope = tree['head_dim'], config.mixers[ATTENTION].rope
  own |= {'vocab_size': tree['vocab_size'], 'attention.value_length': width, 'rope.dimension_count': width}
  own |= {'attention.layer_norm_rms_epsilon': float(tree['rms_norm_eps']), 'rope.freq_base': float(tree['rope_theta'])}
  if rope.attention_factor: raise UserError(f'GGUF has no key for the attention_factor={rope.attention_factor:g} of yarn')
  for name, value in LLAMA3.items():
    if rope.kind == 'llama3' and getattr(rope, name) != value:
      raise UserError(f'GGUF has no key for the {name}={getattr(rope, name):g} of llama3')
  table = tree['rope_parameters']
  own |= {key: table[name] for name, key in SCALING.items() if name in table}
  if rope.kind == 'llama3': own.pop('rope.scaling.factor')           # the divisors are a tensor
  elif rope.kind != 'default': own['rope.scaling.type'] = rope.kind
  general = {'architecture': family, 'type': 'model', 'file_type': FILE_TYPES[kind], 'alignment': 32}
  if type_named(kind).block > 1: general['quantization_version'] = QUANTISATION
  return {f'general.{key}': value for key, value in general.items()} | {f'{family}.{key}': value for key, value in own.items()}


def gguf_tensors(tree: Mapping[str, Any], config: ModelConfig, rows: Mapping[str, Any], kind: str) -> dict[str, TensorSource]:
  """{name in GGUF: what is written} of the tensors `rows`, by their Hugging Face names, in the type `kind`.

  Vectors are F32; rows that the blocks do not divide are F16, as llama.cpp stores them; with 4 and 5 bits the tables of tokens are Q8_0.
  The architecture llama keeps the rows of queries and keys as neighbours.
  """
  attention, out = config.mixers[ATTENTION], {}
  turned = {'attn_q': attention.heads, 'attn_k': attention.kv_heads} if tree['model_type'] in ('llama', 'mistral') else {}
  for name, row in rows.items():
    name = gguf_name(name)
    heads = turned.get(name.split('.')[-2], 0)
    def load(row=row, heads=heads):
      x = np.asarray(row)
      return interleave_rows(x, heads) if heads else x
    out[name] = TensorSource(_type(kind, name, row.shape), tuple(row.shape), load)
  if attention.rope.kind != 'llama3': return out
  plain, stretched = (frequencies(attention.head_width, attention.rotary_base, *rope) for rope in ((), (attention.rope,)))
  return out | {ROPE_FACTORS: source((plain / stretched).astype(np.float32), 'F32')}


def _type(kind: str, name: str, shape: tuple[int, ...]) -> str:
  """Q8_0 for tables of tokens where `kind` has fewer bits, else the type that fits."""
  return fitting_type('Q8_0' if name in TABLES and type_named(kind).block > 1 else kind, shape)
