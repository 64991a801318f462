"""The neural memory token by token: one step that rewrites the weights only where a chunk is complete."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.axes import FIXED
from memjax.layers.linear import Linear, partitioned
from memjax.memory.base import Memory, both, real_resets, where_rows
from memjax.memory.neural_fused import emptied, fused_step, has_kernels
from memjax.memory.neural_held import RECENT, RUNNING, NeuralState, Pending, watched
from memjax.memory.neural_inputs import NeuralInputs, NeuralItems, NeuralProjections
from memjax.ops import neural as ops
from memjax.ops import neural_reads as reads
from memjax.ops.head_norm import GATES, head_norm
from memjax.ops.neural_scan import tell
from memjax.ops.neural_steps import advance, coefficients, steps, weights


class NeuralStep(Memory):
  """Parameters, state and `step` of the neural memory."""

  def setup(self):
    c, shared = self.config, dict(std=self.std, dtype=self.dtype, lora=self.lora)
    (H, _, V), net = self.shape, self.rule.network
    self.projections = NeuralProjections(c, self.width, self.dtype, self.std, self.lora, name='projections')
    init = lambda shape: nn.initializers.normal(shape[0] ** -0.5) if len(shape) > 1 else nn.initializers.zeros_init()
    def make(name, shape, heads=H, axis=None):
      axes = 'heads' if heads == H else None, axis, *(None,) * (len(shape) - 1)
      return self.param(name, partitioned(init(shape), axes), (heads, *shape))
    own, axis = H if c.net.per_head else 1, None if c.net.learn_init else FIXED
    self.fast = {name: jnp.broadcast_to(make(f'start_{name}', shape, own, axis), (H, *shape)) for name, shape in net.fast.items()}
    self.slow = {name: make(f'slow_{name}', shape) for name, shape in net.slow.items()}
    if c.gates.row_factor: self.row = self.param('row', partitioned(nn.initializers.zeros_init(), ('heads', None)), (H, c.chunk))
    if c.write.window_weights:
      self.places = self.param('window', partitioned(nn.initializers.zeros_init(), ('heads', None)), (H, c.write.window))
    if c.write.persistent:
      self.prefix = self.param('persistent', partitioned(nn.initializers.normal(0.02), (None, 'embed')), (c.write.persistent, self.width))
    if c.proj.out_norm: self.scale = self.param('scale', partitioned(nn.initializers.ones_init(), ('heads',)), (H * V,))
    if c.proj.out_gate: self.out_gate = Linear(H * V, ('embed', 'heads'), name='out_gate', **shared)
    self.out = Linear(self.width, ('heads', 'embed'), zero=self.grafted, name='out', **shared)

  @property
  def parts(self) -> NeuralProjections:
    """The projections, unbound: shapes only, for use before parameters exist."""
    return NeuralProjections(self.config, self.width, parent=None)

  @property
  def shape(self) -> tuple[int, int, int]:
    """H, K, V."""
    return self.parts.shape

  @property
  def rule(self) -> ops.Rule:
    """The inner loop of the config."""
    c, r, network = self.config, self.config.rule, self.parts.network
    scale = {'half': 0.5, 'sum': 1.0, 'mean': 1 / network.value_width}[r.loss_scale]
    argument = r.loss_argument or {'huber': 1.0, 'lp': 3.0}.get(r.loss, 0.0)
    momentum = 'cascade' if c.cascade else r.momentum
    return ops.Rule(network, r.mode, r.loss, scale, argument, momentum, r.decay_to, r.read, r.grad_at, r.clip, r.clip_kind,
                    r.first_order, c.exec.solver, c.net.weight_norm, self.dtype, c.write.pairs,
                    c.write.refresh, c.gates.theta_norm == 'gram', c.cascade, c.exec.backend, c.exec.remat, c.write.shrink)

  @property
  def order(self) -> str:
    """'after' or 'before'."""
    return self.config.rule.read

  @property
  def inert(self) -> tuple[str, ...]:
    """The learned start, where it is not to be learned."""
    return () if self.config.net.learn_init else tuple(f'start_{name}' for name in self.rule.network.fast)

  @property
  def is_block(self) -> bool:
    """Whether reads see the chunk's start alone, so that no tokens are pending."""
    return self.config.rule.mode == 'block'

  def init_state(self, batch: int, max_len: int = 0) -> NeuralState:
    """The learned start and nothing pending; constant in the length of the text."""
    del max_len
    (H, _, V), K, C, Q, (pairs, before) = self.shape, self.parts.key_width, self.config.chunk, self.rule.levels, self.reach
    fast, rows = self.rule.network.fast, (before + C) * pairs
    zeros = lambda *shape: jnp.zeros((batch, *shape), self.state_dtype)
    state = NeuralState({name: tuple(zeros(H, *shape) for _ in range(Q)) for name, shape in fast.items()}, jnp.zeros((batch,), jnp.int32),
                        {name: zeros(*shape) for name, shape in self.parts.tails.items()}, zeros(H, len(self.running)))
    if self.is_block: return state.replace(anchor={name: zeros(H, *shape) for name, shape in fast.items()})
    tokens = lambda count: (zeros(count, H, K * pairs), zeros(count, H, V * pairs), zeros(count, len(self.parts.names), H))
    if before: state = state.replace(halo=NeuralItems(None, *tokens(before)))
    return state.replace(pending=Pending(
        {name: zeros(H, rows, shape[0]) for name, shape in fast.items()}, {name: zeros(H, rows, shape[-1]) for name, shape in fast.items()},
        *tokens(C), zeros(H, Q, before + C), zeros(H, Q, Q)))

  @property
  def wants_stream(self) -> bool:
    """Whether keys and values are made of the residual stream."""
    return self.config.proj.source == 'stream'

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array, *, stream_BxLxD: jax.Array | None = None) -> NeuralInputs:
    """Raw queries, keys and values, and the gates."""
    return self.projections(x_BxLxD, position_BxL, self.projections.stored(x_BxLxD, stream_BxLxD))

  def start(self, rows: int) -> ops.Weights:
    """The learned start for some rows."""
    wide = self.state_dtype
    fast = {name: jnp.broadcast_to(a.astype(wide)[None], (rows, *a.shape)) for name, a in self.fast.items()}
    if not self.config.net.learn_init: fast = jax.lax.stop_gradient(fast)
    return ops.Weights(fast, {name: a.astype(wide) for name, a in self.slow.items()})

  def step(self, state, inputs, mask_B=None, *, write_mask_B=None, reset_B=None):
    """One token: convolve, take its gradient, read, and rewrite the weights in rows whose chunk it completes."""
    reset_B, fused = real_resets(reset_B, mask_B), has_kernels(self, state.running_BxHxY[..., 0].size)
    if reset_B is not None: state = where_rows(reset_B, emptied(state, in_place=fused), state)
    items, tail = self.projections.items(jax.tree.map(lambda a: a[:, None], inputs), state.tail)
    written_B = both(mask_B, write_mask_B)
    if written_B is None: written_B = jnp.ones(state.slot_B.shape, bool)
    if fused: new, y_BxE, told = fused_step(self, state, (*self.tokens(items), items), (written_B, reset_B))
    else: new, y_BxE, told = (self._block_step if self.is_block else self._token_step)(state, items, written_B)
    running = RECENT * state.running_BxHxY + (1 - RECENT) * watched(told, len(self.running))[:, :, 0]
    new = new.replace(tail=where_rows(written_B, tail, state.tail), running_BxHxY=where_rows(written_B, running, state.running_BxHxY))
    return new, y_BxE if mask_B is None else jnp.where(mask_B[:, None], y_BxE, 0)

  @property
  def reach(self) -> tuple[int, int]:
    """(pairs of a token, tokens before a chunk that its steps follow)."""
    return self.config.write.pairs, self.config.write.window - 1

  @property
  def gamma(self) -> jax.Array | None:
    """What the gradients of the window count for, [H, window], that of the token itself first; None = 1."""
    return 2 * jax.nn.sigmoid(self.places.astype(self.state_dtype)) if self.config.write.window_weights else None

  def tokens(self, items: NeuralItems, halo: NeuralItems | None = None) -> tuple[Any, ops.Tokens]:
    """(gates [..., H, L] of items [..., L, ...], writes [..., H, L pairs, ...] of `halo`, then of the items)."""
    (_, _, V), K, (pairs, before) = self.shape, self.parts.key_width, self.reach
    unpack = lambda gate: self.projections.unpack(jnp.swapaxes(jnp.moveaxis(gate, -2, 0), -1, -2))
    gates = every = unpack(items.gate)
    if halo is not None:
      items = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new], -3), halo, items.replace(query=None))
      every = unpack(items.gate)
    def rows(a, width):
      a = jnp.swapaxes(a, -2, -3)
      return a.reshape(*a.shape[:-2], -1, width)
    more = lambda a: jnp.repeat(a, pairs, -1) if pairs > 1 else a
    each = jax.tree.map(more, (weights(every, before + 1), 1 - every.alpha, every.rate))
    return gates, ops.Tokens(rows(items.key, K), rows(items.value, V), *each)

  def past_factors(self, start, fast, halo: NeuralItems) -> ops.Factors:
    """The factors, at the weights of `fast`, of the tokens of the window before a chunk; zeros where there is none."""
    _, tokens = self.tokens(halo)
    found, real = ops.factors(self.rule, ops.anchor(start, fast), start.slow, tokens), tokens.weight[..., None] > 0
    return found._replace(a={name: jnp.where(real, a, 0) for name, a in found.a.items()})

  @property
  def running(self) -> tuple[str, ...]:
    """The running means that the state has."""
    return RUNNING if self.config.gates.surprise else RUNNING[:-1]

  def judged(self, state, found: ops.Factors, gates: Any, items: NeuralItems) -> tuple:
    """(factors, gates, items) of one token after a look at its gradient."""
    del state
    return found, gates, items

  def _token_step(self, state, items, written_B):
    return self.token_step(self.start(written_B.shape[0]), state, (*self.tokens(items), items), written_B)

  def token_step(self, start: ops.Weights, state: NeuralState, found: tuple, written_B: jax.Array) -> tuple[NeuralState, jax.Array, Any]:
    """(state, y [B, E], told) of one token: its gates, tokens and items."""
    rule, old, (gates, tokens, items) = self.rule, state.pending, found
    found, gates, items = self.judged(state, self._one_gradient(state, start, tokens), gates, items)
    (B, H), C, (pairs, before), rows = old.push_BxHxQxC.shape[:2], self.config.chunk, self.reach, jnp.arange(written_B.shape[0])
    slot = jnp.where(written_B, state.slot_B, C)                                      # C: dropped
    now = jax.tree.map(lambda a: a[..., 0], gates)
    ahead = jnp.arange(before + C)[None] - slot[:, None]
    at = jnp.broadcast_to(((ahead >= 0) & (ahead <= before))[:, None], (B, H, before + C)).astype(old.push_BxHxQxC.dtype)
    if before: at *= now.theta[..., None]
    if self.gamma is not None: at *= jnp.swapaxes(self.gamma[:, jnp.clip(before - ahead, 0, before)], 0, 1)
    turn, push = advance(steps(rule.momentum, now), old.turn, old.push_BxHxQxC, at)
    def put(ring, one):
      cut = ring.reshape(B, H, -1, pairs, ring.shape[-1])
      return cut.at[rows, :, slot + before].set(one.astype(ring.dtype), mode='drop').reshape(ring.shape)
    keep = lambda ring, one: ring.at[rows, slot].set(one[:, 0].astype(ring.dtype), mode='drop')
    new = Pending({n: put(a, found.a[n]) for n, a in old.a.items()}, {n: put(d, found.d[n]) for n, d in old.d.items()},
                  keep(old.key_BxCxHxK, items.key), keep(old.value_BxCxHxV, items.value), keep(old.gate_BxCxGxH, items.gate),
                  where_rows(written_B, push, old.push_BxHxQxC),
                  where_rows(written_B, turn - jnp.eye(turn.shape[-1], dtype=turn.dtype)[None, None], old.turn_BxHxQxQ))
    before_it, state = state, state.replace(pending=new, slot_B=jnp.where(written_B, state.slot_B + 1, state.slot_B))
    y_BxE = self._flat(self.read_pending(state if rule.read == 'after' else before_it, items.query, start))[:, 0]
    full_B = state.slot_B == C
    state = jax.lax.cond(jnp.any(full_B), lambda state: self._committed(state, start, full_B), lambda state: state, state)
    return state, y_BxE, tell(rule, found, 1)

  def _one_gradient(self, state, start, tokens):
    """The factors of one token, at the weights where the mode takes them."""
    rule = self.rule
    if rule.mode != 'exact':
      found = ops.factors(rule, ops.anchor(start, state.fast), start.slow, tokens)
      if not rule.gram: return found
      past = self.projections.unpack(jnp.moveaxis(state.pending.gate_BxCxGxH, (2, 3), (0, 2)))
      seen, own = (weights(past) > 0)[:, :, None], (tokens.weight > 0)[..., None]
      size = lambda a, ring: reads.overlap(a, ring, seen) + reads.overlap(a, a, own)
      return reads.divided(found, {name: size(a, state.pending.a[name]) for name, a in found.a.items()})
    pairs = tokens.weight.shape[-1]
    past = reads.read_tokens(rule, start, state.fast, tokens.key, found=state.pending.factors(), coefficients=state.pending.reads(pairs))
    return reads.online_factors(rule, start, tokens, past, weigh=jnp.zeros((*tokens.weight.shape, pairs), tokens.weight.dtype))

  def _committed(self, state, start, full_B):
    """The pending tokens of full rows moved into their weights."""
    pending, (pairs, before) = state.pending, self.reach
    fast = ops.commit(self.rule, start, state.fast, found=pending.factors(), coefficients=self._reads(state))
    empty, halo = jax.tree.map(jnp.zeros_like, pending), state.halo
    if before:
      last = lambda a: a[:, -before:]
      halo = NeuralItems(None, last(pending.key_BxCxHxK), last(pending.value_BxCxHxV), last(pending.gate_BxCxGxH))
      found = self.past_factors(start, fast, halo)
      put = lambda ring, one: ring.at[:, :, :before * pairs].set(one.astype(ring.dtype))
      empty = empty.replace(a=jax.tree.map(put, empty.a, found.a), d=jax.tree.map(put, empty.d, found.d))
    return state.replace(fast=where_rows(full_B, fast, state.fast), slot_B=jnp.where(full_B, 0, state.slot_B),
                         pending=where_rows(full_B, empty, pending), halo=where_rows(full_B, halo, state.halo))

  def _block_step(self, state, items, written_B):
    rule, start = self.rule, self.start(written_B.shape[0])
    gates, tokens = self.tokens(items)
    weights = {name: start.fast[name] + a for name, a in state.anchor.items()}
    found, gates, items = self.judged(state, ops.factors(rule, weights, start.slow, tokens), gates, items)
    made = coefficients(rule.momentum, gates, inside=False, pairs=rule.pairs)
    fast = ops.commit(rule, start, state.fast, found=found, coefficients=made)
    y_BxE = self._flat(self.read_anchor(state, items.query))[:, 0]
    slot_B = state.slot_B + 1
    full_B = written_B & (slot_B == self.config.chunk)
    def ended(fast): return where_rows(full_B, ops.finish(rule, start, fast), fast)
    if rule.finishes: fast = jax.lax.cond(jnp.any(full_B), ended, lambda fast: fast, fast)
    moved = where_rows(full_B, {name: levels[0] for name, levels in fast.items()}, state.anchor)
    new = state.replace(fast=where_rows(written_B, fast, state.fast), anchor=moved,
                        slot_B=jnp.where(written_B, jnp.where(full_B, 0, slot_B), state.slot_B))
    return new, y_BxE, tell(rule, found, 1)

  def flush(self, state: NeuralState) -> NeuralState:
    """Pending tokens in their weights, each row at the start of a chunk. Reads stay what they were (mode block: they see all that was
    written); later tokens take their gradients at the new weights, and so differ from those of a text that went on."""
    start, some_B = self.start(state.slot_B.shape[0]), state.slot_B > 0
    if not self.is_block: return self._committed(state, start, some_B)
    fast = where_rows(some_B, ops.finish(self.rule, start, state.fast), state.fast) if self.rule.finishes else state.fast
    return state.replace(fast=fast, anchor={name: levels[0] for name, levels in fast.items()}, slot_B=jnp.zeros_like(state.slot_B))

  def read_pending(self, state: NeuralState, query_BxLxHxK: jax.Array, start: ops.Weights | None = None) -> jax.Array:
    """y [B, L, H, V]: queries read the weights of the state, pending tokens included; nothing is written."""
    if self.is_block: return self.read_anchor(state, query_BxLxHxK)
    query = jnp.swapaxes(query_BxLxHxK, 1, 2)
    start = self.start(query.shape[0]) if start is None else start
    y = reads.read_tokens(self.rule, start, state.fast, query, found=state.pending.factors(),
                        coefficients=self._reads(state, query.shape[2]))
    return jnp.swapaxes(y, 1, 2)

  def _reads(self, state, length=1):
    """The coefficients of tokens that read the weights after all pending ones."""
    made = state.pending.reads(length)
    if not self.config.gates.row_factor: return made
    share_BxH = jnp.take(self.row_factor(), jnp.maximum(state.slot_B - 1, 0), axis=1).T
    return made._replace(weigh=made.weigh * share_BxH[..., None, None], push=made.push * share_BxH[..., None, None])

  def row_factor(self) -> jax.Array:
    """What all steps of a chunk count for after each number of tokens, [H, C]: max(0, 1 / t + learned), as in TTT."""
    row = self.row.astype(self.state_dtype)
    return jnp.maximum(1 / jnp.arange(1, row.shape[1] + 1, dtype=row.dtype)[None] + row, 0)

  def read_anchor(self, state: NeuralState, query_BxLxHxK: jax.Array) -> jax.Array:
    """y [B, L, H, V]: queries read the weights of the chunk's start."""
    memory = {name: (a,) for name, a in state.anchor.items()} if self.is_block else state.fast
    query = jnp.swapaxes(query_BxLxHxK, 1, 2)
    return jnp.swapaxes(reads.read_anchor(self.rule, self.start(query.shape[0]), memory, query), 1, 2)

  def _flat(self, y_BxLxHxV):
    return y_BxLxHxV.reshape(*y_BxLxHxV.shape[:2], -1).astype(self.dtype)

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """RMS norm of the read per head, optional gate, output projection."""
    p, V = self.config.proj, self.shape[2]
    gate_BxLxE = self.out_gate(x_BxLxD) if p.out_gate else None
    if p.out_norm:
      y_BxLxE = head_norm(y_BxLxE, self.scale, gate_BxLxE, width=V, activation=p.out_gate, dtype=self.dtype,
                          backend=self.config.exec.backend)
    elif p.out_gate: y_BxLxE = y_BxLxE * GATES[p.out_gate](gate_BxLxE)
    return self.out(y_BxLxE)
