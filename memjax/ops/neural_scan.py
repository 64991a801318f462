"""The scan of a neural memory over chunks: what one chunk does, and rematerialisation by groups.

Only what the next chunk needs is done one chunk after the other. Reads of tokens wait for the writes of a group: as rows of one call
they are few and large products.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.neural import Factors, Rule, Tokens, Weights, anchor, commit, factors, finish, is_matrix
from memjax.ops.neural_backend import is_fused
from memjax.ops.neural_reads import anchored_factors, find_factors, prepare, read_anchor, read_prepared
from memjax.ops.neural_steps import Coefficients, Gates, coefficients, read_before, weights
from memjax.ops.neural_whole import Whole, is_whole, read_whole, whole_coefficients, write_whole
from memjax.ops.pallas_neural import write_chunks
from memjax.ops.pallas_reads import read_prepared_fused
from memjax.ops.pallas_reads import supports as can_read

KEPT = 2 << 30                      # bytes that the memories of all chunks may take before groups are recomputed
REMAT = {'products': jax.checkpoint_policies.dots_saveable, 'nothing': jax.checkpoint_policies.nothing_saveable,
         'all': jax.checkpoint_policies.everything_saveable}
UNROLL = 4                           # on an accelerator: fewer copies of what a loop carries (1.2 to 1.4 times faster on an H200)


class Chunk(NamedTuple):
  """One chunk: queries [B, H, C, K], writes, coefficients; is it complete (its writes are committed), does a document start with
  it, [B]."""
  query: jax.Array
  tokens: Tokens
  coefficients: Coefficients
  full: jax.Array
  fresh: jax.Array


class Told(NamedTuple):
  """Of each token [..., B, H, C]: inner loss before its write, norm of its gradient, share of it that the clip left; means over its
  pairs."""
  loss: jax.Array
  norm: jax.Array
  kept: jax.Array


def tell(rule: Rule, found: Factors, size: int) -> Told:
  """What is told of the last `size` tokens of some factors."""
  own = lambda a: a if a.shape[-1] == size else a[..., -size * rule.pairs:].reshape(*a.shape[:-1], size, rule.pairs).mean(-1)
  return Told(*map(own, (found.loss, found.norm, found.kept)))


@jax.custom_vjp
def _choose(mask_B, new, old):
  return jax.tree.map(lambda n, o: jnp.where(_spread(mask_B, n), n, o), new, old)


def _spread(mask_B, like):
  return mask_B.reshape(-1, *(1,) * (like.ndim - 1))


def _choose_backward(mask_B, g):
  side = lambda is_new: jax.tree.map(lambda a: jnp.where(_spread(mask_B, a) == is_new, a, 0), g)
  return None, side(True), side(False)


_choose.defvjp(lambda mask_B, new, old: (_choose(mask_B, new, old), mask_B), _choose_backward)


def where_rows(mask_B: jax.Array, new: Any, old: Any) -> Any:
  """`new` in the rows where the mask holds, `old` elsewhere; the gradient keeps the mask of rows, not one as large as the arrays."""
  return _choose(mask_B, new, old)


def _emptied(chunk, memory):
  return where_rows(chunk.fresh, jax.tree.map(jnp.zeros_like, memory), memory)


def write_chunk(rule: Rule, start: Weights, memory: dict, chunk: Chunk) -> tuple[dict, tuple]:
  """(memory, (what its tokens read, told)) of a chunk whose tokens read the exact W_t. Its gradient keeps memories in the compute dtype;
  the rest is computed again as `rule.remat` says."""
  memory, tokens = _emptied(chunk, memory), chunk.tokens
  slim = {name: tuple(a.astype(rule.dtype) for a in levels) if is_matrix(name) else levels for name, levels in memory.items()}
  if rule.mode == 'exact':
    find = lambda memory, tokens, made: find_factors(rule, start, memory, tokens, coefficients=made)
    found = _again(rule, find)(memory, tokens, chunk.coefficients)
  else:
    weights = {name: a.astype(rule.dtype) if is_matrix(name) else a for name, a in anchor(start, memory).items()}
    found = _again(rule, lambda weights, tokens: anchored_factors(rule, weights, start.slow, tokens))(weights, tokens)
  new = commit(rule, start, memory, found=found, coefficients=chunk.coefficients, slim=slim)
  return new, (prepare(rule, start, slim if rule.decay_to == 'init' else memory, found), tell(rule, found, chunk.query.shape[2]))


def token_chunks(rule: Rule, start: Weights, memory: dict, chunks: tuple, *, unroll: int, detach: int = 0) -> tuple[dict, tuple]:
  """(memory, (y, told)) of chunks (numbers, Chunk): their writes one after the other, then the reads of all at once."""
  def write(memory, item):
    number, chunk = item
    return write_chunk(rule, start, _detached(memory, number, detach), chunk)
  fused = is_fused(rule, chunks[1].tokens, chunks[1].query.shape[3])
  if fused: memory, (seen, told) = _fused_writes(rule, start, memory, chunks, detach=detach)
  else: memory, (seen, told) = jax.lax.scan(write, memory, chunks, unroll=unroll)
  _, chunks = chunks
  N, B = chunks.full.shape
  fold = lambda tree: jax.tree.map(lambda a: a.reshape(N * B, *a.shape[2:]), tree)
  made = read_before(chunks.coefficients) if rule.read == 'before' else chunks.coefficients
  read = functools.partial(read_prepared_fused, rows=B) if fused and can_read(rule, made.weigh) else read_prepared
  y = read(rule, start, fold(seen), fold(chunks.query), coefficients=fold(made)).astype(chunks.query.dtype)
  return memory, (y.reshape(N, B, *y.shape[1:]), told)


def _fused_writes(rule, start, memory, chunks, *, detach):
  """The scan of `write_chunk` by kernels."""
  number_N, chunks = chunks
  flow = jnp.broadcast_to((number_N % detach != 0)[:, None], chunks.fresh.shape) if detach else None
  memory, (seen, (loss, norm)) = write_chunks(rule, start, memory, chunks.tokens, coefficients=chunks.coefficients, fresh=chunks.fresh,
                                              flow=flow)
  return memory, (seen, Told(loss, norm, jnp.ones_like(norm)))


def only_full(chunks: Chunk) -> Chunk:
  """The same, where a chunk that is not complete leaves the memory as it is by its coefficients."""
  made, full = chunks.coefficients, chunks.full[:, :, None, None, None]
  still = jnp.eye(made.turn.shape[-1], dtype=made.turn.dtype)[None, None, None]
  return chunks._replace(coefficients=made._replace(turn=jnp.where(full, made.turn, still), push=jnp.where(full, made.push, 0)))


def block_chunk(rule: Rule, start: Weights, memory: tuple[dict, dict], chunk: Chunk) -> tuple[tuple, tuple]:
  """((anchor, memory), (y, told)) of a chunk whose tokens read and learn at the anchor, which moves when the chunk is complete."""
  fixed, memory = _emptied(chunk, memory)
  y = read_anchor(rule, start, {name: (leaf,) for name, leaf in fixed.items()}, chunk.query)
  held = {name: start.fast[name] + leaf for name, leaf in fixed.items()}
  found = factors(rule, held, start.slow, chunk.tokens)
  new = commit(rule, start, memory, found=found, coefficients=chunk.coefficients)
  new = where_rows(chunk.full, finish(rule, start, new), new) if rule.finishes else new
  fixed = where_rows(chunk.full, {name: levels[0] for name, levels in new.items()}, fixed)
  return (fixed, new), (y.astype(chunk.query.dtype), tell(rule, found, y.shape[2]))


def whole_chunk(rule: Rule, start: Weights, memory: Whole, chunk: Chunk) -> tuple[Whole, tuple]:
  """(what the chunk leaves, (y, told)) where writes wait for the end of their chunk."""
  memory = _emptied(chunk, memory)
  new, found = write_whole(rule, start, memory, chunk.tokens, made=chunk.coefficients)
  y = read_whole(rule, start, memory, chunk.query, new=new)
  return where_rows(chunk.full, new, memory), (y.astype(chunk.query.dtype), tell(rule, found, y.shape[2]))


def group_size(count: int, group: int = 0) -> int:
  """Chunks recomputed together: `group`, or near sqrt(count) / 2 with the least padding: a chunk in work takes far more than a memory."""
  if group: return min(group, count)
  root = max(math.sqrt(count) / 2, 1)
  near = [size for size in range(1, count + 1) if root / 1.5 <= size <= root * 1.5] or [1]
  return min(near, key=lambda size: (-(-count // size) * size - count, abs(math.log(size / root)), size))


def _scanned(rule, start, memory, chunks, *, step, unroll, detach=0):
  """(memory, outputs) of chunks (numbers, Chunk), each of which reads before the next one writes."""
  def body(memory, item):
    number, chunk = item
    return step(rule, start, _detached(memory, number, detach), chunk)
  return jax.lax.scan(_again(rule, body), memory, chunks, unroll=unroll)


def _detached(memory, number, detach):
  return jax.tree.map(lambda a: jnp.where(number % detach == 0, jax.lax.stop_gradient(a), a), memory) if detach else memory


def _again(rule, body):
  """The same; its gradient keeps what `rule.remat` says, and computes the rest again."""
  return jax.checkpoint(body, prevent_cse=False, policy=REMAT[rule.remat])


def scan_chunks(rule: Rule, start: Weights, memory: Any, chunks: Chunk, *, group: int = 0, unroll: int = 0,
                detach: int = 0) -> tuple[Any, tuple]:
  """(memory, (y [N, B, H, C, V], told)) of N chunks, leaves leading with N.

  Groups of chunks are recomputed in the backward pass, so that memories are kept between groups only; `group` 0 = automatic (all are
  kept where that takes `KEPT` bytes at most), -1 = nothing is recomputed. `unroll`, chunks a step of the compiled loop, 0 = automatic.
  Chunks added to fill the last group are not complete and change nothing. `detach`: no gradient flows into the memory before every so
  many chunks, 0 = it does.
  """
  one = whole_chunk if is_whole(rule) else block_chunk if rule.mode == 'block' else None
  run = functools.partial(_scanned, step=one) if one else token_chunks
  run = functools.partial(run, rule, start, detach=detach, unroll=unroll or (1 if jax.default_backend() == 'cpu' else UNROLL))
  if one is None: chunks = only_full(chunks)
  count = chunks.full.shape[0]
  if group < 0 or (not group and count * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(memory)) <= KEPT):
    return run(memory, (jnp.arange(count), chunks))
  size = group_size(count, group)
  padded = -(-count // size) * size
  fill = lambda a: jnp.pad(a, [(0, padded - count)] + [(0, 0)] * (a.ndim - 1))
  turn = fill(chunks.coefficients.turn)
  if padded > count: turn = turn.at[count:].add(jnp.eye(rule.levels, dtype=turn.dtype).reshape((1,) * (turn.ndim - 2) + (rule.levels,) * 2))
  chunks = jax.tree.map(fill, chunks)
  chunks = chunks._replace(coefficients=chunks.coefficients._replace(turn=turn))
  cut = jax.tree.map(lambda a: a.reshape(padded // size, size, *a.shape[1:]), (jnp.arange(padded), chunks))
  memory, out = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), memory, cut)
  return memory, jax.tree.map(lambda a: a.reshape(padded, *a.shape[2:])[:count], out)


def mix(rule: Rule, start: Weights, memory: dict, tokens: tuple, *, gates: Gates, chunk: int, window: int = 1,
        gamma: jax.Array | None = None, group: int = 0, unroll: int = 0) -> tuple[dict, jax.Array]:
  """(memory, y [B, H, L, V]) of L tokens that start at a chunk's start: `neural_reference.reference` in chunks.

  The last chunk may be shorter; its writes count in the memory returned. Arguments as in `reference` and `scan_chunks`.
  """
  length = tokens[0].shape[2]
  count, pairs = -(-length // chunk), rule.pairs
  def cut(a, rows=1):
    a = jnp.pad(a, [(0, 0)] * 2 + [(0, count * chunk * rows - a.shape[2])] + [(0, 0)] * (a.ndim - 3))
    return jnp.moveaxis(a.reshape(*a.shape[:2], count, chunk * rows, *a.shape[3:]), 2, 0)
  gates = jax.tree.map(cut, gates)
  whole = is_whole(rule)
  found = whole_coefficients(rule, gates) if whole else coefficients(
      rule.momentum, gates, inside=rule.mode != 'block', window=window, pairs=pairs, gamma=gamma)
  query, key, value = cut(tokens[0]), cut(tokens[1], pairs), cut(tokens[2], pairs)
  writes = Tokens(key, value, *jax.tree.map(lambda a: jnp.repeat(a, pairs, -1), (weights(gates, window), 1 - gates.alpha, gates.rate)))
  writes = jax.tree.map(lambda a: with_halo(a, (window - 1) * pairs), writes)
  B = query.shape[1]
  chunks = Chunk(query, writes, found, jnp.ones((count, B), bool), jnp.zeros((count, B), bool))
  memory = {name: tuple(a[:, :, q] for q in range(a.shape[2])) for name, a in memory.items()}
  if whole:
    fixed = {name: jnp.zeros_like(levels[0]) for name, levels in memory.items()} if rule.refresh else None
    memory = Whole(memory, fixed, jnp.zeros((B,), weights(gates).dtype) if rule.refresh else None)
  elif rule.mode == 'block': memory = ({name: leaf[0] for name, leaf in memory.items()}, memory)
  memory, (y, _) = scan_chunks(rule, start, memory, chunks, group=group, unroll=unroll)
  if whole: memory = memory.fast
  elif rule.mode == 'block': memory = memory[1]
  memory = {name: jnp.stack(levels, 2) for name, levels in memory.items()}
  y = jnp.moveaxis(y, 0, 2)
  return memory, y.reshape(*y.shape[:2], count * chunk, -1)[:, :, :length]


def with_halo(a: jax.Array, size: int) -> jax.Array:
  """Chunks [N, B, H, C, ...] led by the last `size` entries of the chunks before them (zeros before the first)."""
  if not size: return a
  N, C = a.shape[0], a.shape[3]
  back = -(-size // C)
  earlier = [jnp.pad(a, [(n, 0)] + [(0, 0)] * (a.ndim - 1))[:N] for n in range(back, 0, -1)]
  return jnp.concatenate([jnp.concatenate(earlier, 3)[:, :, :, back * C - size:], a], 3)
