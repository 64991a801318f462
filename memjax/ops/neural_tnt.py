"""One global memory in large chunks and local ones in small chunks that start anew at every shard (TNT, arXiv 2511.07343).

    o_t = M(q_t; V at the start of t's global chunk) + sum_n M(p_{n,t}; W^(n)_t)
    p_{n,t} = sum over tokens tau of t's local chunk up to t of k_tau (k_tau . q_t) / |k_tau|^2

Shards do not depend on each other: the local memories run over all of them at once, as rows of a larger batch, so that a scan has
shard / chunk steps instead of length / chunk.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.neural import Rule, Weights
from memjax.ops.neural_scan import mix
from memjax.ops.neural_steps import Gates


class Part(NamedTuple):
  """One memory: its rule, learned start (fast tensors [B, H, ...]), gates of every token [B, H, L] and chunk length."""
  rule: Rule
  start: Weights
  gates: Gates
  chunk: int


def project_query(query: jax.Array, key: jax.Array, write: jax.Array, chunk: int) -> jax.Array:
  """p [B, H, L, K]: each query seen through the written keys of its chunk up to its token. L must be a multiple of `chunk`."""
  cut = lambda a: a.reshape(*a.shape[:2], -1, chunk, *a.shape[3:])
  q, k, write = cut(query), cut(key), cut(write)
  near = jnp.einsum('bhntk,bhnik->bhnti', q, k) * jnp.tril(jnp.ones((chunk, chunk), q.dtype)).reshape(1, 1, 1, chunk, chunk)
  size = jnp.maximum(jnp.sum(k * k, -1), 1e-12)
  return jnp.einsum('bhnti,bhnik->bhntk', near * (write / size)[..., None, :].astype(q.dtype), k).reshape(query.shape)


def project_pending(query: jax.Array, key: jax.Array, write: jax.Array) -> jax.Array:
  """p [B, L, H, K]: every query seen through all written keys [B, C, H, K], of which `write` [B, C, H] tells."""
  near = jnp.einsum('blhk,bchk->blhc', query, key)
  size = jnp.maximum(jnp.sum(key * key, -1), 1e-12)
  return jnp.einsum('blhc,bchk->blhk', near * jnp.swapaxes(write / size, 1, 2)[:, None], key)


def tnt(tokens: tuple, whole: Part, local: tuple[Part, ...], *, shard: int, project: bool = True) -> jax.Array:
  """y [B, H, L, V] of L tokens = (query, key, value) [B, H, L, width], from the learned weights of all memories.

  `whole` is read at the start of its chunk (mode 'block'); those of `local` read every token and start anew at each shard. `project`:
  local queries are `project_query`. UserError where a shard is not whole chunks of every memory: earlier tokens of the same global
  chunk would be seen by none of them.
  """
  for part in (whole, *local):
    if shard % part.chunk: raise UserError(f'shard={shard} is not a multiple of chunk={part.chunk}')
  query, key, value = tokens
  B, H, length = query.shape[:3]
  fresh = lambda part, rows: {name: jnp.zeros((*leaf.shape[:2], part.rule.levels, *leaf.shape[2:]), leaf.dtype)
                              for name, leaf in rows.items()}
  y = mix(whole.rule, whole.start, fresh(whole, whole.start.fast), tokens, gates=whole.gates, chunk=whole.chunk)[1]
  count = -(-length // shard)
  def fold(a):
    a = jnp.pad(a, [(0, 0)] * 2 + [(0, count * shard - length)] + [(0, 0)] * (a.ndim - 3))
    return jnp.moveaxis(a.reshape(B, H, count, shard, *a.shape[3:]), 2, 1).reshape(B * count, H, shard, *a.shape[3:])
  for part in local:
    gates, rows = jax.tree.map(fold, part.gates), {name: jnp.repeat(a, count, 0) for name, a in part.start.fast.items()}
    q, k, v = map(fold, (query, key, value))
    if project: q = project_query(q, k, gates.write, part.chunk)
    own = mix(part.rule, Weights(rows, part.start.slow), fresh(part, rows), (q, k, v), gates=gates, chunk=part.chunk)[1]
    own = jnp.moveaxis(own.reshape(B, count, H, shard, -1), 1, 2).reshape(B, H, count * shard, -1)
    y += own[:, :, :length]
  return y
