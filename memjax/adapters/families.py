"""Llama, Mistral, Qwen2(.5) and Qwen3 as configs of the decoder: what their config.json says, and which tensor is which parameter."""
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from memjax.config.attention import RopeConfig
from memjax.config.errors import ConfigError, UserError, nearest, shown
from memjax.config.layout import stages, suffix_of, walk_layers
from memjax.config.mixers import AttentionConfig, WindowConfig
from memjax.config.placement import fold
from memjax.config.quant import PACKED, storage_of
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig

FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3')
ATTENTION, WINDOW = 'attention', 'window'
LAYER_TYPES = {'full_attention': ATTENTION, 'sliding_attention': WINDOW}
DEPTH_LIMIT = 256                                  # layers; the largest of these families has 126
HEAD, EMBED = 'lm_head.weight', 'model.embed_tokens.weight'
ROPE_NAMES = {'factor': 'factor', 'original_max_position_embeddings': 'original', 'low_freq_factor': 'low_factor',
              'high_freq_factor': 'high_factor', 'beta_fast': 'beta_fast', 'beta_slow': 'beta_slow', 'attention_factor': 'attention_factor'}
ROPE_KEYS = {'default': (), 'linear': ('factor',),
             'llama3': ('factor', 'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'),
             'yarn': ('factor', 'original_max_position_embeddings', 'beta_fast', 'beta_slow', 'attention_factor')}


class Keys:
  """The entries of a config.json by type. null counts as absent; what is wrong is a UserError that begins with the path."""

  def __init__(self, tree: Mapping[str, Any], path: str):
    self.tree, self.path = tree, path

  def fail(self, message: str) -> UserError:
    """The error to raise."""
    return UserError(f'{self.path}: {message}')

  def get(self, name: str, kind: type, default: Any = None) -> Any:
    """The value of type `kind`; without a default it must be there. Whole and real numbers must be above 0."""
    value = self.tree.get(name)
    if value is None and default is None: raise self.fail(f'{name} is missing')
    if value is None: return default
    if kind is float and type(value) is int and value < 1 << 62: value = float(value)
    if type(value) is not kind: raise self.fail(f'{name} wants {kind.__name__}, got {shown(value)}')
    if kind in (int, float) and not 0 < value < 1 << 31: raise self.fail(f'{name} must be above 0 and below 2^31, not {shown(value)}')
    return value


def family_config(tree: Mapping[str, Any], *, path: str = 'config.json', dtype: str = 'float32') -> ModelConfig:
  """The decoder that a Hugging Face config.json describes, in the words of transformers 4 or 5 (specification sections 1.1 to 1.3).

  Layers of equal attention are scanned. Raises UserError for another architecture, activation or type of rope, for a quantised
  checkpoint, and for what is missing or of the wrong type.
  """
  keys = Keys(tree, path)
  family, depth = _family(keys), keys.get('num_hidden_layers', int)
  if depth > DEPTH_LIMIT: raise keys.fail(f'num_hidden_layers={depth} is above {DEPTH_LIMIT}')
  width, heads, epsilon = keys.get('hidden_size', int), keys.get('num_attention_heads', int), keys.get('rms_norm_eps', float, 1e-6)
  bias = keys.get('attention_bias', bool, False) if family in ('llama', 'qwen3') else False
  if not tree.get('head_dim') and width % heads: raise keys.fail(f'num_attention_heads={heads} does not divide hidden_size={width}')
  layers, window = _layers(keys, family, depth)
  try:
    base, rope = _rope(keys)
    shared = dict(heads=heads, kv_heads=keys.get('num_key_value_heads', int, heads), head_width=keys.get('head_dim', int, width // heads),
                  rotary_base=base, rope=rope, bias=bias or family == 'qwen2', out_bias=bias,
                  qk_norm=epsilon if family == 'qwen3' else 0.0)
    kinds = {ATTENTION: AttentionConfig(**shared)} | ({WINDOW: WindowConfig(window=window, **shared)} if window else {})
    return ModelConfig(
        width=width, hidden=keys.get('intermediate_size', int), vocabulary=keys.get('vocab_size', int),
        mixers={name: mixer for name, mixer in kinds.items() if name in layers}, dtype=dtype, **fold(layers),
        block=BlockConfig(norm_epsilon=epsilon, bias=keys.get('mlp_bias', bool, False) if family == 'llama' else False),
        embedding=EmbeddingConfig(tie=keys.get('tie_word_embeddings', bool, False)))
  except ConfigError as error:
    raise keys.fail(str(error)) from None


def _family(keys: Keys) -> str:
  """The model type, after what no family here has was refused."""
  family, tree = keys.get('model_type', str), keys.tree
  if family not in FAMILIES:
    raise keys.fail(f'model_type {shown(family)} is not one of {", ".join(FAMILIES)}{nearest(family, FAMILIES)}')
  act = keys.get('hidden_act', str, 'silu')
  if act != 'silu': raise keys.fail(f'hidden_act {shown(act)} is not supported; only silu is')
  if tree.get('quantization_config'): raise keys.fail('the checkpoint is quantised (quantization_config); load the original weights')
  return family


def _layers(keys: Keys, family: str, depth: int) -> tuple[tuple[str, ...], int]:
  """(mixer of each layer, window or 0)."""
  window = 0
  if family == 'mistral':
    if 'sliding_window' not in keys.tree: raise keys.fail('sliding_window is missing; write null or a number of tokens')
    window = keys.get('sliding_window', int, 0)
  elif family != 'llama' and keys.get('use_sliding_window', bool, False): window = keys.get('sliding_window', int, 4096)
  first = keys.get('max_window_layers', int, 28) if family.startswith('qwen') and keys.tree.get('max_window_layers') != 0 else 0
  derived = tuple(WINDOW if window and number >= first else ATTENTION for number in range(depth))
  given = keys.tree.get('layer_types')
  if given is None: return derived, window if WINDOW in derived else 0
  if not isinstance(given, list) or len(given) != depth: raise keys.fail(f'layer_types is no list of {depth} names')
  for name in given:
    if isinstance(name, str) and name in LAYER_TYPES: continue
    raise keys.fail(f'layer_types holds {shown(name)}; known are {", ".join(LAYER_TYPES)}')
  layers = tuple(LAYER_TYPES[name] for name in given)
  if family in ('llama', 'mistral') and layers != derived: raise keys.fail(f'layer_types contradicts what {family} does in its layers')
  if WINDOW in layers and not window: raise keys.fail('layer_types holds sliding_attention, but no sliding window is in use')
  return layers, window if WINDOW in layers else 0


def _rope(keys: Keys) -> tuple[float, RopeConfig]:
  """(base, stretching) of either style."""
  tree = keys.tree
  given = tree.get('rope_parameters') or tree.get('rope_scaling') or {}
  if not isinstance(given, dict): raise keys.fail(f'the rope parameters are no table: {shown(given)}')
  given = {name: value for name, value in given.items() if value is not None}
  if any(isinstance(value, dict) for value in given.values()): raise keys.fail('rope parameters by type of layer are not supported')
  kind = given.get('rope_type', given.get('type', 'default'))
  if not isinstance(kind, str) or kind not in ROPE_KEYS: raise keys.fail(f'rope type {shown(kind)} is not one of {", ".join(ROPE_KEYS)}')
  for name in given:
    if name not in ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor', *ROPE_KEYS[kind]):
      raise keys.fail(f'rope type {kind} with {shown(name)} is not supported')
  own = Keys({**tree, **given}, keys.path)
  if own.get('partial_rotary_factor', float, 1.0) != 1: raise keys.fail('partial_rotary_factor other than 1 is not supported')
  found = {ROPE_NAMES[name]: own.get(name, float) for name in ROPE_KEYS[kind] if name in given}
  if kind != 'default' and 'factor' not in found: raise keys.fail(f'rope type {kind} has no factor')
  if kind in ('llama3', 'yarn'):
    found['original'] = own.get('original_max_position_embeddings', int, own.get('max_position_embeddings', int, 0)) or 0
  return own.get('rope_theta', float, 1e4), RopeConfig(kind=kind, **found)


class Place(NamedTuple):
  """Where a tensor goes: keys into the parameters, repeat of a scanned layer (-1: not scanned), and whether it is transposed."""
  path: tuple[str, ...]
  repeat: int
  transposed: bool


def tensor_places(config: ModelConfig) -> dict[str, Place]:
  """{name in a checkpoint: its place} for the decoder of `family_config`, or the same with memories beside its attention.

  The layers that hold an attention (not a grafted one) are those of the checkpoint, in order; memories have no tensors here.
  """
  places = {EMBED: Place(('embed', 'table'), -1, False), 'model.norm.weight': Place(('norm', 'scale'), -1, False)}
  if not config.embedding.tie: places[HEAD] = Place(('head', 'kernel'), -1, True)
  number = 0
  for part, repeat, layer in walk_layers(config):
    found = [(stage, name) for stage, (names, _) in enumerate(stages(layer)) for name in names
             if isinstance(config.mixers[name], AttentionConfig) and name not in config.grafted]
    if not found: continue
    for name, path in _layer_tensors(config, *found[0]):
      places[f'model.layers.{number}.{name}'] = Place((*part, *path), repeat, path[-1] == 'kernel')
    number += 1
  return places


def stored_places(config: ModelConfig) -> dict[str, Place]:
  """`tensor_places` in which a kernel stored as integers is two tensors, NAME_codes and NAME_scale, of its transpose [out, in]."""
  places: dict[str, Place] = {}
  for name, place in tensor_places(config).items():
    if place.path[-1] != 'kernel' or storage_of(config.block.quant, '/'.join(place.path)) not in PACKED: places[name] = place
    else: places |= {f'{name}_{part}': Place((*place.path[:-1], f'kernel_{part}'), place.repeat, False) for part in ('codes', 'scale')}
  return places


def _layer_tensors(config: ModelConfig, stage: int, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """(name, path) of the tensors of one layer, both below it."""
  suffix, mixer = suffix_of(stage), config.mixers[name]
  own = (f'mixers{suffix}', name)
  yield 'input_layernorm.weight', (f'norm_mixer{suffix}', 'scale')
  yield 'post_attention_layernorm.weight', ('norm_mlp', 'scale')
  linear = [(f'self_attn.{one[0]}_proj', (*own, one), mixer.bias) for one in ('query', 'key', 'value')]
  linear += [('self_attn.o_proj', (*own, 'out'), mixer.out_bias)]
  linear += [(f'mlp.{one}_proj', ('mlp', one), config.block.bias) for one in ('gate', 'up', 'down')]
  for tensor, path, has_bias in linear:
    yield f'{tensor}.weight', (*path, 'kernel')
    if has_bias: yield f'{tensor}.bias', (*path, 'bias')
  if not mixer.qk_norm: return
  for one in ('query', 'key'): yield f'self_attn.{one[0]}_norm.weight', (*own, f'{one}_norm', 'scale')
