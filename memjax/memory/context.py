"""Dynamic context bank as a memory: `ratio` tokens become one slot, attention reads the slots, attention keeps them alive.

    slot = mean of `ratio` inputs      p = softmax over visible slots of (W_q x) . (W_k slot) / sqrt(K)
    y = sum_s p_s W_v slot_s           importance_s <- importance_s + p_s

The bank holds what was, not what is learned: gradients stop at the slots, so no token changes the read of a later one by
gradient, and the state carries none. A token reads before it is written: it never meets itself, and its read and the
account of that read see the same slots. W_k and W_v are moved to the query and the mixed slots, W_v (sum_s p_s slot_s),
which spares projecting S slots for every token. To keep a bank over prompts, pass `reset_BxL` without resets.
"""
import jax
import jax.numpy as jnp
from flax import struct

from memjax.layers.linear import Linear, Projection
from memjax.memory.base import Memory, both, real_resets, where_rows
from memjax.ops import context as ops
from memjax.ops.context import Bank

WINDOW = 256           # tokens taken at once at most, which bounds the logits


@struct.dataclass
class ContextInputs:
  """Queries of some tokens and their inputs, which become slots."""
  query_BxLxHxK: jax.Array
  x_BxLxD: jax.Array


class Context(Memory):
  """The kind `context`; its state is a `Bank` for each row."""

  order = 'before'
  reaches_back = False        # gradients stop at the slots

  def setup(self):
    c, D, shared = self.config, self.width, dict(std=self.std, dtype=self.dtype, lora=self.lora)
    self.query = Linear(D, ('embed', 'heads'), name='query', **shared)
    self.key, self.value = (Projection(D, self.groups * self.head_width, ('embed', 'heads'), name=n, **shared) for n in ('key', 'value'))
    self.kernels = self.key.matrix(), self.value.matrix()          # made before any scan
    self.out = Linear(D, ('heads', 'embed'), zero=self.grafted, name='out', **shared)
    if c.out_gate: self.out_gate = Linear(D, ('embed', 'heads'), name='out_gate', **shared)

  @property
  def groups(self) -> int:
    """G, key and value heads."""
    return self.config.kv_heads or self.config.heads

  @property
  def head_width(self) -> int:
    """K, channels per head."""
    return self.width // self.config.heads

  def init_state(self, batch: int, max_len: int = 0) -> Bank:
    """An empty bank for each row; constant in the length of the text."""
    return ops.empty_bank(self.config, self.width, batch=(batch,), dtype=self.state_dtype)

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> ContextInputs:
    """Queries of all tokens; keys and values belong to slots."""
    del position_BxL
    q = self.query(x_BxLxD)
    return ContextInputs(q.reshape(*q.shape[:2], self.config.heads, -1), x_BxLxD)

  def _look(self, bank: Bank, inputs: ContextInputs):
    """(y [B, L, E], mass [B, L, S]) of tokens that all meet the same bank."""
    split = lambda kernel: kernel.reshape(self.width, self.groups, self.head_width)
    key, value = map(split, self.kernels)
    q = inputs.query_BxLxHxK.astype(self.dtype)
    B, L, H, K = q.shape
    grouped = lambda a: a.reshape(B, L, self.groups, H // self.groups, a.shape[-1])
    query = (jnp.einsum('blgik,dgk->blgid', grouped(q), key) * K ** -0.5).reshape(B, L, H, -1)
    see = jax.vmap(lambda query, bank: ops.route(query, bank, self.config.top_k))(query, bank)
    mixed, mass = jax.vmap(ops.read_slots)(query, bank, see)
    return jnp.einsum('blgid,dgk->blgik', grouped(mixed), value).reshape(B, L, H * K), mass

  def _complete(self, bank: Bank) -> Bank:
    """A new slot in the rows whose pool is full; merging costs nothing where no row has one."""
    full_B = bank.pending == self.config.ratio
    new = lambda bank: where_rows(full_B, jax.vmap(lambda b: ops.append(b, self.config))(bank), bank)
    return jax.lax.cond(jnp.any(full_B), new, lambda bank: bank, bank)

  def write(self, state: Bank, inputs: ContextInputs) -> Bank:
    """Accounts the token's read, pools its input, and makes a slot where the pool is full."""
    state = jax.lax.stop_gradient(state)
    inputs = jax.tree.map(lambda a: a[:, None], inputs)
    _, mass = self._look(state, inputs)
    taken = jnp.ones(inputs.x_BxLxD.shape[:2], bool)
    return self._complete(self._spend(state, inputs, mass, taken))

  def _spend(self, bank, inputs, mass_BxLxS, taken_BxL):
    bank = jax.vmap(lambda b, mass: ops.account(b, mass, threshold=self.config.threshold))(bank, mass_BxLxS)
    return jax.vmap(ops.pool)(bank, inputs.x_BxLxD, taken_BxL)

  def read(self, state: Bank, inputs: ContextInputs) -> jax.Array:
    """y [B, E] of one token; exactly 0 from an empty bank."""
    return self._look(state, jax.tree.map(lambda a: a[:, None], inputs))[0][:, 0]

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """Windows of at most `ratio` tokens, in which a row completes one slot at most: two dense reads a window, old and new bank."""
    B, L = inputs.x_BxLxD.shape[:2]
    R = min(self.config.ratio, WINDOW, L)
    if R == 1: return self.scan(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    N, nothing = -(-L // R), jnp.zeros((B, L), bool)
    real = ~nothing if mask_BxL is None else mask_BxL
    wrote = real if write_mask_BxL is None else both(real, write_mask_BxL)
    reset = nothing if reset_BxL is None else real_resets(reset_BxL, real)
    cut = lambda a: jnp.moveaxis(jnp.pad(a, [(0, 0), (0, N * R - L)] + [(0, 0)] * (a.ndim - 2)).reshape(B, N, R, *a.shape[2:]), 1, 0)
    state, y = jax.lax.scan(jax.checkpoint(self._window), jax.lax.stop_gradient(state), jax.tree.map(cut, (inputs, real, wrote, reset)))
    return state, jnp.moveaxis(y, 0, 1).reshape(B, N * R, -1)[:, :L]

  def _window(self, bank, tokens):
    """Tokens up to the one that completes a slot meet the bank as it was, those after it the bank with that slot."""
    inputs, real, wrote, reset = tokens
    late = jax.vmap(ops.past_border, (0, 0, 0, None))(bank.pending, wrote, reset, self.config.ratio)
    bank, early_y = self._part(bank, inputs, real & ~late, wrote=wrote, reset=reset)
    bank = self._complete(bank)
    late &= real
    rest = lambda bank: self._part(bank, inputs, late, wrote=wrote, reset=reset)
    bank, late_y = jax.lax.cond(jnp.any(late), rest, lambda bank: (bank, jnp.zeros_like(early_y)), bank)
    return bank, early_y + late_y

  def _part(self, bank, inputs, part_BxR, *, wrote, reset):
    """(bank, y): the tokens of a part read one bank until a reset in it; those after its last reset stay in the pool."""
    resets_BxR = jnp.cumsum((reset & part_BxR).astype(jnp.int32), 1)
    last_Bx1 = resets_BxR[:, -1:]
    meets = part_BxR & (resets_BxR == 0)
    y, mass = self._look(bank, inputs)
    mass = jnp.where((meets & wrote)[..., None], mass, 0)
    start = where_rows(last_Bx1[:, 0] > 0, ops.clear_bank(bank), bank)
    mass = jnp.where((last_Bx1 == 0)[..., None], mass, 0)
    bank = self._spend(start, inputs, mass, part_BxR & wrote & (resets_BxR == last_Bx1))
    return bank, jnp.where(meets[..., None], y, 0)

  def mix(self, x_BxLxD, state, **context):
    """As in the base class; the monitors look at the bank after the call: share of slots in use, and of those that were read."""
    y_BxLxE, new, aux = super().mix(x_BxLxD, state, **context)
    valid, used = new.valid > 0, (new.valid > 0) & (new.refs > 0)
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    aux |= {'fill': valid.mean(dtype=jnp.float32), 'used': used.sum().astype(jnp.float32) / count}
    if 'statistics' in aux:
      aux['statistics'] |= {f'bank_{name}_BxS': getattr(new, name) for name in ('importance', 'refs', 'age', 'assign')}
    return y_BxLxE, new, aux

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """Optional gate and output projection."""
    if self.config.out_gate: y_BxLxE = y_BxLxE * jax.nn.silu(self.out_gate(x_BxLxD))
    return self.out(y_BxLxE)
