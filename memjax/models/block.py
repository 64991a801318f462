"""One layer: norm, a wiring of memories, residual, feed-forward network, residual."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.config.banks import own_dropout
from memjax.config.layout import BARE, GATE, MAC, MAG, stages, suffix_of
from memjax.config.schema import ModelConfig
from memjax.layers.axes import constrain
from memjax.layers.linear import Linear, dropout
from memjax.layers.lora import FLOAT, Lora
from memjax.layers.mlp import MLP, hidden_width
from memjax.layers.norm import RMSNorm, make_norm
from memjax.memory.base import confidence, only_real
from memjax.memory.registry import make_memory
from memjax.models.fuse import Fuse
from memjax.models.titans import Context


@struct.dataclass
class Flow:
  """What every layer is told about the tokens of a call; None = all valid, no resets given."""
  position_BxL: jax.Array
  mask_BxL: jax.Array | None = None
  write_mask_BxL: jax.Array | None = None
  reset_BxL: jax.Array | None = None
  token_BxL: jax.Array | None = None
  banks: Any = None                    # the tables that layers share, by name
  frozen: tuple[str, ...] = struct.field(default=(), pytree_node=False)      # mixers into which no token writes
  silent: tuple[str, ...] = struct.field(default=(), pytree_node=False)      # mixers whose read is replaced by zeros

  def told(self, name: str) -> dict[str, Any]:
    """The keywords of one mixer."""
    write_mask_BxL = jnp.zeros(self.position_BxL.shape, bool) if name in self.frozen else self.write_mask_BxL
    return dict(position_BxL=self.position_BxL, mask_BxL=self.mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=self.reset_BxL,
                token_BxL=self.token_BxL, banks=self.banks)


def settings(config: ModelConfig, name: str = '', *, above: str = '') -> Lora:
  """What linear maps are told, those of the mixer `name` (at the path `above`) or of the block: grafted ones are stored as they are."""
  return Lora(config.block.lora, above, FLOAT if name in config.grafted else config.block.quant)


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
  """A key of its own for each use; None stays None."""
  return None if key is None else jax.random.fold_in(key, number)


def compute_dtype(config: ModelConfig) -> Any:
  """The jax dtype of `model.dtype`."""
  return jnp.dtype(config.dtype)


def empty_memories(config: ModelConfig, layer: str, batch: int, max_len: int) -> dict:
  """Zero states of the memories of one layer, by name."""
  def one(names, wiring):
    if wiring == MAC: return Context(config, names, parent=None).init_state(batch)
    return {name: make_memory(config.mixers[name], config.width, dtype=compute_dtype(config), parent=None).init_state(batch, max_len)
            for name in names}
  return {name: state for names, wiring in stages(layer) for name, state in one(names, wiring).items()}


def make_stage(config: ModelConfig, names: tuple[str, ...], wiring: str, **options: Any) -> nn.Module:
  """The module of one stage; `options` are name and parent."""
  if wiring != MAC: return Mixers(config, names, wiring, **options)
  return Context(config, names, *(settings(config, name) for name in names), **options)


class Mixers(nn.Module):
  """The memories of one stage: one alone, a sum ('a+b'), a learned gate between two ('a+b:gate'), or 'a+b:mag'.

  mag (titans specification section 12.2): y = W_O fuse(a's read, b(x)), where W_O is a's; grafted, b starts without effect.
  The gate is alpha = sigmoid(W x + w_c confidence + b) per channel, b = 0; y = alpha * b + (1 - alpha) * a on normalised
  outputs, where confidence is the size of b's read before its norm, so that an empty memory can be closed.
  """
  config: ModelConfig
  names: tuple[str, ...]
  wiring: str

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, states: dict, flow: Flow, *, stream_BxLxD: jax.Array, key: jax.Array | None,
               prepared: dict, collect: bool):
    """(y [B, L, D], states, {name: aux}) of x; `stream_BxLxD` is the residual stream at the entry of the layer."""
    c, dtype, names = self.config, compute_dtype(self.config), self.names
    x_BxLxD, out, new, aux = only_real(x_BxLxD, flow.mask_BxL), [], {}, {}
    given = {'stream_BxLxD': only_real(stream_BxLxD, flow.mask_BxL), 'collect': collect}
    for number, name in enumerate(names):
      memory = make_memory(c.mixers[name], c.width, dtype=dtype, std=c.block.init_std, out_std=c.block.mixer_out_std,
                           grafted=name in c.grafted and not (number and self.wiring == MAG), lora=settings(c, name), name=name)
      y_BxLxE, new[name], aux[name] = memory.mix(x_BxLxD, states[name], key=fold(key, number), prepared=prepared.get(name),
                                                **flow.told(name), **given)
      if name in flow.silent: y_BxLxE = jnp.zeros_like(y_BxLxE)
      if self.wiring == MAG: out.append((memory, y_BxLxE))
      else: out.append((memory.readout(x_BxLxD, y_BxLxE), y_BxLxE))
    if self.wiring == MAG: return self._fused(x_BxLxD, *out), new, aux
    if self.wiring != GATE: return sum(y for y, _ in out[1:]) + out[0][0] if len(out) > 1 else out[0][0], new, aux
    first, second = (RMSNorm(c.block.norm_epsilon, dtype, name=f'norm_{n}')(y) for n, (y, _) in zip(names, out, strict=True))
    gate = Linear(c.width, ('embed', None), use_bias=True, std=c.block.init_std, dtype=dtype, lora=settings(c), name='gate')
    logit = gate(x_BxLxD)
    weight = self.param('gate_confidence', nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,)), (c.width,))
    logit += confidence(out[1][1])[..., None].astype(dtype) * weight.astype(dtype).reshape(1, 1, -1)
    alpha_BxLxD = jax.nn.sigmoid(logit)
    aux[names[1]]['share'] = jax.lax.stop_gradient(alpha_BxLxD.astype(jnp.float32).mean())
    return alpha_BxLxD * second + (1 - alpha_BxLxD) * first, new, aux

  def _fused(self, x_BxLxD, attention, memory):
    """W_O fuse(y, m) of (module, read) of the two; W_O is that of attention."""
    c, (first, y_BxLxD), (second, read_BxLxE) = self.config, attention, memory
    is_graft = self.names[1] in c.grafted
    fuse = Fuse(c.block.titans.fuse, norm_first=not is_graft, zero=is_graft, epsilon=c.block.norm_epsilon, std=c.block.init_std,
                dtype=compute_dtype(c), lora=settings(c, self.names[1]), name='fuse')
    return first.readout(x_BxLxD, fuse(x_BxLxD, y_BxLxD, second.readout(x_BxLxD, read_BxLxE)))


def branch_dropout(config: ModelConfig, names: tuple[str, ...]) -> float:
  """The dropout of a stage's output: its mixer's own, or that of the block."""
  own = own_dropout(config.mixers[names[0]]) if len(names) == 1 else -1.0
  return own if own >= 0 else config.block.dropout


class Layer(nn.Module):
  """x + mixers(norm x) for each stage, then + MLP(norm x) unless the layer is ':bare'; with placement 'post' the norms follow
  the residual sums instead."""
  config: ModelConfig
  layer: str

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, states: dict, flow: Flow, *, key: jax.Array | None = None, prepared: dict | None = None,
               collect: bool = False):
    """(x [B, L, D], states, {name: aux})."""
    c, block, dtype = self.config, self.config.block, compute_dtype(self.config)
    pre = block.placement == 'pre'
    norm = lambda name: make_norm(block.norm, epsilon=block.norm_epsilon, dtype=dtype, name=name)
    def residual(x, branch, *, name, rate, noise):
      y = branch(norm(name)(x) if pre else x)
      x = x + dropout(y, rate, noise)
      return constrain(x if pre else norm(name)(x), ('batch', 'tokens', None))
    new, aux, entry_BxLxD = {}, {}, x_BxLxD
    for number, (names, wiring) in enumerate(stages(self.layer)):
      suffix, own = suffix_of(number), fold(key, 16 + number) if number else key
      def mixers(x, *, names=names, wiring=wiring, suffix=suffix, own=own):
        y, state, told = make_stage(c, names, wiring, name=f'mixers{suffix}')(
            x, states, flow, stream_BxLxD=entry_BxLxD, key=fold(own, 0), prepared=prepared or {}, collect=collect)
        new.update(state)
        aux.update(told)
        return y
      x_BxLxD = residual(x_BxLxD, mixers, name=f'norm_mixer{suffix}', rate=branch_dropout(c, names), noise=fold(own, 1))
    if c.hidden >= 0 and not self.layer.endswith(BARE):
      mlp = MLP(hidden_width(c.width, c.hidden, block.activation), block.activation, block.bias, block.dropout if not pre else 0.0,
                block.init_std, dtype, block.mlp_out_std, settings(c), name='mlp')
      x_BxLxD = residual(x_BxLxD, lambda x: mlp(x, key=fold(key, 2)), name='norm_mlp', rate=block.dropout, noise=fold(key, 3))
    return x_BxLxD, new, aux
