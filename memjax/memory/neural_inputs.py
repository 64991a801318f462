"""From the layer's input to what the neural memory learns from: queries, keys, values and gates."""
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from memjax.config.neural import NeuralConfig
from memjax.layers.conv import find_taps, next_tail, short_conv
from memjax.layers.linear import Linear, partitioned, wide_dot
from memjax.layers.lora import Lora
from memjax.layers.norm import RMSNorm
from memjax.ops.backend import uses_kernels
from memjax.ops.neural_custom import feature_width, features
from memjax.ops.neural_nets import Network
from memjax.ops.neural_steps import Gates
from memjax.ops.pallas_streams import stream, supports
from memjax.ops.rope import frequencies, rotate

ROPE_BASE = 10000.0


@struct.dataclass
class NeuralInputs:
  """Raw queries, keys and values [B, L, E], gates (see `NeuralProjections.names`), and positions where they are rotated."""
  streams: tuple
  gate_BxLxGxH: jax.Array
  position_BxL: Any = None


@struct.dataclass
class NeuralItems:
  """Tokens after the convolution; and the tails of the streams, without this call. Pairs of a token lie side by side."""
  query: Any                        # [B, L, H, K]
  key: jax.Array                    # [B, L, H, pairs K]
  value: jax.Array                  # [B, L, H, pairs V]
  gate: jax.Array                   # [B, L, G, H]


def same_tap(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
  """Current token 1, older taps 0: the convolution starts as the identity."""
  del key
  return jnp.zeros(shape, dtype).at[0].set(1)


class NeuralProjections(nn.Module):
  """All parameters before the memory: projections, taps and gates."""
  config: NeuralConfig
  width: int
  dtype: Any = jnp.float32
  std: float = 0.0
  lora: Lora = Lora()

  @property
  def shape(self) -> tuple[int, int, int]:
    """H, K, V; K is that before the feature map."""
    c = self.config
    H = c.heads or max(self.width // 64, 1)
    K = c.key_width or self.width // H
    return H, K, c.value_width or K

  @property
  def key_width(self) -> int:
    """Channels of a query or key as the memory sees it."""
    return feature_width(self.shape[1], self.config.proj.features, self.config.proj.degree)

  @property
  def channels(self) -> tuple[int, int, int]:
    """Channels of the raw queries, keys and values."""
    (H, K, V), pairs = self.shape, self.config.write.pairs
    return H * K, H * K * pairs, H * V * pairs

  @property
  def convolved(self) -> tuple[int, int, int]:
    """Of these the channels that are convolved."""
    return tuple(width * (name in self.config.proj.convolved) for name, width in zip('qkv', self.channels, strict=True))

  @property
  def network(self) -> Network:
    """The network whose weights are the memory of a head."""
    n, (_, K, V) = self.config.net, self.shape
    return Network(self.key_width, V, n.kind, n.depth, n.expansion * K, n.activation, n.rank, n.has_residual, n.gain == 'slow', n.bias,
                   n.function)

  @property
  def names(self) -> tuple[str, ...]:
    """The gates in force, in the order of axis G: 'rate_' of each fast tensor; 'write' says that a slot holds a token that writes."""
    rule = self.config.rule
    names = ['theta'] + ['eta'] * (rule.momentum != 'none') + ['alpha'] * rule.forget
    rates = [f'rate_{name}' for name in self.network.fast] if self.config.write.per_tensor else []
    order = self.config.cascade
    cascade = [f'eta{n}' for n in range(2, order + 1)] + [f'c{n}' for n in range(order + 1) if order]
    pool = ['pool'] * (self.config.gates.pool == 'attention')
    return (*names, *cascade, *rates, *pool, 'write')

  def setup(self):
    c, (H, _, _) = self.config, self.shape
    linear = dict(std=self.std, dtype=self.dtype, lora=self.lora)
    if c.proj.source == 'stream': self.norm = RMSNorm(dtype=self.dtype, name='norm')
    names = ('query', 'key', 'value')
    self.linear = {n: Linear(width, ('embed', 'heads'), name=n, **linear) for n, width in zip(names, self.channels, strict=True)}
    if c.proj.conv_width: self.taps = self.param('taps', partitioned(same_tap, (None, 'heads')), (c.proj.conv_width, sum(self.convolved)))
    zero, made = nn.initializers.zeros_init(), {}
    for name in self.names[:-1]:
      bias = lambda key, shape, dtype=jnp.float32, name=name: jnp.asarray(np.broadcast_to(self.biases(name), shape), dtype)
      kernel = self.param(name, partitioned(zero, ('embed', 'heads')), (self.width, H))
      made[name] = kernel, (jnp.zeros((H,)) if name == 'pool' else self.param(f'{name}_bias', partitioned(bias, ('heads',)), (H,)))
    self.gate = made

  def biases(self, name: str) -> Any:
    """Logits at initialisation."""
    g, (H, _, _) = self.config.gates, self.shape
    if name == 'alpha': return g.alpha_bias or (np.linspace(-4, -8, H) if self.config.rule.decay_to == 'init' else -6.0)
    return g.eta_bias if name.startswith('eta') else {'theta': g.theta_bias, 'c1': 1.0}.get(name, 0.0)

  def __call__(self, x_BxLxD: jax.Array, position_BxL: jax.Array, stored_BxLxD: jax.Array | None = None) -> NeuralInputs:
    """The big matmuls, all tokens at once; gates in float32. `stored_BxLxD`: what is written, if not x (see `stored`)."""
    *of, other = apart(x_BxLxD, x_BxLxD if stored_BxLxD is None else stored_BxLxD)
    streams = tuple(linear(x) for linear, x in zip(self.linear.values(), of, strict=True))
    return NeuralInputs(streams, self.gates(other), position_BxL if self.config.proj.rope else None)

  def stored(self, x_BxLxD: jax.Array, stream_BxLxD: jax.Array | None) -> jax.Array:
    """What keys, values and gates are made of; a memory alone, outside of a layer, has no stream but x."""
    if self.config.proj.source == 'input': return x_BxLxD
    return self.norm(x_BxLxD if stream_BxLxD is None else stream_BxLxD)

  def gates(self, x_BxLxD: jax.Array) -> jax.Array:
    """The gates [B, L, G, H] in the order of `names`."""
    wide = jnp.promote_types(jnp.float32, self.dtype)
    kernel, bias = (jnp.concatenate([pair[n].astype(wide) for pair in self.gate.values()], -1) for n in (0, 1))
    logit = wide_dot(x_BxLxD.astype(self.dtype), kernel, precision='highest') + bias.reshape(1, 1, -1)
    logit = logit.reshape(*logit.shape[:2], len(self.gate), -1)
    gate = {name: logit[:, :, n] for n, name in enumerate(self.gate)}
    gate = {name: a if name[0] == 'c' or name in self.pooled or name == 'pool' else jax.nn.sigmoid(a) for name, a in gate.items()}
    gate = {name: 2 * a if name.startswith('rate_') else a for name, a in gate.items()}
    gate['theta'] = gate['theta'] * self.theta_scale(gate)
    return jnp.stack([*gate.values(), jnp.ones_like(gate['theta'])], 2)

  def theta_scale(self, gate: dict) -> Any:
    """What the sigmoid of the step size is multiplied by."""
    c, (_, K, _) = self.config, self.shape
    g = c.gates
    residual = c.net.has_residual and c.rule.mode != 'exact'
    gram = g.theta_norm == 'gram'
    base = g.theta_base or ((0.7 if residual else 0.3) if gram else 4.0 if residual else 1.0)
    if g.theta_raw: return base
    by_chunk = g.theta_norm == 'chunk' or (g.theta_norm == '' and c.rule.mode != 'exact')
    many = c.chunk * c.write.pairs * c.write.window                     # gradients that the steps of a chunk follow
    scale = base / ((many if by_chunk else 1) * (1 if gram or c.proj.qk_norm == 'l2' else K))
    return scale * (1 - gate['eta']) if g.theta_momentum_norm and 'eta' in gate else scale

  @property
  def pooled(self) -> tuple[str, ...]:
    """The gates that are those of a whole chunk."""
    return tuple(name for name in self.names if name == 'alpha' or name[0] in 'ec') if self.config.rule.mode == 'chunk_gates' else ()

  def unpack(self, gate: jax.Array) -> Gates:
    """The gates of [G, ..., C]; those that are not in force are zero. Those of chunks are of mean logits, or of logits weighed by
    a softmax over the chunk."""
    found = {name: gate[n] for n, name in enumerate(self.names)}
    share = jax.nn.softmax(found['pool'], -1) if 'pool' in found else 1 / gate.shape[-1]
    for name in self.pooled:
      mean = jnp.sum(share * found[name], -1, keepdims=True)
      found[name] = jnp.broadcast_to(mean if name[0] == 'c' else jax.nn.sigmoid(mean), found[name].shape)
    zero = jnp.zeros_like(found['theta'])
    order, more = self.config.cascade, {}
    if order: more = dict(higher=tuple(found[f'eta{n}'] for n in range(2, order + 1)), mix=tuple(found[f'c{n}'] for n in range(order + 1)))
    if self.config.write.per_tensor: more['rate'] = {name: found[f'rate_{name}'] for name in self.network.fast}
    return Gates(found['theta'], found.get('eta', zero), found.get('alpha', zero), found['write'] > 0, **more)

  @property
  def tails(self) -> dict[str, tuple[int, int]]:
    """Tokens and channels of what the state carries: raw streams, and with `lookahead` the last key with a mark that there is one."""
    p, keys = self.config.proj, self.shape[0] * self.config.write.pairs * self.key_width
    return {'stream': (max(p.conv_width - 1, 0), sum(self.convolved)), **({'key': (1, keys + 1)} if p.lookahead else {})}

  def items(self, inputs: NeuralInputs, tail: dict, *, written_BxL=None, reset_BxL=None) -> tuple[NeuralItems, dict]:
    """(items, next tails): convolution over written tokens of a document, activation, norm, and the pairing of keys and values."""
    p, (H, _, _) = self.config.proj, self.shape
    flow, new, streams, taps = dict(written_BxL=written_BxL, reset_BxL=reset_BxL), dict(tail), inputs.streams, None
    each = list(zip('qkv', streams, streams, streams, strict=True))
    if p.conv_width:                                                 # each on its own: side by side they would be copied
      taps, sides = find_taps(p.conv_width, streams[0].shape[1], **flow), np.cumsum(self.convolved)[:-1]
      each = list(zip('qkv', streams, jnp.split(self.taps, sides, -1), jnp.split(tail['stream'], sides, -1), strict=True))
      new['stream'] = jnp.concatenate([next_tail(x, before, taps) for name, x, _, before in each if p.taps(name)], -1)
    if written_BxL is None and self.is_streamed(streams[0]): query, key, value = self._streamed(each, reset_BxL)
    else: query, key, value = self._plain(each, taps, inputs.position_BxL)
    cut, gate = lambda a: a.reshape(*a.shape[:2], H, -1), inputs.gate_BxLxGxH
    key, value = cut(key), cut(value)
    if p.lookahead:
      marked = jnp.concatenate([key.reshape(*key.shape[:2], -1), jnp.ones_like(key[..., 0, :1])], -1)
      taps = find_taps(2, key.shape[1], **flow)
      shift = jnp.concatenate([jnp.zeros_like(marked[:1, 0]), jnp.ones_like(marked[:1, 0])])
      before, new['key'] = short_conv(marked, shift, tail['key'], taps), next_tail(marked, tail['key'], taps)
      key = cut(before[..., :-1])
      gate = gate.at[:, :, -1].multiply(before[..., -1:].astype(gate.dtype))
    return NeuralItems(query, key, value, gate), new

  def _plain(self, each, taps, position_BxL):
    """Queries, keys and values of (name, stream, its taps, its tail)."""
    p, K, wide = self.config.proj, self.shape[1], jnp.promote_types(jnp.float32, self.dtype)
    each = [(name, row_major(x), own, before) for name, x, own, before in each]
    streams = [narrow_gradient(x.dtype, short_conv(x, own, before, taps, dtype=wide)) if p.taps(name) else x
               for name, x, own, before in each]
    streams = [jax.nn.silu(x.astype(wide)) if p.activates(name) else x.astype(wide) for name, x in zip('qkv', streams, strict=True)]
    query, key = (finished(a.reshape(*a.shape[:2], -1, K), self.config, position_BxL) for a in streams[:2])
    return jax.lax.optimization_barrier(tuple(row_major(a.astype(self.dtype)) for a in (query, key, streams[2])))

  def is_streamed(self, x_BxLxE: jax.Array) -> bool:
    """Whether kernels make items of streams without masked tokens."""
    (_, K, V), p, C, L = self.shape, self.config.proj, self.config.chunk, x_BxLxE.shape[1]
    usual = all(p.taps(name) and p.activates(name) for name in 'qkv') and p.qk_norm == 'l2' and not p.rope and not p.features
    return usual and uses_kernels(self.config.exec.backend, self.dtype) and supports(L, C, K) and supports(L, C, V)

  def _streamed(self, each, reset_BxL):
    """The same from kernels."""
    (_, K, V), (B, L) = self.shape, each[0][1].shape[:2]
    segment_BxL = jnp.zeros((B, L), jnp.int32) if reset_BxL is None else jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
    for (name, x, own, before), width in zip(each, (K, K, V), strict=True):
      y = stream(x, own, before, segment_BxL, chunk=self.config.chunk, width=width, has_norm=name != 'v')
      yield jnp.moveaxis(y, (0, 2), (1, 3)).reshape(B, L, -1, width)


@jax.custom_vjp
def apart(own: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
  """(own, other, other, other) to multiply: else XLA makes one product of some, and copies its parts. Cotangents are added all at once."""
  given = []
  for _ in 'qkv':
    own, other = jax.lax.optimization_barrier((own, other))
    given.append(other if given else own)
  return *given, other


apart.defvjp(lambda own, other: (apart(own, other), None), lambda _, g: (g[0], functools.reduce(jnp.add, g[1:])))


def row_major(x: jax.Array) -> jax.Array:
  """x with its last axis contiguous in memory: XLA for GPUs would lay convolutions out by tokens, and copy them back and forth."""
  return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if jax.default_backend() == 'gpu' else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def narrow_gradient(dtype: Any, x: jax.Array) -> jax.Array:
  """x, row-major; its gradient is rounded to `dtype` and stored once, for the several sums that read it."""
  return row_major(x)


narrow_gradient.defvjp(lambda dtype, x: (row_major(x), None),
                       lambda dtype, _, g: (row_major(jax.lax.optimization_barrier(g.astype(dtype))).astype(g.dtype),))


def finished(x: jax.Array, config: NeuralConfig, position_BxL: jax.Array | None = None) -> jax.Array:
  """Queries or keys [B, L, H, K] after norm, rotation (None: all at position 0) and feature map."""
  p = config.proj
  x = unit(x, p.qk_norm)
  if p.rope and position_BxL is not None:
    x = rotate(x, position_BxL % config.chunk if p.rope == 'chunk' else position_BxL, frequencies(x.shape[-1], ROPE_BASE))
  return features(x, p.features, p.degree)


def unit(x: jax.Array, norm: str) -> jax.Array:
  """x over its Euclidean norm ('l2') or its root mean square ('rms'), or x."""
  if norm == 'none': return x
  total = jnp.sum(x * x, -1, keepdims=True)
  return x * jax.lax.rsqrt(total + 1e-6) * (1.0 if norm == 'l2' else math.sqrt(x.shape[-1]))
