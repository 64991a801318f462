"""Where the tokens of a call go in chunks: slots count the written tokens of a document, so that cuts and padding move nothing."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.counts import cumulate


class Layout(NamedTuple):
  """Tokens of a row in N chunks of C slots. The source is C pending tokens followed by the L tokens of the call.

  source [B, N C]: which of them fills a slot, C + L = none. place [B, C + L]: the slot of each, N C = none. full, fresh [B, N]: is a
  chunk complete, does a document start with it. slot [B]: pending tokens after the call, last [B]: their chunk. begins [B]: the row
  starts with a document. fits: all tokens have a slot.
  """
  source: jax.Array
  place: jax.Array
  full: jax.Array
  fresh: jax.Array
  slot: jax.Array
  last: jax.Array
  begins: jax.Array
  fits: jax.Array
  plain: bool = False


def lay_out(written_BxL: jax.Array, reset_BxL: jax.Array, slot_B: jax.Array, *, chunk: int, count: int) -> Layout:
  """The layout of written tokens, of which `reset` start documents; `slot` tokens are pending. A document opens a chunk of its own."""
  B, L = written_BxL.shape
  reset_BxL, none = reset_BxL & written_BxL, count * chunk
  order_BxL = cumulate(written_BxL) - 1
  begins_B = jnp.any(reset_BxL & (order_BxL == 0), 1)
  slot_B = jnp.where(begins_B, 0, slot_B)
  base_BxL = cumulate(jnp.where(reset_BxL, order_BxL, -slot_B[:, None]), jnp.maximum)
  spot_BxL = (order_BxL - base_BxL) % chunk
  number_BxL = cumulate(written_BxL & (spot_BxL == 0)) - (slot_B == 0)[:, None]
  place_BxL = jnp.where(written_BxL, number_BxL * chunk + spot_BxL, none)
  fits = jnp.all((place_BxL < none) | ~written_BxL)
  spots = jnp.arange(chunk, dtype=jnp.int32)[None]
  place = jnp.minimum(jnp.concatenate([jnp.where(spots < slot_B[:, None], spots, none), place_BxL], 1), none)
  source = jnp.full((B, none), chunk + L, jnp.int32).at[jnp.arange(B)[:, None], place].set(
      jnp.arange(chunk + L, dtype=jnp.int32)[None], mode='drop')
  filled_BxNxC = (source < chunk + L).reshape(B, count, chunk)
  opener_BxN = source[:, ::chunk]
  padded = jnp.pad(reset_BxL, ((0, 0), (chunk, 1)))
  fresh = jnp.take_along_axis(padded, opener_BxN, 1)
  end_B = jnp.max(jnp.where(written_BxL, place_BxL, -1), 1)
  slot = jnp.where(end_B < 0, slot_B, (end_B + 1) % chunk)
  return Layout(source, place, filled_BxNxC.all(-1), fresh, slot, jnp.clip(end_B // chunk, 0, count - 1), begins_B, fits)


@jax.custom_vjp
def rearrange(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
  """x [B, S, ...] at `source` [B, M], zeros where that is S; `place` [B, S] is the inverse, by which the gradient is gathered too."""
  del place
  return _gather(x, source)


def _gather(x, index):
  return jax.vmap(lambda row, at: row.at[at].get(mode='fill', fill_value=0))(x, index)


rearrange.defvjp(lambda x, source, place: (_gather(x, source), place), lambda place, g: (_gather(g, place), None, None))
