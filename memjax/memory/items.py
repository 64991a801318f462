"""From the layer's input to what the slot recurrence is fed: bound pairs, addresses, picks, queries, keep and gate."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from memjax.config.mixers import HolographicConfig
from memjax.layers.conv import Taps, find_taps, next_tail, short_conv, taps_init
from memjax.layers.linear import Linear, partitioned
from memjax.layers.lora import Lora
from memjax.memory.tiers import FAST_DECAY
from memjax.ops.binding import bind, key_map, real_bins, resolve_transform, to_spectrum
from memjax.ops.keys import fractional_code, fractional_phases, permutation, permute, random_keys
from memjax.ops.routing import address_map, log_keep_map, pick_map, rotate_slots, spaced_decay, tied_log_keep
from memjax.ops.sequence import from_before, from_piece

SLOT_KINDS = ('sigmoid', 'softmax', 'scored', 'top1', 'topk')   # routers that read the layer input, not their own streams


@struct.dataclass
class Items:
  """One token each, after the short convolution; keys, queries and values in the space of the state.

  bound [B, L, H, K] ([B, L, H, S, K] for permuted copies); address [B, L, H, S] times gate; pick [B, L, G, H, S];
  query [B, L, G, H, K]; log_keep None, [B, L, H, 1], [B, L, H, S], [1, 1, H, S] or [B, L, H, 1, K]; gate and the rest for losses.
  """
  bound: jax.Array
  address: jax.Array | None
  pick: jax.Array | None
  query: jax.Array
  log_keep: jax.Array | None
  gate: jax.Array | None
  unit_address: jax.Array | None
  value: jax.Array
  key: jax.Array


class Projections(nn.Module):
  """All parameters before the recurrence: projections, taps, routers, gate, keep."""
  config: HolographicConfig
  width: int
  dtype: Any = jnp.float32
  std: float = 0.0
  lora: Lora = Lora()

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """G, H, S, K."""
    c = self.config
    K = c.key_width or self.width // c.heads
    return c.reads, c.heads, c.slots or K, K

  @property
  def sources(self) -> dict[str, int]:
    """Raw streams that the layer projects, and their channels."""
    G, H, S, K = self.shape
    a, streams = self.config.address, {'key': H * K, 'value': H * K}
    if not self.config.binding.tie_query: streams['query'] = G * H * K
    if a.kind in SLOT_KINDS: return {**streams, 'router': self.width}
    if a.kind == 'copies' or a.source == 'key': return streams
    heads = 1 if a.kind == 'signed' else H
    return {**streams, 'address': heads * S, **({} if a.tie else {'pick': G * heads * S})}

  @property
  def readers(self) -> dict[str, tuple[str, int]]:
    """Streams that leave the convolution: name -> (raw source, channels)."""
    G, H, S, K = self.shape
    a, sources = self.config.address, self.sources
    out = {'key': ('key', H * K), 'value': ('value', H * K), 'query': ('query' if 'query' in sources else 'key', G * H * K)}
    if 'router' in sources:
      return {**out, **{n: ('router', self.width) for n in ('address', 'pick') if n == 'address' or a.kind != 'scored'}}
    if 'address' not in sources: return out
    heads = 1 if a.kind == 'signed' else H
    return {**out, 'address': ('address', heads * S), 'pick': ('pick' if 'pick' in sources else 'address', G * heads * S)}

  @property
  def convolved(self) -> tuple[str, ...]:
    """The streams that pass the short convolution."""
    if self.config.conv_width < 2: return ()
    return tuple(n for n in self.readers if self.config.address.after_conv or n not in ('address', 'pick'))

  @property
  def tails(self) -> dict[str, int]:
    """Raw sources whose last tokens the state carries, and their channels."""
    sources = self.sources
    return {s: sources[s] for s in dict.fromkeys(self.readers[name][0] for name in self.convolved)}

  def setup(self):
    c, (G, H, S, K) = self.config, self.shape
    linear = dict(std=self.std, dtype=self.dtype, lora=self.lora)
    self.linear = {n: Linear(width, ('embed', 'heads'), name=n, **linear) for n, width in self.sources.items() if n != 'router'}
    self.taps = {n: self.param(f'{n}_taps', partitioned(taps_init, (None, 'heads')), (c.conv_width, self.readers[n][1]))
                 for n in self.convolved}
    if c.address.kind in SLOT_KINDS: self._routers(G, H, S, K)
    if c.address.gate: self.gate_logit, self.gate_bias = self._small('gate', self._gates(), c.address.gate_bias)
    scales = self._keep_scales()
    if scales is not None: self.keep_logit, self.keep_bias = self._small('keep', scales.shape[0], scales)

  def _routers(self, G, H, S, K):
    init = lambda fan_in: nn.initializers.normal(self.std or fan_in ** -0.5)
    a = self.config.address
    router = lambda name, n: self.param(f'{name}_router', partitioned(init(self.width), ('embed', 'heads')), (self.width, n))
    bias = lambda name, n: self.param(f'{name}_router_bias', partitioned(nn.initializers.zeros_init(), ('heads',)), (n,))
    write = router('address', H * S)
    if a.kind == 'scored':
      self.router = {'address': (write, bias('address', H * S))}
      self.score = self.param('score', partitioned(init(K), ('heads', None)), (H, K))
      return
    read = jnp.tile(write, (1, G)) if a.tie else router('pick', G * H * S)
    self.router = {'address': (write, bias('address', H * S)), 'pick': (read, bias('pick', G * H * S))}

  def _gates(self) -> int:
    _, H, _, K = self.shape
    return H if self.config.address.gate == 'head' else H * self._free(K)

  def _free(self, K: int) -> int:
    """Independent channel gates of a head: pairs share one."""
    real = real_bins(self.config.binding.kind, K)
    return real + (K - real) // 2

  def _spread(self, x, K):
    """Channel gates [..., H * free] to [..., H, K], each pair with one value."""
    real, x = real_bins(self.config.binding.kind, K), x.reshape(*x.shape[:-1], self.shape[1], -1)
    return jnp.concatenate([x, x[..., real:]], -1)

  def _keep_scales(self) -> np.ndarray | None:
    """Biases of the keep logits, or None where keep is not learned."""
    k, (_, H, S, K) = self.config.keep, self.shape
    if k.kind in ('none', 'static'): return None
    over = S if k.kind == 'slot' and S > 1 else H
    decay = spaced_decay(over, k.fast or 2.0 ** -6, k.slow or 2.0 ** -12)
    bias = np.full(over, k.bias) if k.bias else np.log1p(-decay) - np.log(decay)
    if k.kind == 'slot': return np.tile(bias, H) if S > 1 else bias
    return np.repeat(bias, self._free(K)) if k.kind == 'channel' else bias

  def _small(self, name, features, bias):
    """A narrow linear map with small weights (N(0, .1^2 / D)) and its bias, float32."""
    init = lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(bias, dtype), shape)
    logit = Linear(features, ('embed', 'heads'), std=0.1 * self.width ** -0.5, dtype=self.dtype, lora=self.lora, name=name)
    return logit, self.param(f'{name}_bias', partitioned(init, ('heads',)), (features,))

  def __call__(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> dict[str, Any]:
    """Raw streams [B, L, channels], gate and keep logits in float32, positions."""
    wide = jnp.promote_types(jnp.float32, self.dtype)
    streams = {n: linear(x_BxLxD) for n, linear in self.linear.items()}
    if 'router' in self.sources: streams['router'] = x_BxLxD.astype(self.dtype)
    out = {'streams': streams, 'position_BxL': position_BxL}
    for name in ('gate', 'keep'):
      if hasattr(self, f'{name}_logit'):
        logit = getattr(self, f'{name}_logit')(x_BxLxD).astype(wide)
        out[name] = logit + getattr(self, f'{name}_bias').astype(wide).reshape(1, 1, -1)
    return out

  def convolve(self, tail_BxTxE, inputs, *, written_BxL=None, reset_BxL=None, axis='') -> tuple[dict[str, jax.Array], jax.Array]:
    """(streams after the short convolution, next tail). The tail holds the raw sources side by side; with pieces of the rows over
    `axis`, that of the piece before."""
    streams = {n: inputs['streams'][source] for n, (source, _) in self.readers.items()}
    if not self.convolved: return streams, tail_BxTxE
    taps = find_taps(self.config.conv_width, inputs['position_BxL'].shape[1], written_BxL=written_BxL, reset_BxL=reset_BxL)
    if axis: tail_BxTxE = from_before(self._next_tail(inputs, jnp.zeros_like(tail_BxTxE), taps), tail_BxTxE, axis)
    own = self._sources(tail_BxTxE)
    for name in self.convolved:
      source, channels = self.readers[name]
      copies = (1, 1, channels // self.sources[source])
      streams[name] = short_conv(jnp.tile(streams[name], copies), self.taps[name], jnp.tile(own[source], copies), taps)
    tail_BxTxE = self._next_tail(inputs, tail_BxTxE, taps)
    return streams, from_piece(tail_BxTxE, axis) if axis else tail_BxTxE

  def _sources(self, tail_BxTxE):
    edges = np.cumsum([0, *self.tails.values()])
    return {s: tail_BxTxE[..., a:b] for s, a, b in zip(self.tails, edges[:-1], edges[1:], strict=True)}

  def _next_tail(self, inputs, tail_BxTxE, taps: Taps):
    return jnp.concatenate([next_tail(inputs['streams'][source], tail, taps) for source, tail in self._sources(tail_BxTxE).items()], -1)

  def items(self, streams, inputs, written_BxL=None) -> Items:
    """Keys, addresses, keep and gate of convolved streams. Tokens that may not write have no address and forget nothing."""
    c, b, (G, H, _, K) = self.config, self.config.binding, self.shape
    transform = resolve_transform(b.kind, b.transform)
    head = lambda x, *shape: x.reshape(*x.shape[:2], *shape)
    raw = {n: head(jnp.tile(streams[n], (1, 1, count * H * K // streams[n].shape[-1])), *([count] if n == 'query' else []), H, K)
           for n, count in (('key', 1), ('value', 1), ('query', G))}
    key, value, query = (to_spectrum(raw[n], transform) for n in ('key', 'value', 'query'))
    keys = dict(eps=b.eps, squash=b.squash, identity_bias=b.identity_bias)
    key, query = key_map(b.kind, key, **keys), key_map(b.kind, query, **keys)
    key, query = self._place(key, query, inputs['position_BxL'])
    unit, pick = self._addresses(streams, raw, inputs['position_BxL'])
    gate = jax.nn.sigmoid(inputs['gate']) if 'gate' in inputs else None
    log_keep = self._log_keep(inputs, unit, gate)
    bound, address = self._bound(key, value, gate), self._gated(unit, gate)
    if c.address.kind == 'copies': query = self._copies(query)
    if written_BxL is not None:
      row = lambda x: written_BxL.reshape(*written_BxL.shape, *(1,) * (x.ndim - 2))
      bound = jnp.where(row(bound), bound, 0)
      address = address if address is None else jnp.where(row(address), address, 0)
      log_keep = log_keep if log_keep is None else jnp.where(row(log_keep), log_keep, 0)
    return Items(bound, address, pick, query, log_keep, gate, unit, value, key)

  def probe(self, query):
    """bind(query, w): its inner product with slot m_s is w . unbind(query, m_s), the score of address kind 'scored'."""
    w = to_spectrum(self.score.astype(query.dtype), resolve_transform(self.config.binding.kind, self.config.binding.transform))
    return bind(self.config.binding.kind, query, jnp.broadcast_to(w, query.shape))

  def _place(self, key, query, position_BxL):
    """Position codes multiplied into the keys and queries of the first heads."""
    b, (_, H, _, K) = self.config.binding, self.shape
    if not b.position: return key, query
    if b.position == 'random':
      kind = {'bipolar': 'bipolar', 'phasor': 'phasor'}.get(b.kind, 'unitary')
      code = random_keys(b.seed, 'position', position_BxL, K, kind=kind)
    else: code = fractional_code(b.kind, K, position_BxL, fractional_phases(b.kind, K, seed=b.seed, frequencies=b.frequencies))
    code, first = code.astype(key.dtype)[:, :, None], b.position_heads or H
    place = lambda x, code: jnp.concatenate([bind(b.kind, code, x[..., :first, :]), x[..., first:, :]], -2)
    return place(key, code), place(query, code[:, :, None])

  def _addresses(self, streams, raw, position_BxL):
    """(unit address [B, L, H, S], pick [B, L, G, H, S]), float32 maps in the compute dtype; None for copies."""
    a = self.config.address
    if a.kind == 'copies': return None, None
    if a.source == 'key': z = {'address': raw['key'], 'pick': raw['query']}
    else: z = {n: self._logits(n, streams) for n in ('address', 'pick') if n == 'address' or a.kind != 'scored'}
    options = dict(temperature=a.temperature, top_k=a.top_k or 2)
    address = address_map(a.kind, z['address'], **options).astype(self.dtype)
    pick = pick_map(a.kind, z['pick'], **options).astype(self.dtype) if 'pick' in z else None
    if not a.rotary: return address, pick
    return rotate_slots(address, position_BxL), rotate_slots(pick, position_BxL)

  def _logits(self, name, streams):
    """Raw addresses or picks with their heads apart."""
    G, H, S, _ = self.shape
    z, groups = streams[name], ([G] if name == 'pick' else [])
    if self.config.address.kind in SLOT_KINDS:
      weight, bias = self.router[name]
      z = jnp.dot(z, weight.astype(z.dtype)) + bias.astype(z.dtype).reshape(1, 1, -1)
    heads = 1 if self.config.address.kind == 'signed' else H
    copies = (1, 1, (groups or [1])[0] * heads * S // z.shape[-1])
    z = jnp.tile(z, copies).reshape(*z.shape[:2], *groups, heads, S)
    return jnp.broadcast_to(z, (*z.shape[:-2], H, S))

  def _bound(self, key, value, gate):
    """bind(key, value), with one permuted key per slot for copies; channel gates belong to it."""
    c = self.config
    copies = c.address.kind == 'copies'
    bound = bind(c.binding.kind, self._copies(key), value[..., None, :]) if copies else bind(c.binding.kind, key, value)
    if gate is None or c.keep.erase == 'slot': return bound
    if c.address.gate == 'channel': gate = self._spread(gate, key.shape[-1])
    elif copies: gate = gate[..., None]
    else: return bound
    return bound * (gate[..., None, :] if copies else gate).astype(bound.dtype)

  def gated_value(self, value, gate):
    """The value that a key binds: times its channel gate, where there is one."""
    if gate is None or self.config.address.gate != 'channel': return value
    return value * self._spread(gate, value.shape[-1]).astype(value.dtype)

  def _gated(self, unit, gate):
    if unit is None or gate is None or self.config.address.gate != 'head' or self.config.keep.erase == 'slot': return unit
    return unit * gate[..., None].astype(unit.dtype)

  def ask(self, key_BxLxHxK):
    """The keys as queries of one read group, [B, L, 1, H, K] (copies: [B, L, 1, H, S, K])."""
    query = key_BxLxHxK[:, :, None]
    return self._copies(query) if self.config.address.kind == 'copies' else query

  def _copies(self, x):
    """[..., K] to S permuted copies [..., S, K], each slot with a permutation of its own."""
    b, (_, _, S, K) = self.config.binding, self.shape
    return permute(x, np.stack([permutation(b.seed, K, b.kind, stream=f'slot {s}') for s in range(S)]))

  def _log_keep(self, inputs, unit, gate):
    """log keep in float32, clamped at the floor; never the logarithm of a rounded keep. With tiers the fast one forgets a little more."""
    log_keep = self._learned_keep(inputs, unit, gate)
    if not self.config.tiers.kind: return log_keep
    _, H, S, _ = self.shape
    log_keep = jnp.zeros((1, 1, H, S), jnp.promote_types(jnp.float32, self.dtype)) if log_keep is None else log_keep
    return log_keep + float(np.log1p(-FAST_DECAY))

  def _learned_keep(self, inputs, unit, gate):
    k, a, (_, H, S, K) = self.config.keep, self.config.address, self.shape
    if k.kind == 'none': return None
    if k.kind == 'static':
      log = np.log1p(-spaced_decay(S if S > 1 else H, k.fast or 2.0 ** -5, k.slow or 2.0 ** -12))
      table = np.broadcast_to(log, (H, S)) if S > 1 else log[:, None]
      return jnp.asarray(table, jnp.promote_types(jnp.float32, self.dtype))[None, None]
    logit = inputs['keep']
    if k.kind == 'channel': return log_keep_map(self._spread(logit, K), floor=k.log_floor)[:, :, :, None]
    log_keep = log_keep_map(logit.reshape(*logit.shape[:2], H, -1), floor=k.log_floor)
    if k.kind != 'tied': return log_keep
    write = unit.astype(log_keep.dtype)
    if a.kind not in SLOT_KINDS: write *= write
    if gate is not None and a.gate == 'head': write *= gate[..., None]
    return tied_log_keep(log_keep, write, strength=k.tie_strength, floor=k.log_floor)
