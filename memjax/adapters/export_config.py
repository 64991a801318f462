"""A decoder as the config.json of its family, in the words of transformers 4 and of transformers 5: the inverse of `family_config`."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from memjax.adapters.families import ATTENTION, FAMILIES, ROPE_KEYS, ROPE_NAMES, WINDOW, family_config
from memjax.adapters.graft import FREE
from memjax.config.codec import leaves, to_json
from memjax.config.errors import UserError, shown
from memjax.config.layout import mixer_names
from memjax.config.lora import LoraConfig
from memjax.config.mixers import AttentionConfig, WindowConfig
from memjax.config.placement import fold
from memjax.config.schema import ModelConfig
from memjax.layers.mlp import hidden_width

CLASSES = {'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}
DROPPED = ('_name_or_path', 'transformers_version', 'quantization_config', 'auto_map')      # of the checkpoint that the model came from
USUAL = {'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True}
UNSEEN = (*FREE, 'grafted')        # what a checkpoint does not say


def plain_config(config: ModelConfig) -> ModelConfig:
  """The same decoder with the names and the explicit sizes that `family_config` gives; without low-rank changes.

  Raises UserError, naming the memory or the layer, for a model that is not attention and feed-forward networks alone.
  """
  def full(mixer):
    return dataclasses.replace(mixer, kv_heads=mixer.kv_heads or mixer.heads, head_width=mixer.head_width or config.width // mixer.heads)
  names, mixers = {}, {}
  for name in dict.fromkeys(name for layer in config.layers for name in mixer_names(layer)):
    mixer = config.mixers[name]
    if not isinstance(mixer, AttentionConfig):
      raise UserError(f'a checkpoint of Llama, Mistral or Qwen cannot hold the {mixer.kind} memory {name!r} of the model')
    names[name] = WINDOW if isinstance(mixer, WindowConfig) else ATTENTION
  for layer in config.layers:
    mixer = config.mixers.get(layer)
    if not mixer or mixers.setdefault(names[layer], full(mixer)) != full(mixer):
      raise UserError(f'a checkpoint of Llama, Mistral or Qwen cannot hold the layer {layer!r} of the model')
  if config.hidden < 0: raise UserError('a checkpoint of Llama, Mistral or Qwen cannot hold a model without feed-forward networks')
  block = dataclasses.replace(config.block, lora=LoraConfig())
  hidden = hidden_width(config.width, config.hidden, block.activation)
  return dataclasses.replace(config, mixers=mixers, hidden=hidden, block=block, grafted=(),
                             **fold([names[layer] for layer in config.layers]))


def config_json(config: ModelConfig, *, context: int, dtype: str, given: Mapping[str, Any] | None = None,
                more: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """The config.json of a decoder without memories and low-rank changes, stored as `dtype`, for texts of `context` tokens.

  `given` is the config.json that the model came with, whose other entries stay; `more` overrules them. Raises UserError for a
  decoder that none of the families can hold, naming what it is.
  """
  given, config = given or {}, plain_config(config)
  family = given.get('model_type') if given.get('model_type') in FAMILIES else _family(config)
  tree = {name: value for name, value in {**USUAL, **given}.items() if name not in DROPPED}
  attention = next(iter(config.mixers.values()))
  tree |= {'architectures': [CLASSES[family]], 'model_type': family, 'hidden_act': 'silu', 'torch_dtype': dtype, 'dtype': dtype}
  tree |= {'tie_word_embeddings': config.embedding.tie, 'max_position_embeddings': context} | _sizes(config, attention)
  tree |= _rope(attention) | _windows(config, family) | dict(more or {})
  if family in ('llama', 'qwen3'): tree['attention_bias'] = attention.bias
  if family == 'llama': tree['mlp_bias'] = config.block.bias
  if path := difference(family_config(tree), config):
    value = dict(leaves(to_json(config))).get(path)
    raise UserError(f'a checkpoint of {family} cannot hold this model: its {path} is {shown(value)}')
  return tree


def difference(one: ModelConfig, other: ModelConfig) -> str:
  """The first field, in dots, in which two decoders differ that a checkpoint has to say; '' for none."""
  a, b = ({path: value for path, value in leaves(to_json(config)) if not path.startswith(UNSEEN)} for config in (one, other))
  return next((path for path in {**a, **b} if path not in a or path not in b or a[path] != b[path]), '')


def without_windows(config: ModelConfig) -> ModelConfig:
  """The config, laid out as it is, whose layers all see the whole text, as files without windows say."""
  fields = [field.name for field in dataclasses.fields(AttentionConfig)]
  wide = lambda mixer: AttentionConfig(**{name: getattr(mixer, name) for name in fields}) if isinstance(mixer, WindowConfig) else mixer
  return dataclasses.replace(config, mixers={name: wide(mixer) for name, mixer in config.mixers.items()})


def _family(config: ModelConfig) -> str:
  """The family that has what the model has; what does not fit is found out by reading its config.json."""
  attention = next(iter(config.mixers.values()))
  if attention.qk_norm: return 'qwen3'
  if attention.bias and not attention.out_bias: return 'qwen2'
  return 'mistral' if set(config.layers) == {WINDOW} else 'llama'


def _sizes(config: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
  return {'hidden_size': config.width, 'intermediate_size': config.hidden, 'num_hidden_layers': config.depth,
          'vocab_size': config.vocabulary, 'rms_norm_eps': config.block.norm_epsilon, 'head_dim': attention.head_width,
          'num_attention_heads': attention.heads, 'num_key_value_heads': attention.kv_heads}


def _rope(attention: AttentionConfig) -> dict[str, Any]:
  """Base and stretching in both styles."""
  kind, rope = attention.rope.kind, attention.rope
  own = {name: getattr(rope, ROPE_NAMES[name]) for name in ROPE_KEYS[kind]}
  if not own.get('attention_factor'): own.pop('attention_factor', None)
  table = {'rope_type': kind, **own}
  return {'rope_theta': attention.rotary_base, 'rope_scaling': None if kind == 'default' else table,
          'rope_parameters': {**table, 'rope_theta': attention.rotary_base}}


def _windows(config: ModelConfig, family: str) -> dict[str, Any]:
  """What the family says of sliding windows; Llama has none."""
  window = config.mixers[WINDOW].window if WINDOW in config.mixers else None
  if family == 'llama': return {}
  if family == 'mistral': return {'sliding_window': window}
  first = next((number for number, layer in enumerate(config.layers) if layer == WINDOW), 0)
  kinds = ['sliding_attention' if layer == WINDOW else 'full_attention' for layer in config.layers]
  found = {'use_sliding_window': window is not None, 'sliding_window': window, 'layer_types': kinds}
  return found | ({'max_window_layers': first} if window else {})
