"""The original HAMT memory (codenlighten/holographic-ai, 2025): scalar gates, position keys, a norm in the recurrence.

    v = W_i h,  q = W_q h,  p_t = key of the position,  u = n(W2 drop(gelu(W1 q)))         n(x) = x / |x|
    r_s = unbind(u, m_s),  alpha = softmax_s(w r_s),  c = sum_s alpha_s r_s                read before the write
    g = sigmoid(G2 gelu(G1 [q; v; |m_1| ... |m_S|]))                                        one scalar a slot
    m_s <- norm((1 - g_s) (1 - decay) m_s + g_s bind(p, v)),  o = W_o [q; c]                biases everywhere

The norm after each write makes the recurrence nonlinear: there is no fast form, and this kind exists for comparison.
Only the softmax, |m| and the write depend on the state; all else is computed for all tokens at once. With binding 'hrr'
v, u, w, c and the slots are packed spectra, emitted by their projections: the original model in an orthonormal basis
(W_i F, W2 F, F' W_o ...), of the same distribution at initialisation, which spares the transforms. Keys are functions
of the position where the original redrew them on every call.
"""
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.layers.linear import Linear, dropout, kernel_init, partitioned
from memjax.memory.base import Aux, Memory, both, confidence, real_resets, where_rows
from memjax.ops import holographic_seed as ops
from memjax.ops.binding import bind

REMAT_EVERY = 64


@struct.dataclass
class SeedState:
  """The normalised slots; the key of a token comes from its position, so nothing is counted."""
  m_BxSxK: jax.Array


@struct.dataclass
class SeedInputs:
  """What the scan needs of some tokens: key p, value v, query u, score bind(u, w), the [q; v] part of the gate."""
  key_BxLxK: jax.Array
  value_BxLxK: jax.Array
  query_BxLxK: jax.Array
  score_BxLxK: jax.Array
  gate_BxLxD: jax.Array | None


class Weights(nn.Module):
  """A kernel and a bias as attributes, for use inside a scan."""
  shape: tuple[int, ...]
  axes: tuple
  bias_shape: tuple[int, ...] = ()
  use_bias: bool = True
  std: float = 0.0

  def setup(self):
    self.kernel = self.param('kernel', partitioned(kernel_init(self.std, fan_in=self.shape[0]), self.axes), self.shape)
    if self.use_bias:
      init = partitioned(nn.initializers.zeros_init(), (None,) * len(self.bias_shape))
      self.bias = self.param('bias', init, self.bias_shape)


class HolographicSeed(Memory):
  """The kind `holographic_seed`. `read` sees the state before the token's own write."""

  order = 'before'

  def setup(self):
    c, D, dense = self.config, self.width, dict(use_bias=True, std=self.std, dtype=self.dtype, lora=self.lora)
    self.item = Linear(c.key_width, ('embed', None), name='item', **dense)
    self.query = Linear(D, ('embed', None), name='query', **dense)
    if self.hidden: self.retrieve_up = Linear(self.hidden, ('embed', 'hidden'), name='retrieve_up', **dense)
    inner = 'hidden' if self.hidden else 'embed'
    self.retrieve_down = Linear(c.key_width, (inner, None), name='retrieve_down', **dense)
    self.select = Weights((c.key_width,), (None,), std=self.std, name='select')
    if c.gating:
      std = self.std or (D + c.key_width + c.slots) ** -0.5      # the two parts of G1 are one matrix
      self.gate_in = Linear(D, (None, 'embed'), name='gate_in', **dense | dict(std=std))
      self.gate_sizes = Weights((c.slots, D), (None, 'embed'), use_bias=False, std=std, name='gate_sizes')
      self.gate_out = Weights((D, c.slots), ('embed', None), (c.slots,), std=self.std, name='gate_out')
      self.gate_weights = self.gate_sizes.kernel, self.gate_out.kernel, self.gate_out.bias     # made before any scan
    if c.norm != 'none': self.scale = self.param('scale', partitioned(nn.initializers.ones_init(), ()), ())
    self.out = Linear(D, (None, 'embed'), zero=self.grafted, name='out', **dense)

  @property
  def hidden(self) -> int:
    """Hidden width of the retrieval MLP; 0 = one projection."""
    c = self.config
    return 2 * c.key_width if c.retrieval_hidden < 0 else c.retrieval_hidden

  @property
  def inert(self) -> tuple[str, ...]:
    """Parameters of the original that no output depends on: softmax ignores a bias, and weighs equal slots equally."""
    slots_differ = self.config.gating and self.config.slots > 1
    return ('select/bias',) if slots_differ else ('select/bias', 'select/kernel')

  def init_state(self, batch: int, max_len: int = 0) -> SeedState:
    """Empty slots; constant in the length of the text."""
    return SeedState(jnp.zeros((batch, self.config.slots, self.config.key_width), self.state_dtype))

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array, *, key: jax.Array | None = None) -> SeedInputs:
    """Everything that does not depend on the state; `key` switches the dropout of the retrieval MLP on."""
    c, q_BxLxD, value_BxLxK = self.config, self.query(x_BxLxD), self.item(x_BxLxD)
    h = q_BxLxD
    if self.hidden: h = dropout(jax.nn.gelu(self.retrieve_up(h), approximate=False), c.dropout, key)
    query_BxLxK = ops.unit_query(c.binding, self.retrieve_down(h))
    select_1x1xK = self.select.kernel.astype(query_BxLxK.dtype)[None, None]
    key_BxLxK = ops.position_keys(c.binding, position_BxL, c.key_width, seed=c.key_seed, unitary=c.unitary)
    gate = self.gate_in(jnp.concatenate([q_BxLxD, value_BxLxK], -1)) if c.gating else None
    score_BxLxK = bind(c.binding, query_BxLxK, select_1x1xK)
    return SeedInputs(key_BxLxK.astype(self.state_dtype), value_BxLxK, query_BxLxK, score_BxLxK, gate)

  def gates(self, state: SeedState, inputs: SeedInputs) -> jax.Array:
    """g [B, S] of one token from the state before its write; 1 without gating, which keeps only the newest item."""
    if not self.config.gating: return jnp.ones(state.m_BxSxK.shape[:2], self.state_dtype)
    weights = [weight.astype(self.state_dtype) for weight in self.gate_weights]
    return ops.write_gate(state.m_BxSxK, inputs.gate_BxLxD.astype(self.state_dtype), weights)

  def superpose(self, state: SeedState, inputs: SeedInputs) -> jax.Array:
    """The slots [B, S, K] after the write of one token and before their norm."""
    c = self.config
    value_BxK = inputs.value_BxLxK.astype(self.state_dtype)
    gate_BxS = self.gates(state, inputs)
    return ops.superpose(c.binding, state.m_BxSxK, inputs.key_BxLxK, value_BxK, gate_BxS=gate_BxS, decay=c.decay)

  def write(self, state: SeedState, inputs: SeedInputs) -> SeedState:
    """norm((1 - g) (1 - decay) m + g bind(p, v))."""
    c = self.config
    scale = self.scale.astype(self.state_dtype) if c.norm != 'none' else None
    return SeedState(ops.normalise_slots(c.norm, c.binding, self.superpose(state, inputs), scale))

  def read(self, state: SeedState, inputs: SeedInputs) -> jax.Array:
    """c [B, K], the read of one token; exactly 0 from an empty memory."""
    return self._retrieve(state, inputs)[0]

  def _retrieve(self, state, inputs):
    return ops.retrieve(self.config.binding, state.m_BxSxK, inputs.query_BxLxK, inputs.score_BxLxK)

  def parallel(self, state, inputs, mask_BxL=None, *, write_mask_BxL=None, reset_BxL=None):
    """The scan of `step`, keeping one state in 64 for the gradient."""
    state, (y_BxLxE, _) = self._run(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    return state, y_BxLxE

  def _run(self, state, inputs, mask_BxL, *, write_mask_BxL, reset_BxL):
    """(state, (y, what `aux` and `statistics` need of each token)); what nobody uses is never computed."""
    def token(state, token):
      inputs, mask_B, write_mask_B, reset_B = token
      new, y_BxK = self.step(state, inputs, mask_B, write_mask_B=write_mask_B, reset_B=reset_B)
      reset_B = real_resets(reset_B, mask_B)
      if reset_B is not None: state = where_rows(reset_B, jax.tree.map(jnp.zeros_like, state), state)
      return new, (y_BxK, self._watch(state, new, inputs))
    return ops.remat_scan(token, state, (inputs, mask_BxL, write_mask_BxL, reset_BxL), every=REMAT_EVERY)

  def _watch(self, old, new, inputs):
    c, value_BxK = self.config, inputs.value_BxLxK.astype(self.state_dtype)
    still = jax.lax.stop_gradient(dict(
        gate_BxLxS=self.gates(old, inputs), pick_BxLxS=self._retrieve(old, inputs)[1],
        state_norm_BxLxS=ops.slot_sizes(self.superpose(old, inputs))))
    if not c.immediate: return still
    return still | {'immediate_BxL': ops.immediate_error(c.binding, new.m_BxSxK, inputs.key_BxLxK, value_BxK)}

  def mix(self, x_BxLxD, state, *, position_BxL, mask_BxL=None, write_mask_BxL=None, reset_BxL=None, key=None,
          collect=False, **unused):
    """(c [B, L, K], state, aux); as in the base class, with dropout in `project` and losses taken inside the scan."""
    del unused
    if reset_BxL is None: reset_BxL = position_BxL == 0
    if mask_BxL is not None: x_BxLxD = jnp.where(mask_BxL[..., None], x_BxLxD, 0)     # NaN in padding ends here
    inputs = self.project(x_BxLxD, position_BxL, key=key)
    state, (y_BxLxK, watched) = self._run(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    context = dict(watched=watched, written_BxL=both(mask_BxL, write_mask_BxL))
    aux = self.aux(state, inputs, y_BxLxK, **context)
    if collect: aux['statistics'] = self.statistics(state, inputs, y_BxLxK, **context)
    return y_BxLxK, state, aux

  def aux(self, state: SeedState, inputs: SeedInputs, y_BxLxE: jax.Array, *, watched: dict, written_BxL=None) -> Aux:
    """'penalty' = immediate * mean over written tokens of the immediate error; monitors without gradient.

    The penalty is meant for training only: the trainer adds it, evaluation does not.
    """
    del state, inputs
    gate_BxLxS = watched['gate_BxLxS'].astype(jnp.float32)
    weight_BxL = jnp.ones(gate_BxLxS.shape[:2]) if written_BxL is None else written_BxL.astype(jnp.float32)
    def mean(a_BxL):
      a_BxL = jnp.where(weight_BxL > 0, a_BxL.astype(jnp.float32), 0)
      return a_BxL.sum() / jnp.maximum(weight_BxL.sum(), 1)
    keep_BxLxS = (1 - gate_BxLxS) * (1 - self.config.decay)
    horizon_BxL = jnp.mean(-1 / jnp.log(jnp.clip(keep_BxLxS, 1e-6, 1 - 1e-6)), -1)
    aux = {'penalty': jnp.zeros((), jnp.float32), 'confidence': mean(jax.lax.stop_gradient(confidence(y_BxLxE))),
           'gate_mean': mean(gate_BxLxS.mean(-1)), 'keep_horizon': mean(horizon_BxL),
           'effective_slots': ops.effective_slots(jnp.where(weight_BxL[..., None] > 0, gate_BxLxS, 0), weight_BxL)}
    if not self.config.immediate: return aux
    immediate = mean(watched['immediate_BxL'])
    return aux | {'penalty': self.config.immediate * immediate, 'immediate': jax.lax.stop_gradient(immediate)}

  def statistics(self, state: SeedState, inputs: SeedInputs, y_BxLxE: jax.Array, *, watched: dict,
                 written_BxL=None) -> dict[str, jax.Array]:
    """Gates, picks and slot norms (before the norm of the write) of each token, for the figures."""
    del written_BxL
    return super().statistics(state, inputs, y_BxLxE) | {n: a for n, a in watched.items() if n != 'immediate_BxL'}

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """W_o [q; c]."""
    q_BxLxD = self.query(x_BxLxD)
    return self.out(jnp.concatenate([q_BxLxD, y_BxLxE.astype(q_BxLxD.dtype)], -1))
