"""What pieces of a sequence hand to each other where each lies on a device of its own: for use inside of `jax.shard_map`.

Piece i of n holds tokens [i L / n, (i + 1) L / n) and is device i of the mesh axis `axis`. States before the first piece are
the same on all devices, and so are those after the last.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def has_whole_rows() -> bool:
  """Whether a kernel sees all of the rows that it is given: on one device, or inside of what each does with its own."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.size <= 1 or set(mesh.axis_names) <= set(mesh.manual_axes)


def from_before(left: Any, first: Any, axis: str) -> Any:
  """What the piece before this one left; `first` on the first piece."""
  size, is_first = jax.lax.axis_size(axis), jax.lax.axis_index(axis) == 0
  moved = jax.lax.ppermute(left, axis, [(i, i + 1) for i in range(size - 1)])
  return jax.tree.map(lambda one, other: jnp.where(is_first, one, other), first, moved)


def from_piece(x: Any, axis: str, number: int = -1) -> Any:
  """What one piece holds (-1: the last), on all of them."""
  mine = jax.lax.axis_index(axis) == number % jax.lax.axis_size(axis)
  def one(a):
    wide = a.astype(jnp.int32) if a.dtype == bool else a
    return jax.lax.psum(jnp.where(mine, wide, 0), axis).astype(a.dtype)
  return jax.tree.map(one, x)


def hand_over(decay: jax.Array, left: jax.Array, state: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
  """(state before this piece, state after the last) of x_i = decay_i x_{i-1} + left_i over the pieces, from `state`.

  `left` is what a piece leaves of an empty state, `decay` what it keeps of a given one. log2 n rounds between neighbours at
  distance 1, 2, 4, .. (Hillis and Steele 1986), then one step to the next piece.
  """
  size, me, distance = jax.lax.axis_size(axis), jax.lax.axis_index(axis), 1
  while distance < size:
    earlier = jax.lax.ppermute((decay, left), axis, [(i, i + distance) for i in range(size - distance)])
    left = left + decay * earlier[1]
    decay = jnp.where(me >= distance, decay * earlier[0], decay)
    distance *= 2
  after = left + decay * state
  return from_before(after, state, axis), from_piece(after, axis)


def in_turn(run: Callable[[Any], tuple[Any, jax.Array]], state: Any, axis: str) -> tuple[Any, jax.Array]:
  """(state after the last piece, y of this one) of run(state) -> (state, y) by one piece after the other.

  For recurrences that have no sum over pieces: time is that of one device, memory that of a piece.
  """
  size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  run = jax.checkpoint(run)
  def turn(carry, number):
    state, y = carry
    state, y = jax.lax.cond(me == number, lambda state, y: run(state), lambda state, y: (state, y), state, y)
    return (jax.lax.ppermute(state, axis, [(i, (i + 1) % size) for i in range(size)]), y), None
  shape = jax.eval_shape(run, state)[1]
  (state, y), _ = jax.lax.scan(turn, (state, jnp.zeros(shape.shape, shape.dtype)), jnp.arange(size))
  return from_piece(state, axis, 0), y
