"""The tokens of a call in segments: what a segment is told, and the scans over segments and over tokens."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from memjax.ops.nested_scan import nested_scan
from memjax.ops.neural_layout import Layout, rearrange
from memjax.ops.neural_scan import group_size


@struct.dataclass
class ContextTokens:
  """Tokens of one segment: queries, keys and values of attention, queries to the memory or keys and values of what it read, positions;
  which exist, which write; does a document start with them; the input, where the memory learns from it too; does the memory stay as
  it is, is what it reads replaced by zeros."""
  query_BxTxHxK: jax.Array
  key_BxTxGxK: jax.Array
  value_BxTxGxK: jax.Array
  recall: Any                              # [B, T, H, K], or two [B, T, G, K]
  position_BxT: jax.Array
  real_BxT: jax.Array
  written_BxT: jax.Array
  fresh_B: jax.Array
  input_BxTxD: Any = None
  frozen: bool = struct.field(default=False, pytree_node=False)
  silent: bool = struct.field(default=False, pytree_node=False)


def put(ring_BxGxSxK: jax.Array, new_BxTxGxK: jax.Array, place_BxT: jax.Array, written_BxT: jax.Array) -> jax.Array:
  """The ring with written tokens in their slots, of one token or of all slots."""
  new = new_BxTxGxK.astype(ring_BxGxSxK.dtype)
  if new.shape[1] > 1: return jnp.where(written_BxT[:, None, :, None], jnp.swapaxes(new, 1, 2), ring_BxGxSxK)
  slot_B = jnp.where(written_BxT[:, 0], place_BxT[:, 0], ring_BxGxSxK.shape[2])
  return ring_BxGxSxK.at[jnp.arange(slot_B.shape[0]), :, slot_B].set(new[:, 0], mode='drop')


def cut_rows(see_BxTxM: jax.Array, at: Any, size: int) -> jax.Array:
  """Rows [at, at + size) of a visibility; beyond its end nothing is seen."""
  return jax.lax.dynamic_slice_in_dim(jnp.pad(see_BxTxM, ((0, 0), (0, size), (0, 0))), at, size, 1)


def scan_segments(body: Any, carry: Any, tokens: ContextTokens, *, layout: Layout, group: int) -> tuple[Any, Any]:
  """(carry, outputs [B, L, ...]) of `body(carry, (number, tokens))` over segments; the gradient recomputes each, and groups of them
  (`group` 0: near the root of their number; -1: it keeps everything)."""
  N = layout.full.shape[1]
  size = N if group < 0 else group_size(N, group)
  items = jnp.arange(N), _cut(tokens, layout)
  items = jax.tree.map(lambda a: jnp.pad(a, [(0, -N % size)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:]), items)
  one = body if group < 0 else jax.checkpoint(body, prevent_cse=False)
  scan = lambda carry, items: jax.lax.scan(one, carry, items)
  carry, out = jax.lax.scan(scan if group < 0 else jax.checkpoint(scan, prevent_cse=False), carry, items)
  return carry, jax.tree.map(lambda a: _back(a.reshape(-1, *a.shape[2:])[:N], layout), out)


def all_segments(pass_on: Any, body: Any, carry: Any, tokens: ContextTokens, *, layout: Layout, group: int) -> tuple[Any, Any]:
  """The same, segments side by side: `pass_on(carry, tokens)` gives the carry after a segment without its outputs."""
  pieces = _cut(tokens, layout)
  carry, starts = jax.lax.scan(lambda carry, tokens: (pass_on(carry, tokens), carry), carry, pieces)
  one = lambda start, number, tokens: body(start, (number, tokens))[1]
  out = jax.vmap(one if group < 0 else jax.checkpoint(one))(starts, jnp.arange(layout.full.shape[1]), pieces)
  return carry, jax.tree.map(lambda a: _back(a, layout), out)


def _cut(tokens: ContextTokens, layout: Layout) -> ContextTokens:
  """The tokens by segments, [N, B, S, ...]."""
  B, N = layout.full.shape
  S = layout.source.shape[1] // N
  def cut(a):
    a = rearrange(jnp.concatenate([jnp.zeros((B, S, *a.shape[2:]), a.dtype), a], 1), layout.source, layout.place)
    return jnp.moveaxis(a.reshape(B, N, S, *a.shape[2:]), 1, 0)
  return jax.tree.map(cut, tokens.replace(fresh_B=None)).replace(fresh_B=jnp.swapaxes(layout.fresh, 0, 1))


def _back(a: jax.Array, layout: Layout) -> jax.Array:
  """Outputs [N, B, S, ...] at their tokens, [B, L, ...]."""
  N, B, S = a.shape[:3]
  return rearrange(jnp.moveaxis(a, 0, 1).reshape(B, N * S, *a.shape[3:]), layout.place, layout.source)[:, S:]


def scan_tokens(body: Any, carry: Any, tokens: ContextTokens) -> tuple[Any, Any]:
  """(carry, outputs [B, L, ...]) of `body` over single tokens."""
  def step(carry, item):
    number, token = item
    token = jax.tree.map(lambda a: a[:, None], token.replace(fresh_B=None)).replace(fresh_B=token.fresh_B)
    carry, out = body(carry, (number, token))
    return carry, jax.tree.map(lambda a: a[:, 0], out)
  items = jnp.arange(tokens.real_BxT.shape[1]), jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens)
  carry, out = nested_scan(step, carry, items)
  return carry, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), out)
