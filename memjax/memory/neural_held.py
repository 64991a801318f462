"""What a neural memory holds between calls."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from memjax.ops import neural as ops
from memjax.ops.neural_scan import Told
from memjax.ops.neural_steps import Coefficients, for_pairs

RECENT = 0.99                              # share of the running means that a token keeps
RUNNING = ('weight', 'loss', 'surprise', 'surprise_square', 'clipped', 'written')     # written: with a surprise gate alone


@struct.dataclass
class Pending:
  """Tokens of a chunk that is not complete, zeros where there is none: factors by name [B, H, C, width], keys, values and gates, and
  their coefficients push [B, H, Q, C] and turn - 1 [B, H, Q, Q]. Factors and push begin with the tokens of the window before the
  chunk; factors of the pairs of a token follow each other. Where writes wait for the whole chunk no factors; queries where they mix."""
  a: dict
  d: dict
  key_BxCxHxK: jax.Array
  value_BxCxHxV: jax.Array
  gate_BxCxGxH: jax.Array
  push_BxHxQxC: Any
  turn_BxHxQxQ: Any
  query_BxCxHxK: Any = None

  @property
  def turn(self) -> jax.Array:
    """turn [B, H, Q, Q]."""
    return self.turn_BxHxQxQ + jnp.eye(self.turn_BxHxQxQ.shape[-1], dtype=self.turn_BxHxQxQ.dtype)[None, None]

  def reads(self, length: int = 1) -> Coefficients:
    """Coefficients of tokens that read the weights after all pending ones."""
    B, H, Q, C = self.push_BxHxQxC.shape
    made = Coefficients(jnp.broadcast_to(self.push_BxHxQxC[:, :, :1], (B, H, length, C)),
                        jnp.broadcast_to(self.turn[:, :, 0, :, None], (B, H, Q, length)), self.turn, self.push_BxHxQxC)
    return for_pairs(made, next(iter(self.a.values())).shape[2] // C)

  def factors(self) -> ops.Factors:
    """The factors, without what is told of them."""
    return ops.Factors(self.a, self.d, None, None, None)


@struct.dataclass
class NeuralState:
  """Fast weights minus their start, then momenta, each [B, H, ...], by name; slot: pending tokens; tails of the streams; running means
  of `RUNNING`. In modes token and exact the pending tokens; in mode block, whose weights take every token at once, those of the
  chunk's start (minus the learned ones) from which it reads. halo: the tokens of the window before the chunk. In mode chunk_gates
  the anchor is where gradients are taken, if not at the learned start, for a number of chunks, of which count are over."""
  fast: dict
  slot_B: jax.Array
  tail: dict
  running_BxHxY: jax.Array
  pending: Any = None
  anchor: Any = None
  halo: Any = None
  count_B: Any = None


def watched(told: Told, count: int) -> jax.Array:
  """The first `count` of what `RUNNING` averages, of each token [..., Y], without gradient."""
  one = jnp.ones_like(told.loss)
  written = told.kept > 0
  parts = one, told.loss, told.norm, told.norm ** 2, ((told.kept < 1) & written).astype(one.dtype), written.astype(one.dtype)
  return jax.lax.stop_gradient(jnp.stack(parts[:count], -1))
