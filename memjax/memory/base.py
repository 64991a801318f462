"""The memory protocol: a fixed-shape state, a way to write one token into it, a way to read it. The rest is derived here.

An empty memory is all zeros. Axis 0 of every state leaf is the batch and rows never mix. The scan of `step` is the
specification of `parallel`; a kind overrides `parallel` only with something that equals it and is measured to be faster.
"""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.layers.lora import Lora
from memjax.memory.pieces import mesh_of, over_pieces

State = Any
Inputs = Any
Aux = dict[str, Any]


def where_rows(mask_B: jax.Array | None, new: State, old: State) -> State:
  """`new` in the rows where the mask holds, `old` elsewhere; `new` for mask None."""
  if mask_B is None: return new
  return jax.tree.map(lambda n, o: jnp.where(mask_B.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old)


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
  """Conjunction of two masks, None meaning all True."""
  if a is None or b is None: return b if a is None else a
  return a & b


def real_resets(reset_BxL: jax.Array | None, mask_BxL: jax.Array | None) -> jax.Array | None:
  """Resets at tokens that exist."""
  return None if reset_BxL is None else both(reset_BxL, mask_BxL)


def only_real(x_BxLxD: jax.Array, mask_BxL: jax.Array | None) -> jax.Array:
  """x with masked tokens set to zero: NaN in padding ends here."""
  return x_BxLxD if mask_BxL is None else jnp.where(mask_BxL[..., None], x_BxLxD, 0)


class Memory(nn.Module):
  """Base of every memory. Kinds give `init_state`, `project`, `write`, `read` and `readout`.

  config: the kind's dataclass; width: D; std: of matrices at initialisation, 0 = 1/sqrt(fan-in); grafted: the output
  projection starts at zero, so that a host is left bit-equal; out_std: of the output projection of attention, 0 = std;
  lora: low-rank changes of the linear maps.
  """
  config: Any
  width: int
  dtype: Any = jnp.float32
  std: float = 0.0
  grafted: bool = False
  out_std: float = 0.0
  lora: Lora = Lora()

  chunk = 1            # a fast form may be entered only at position % chunk == 0
  order = 'after'      # read 'after' or 'before' the write of the same token
  reaches_back = True  # some earlier token can change the read of a later one
  wants_stream = False # `project` also takes the residual stream before the norm
  has_pieces = True    # where rows or their tokens lie on several devices, each reads its own; False: that is left to the compiler

  @property
  def state_dtype(self) -> Any:
    """float32, or float64 under float64 compute."""
    return jnp.promote_types(jnp.float32, self.dtype)

  def init_state(self, batch: int, max_len: int = 0) -> State:
    """The empty state: zeros, from shapes alone. Only full attention uses `max_len`, the tokens it can hold."""
    raise NotImplementedError

  def project(self, x_BxLxD: jax.Array, position_BxL: jax.Array) -> Inputs:
    """The big matmuls, all tokens at once; every leaf leads with [B, L]."""
    raise NotImplementedError

  def write(self, state: State, inputs: Inputs) -> State:
    """The state after one token (leaves of `inputs` lead with [B])."""
    raise NotImplementedError

  def read(self, state: State, inputs: Inputs) -> jax.Array:
    """y [B, E] of one token; never changes the state."""
    raise NotImplementedError

  def readout(self, x_BxLxD: jax.Array, y_BxLxE: jax.Array) -> jax.Array:
    """Norm, gate and output projection, [B, L, D]."""
    raise NotImplementedError

  def flush(self, state: State) -> State:
    """The state after what waits for the end of its chunk was written; in most memories nothing does."""
    return state

  def prepare(self, banks: dict | None = None) -> Any:
    """What depends on parameters alone (`banks`: tables that layers share, by name); computed once a call, or once for all
    calls by who keeps it. None: nothing."""
    del banks

  def aux(self, state: State, inputs: Inputs, y_BxLxE: jax.Array, **context) -> Aux:
    """float32 scalars: monitors without gradient and, in kinds that have auxiliary losses, their weighted sum 'penalty'."""
    del state, inputs, context
    return {'confidence': jax.lax.stop_gradient(confidence(y_BxLxE).mean())}

  def statistics(self, state: State, inputs: Inputs, y_BxLxE: jax.Array, **context) -> dict[str, jax.Array]:
    """Arrays for the figures of `analyze`; traced only when asked for."""
    del state, inputs, context
    return {'read_norm_BxL': jnp.linalg.norm(y_BxLxE.astype(jnp.float32), axis=-1)}

  def step(self, state: State, inputs: Inputs, mask_B: jax.Array | None = None, *,
           write_mask_B: jax.Array | None = None, reset_B: jax.Array | None = None, **prepared) -> tuple[State, jax.Array]:
    """One token: (state, y [B, E]). Masked rows keep their state bit for bit and read 0. `prepared` goes to `read`."""
    reset_B = real_resets(reset_B, mask_B)
    if reset_B is not None: state = where_rows(reset_B, jax.tree.map(jnp.zeros_like, state), state)
    new = where_rows(both(mask_B, write_mask_B), self.write(state, inputs), state)
    y_BxE = self.read(new if self.order == 'after' else state, inputs, **prepared)
    return new, y_BxE if mask_B is None else jnp.where(mask_B[:, None], y_BxE, 0)

  def scan(self, state: State, inputs: Inputs, mask_BxL: jax.Array | None = None, *,
           write_mask_BxL: jax.Array | None = None, reset_BxL: jax.Array | None = None, **prepared) -> tuple[State, jax.Array]:
    """THE SPECIFICATION of `parallel`: `lax.scan` of `step` over the tokens."""
    def body(state, token):
      inputs, mask_B, write_mask_B, reset_B = token
      return self.step(state, inputs, mask_B, write_mask_B=write_mask_B, reset_B=reset_B, **prepared)
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (inputs, mask_BxL, write_mask_BxL, reset_BxL))
    state, y_LxBxE = jax.lax.scan(body, state, tokens)
    return state, jnp.swapaxes(y_LxBxE, 0, 1)

  def parallel(self, state: State, inputs: Inputs, mask_BxL: jax.Array | None = None, *,
               write_mask_BxL: jax.Array | None = None, reset_BxL: jax.Array | None = None, **prepared) -> tuple[State, jax.Array]:
    """All tokens: (state, y [B, L, E]); equals `scan`."""
    return self.scan(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL, **prepared)

  def hands_over(self, length: int, **flow: jax.Array | None) -> bool:
    """Whether pieces of `length` tokens on different devices can be read at the same time, by `piece`; no: in turn."""
    del length, flow
    return False

  def piece(self, state: State, inputs: Inputs, *, axis: str, **flow: jax.Array | None) -> tuple[State, jax.Array]:
    """`parallel` of one piece of the rows, inside of a `shard_map` over `axis`: state before the first and after the last piece."""
    raise NotImplementedError

  def mix(self, x_BxLxD: jax.Array, state: State, *, position_BxL: jax.Array, mask_BxL: jax.Array | None = None,
          write_mask_BxL: jax.Array | None = None, reset_BxL: jax.Array | None = None, key: jax.Array | None = None,
          token_BxL: jax.Array | None = None, stream_BxLxD: jax.Array | None = None, banks: dict | None = None,
          prepared: Any = None, collect: bool = False) -> tuple[jax.Array, State, Aux]:
    """(y [B, L, E] before the readout, state, aux): what a wiring needs to weigh memories against each other.

    `stream_BxLxD` is the residual stream at the entry of the layer, `banks` the tables that layers share, `prepared` what
    `prepare` gave, where the caller kept it.
    """
    if reset_BxL is None: reset_BxL = position_BxL == 0
    stream = {'stream_BxLxD': stream_BxLxD} if self.wants_stream and stream_BxLxD is not None else {}
    inputs = self.project(x_BxLxD, position_BxL, **stream)
    prepared = self.prepare(banks) if prepared is None else prepared
    given = {} if prepared is None else {'prepared': prepared}
    if x_BxLxD.shape[1] == 1:
      first = lambda tree: jax.tree.map(lambda a: a[:, 0], tree)
      new, y_BxE = self.step(state, first(inputs), first(mask_BxL), write_mask_B=first(write_mask_BxL), reset_B=first(reset_BxL), **given)
      y_BxLxE = y_BxE[:, None]
    elif self.has_pieces and (mesh := mesh_of(*x_BxLxD.shape[:2])) and not self.is_initializing():
      new, y_BxLxE = over_pieces(self, mesh, state, inputs, mask_BxL=mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL)
    else:
      new, y_BxLxE = self.parallel(state, inputs, mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL, **given)
    context = dict(mask_BxL=mask_BxL, write_mask_BxL=write_mask_BxL, reset_BxL=reset_BxL, key=key, token_BxL=token_BxL, **given)
    aux = self.aux(state, inputs, y_BxLxE, **context)
    if collect: aux['statistics'] = self.statistics(state, inputs, y_BxLxE, **context)
    return y_BxLxE, new, aux

  def __call__(self, x_BxLxD: jax.Array, state: State, **context) -> tuple[jax.Array, State, Aux]:
    """(y [B, L, D], state, aux) for a call of any length; keywords as in `mix`. May be cut anywhere, rows may be ragged; of no
    tokens nothing is told in aux."""
    if not x_BxLxD.shape[1] and not self.is_initializing(): return x_BxLxD.astype(self.dtype), state, {}
    x_BxLxD = only_real(x_BxLxD, context.get('mask_BxL'))
    y_BxLxE, state, aux = self.mix(x_BxLxD, state, **context)
    return self.readout(x_BxLxD, y_BxLxE), state, aux


def confidence(y_BxLxE: jax.Array) -> jax.Array:
  """Root mean square of each read before any norm, [B, L] float32; exactly 0 with finite gradient for an empty memory."""
  square_BxL = jnp.mean(jnp.square(y_BxLxE.astype(jnp.float32)), -1)
  return jnp.sqrt(square_BxL + 1e-12) - 1e-6
