"""A GGUF file as a decoder: its metadata as the config.json of its family, its tensors under their Hugging Face names.

Metadata goes the way of a config.json (`family_config`); of what belongs to the architecture nothing is passed over: a key that
is not known here, and set, is refused. The architecture `llama` (Mistral too is stored under it) holds the rows of queries and
keys in another order, which is undone as they are read (specification sections 3.3 and 1.3).
"""
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from memjax.adapters.families import EMBED, HEAD, family_config
from memjax.adapters.gguf import GgufFile
from memjax.adapters.gguf_types import split_rows
from memjax.adapters.pretrained import load_params, settle_head
from memjax.config.attention import RopeConfig
from memjax.config.errors import UserError, nearest, shown
from memjax.config.schema import ModelConfig
from memjax.ops.rope import frequencies

ARCHITECTURES = ('llama', 'qwen2', 'qwen3')
TOP = {'token_embd.weight': EMBED, 'output_norm.weight': 'model.norm.weight', 'output.weight': HEAD}
LAYER = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
         'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm',
         'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
IN_LAYER = re.compile(r'blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)')
ROPE_FACTORS = 'rope_freqs.weight'
LLAMA3_ORIGINAL = 8192             # tokens of the texts of Llama 3 before stretching; files do not say it
NEEDED = {'num_hidden_layers': 'block_count', 'hidden_size': 'embedding_length', 'intermediate_size': 'feed_forward_length',
          'num_attention_heads': 'attention.head_count', 'rms_norm_eps': 'attention.layer_norm_rms_epsilon'}
OPTIONAL = {'num_key_value_heads': 'attention.head_count_kv', 'head_dim': 'attention.key_length', 'rope_theta': 'rope.freq_base',
            'max_position_embeddings': 'context_length'}
SIZES = ('num_attention_heads', 'num_key_value_heads', 'hidden_size', 'head_dim', 'max_position_embeddings')
SCALING = {'factor': 'rope.scaling.factor', 'original_max_position_embeddings': 'rope.scaling.original_context_length',
           'beta_fast': 'rope.scaling.yarn_beta_fast', 'beta_slow': 'rope.scaling.yarn_beta_slow'}
KNOWN = {*NEEDED.values(), *OPTIONAL.values(), *SCALING.values(), 'attention.value_length', 'rope.dimension_count', 'rope.scaling.type',
         'rope.scaling.finetuned', 'vocab_size'}


def hf_name(name: str) -> str:
  """The Hugging Face name of a tensor; what has none keeps its own."""
  found = IN_LAYER.fullmatch(name)
  if found and found[2] in LAYER: return f'model.layers.{found[1]}.{LAYER[found[2]]}.{found[3]}'
  return TOP.get(name, name)


class GgufModel:
  """An open GGUF file of a language model: what `load_params` reads tensors from, and `metadata`, its tokenizer within.

  `tree` is what its config.json would say. Raises UserError for a file that is not GGUF, another architecture, and what is
  missing, contradictory or unknown.
  """

  def __init__(self, path: str | os.PathLike):
    self.file = GgufFile(path)
    self.folder, self.metadata = self.file.path, self.file.metadata
    self.tree = _tree(self.file)
    self._stored: dict[str, str] = {}
    for name in self.file.tensors:
      if name == ROPE_FACTORS: continue
      other = self._stored.setdefault(hf_name(name), name)
      if other != name: raise UserError(f'{self.folder}: tensors {shown(other)} and {shown(name)} are both {hf_name(name)}')
    heads = self.tree['num_attention_heads']
    turned = {'q': heads, 'k': self.tree.get('num_key_value_heads', heads)} if self.tree['model_type'] == 'llama' else {}
    self._turned = {f'self_attn.{one}_proj': count for one, count in turned.items()}

  @property
  def names(self) -> list[str]:
    """All tensors by their Hugging Face names."""
    return list(self._stored)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, [out, in] for matrices."""
    return self.file.tensors[self._stored[name]].shape

  def read(self, name: str) -> np.ndarray:
    """A tensor in float32, whatever it is stored as, its rows in the order of the decoder."""
    x = self.file.read(self._stored[name])
    heads = self._turned.get('.'.join(name.split('.')[3:-1]))
    if heads is None: return x
    try:
      return split_rows(x, heads)
    except UserError as error:
      raise UserError(f'{self.folder}: tensor {shown(self._stored[name])}: {error}') from None

  def config(self, dtype: str = 'float32') -> ModelConfig:
    """The decoder of the file."""
    return settle_head(family_config(self.tree, path=self.folder, dtype=dtype), self)

  @property
  def context(self) -> int:
    """Tokens of the longest texts that it was made for; 0 where the file does not say."""
    return self.tree.get('max_position_embeddings', 0)

  @property
  def ends(self) -> tuple[int, ...]:
    """Tokens that end a text or a turn."""
    found = [self.metadata.get(f'tokenizer.ggml.{kind}_token_id') for kind in ('eos', 'eot', 'eom')]
    return tuple(dict.fromkeys(token for token in found if type(token) is int))


def load_gguf(path: str | os.PathLike, *, dtype: str = 'float32', mesh: Mesh | None = None,
              param_dtype: str = 'float32') -> tuple[ModelConfig, dict]:
  """(config, parameters) of the decoder in a GGUF file: `dtype` to compute in, `param_dtype` to keep.

  Raises UserError for what cannot be read exactly: see `GgufModel`, `family_config`, `load_params`.
  """
  file = GgufModel(path)
  config = file.config(dtype)
  return config, load_params(config, file, mesh=mesh, param_dtype=param_dtype)


def _tree(file: GgufFile) -> dict[str, Any]:
  """The config.json that the metadata and the tensors amount to."""
  family = file.metadata.get('general.architecture')
  if family not in ARCHITECTURES:
    raise UserError(f'{file.path}: general.architecture {shown(family)} is not one of {", ".join(ARCHITECTURES)}'
                    + nearest(str(family), ARCHITECTURES))
  own = {key.removeprefix(f'{family}.'): value for key, value in file.metadata.items() if key.startswith(f'{family}.')}
  for key, value in own.items():
    if key not in KNOWN and (len(value) if isinstance(value, str | list) else np.any(value)):
      raise UserError(f'{file.path}: metadata {family}.{key}={shown(value)} is not supported{nearest(key, KNOWN)}')
  for key in NEEDED.values():
    if key not in own: raise UserError(f'{file.path}: metadata {family}.{key} is missing')
  tree = {name: own[key] for name, key in (NEEDED | OPTIONAL).items() if key in own}
  for name in SIZES:
    if name not in tree or (type(tree[name]) is int and tree[name] > 0): continue
    raise UserError(f'{file.path}: metadata {family}.{(NEEDED | OPTIONAL)[name]} is no number above 0: {shown(tree[name])}')
  if isinstance(tree['rms_norm_eps'], float): tree['rms_norm_eps'] = float(f'{tree["rms_norm_eps"]:.6g}')     # stored as float32
  table = file.tensors.get('token_embd.weight')
  if table is None: raise UserError(f'{file.path} lacks the tensor token_embd.weight')
  tree |= {'model_type': family, 'vocab_size': table.shape[0], 'tie_word_embeddings': 'output.weight' not in file.tensors,
           'attention_bias': 'blk.0.attn_q.bias' in file.tensors, 'mlp_bias': 'blk.0.ffn_gate.bias' in file.tensors}
  width = tree.get('head_dim', tree['hidden_size'] // tree['num_attention_heads'])
  for key in ('attention.value_length', 'rope.dimension_count'):
    if key not in own or (type(own[key]) is int and own[key] == width): continue
    raise UserError(f'{file.path}: metadata {family}.{key} is {shown(own[key])}; only the width of a head, {shown(width)}, is supported')
  return tree | {'rope_parameters': _rope(file, own, width)}


def _rope(file: GgufFile, own: Mapping[str, Any], width: Any) -> dict[str, Any]:
  """The table `rope_parameters`, beside rope_theta."""
  kind = own.get('rope.scaling.type', 'none')
  given = {name: own[key] for name, key in SCALING.items() if key in own}
  if ROPE_FACTORS not in file.tensors:
    if kind == 'none': return {}
    return {'rope_type': kind, **(given if kind != 'linear' else {'factor': given.get('factor')})}
  if kind != 'none': raise UserError(f'{file.path}: both {ROPE_FACTORS} and the rope scaling {shown(kind)}')
  return _llama3(file, own, width)


def _llama3(file: GgufFile, own: Mapping[str, Any], width: Any) -> dict[str, Any]:
  """The stretching of Llama 3 whose divisors of the frequencies the file holds; {} for divisors of 1.

  The file has one divisor a frequency, not the rule. Raises UserError where the rule of Llama 3 does not give them.
  """
  divisors = file.read(ROPE_FACTORS).reshape(-1).astype(np.float64)
  base, original = own.get('rope.freq_base', 1e4), own.get('rope.scaling.original_context_length', LLAMA3_ORIGINAL)
  usable = type(base) is float and base > 1 and type(original) is int and original > 0 and len(divisors) * 2 == width
  if usable and np.all(divisors == 1): return {}
  factor = float(divisors.max())
  if usable and np.isfinite(factor) and factor > 1:
    rope = RopeConfig(kind='llama3', factor=factor, original=original)
    wanted = frequencies(width, base) / frequencies(width, base, rope)
    if np.allclose(divisors, wanted, rtol=1e-4, atol=0):
      return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': rope.low_factor, 'high_freq_factor': rope.high_factor,
              'original_max_position_embeddings': original}
  raise UserError(f'{file.path}: {ROPE_FACTORS} are not the divisors of Llama 3 for texts of {shown(original)} tokens')
