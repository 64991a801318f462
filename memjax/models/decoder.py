"""The decoder: embeddings, named layers (the pattern scanned over its repeats), final norm, output head."""
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.config.banks import for_inference, shared_table
from memjax.config.errors import UserError
from memjax.config.layout import MAC, mixer_names, stacks, stages, suffix_of
from memjax.config.lora import check_found
from memjax.config.quant import check_stored
from memjax.config.schema import ModelConfig
from memjax.layers.axes import constrain
from memjax.layers.embed import Embed, PositionTable
from memjax.layers.linear import Linear, dropout
from memjax.layers.lora import NOISE
from memjax.layers.norm import make_norm
from memjax.layers.tree import named
from memjax.memory.base import Memory
from memjax.memory.registry import make_memory, make_table
from memjax.models.block import Flow, Layer, compute_dtype, empty_memories, fold, settings


def shared_tables(config: ModelConfig) -> dict[str, str]:
  """{name of a shared table: a mixer that describes it}, for the tables that some layer uses."""
  used = sorted({name for layer in config.layers for name in mixer_names(layer)})
  return {shared_table(config.mixers[name]): name for name in used if shared_table(config.mixers[name])}


class Period(nn.Module):
  """The layers of one repeat of the pattern, in order."""
  config: ModelConfig
  layers: tuple[str, ...]
  collect: bool = False

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, states: dict, given: tuple[jax.Array | None, dict], flow: Flow):
    """(x, (states, aux)) with one entry a layer, 'layer_0', 'layer_1', ...; `given` is a key and what the memories prepared."""
    (key, prepared), new, aux = given, {}, {}
    for number, layer in enumerate(self.layers):
      name = f'layer_{number}'
      x_BxLxD, new[name], aux[name] = Layer(self.config, layer, name=name)(
          x_BxLxD, states[name], flow, key=fold(key, number), prepared=prepared.get(name), collect=self.collect)
    return x_BxLxD, (new, aux)


class Decoder(nn.Module):
  """A causal language model whose layers are named in the config. State in, state out."""
  config: ModelConfig

  def init_state(self, batch: int, max_len: int = 0) -> dict:
    """Zero states of all layers; batch at axis 0 of every leaf, the repeats at axis 1 of the scanned ones."""
    def part(name, layers):
      states = {f'layer_{i}': empty_memories(self.config, layer, batch, max_len) for i, layer in enumerate(layers)}
      if name != 'repeats': return states
      return jax.tree.map(lambda a: jnp.zeros((a.shape[0], self.config.repeats, *a.shape[1:]), a.dtype), states)
    return {name: part(name, layers) for name, layers in stacks(self.config).items()}

  @nn.compact
  def __call__(self, token_BxL: jax.Array, state: dict, *, position_BxL: jax.Array, mask_BxL: jax.Array | None = None,
               write_mask_BxL: jax.Array | None = None, reset_BxL: jax.Array | None = None, key: jax.Array | None = None,
               prepared: dict | None = None, collect: bool = False, remat: bool = False, unroll: bool = False, last: bool = False,
               headless: bool = False, frozen: tuple[str, ...] = (), silent: tuple[str, ...] = ()) -> tuple[jax.Array, dict, dict]:
    """(logits [B, L, A] in float32 at least, state, aux).

    A document starts where `position_BxL` is 0 (or where `reset_BxL` says). `key` switches dropout and replay on.
    `prepared` is what `prepare_memories` gave for these parameters, None = computed in this call. `unroll` writes the repeats out, so
    that what the gradient needs of them is not stacked. `last`: logits [B, 1, A] of the last token alone. `headless`: what `head` takes,
    [B, L, D], in place of logits. `frozen` names mixers into which no token writes, `silent` those whose read is replaced by zeros.
    aux: float32 scalars averaged over the memories that report them, 'penalty' among them; 'load', the use of chapters by
    layer, where a selection bias asks for it; with `collect` also 'layers'.
    """
    c, dtype = self.config, compute_dtype(self.config)
    embed = _embed(c, name='embed')
    x_BxLxD = embed(token_BxL)
    if c.embedding.position:
      x_BxLxD += PositionTable(c.embedding.max_position, c.width, c.embedding.std, dtype, name='position')(position_BxL)
    x_BxLxD = constrain(dropout(x_BxLxD, c.block.dropout, fold(key, 0)), ('batch', 'tokens', None))
    banks = {name: make_table(c.mixers[mixer], c.width, name=f'bank_{name}')() for name, mixer in shared_tables(c).items()}
    flow = Flow(position_BxL, mask_BxL, write_mask_BxL, reset_BxL, token_BxL, banks, frozen, silent)
    new, aux = {}, {}
    if not token_BxL.shape[1] and not self.is_initializing(): new, parts = state, {}      # no token: nothing to read, nothing to tell
    else: parts = stacks(c)
    for number, part in enumerate(parts):
      x_BxLxD, (new[part], aux[part]) = self._stack(part, remat, collect, unroll)(
          x_BxLxD, state[part], (self._keys(part, fold(key, number + 1)), (prepared or {}).get(part, {})), flow)
    if last: x_BxLxD = x_BxLxD[:, -1:]
    x_BxLxD = make_norm(c.block.norm, epsilon=c.block.norm_epsilon, dtype=dtype, name='norm')(x_BxLxD)
    if headless: return x_BxLxD, new, summarise(aux, collect)
    logits_BxLxA = embed.attend(x_BxLxD) if c.embedding.tie else _head(c, name='head')(x_BxLxD)
    return _placed(logits_BxLxA, dtype), new, summarise(aux, collect)

  def _keys(self, part: str, key: jax.Array | None):
    return key if key is None or part != 'repeats' else jax.random.split(key, self.config.repeats)

  def _stack(self, part: str, remat: bool, collect: bool, unroll: bool) -> nn.Module:
    kind = nn.remat(Period, prevent_cse=part != 'repeats' or unroll) if remat else Period
    if part != 'repeats': return kind(self.config, stacks(self.config)[part], collect, name=part)
    scan = nn.scan(kind, variable_axes={'params': 0}, split_rngs={'params': True, NOISE: True}, in_axes=(1, 0, nn.broadcast),
                   out_axes=(1, 0), length=self.config.repeats, unroll=max(self.config.repeats, 1) if unroll else 1,
                   metadata_params={nn.PARTITION_NAME: 'layers'})
    return scan(self.config, stacks(self.config)[part], collect, name=part)


def _embed(c: ModelConfig, **more: Any) -> Embed:
  return Embed(c.vocabulary, c.width, c.embedding.std, compute_dtype(c), **more)


def _head(c: ModelConfig, **more: Any) -> Linear:
  return Linear(c.vocabulary, ('embed', 'vocabulary'), std=c.block.init_std, dtype=compute_dtype(c), lora=settings(c), **more)


def _placed(logits_BxLxA: jax.Array, dtype: Any) -> jax.Array:
  return constrain(logits_BxLxA.astype(jnp.promote_types(jnp.float32, dtype)), ('batch', 'tokens', 'vocabulary'))


def head_params(config: ModelConfig, params: dict) -> dict:
  """The parameters that `head` needs."""
  return params['embed' if config.embedding.tie else 'head']


def head(config: ModelConfig, params: dict, x_BxLxD: jax.Array, rngs: dict | None = None) -> jax.Array:
  """Logits [B, L, A] of what a decoder returns `headless`; `params` are `head_params`, `rngs` as for `apply`."""
  if config.embedding.tie: logits_BxLxA = _embed(config, parent=None).apply({'params': params}, x_BxLxD, method='attend')
  else: logits_BxLxA = _head(config, parent=None).apply({'params': params}, x_BxLxD, rngs=rngs)
  return _placed(logits_BxLxA, compute_dtype(config))


def set_prompt_length(state: dict, length_B: jax.Array) -> dict:
  """The state in which every router that asks for it knows how many tokens the prompt of each row has."""
  def one(path, leaf):
    if 'prompt_length' not in jax.tree_util.keystr(path[-1:]): return leaf
    length_Bx1 = length_B.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.zeros_like(leaf) + length_Bx1            # an array of its own, for callers that donate the state
  return jax.tree_util.tree_map_with_path(one, state)


def summarise(aux: dict, collect: bool) -> dict[str, Any]:
  """{'penalty': ..., monitor: ...}: each scalar averaged over the memories that report it; 'load' as {path of the memory:
  array}; with `collect` also 'layers'."""
  values, layers, load = {'penalty': []}, {}, {}
  for part, by_layer in aux.items():
    for layer, by_name in by_layer.items():
      for name, entries in by_name.items():
        entries = dict(entries)
        if collect: layers[f'{part}/{layer}/{name}'] = entries.pop('statistics')
        if 'load' in entries: load[f'{part}/{layer}/{name}'] = entries.pop('load')
        for entry, value in entries.items(): values.setdefault(entry, []).append(jnp.ravel(value))
  flat = {name: jnp.mean(jnp.concatenate(value)) if value else jnp.zeros((), jnp.float32) for name, value in values.items()}
  return flat | ({'load': load} if load else {}) | ({'layers': layers} if collect else {})


def each_memory(c: ModelConfig) -> Iterator[tuple[tuple[str, str, str, str], str, Memory]]:
  """Yields ((part, layer, stage, mixer), wiring, memory) of every memory of a model."""
  for part, layers in stacks(c).items():
    for number, layer in enumerate(layers):
      for stage, (names, wiring) in enumerate(stages(layer)):
        for name in names:
          own = f'mixers{suffix_of(stage)}'
          above = f'{part}/layer_{number}/{own}/{name}'
          memory = make_memory(c.mixers[name], c.width, dtype=compute_dtype(c), lora=settings(c, name, above=above), parent=None)
          yield (part, f'layer_{number}', own, name), wiring, memory


def prepare_memories(model: Decoder, params: dict) -> dict:
  """What the memories compute from parameters alone (keys and values of banks), by part, layer and mixer: for `prepared`.

  Valid as long as `params` are; computing it once is what makes decoding with a bank cheap.
  """
  c, out = model.config, {}
  banks = {name: make_table(c.mixers[mixer], c.width, parent=None).apply({'params': params[f'bank_{name}']})
           for name, mixer in shared_tables(c).items()}
  for (part, layer, own, name), _, memory in each_memory(c):
    if type(memory).prepare is Memory.prepare: continue
    make = lambda p, memory=memory: memory.apply({'params': p}, banks, method='prepare')
    given = params[part][layer][own][name]
    out.setdefault(part, {}).setdefault(layer, {})[name] = jax.vmap(make)(given) if part == 'repeats' else make(given)
  return out


def flush_memories(model: Decoder, params: dict, state: dict) -> dict:
  """The state with all that waits for the end of a chunk written, as `Memory.flush` tells.

  Raises UserError for layers that read by segments (mac) and memories that write whole chunks.
  """
  new = {part: {layer: dict(own) for layer, own in layers.items()} for part, layers in state.items()}
  for (part, layer, own, name), wiring, memory in each_memory(model.config):
    if type(memory).flush is Memory.flush: continue
    if wiring == MAC: raise UserError(f'{name} lies in a layer of kind mac, whose segments end with its chunks; flush has no form for it')
    write = lambda p, held, memory=memory: memory.apply({'params': p}, held, method='flush')
    if part == 'repeats': write = jax.vmap(write, (0, 1), 1)
    new[part][layer][name] = write(params[part][layer][own][name], state[part][layer][name])
  return new


def build_decoder(config: ModelConfig) -> Decoder:
  """The decoder of a config whose vocabulary is known; UserError otherwise."""
  if config.vocabulary < 1: raise UserError('config.model.vocabulary is 0; it is filled from the tokenizer before a model is built')
  return Decoder(config)


def inference_model(config: ModelConfig) -> Decoder:
  """The decoder of evaluation and generation: as trained, or with the strategy that a router names for inference."""
  return build_decoder(dataclasses.replace(config, mixers=for_inference(config.mixers)))


def noise(config: ModelConfig, key: jax.Array | None) -> dict[str, jax.Array]:
  """`rngs` for `apply` in training: the dropout of low-rank changes, where there is one, takes its random numbers from there."""
  return {NOISE: fold(key, 1 << 16)} if config.block.lora.dropout and key is not None else {}


def _init(model: Decoder, key: jax.Array) -> dict:
  token_BxL = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, token_BxL, model.init_state(1), position_BxL=jnp.arange(2)[None])['params']


def stored_kernels(params: dict) -> list[str]:
  """The paths of the kernels of linear maps that are stored in fewer bits."""
  flat = named(params)
  packed = [path.removesuffix('_codes') for path in flat if path.endswith('/kernel_codes')]
  return packed + [path for path, x in flat.items() if path.endswith('/kernel') and x.dtype in (jnp.bfloat16, jnp.float16)]


def param_shapes(model: Decoder) -> tuple[dict, dict]:
  """(shapes and dtypes, PartitionSpecs of logical axis names) of all parameters, computing nothing.

  Raises UserError for low-rank changes that match no kernel, and for kernels in fewer bits that are none or do not fit.
  """
  boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
  shapes = nn.unbox(boxed)
  check_found(model.config.block.lora, [path.replace('/lora_a', '/kernel') for path in named(shapes) if path.endswith('/lora_a')])
  check_stored(model.config.block.quant, stored_kernels(shapes))
  return shapes, nn.get_partition_spec(boxed)


def init_params(model: Decoder, key: jax.Array) -> tuple[dict, dict]:
  """(float32 parameters, PartitionSpecs of logical axis names); traceable, so that jit can place them on a mesh."""
  return nn.unbox(_init(model, key)), param_shapes(model)[1]
