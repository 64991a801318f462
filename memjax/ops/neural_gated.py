"""Writes of surprising tokens alone: a token whose gradient is small, or small for its text, leaves the memory as it is.

    z_t = (N_t - mu_{t-1}) / sqrt(var_{t-1} + eps)       writes where z_t >= threshold, or N_t >= threshold

N_t is the norm of the gradient of token t at the anchor, over one row and head alone; mu and var are running means over the tokens of
its document before it, written or not. Its first token writes. Gates depend on gradients, so that coefficients are found inside the scan.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.neural import Rule, Tokens, Weights, anchor, commit, factors, finish
from memjax.ops.neural_reads import read_anchor, read_tokens
from memjax.ops.neural_scan import group_size, tell, where_rows
from memjax.ops.neural_steps import Gates, coefficients, read_before

EPSILON = 1e-6


class Surprise(NamedTuple):
  """What may write: 'z' or 'norm' at or above the threshold; the share of the running means that a token keeps."""
  kind: str
  threshold: float
  keep: float


class GatedChunk(NamedTuple):
  """One chunk: queries [B, H, C, K], writes, gates [B, H, C]; which tokens are judged here (the others were) [B, C]; is it complete, does
  a document start with it, [B]."""
  query: jax.Array
  tokens: Tokens
  gates: Gates
  new: jax.Array
  full: jax.Array
  fresh: jax.Array


def opens(surprise: Surprise, norm: jax.Array, means: jax.Array) -> jax.Array:
  """Whether tokens of these gradient norms may write, after running sums [..., 3] of (1, N, N^2) before each."""
  if surprise.kind == 'norm': return norm >= surprise.threshold
  weight, total, square = (means[..., n] for n in range(3))
  size = jnp.maximum(weight, 1e-12)
  mean = total / size
  z = (norm - mean) * jax.lax.rsqrt(jnp.maximum(square / size - mean * mean, 0) + EPSILON)
  return (z >= surprise.threshold) | (weight == 0)


def running(surprise: Surprise, norm: jax.Array, new: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(running sums [B, H, C, 3] before each token, those [B, H, 3] after all) of norms [B, H, C], of which `new` [B, C] count."""
  each = jnp.stack([jnp.ones_like(norm), norm, norm * norm], -1)
  counts = new[:, None, :, None]
  old, add = jnp.where(counts, surprise.keep, 1).astype(norm.dtype), jnp.where(counts, (1 - surprise.keep) * each, 0)
  join = lambda one, two: (one[0] * two[0], one[1] * two[0] + two[1])
  kept, made = jax.lax.associative_scan(join, (jnp.broadcast_to(old, add.shape), add), axis=2)
  after = kept * means[:, :, None] + made
  return jnp.concatenate([means[:, :, None], after[:, :, :-1]], 2), after[:, :, -1]


def gated_chunk(rule: Rule, start: Weights, carry: tuple, chunk: GatedChunk, *, surprise: Surprise) -> tuple[tuple, tuple]:
  """((memory, running sums), (y, told)); told.kept is 0 for tokens that did not write. The memory of mode 'block' is (anchor, memory)."""
  memory, means = where_rows(chunk.fresh, jax.tree.map(jnp.zeros_like, carry), carry)
  is_block, size = rule.mode == 'block', chunk.query.shape[2]
  fixed, memory = memory if is_block else (None, memory)
  held = {name: start.fast[name] + a for name, a in fixed.items()} if is_block else anchor(start, memory)
  found = factors(rule, held, start.slow, chunk.tokens)
  told = tell(rule, found, size)
  norm = jax.lax.stop_gradient(told.norm)
  before, after = running(surprise, norm, chunk.new, means)
  write = chunk.gates.write & (opens(surprise, norm, before) | ~chunk.new[:, None])
  made = coefficients(rule.momentum, chunk.gates._replace(write=write), inside=not is_block, pairs=rule.pairs)
  new = commit(rule, start, memory, found=found, coefficients=made)
  if is_block:
    y = read_anchor(rule, start, {name: (a,) for name, a in fixed.items()}, chunk.query)
    if rule.finishes: new = where_rows(chunk.full, finish(rule, start, new), new)
    memory = where_rows(chunk.full, {name: levels[0] for name, levels in new.items()}, fixed), new
  else:
    seen = read_before(made) if rule.read == 'before' else made
    y = read_tokens(rule, start, memory, chunk.query, found=found, coefficients=seen)
    memory = where_rows(chunk.full, new, memory)
  told = told._replace(kept=jnp.where(write, told.kept, 0))
  return (memory, jnp.where(chunk.full[:, None, None], after, means)), (y.astype(chunk.query.dtype), told)


def scan_gated(rule: Rule, start: Weights, carry: tuple, chunks: GatedChunk, *, surprise: Surprise, group: int = 0,
               detach: int = 0) -> tuple[Any, tuple]:
  """(carry, (y [N, B, H, C, V], told)) of N chunks; groups as in `scan_chunks`."""
  count = chunks.full.shape[0]
  size = count if group < 0 else group_size(count, group)
  def one(carry, item):
    number, chunk = item
    if detach: carry = jax.tree.map(lambda a: jnp.where(number % detach == 0, jax.lax.stop_gradient(a), a), carry)
    return gated_chunk(rule, start, carry, chunk, surprise=surprise)
  wrap = (lambda f: f) if group < 0 else (lambda f: jax.checkpoint(f, prevent_cse=False))
  cut = lambda a: jnp.pad(a, [(0, -count % size)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])
  carry, out = jax.lax.scan(wrap(lambda carry, items: jax.lax.scan(wrap(one), carry, items)), carry,
                            jax.tree.map(cut, (jnp.arange(count), chunks)))
  return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], out)
