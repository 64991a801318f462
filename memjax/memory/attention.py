"""Softmax attention as a memory: the state is a ring of keys and values. Full attention is a ring as long as the text."""
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.layers.linear import Linear, partitioned
from memjax.layers.norm import RMSNorm
from memjax.memory.base import Memory, both, real_resets
from memjax.ops.attention import attend, attend_ring, attend_window
from memjax.ops.counts import cumulate
from memjax.ops.flash import flash, is_flash
from memjax.ops.rope import frequencies, magnitude, rotate
from memjax.ops.sequence import from_before, from_piece


@struct.dataclass
class AttentionState:
  """The last M written keys and values; token number r (from 1) lives in slot (r - 1) % M. Slots never written are zero.

  The heads stand before the slots, so that reading a ring is one batched product and needs no copy of it.
  """
  k_BxGxMxK: jax.Array
  v_BxGxMxK: jax.Array
  count_B: jax.Array


@struct.dataclass
class AttentionInputs:
  """Queries and rotated keys and values of some tokens."""
  q_BxLxHxK: jax.Array
  k_BxLxGxK: jax.Array
  v_BxLxGxK: jax.Array


def is_whole(state: AttentionState, mask_BxL: jax.Array | None, segment_BxL: jax.Array) -> jax.Array:
  """Whether each row is one text that starts with it, padded at its end if at all: then a causal mask says what a query sees."""
  whole = jnp.all(segment_BxL == segment_BxL[:, :1])
  if state.k_BxGxMxK.shape[2]: whole &= jnp.all((state.count_B == 0) | (segment_BxL[:, 0] > 0))
  return whole if mask_BxL is None else whole & jnp.all(mask_BxL[:, :-1] | ~mask_BxL[:, 1:])


class Attention(Memory):
  """Causal attention with H query and G key heads. `max_len=0` is one parallel call from empty; otherwise the ring holds max_len.

  Persistent tokens (titans specification section 12) are learned keys and values, without position, that every query sees.
  """

  has_pieces = False

  def setup(self):
    c, shared = self.config, dict(std=self.std, dtype=self.dtype, lora=self.lora)
    inner = dict(use_bias=c.bias, **shared)
    self.query = Linear(c.heads * self.head_width, ('embed', 'heads'), name='query', **inner)
    self.key = Linear(self.groups * self.head_width, ('embed', 'heads'), name='key', **inner)
    self.value = Linear(self.groups * self.head_width, ('embed', 'heads'), name='value', **inner)
    self.out = Linear(self.width, ('heads', 'embed'), use_bias=c.out_bias, zero=self.grafted, name='out',
                      **shared | {'std': self.out_std or self.std})
    if c.qk_norm:
      self.query_norm, self.key_norm = (RMSNorm(c.qk_norm, self.dtype, name=n) for n in ('query_norm', 'key_norm'))
    if c.persistent:
      made = partitioned(nn.initializers.normal(0.02), (None, 'heads'))
      self.persistent = tuple(self.param(f'persistent_{n}', made, (c.persistent, self.groups * self.head_width)) for n in ('key', 'value'))

  @property
  def always(self) -> tuple[jax.Array, jax.Array] | None:
    """Persistent keys and values [G, N, K]; None: there are none."""
    if not self.config.persistent: return None
    return tuple(jnp.swapaxes(a.reshape(-1, self.groups, self.head_width), 0, 1) for a in self.persistent)

  @property
  def head_width(self) -> int:
    """K, channels per head."""
    return self.config.head_width or self.width // self.config.heads

  @property
  def groups(self) -> int:
    """G, key and value heads."""
    return self.config.kv_heads or self.config.heads

  def capacity(self, max_len: int) -> int:
    """M, slots of the ring."""
    return max_len

  def init_state(self, batch: int, max_len: int = 0) -> AttentionState:
    """An empty ring of `capacity(max_len)` slots."""
    shape = (batch, self.groups, self.capacity(max_len), self.head_width)
    return AttentionState(jnp.zeros(shape, self.state_dtype), jnp.zeros(shape, self.state_dtype), jnp.zeros((batch,), jnp.int32))

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> AttentionInputs:
    """Queries, keys and values of all tokens, normed and rotated as configured."""
    q = self._split(self.query(x_BxLxD), self.config.heads)
    if self.config.qk_norm: q = self.query_norm(q)
    return AttentionInputs(self._rotated(q, position_BxL), *self.keys(x_BxLxD, position_BxL))

  def keys(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, L, G, K]."""
    k = self._split(self.key(x_BxLxD), self.groups)
    if self.config.qk_norm: k = self.key_norm(k)
    return self._rotated(k, position_BxL), self._split(self.value(x_BxLxD), self.groups)

  def _split(self, a, heads):
    return a.reshape(*a.shape[:2], heads, self.head_width)

  def _rotated(self, a, position_BxL):
    c = self.config
    if not c.rotary: return a
    return rotate(a, position_BxL, frequencies(self.head_width, c.rotary_base, c.rope), scale=magnitude(c.rope))

  def write(self, state: AttentionState, inputs: AttentionInputs) -> AttentionState:
    """Puts one key and value over the oldest slot.

    Each head is given its slot, not each row for all heads: a CPU would copy the ring, and devices exchange what rows write.
    """
    slot_BxG = jnp.broadcast_to((state.count_B % state.k_BxGxMxK.shape[2])[:, None], state.k_BxGxMxK.shape[:2])
    one = lambda ring_MxK, slot, new_K: ring_MxK.at[slot].set(new_K.astype(ring_MxK.dtype))
    put = lambda ring, new: jax.vmap(jax.vmap(one))(ring, slot_BxG, new)
    return AttentionState(put(state.k_BxGxMxK, inputs.k_BxLxGxK), put(state.v_BxGxMxK, inputs.v_BxLxGxK), state.count_B + 1)

  def read(self, state: AttentionState, inputs: AttentionInputs) -> jax.Array:
    """Attends with one query over the filled slots."""
    y_BxHxK = attend_ring(inputs.q_BxLxHxK, state.k_BxGxMxK, state.v_BxGxMxK, state.count_B, always=self.always)
    return y_BxHxK.reshape(y_BxHxK.shape[0], -1)

  def step(self, state, inputs, mask_B=None, *, write_mask_B=None, reset_B=None):
    """One token against the ring; without a ring (max_len 0) it sees itself alone."""
    if state.k_BxGxMxK.shape[2]: return super().step(state, inputs, mask_B, write_mask_B=write_mask_B, reset_B=reset_B)
    row = lambda tree: jax.tree.map(lambda a: a[:, None], tree)
    state, y_Bx1xE = self.parallel(state, row(inputs), row(mask_B), write_mask_BxL=row(write_mask_B), reset_BxL=row(reset_B))
    return state, y_Bx1xE[:, 0]

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """All queries against the ring and each other at once; by flash attention where it can be had and every row is one new text."""
    B, L = inputs.q_BxLxHxK.shape[:2]
    reset_BxL = real_resets(reset_BxL, mask_BxL)
    wrote_BxL = both(mask_BxL, write_mask_BxL)
    wrote_BxL = jnp.ones((B, L), bool) if wrote_BxL is None else wrote_BxL
    segment_BxL = jnp.zeros((B, L), jnp.int32) if reset_BxL is None else jnp.cumsum(reset_BxL.astype(jnp.int32), 1)
    dense = mask_BxL is not None or write_mask_BxL is not None
    def reference(inputs): return self._seen(state, inputs, wrote_BxL, segment_BxL=segment_BxL, dense=dense)
    def fast(inputs): return flash(inputs.q_BxLxHxK, inputs.k_BxLxGxK, inputs.v_BxLxGxK, window=state.k_BxGxMxK.shape[2])
    if write_mask_BxL is None and is_flash(self.config.backend, inputs.q_BxLxHxK, persistent=self.config.persistent):
      whole = is_whole(state, mask_BxL, segment_BxL)
      if self.config.backend == 'cudnn_rows': y = fast(inputs.replace(q_BxLxHxK=jnp.where(whole, inputs.q_BxLxHxK, jnp.nan)))
      # Both branches leave what the gradient needs of either; recomputed, the scores of the reference are not among it.
      else: y = jax.lax.cond(whole, fast, jax.checkpoint(reference), inputs)
    else: y = reference(inputs)
    y_BxLxE = y.reshape(B, L, -1)
    if mask_BxL is not None: y_BxLxE = jnp.where(mask_BxL[..., None], y_BxLxE, 0)
    return self._store(state, inputs, wrote_BxL, segment_BxL), y_BxLxE

  def _seen(self, state, inputs, wrote_BxL, *, segment_BxL, dense):
    """Reads [B, L, H, K] of all queries, whatever the ring holds and wherever documents start."""
    M = state.k_BxGxMxK.shape[2]
    *past, see_past_BxM = self._past(state)
    keys, values = (jnp.concatenate([old, jnp.swapaxes(new, 1, 2).astype(self.state_dtype)], 2)
                    for old, new in zip(past, (inputs.k_BxLxGxK, inputs.v_BxLxGxK), strict=True))
    see_BxM = jnp.concatenate([see_past_BxM, wrote_BxL], 1)
    segment_BxM = jnp.pad(segment_BxL, ((0, 0), (M, 0)))
    return self._look(inputs.q_BxLxHxK, keys, values, see_BxM=see_BxM, segment_BxM=segment_BxM, past=M, dense=dense)

  def _past(self, state):
    """The ring, oldest first, and which of its entries exist."""
    M = state.k_BxGxMxK.shape[2]
    rank_BxM = state.count_B[:, None] - M + 1 + jnp.arange(M)[None]
    slot = jnp.where(rank_BxM > 0, (rank_BxM - 1) % max(M, 1), 0)
    take = lambda ring: jnp.take_along_axis(ring, slot[:, None, :, None], 2)
    return take(state.k_BxGxMxK), take(state.v_BxGxMxK), rank_BxM > 0

  def _look(self, q, keys, values, *, see_BxM, segment_BxM, past, dense):
    """Dense scores: a query sees written keys of its segment, at most `past` back where a ring limits the reach."""
    del dense
    rank_BxM = cumulate(see_BxM)
    def see(start, size):
      row = lambda a: jax.lax.dynamic_slice_in_dim(jnp.pad(a[:, past:], ((0, 0), (0, size))), start, size, 1)[..., None]
      own, near = row(rank_BxM), see_BxM[:, None] & (segment_BxM[:, None] == row(segment_BxM))
      near &= rank_BxM[:, None] <= own
      near &= jnp.arange(see_BxM.shape[1])[None, None] <= past + start + jnp.arange(size)[None, :, None]
      return near & (rank_BxM[:, None] > own - past) if past else near
    return attend(q, keys, values, see=see, always=self.always)

  def _store(self, state, inputs, wrote_BxL, segment_BxL):
    """The ring after the call: the last M written tokens of each row's last segment."""
    M, last_B = state.k_BxGxMxK.shape[2], segment_BxL[:, -1]
    kept_BxL = wrote_BxL & (segment_BxL == last_B[:, None])
    start_B = jnp.where(last_B == 0, state.count_B, 0)
    rank_BxL = start_B[:, None] + cumulate(kept_BxL)
    count_B = rank_BxL[:, -1]
    if not M: return state.replace(count_B=count_B)
    slot = jnp.where(kept_BxL & (rank_BxL > count_B[:, None] - M), (rank_BxL - 1) % M, M)
    rows = jnp.arange(slot.shape[0])[:, None]
    def put(ring, new):
      ring = jnp.where((last_B == 0)[:, None, None, None], ring, 0)
      return ring.at[rows, :, slot].set(new.astype(ring.dtype), mode='drop')
    return AttentionState(put(state.k_BxGxMxK, inputs.k_BxLxGxK), put(state.v_BxGxMxK, inputs.v_BxLxGxK), count_B)

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """Output projection."""
    return self.out(y_BxLxE)


class Window(Attention):
  """Sliding-window attention: a ring of `window` slots, whatever the length of the text."""

  has_pieces = True

  def hands_over(self, length, *, mask_BxL=None, write_mask_BxL=None, **flow):
    """Where a piece holds a window of tokens, and all are written: then its ring is that of its last tokens."""
    return length >= self.config.window and mask_BxL is None and write_mask_BxL is None

  def piece(self, state, inputs, *, axis, reset_BxL=None, **flow):
    """The last keys and values of the piece before are the ring of this one."""
    last = jax.tree.map(lambda a: a[:, -self.config.window:], (inputs, reset_BxL))
    left, _ = self.parallel(jax.tree.map(jnp.zeros_like, state), last[0], reset_BxL=last[1])
    new, y_BxLxE = self.parallel(from_before(left, state, axis), inputs, reset_BxL=reset_BxL)
    return from_piece(new, axis), y_BxLxE

  def capacity(self, max_len: int) -> int:
    """M = window, whatever `max_len`."""
    return self.config.window

  def _look(self, q, keys, values, *, see_BxM, segment_BxM, past, dense):
    """Blocks of two windows; dense where masks leave holes, or where one block would hold the whole call."""
    if dense or q.shape[1] <= past:
      return super()._look(q, keys, values, see_BxM=see_BxM, segment_BxM=segment_BxM, past=past, dense=dense)
    return attend_window(q, keys, values, window=past, see_key_BxM=see_BxM, segment_BxM=segment_BxM, always=self.always)
