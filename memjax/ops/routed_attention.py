"""Routed attention: every token reads J chapters of a bank. Partial results a chapter, their combination, and both in token chunks."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops import rounds, tiles
from memjax.ops.tiles import (
  Form,
  attend_all,
  attend_tiles,
  is_array,
  restore,
  sort_pairs,
  sum_slots,
  take_chapters,
  tile_partials,
  wide_dtype,
)

IMPLEMENTATIONS = ('auto', 'gather', 'scan', 'tiles', 'capacity', 'cudnn')
MODES = ('mixture', 'joint', 'joint_bias')
CHUNK_BYTES = {'tiles': 1 << 27, 'capacity': 1 << 27, 'cudnn': 1 << 29, 'scan': 1 << 27, 'gather': 1 << 30}


class Plan(NamedTuple):
  """What is static in a call of `routed_attend`; scale and routed_scale are numbers, block and chunk resolved."""
  mode: str
  impl: str
  block: int
  scale: float
  routed_scale: float
  remat: bool


def choose_block(pairs: int, chapters: int, block: int) -> int:
  """Rows of a tile where `block` is 0: about the mean number of pairs a chapter, a power of two from 8 to 64 (256 on a GPU)."""
  if block: return block
  most = 64 if jax.default_backend() == 'cpu' else 256
  return max(8, min(most, 1 << max(pairs // chapters - 1, 0).bit_length()))


def choose_implementation(q_ZxHxK, k, ids_ZxJ, *, impl: str, gather_limit: int, needs_xla: bool = False) -> str:
  """The implementation that 'auto' stands for; another name as it is. Raises UserError for an unknown one.

  gather where there are few pairs a chapter and the gathered keys and values fit `gather_limit` bytes (decoding); cudnn on
  an NVIDIA GPU in 16 bits unless the call `needs_xla` (a mask of entries, V != K, a log-sum-exp to be differentiated); else tiles.
  """
  if impl not in IMPLEMENTATIONS: raise UserError(f'unknown routed attention {impl!r}; one of {", ".join(IMPLEMENTATIONS)}')
  if impl != 'auto': return impl
  (P, T, G, K), pairs = k.shape, ids_ZxJ.size
  if pairs <= 4 * P and pairs * T * 2 * G * K * q_ZxHxK.dtype.itemsize <= gather_limit: return 'gather'
  return 'cudnn' if not needs_xla and rounds.takes_cudnn(q_ZxHxK.dtype, K) else 'tiles'


def check_heads(q_ZxHxK, k, v) -> None:
  """Raises UserError unless query, key and value shapes belong together."""
  H, K, G = *q_ZxHxK.shape[1:], k.shape[2]
  if k.shape[:3] != v.shape[:3] or k.shape[3] != K or H % G:
    raise UserError(f'queries {q_ZxHxK.shape}, keys {k.shape} and values {v.shape} do not fit: G must divide H, widths must agree')


# One result a chapter ------------------------------------------------------------------------------------------------------------

def routed_partials(q_ZxHxK, k, v, ids_ZxJ, *, mask_PxT=None, scale: float = 0.0, impl: str = 'tiles', block: int = 0,
                    gather_limit: int = 1 << 30):
  """(o [Z, J, H, V], lse [Z, J, H]): for each token and each of its chapters, softmax attention and log-sum-exp of its scores.

  q [Z, H, K], k [P, T, G, K], v [P, T, G, V], ids [Z, J] distinct in a row; query head h reads key head h G // H. id < 0 is an
  empty slot: o = 0, lse = -inf, no gradient; so is a chapter whose mask is all False. k and v may be `Quantized`: restored a
  few chapters at a time, without gradient. scale 0 = K^-1/2; block 0 = automatic. impl: auto, gather (K[ids]: decoding, the
  oracle), scan (all chapters for all tokens), tiles (sorted pairs, section 5.3), capacity (a row of Z places a chapter).
  o has the dtype of q; scores, softmax and lse are at least fp32. Raises UserError for unknown names and wrong shapes.
  """
  q_ZxHxK, k, v, ids_ZxJ, mask_PxT = jax.tree.map(jnp.asarray, (q_ZxHxK, k, v, ids_ZxJ, mask_PxT))
  check_heads(q_ZxHxK, k, v)
  impl = choose_implementation(q_ZxHxK, k, ids_ZxJ, impl=impl, gather_limit=gather_limit, needs_xla=True)
  if impl in ('gather', 'scan', 'capacity'):
    ways = {'gather': _gather, 'scan': _scan, 'capacity': _capacity}
    return ways[impl](q_ZxHxK, (k, v, mask_PxT), ids_ZxJ, scale)
  form = Form(scale, choose_block(ids_ZxJ.size, k.shape[0], block))      # cudnn has no gradient of lse alone: tiles
  return tile_partials(form, q_ZxHxK, (k, v, mask_PxT), ids_ZxJ)


def _entries(bank, chapter_U, dtype):
  k, v, mask_PxT = bank
  kv = take_chapters(k, chapter_U, dtype), take_chapters(v, chapter_U, dtype)
  return *kv, None if mask_PxT is None else mask_PxT[chapter_U]


def _hide_empty(o, lse, ids_ZxJ):
  is_real = (ids_ZxJ >= 0)[..., None]
  return jnp.where(is_real[..., None], o, 0), jnp.where(is_real, lse, -jnp.inf)


def _gather(q_ZxHxK, bank, ids_ZxJ, scale):
  Z, J = ids_ZxJ.shape
  q_XxHxK = jnp.repeat(q_ZxHxK, J, axis=0)
  o, lse = attend_tiles(q_XxHxK[:, None], *_entries(bank, jnp.maximum(ids_ZxJ, 0).reshape(-1), q_ZxHxK.dtype), scale=scale)
  return _hide_empty(o.reshape(Z, J, *o.shape[2:]), lse.reshape(Z, J, -1), ids_ZxJ)


def _scan(q_ZxHxK, bank, ids_ZxJ, scale):
  """All tokens against each chapter in turn, then the J that were asked for: P / J times the work, no sort, no tables."""
  def chapter(c):
    o, lse = attend_tiles(q_ZxHxK[None], *_entries(bank, c[None], q_ZxHxK.dtype), scale=scale)
    return o[0], lse[0]
  o_PxZxHxV, lse_PxZxH = jax.lax.map(jax.checkpoint(chapter), jnp.arange(bank[0].shape[0]))
  at = jnp.maximum(ids_ZxJ, 0), jnp.arange(ids_ZxJ.shape[0])[:, None]
  return _hide_empty(o_PxZxHxV[at], lse_PxZxH[at], ids_ZxJ)


def _capacity(q_ZxHxK, bank, ids_ZxJ, scale):
  """A table of Z places a chapter, which nothing can overflow; chapters in turn."""
  Z, J = ids_ZxJ.shape
  pairs = sort_pairs(ids_ZxJ, bank[0].shape[0])
  def chapter(c):
    pair_Z = pairs.order_X[jnp.minimum(pairs.start_P[c] + jnp.arange(Z), Z * J - 1)]
    o, lse = attend_tiles(q_ZxHxK[pair_Z // J][None], *_entries(bank, c[None], q_ZxHxK.dtype), scale=scale)
    return o[0], lse[0]
  o_PxZxHxV, lse_PxZxH = jax.lax.map(jax.checkpoint(chapter), jnp.arange(bank[0].shape[0]))
  at = jnp.maximum(ids_ZxJ, 0), jnp.minimum(pairs.rank_X, Z - 1).reshape(Z, J)
  return _hide_empty(o_PxZxHxV[at], lse_PxZxH[at], ids_ZxJ)


# Their combination ---------------------------------------------------------------------------------------------------------------

def combine(o_ZxJxHxV, lse_ZxJxH, log_weight_ZxJ, *, mode: str, routed_scale: float = 1.0, shared=None):
  """y [Z, H, V] of the partial results of J slots, and of `shared` = (o [Z, H, V], lse [Z, H]) where given (section 5.2).

  mixture: y = o_shared + s sum_j w_j o_j. joint: one softmax over all entries, y = sum_j a_j o_j with a = softmax(lse + log s),
  in which the shared slot has log s = 0; joint_bias: a = softmax(lse + log w + log s). s = routed_scale. Slots with
  lse = -inf count for nothing; a token that has no others reads 0. Raises UserError for another mode.
  """
  return combine_with_lse(o_ZxJxHxV, lse_ZxJxH, log_weight_ZxJ, mode=mode, routed_scale=routed_scale, shared=shared)[0]


def combine_with_lse(o_ZxJxHxV, lse_ZxJxH, log_weight_ZxJ, *, mode: str, routed_scale: float = 1.0, shared=None):
  """(y, log-sum-exp [Z, H] of all that y counts) of `combine`; None for the latter in mixture, where nothing is normalised."""
  if mode not in MODES: raise UserError(f'unknown combination of chapters {mode!r}; one of {", ".join(MODES)}')
  wide = lse_ZxJxH.dtype
  is_real = lse_ZxJxH > -jnp.inf
  log_weight = jnp.where(is_real, log_weight_ZxJ.astype(wide)[..., None], 0)
  if mode == 'mixture':
    weight = jnp.where(is_real, routed_scale * jnp.exp(log_weight), 0)
    y = sum_slots(o_ZxJxHxV, weight[..., None])
    return (y if shared is None else y + shared[0].astype(wide)).astype(o_ZxJxHxV.dtype), None
  score = jnp.where(is_real, lse_ZxJxH, 0) + jnp.log(jnp.asarray(routed_scale, wide)) + (log_weight if mode == 'joint_bias' else 0)
  if shared is not None:
    is_shared = shared[1] > -jnp.inf
    o_ZxJxHxV = jnp.concatenate([o_ZxJxHxV, shared[0][:, None]], 1)
    score = jnp.concatenate([score, jnp.where(is_shared, shared[1], 0)[:, None]], 1)
    is_real = jnp.concatenate([is_real, is_shared[:, None]], 1)
  top = jax.lax.stop_gradient(jnp.max(jnp.where(is_real, score, -jnp.inf), 1))
  top = jnp.where(jnp.isfinite(top), top, 0)
  share = jnp.where(is_real, jnp.exp(jnp.where(is_real, score - top[:, None], 0)), 0)
  total = share.sum(1)
  safe = jnp.where(total > 0, total, 1)
  y = sum_slots(o_ZxJxHxV, (share / safe[:, None])[..., None])
  return y.astype(o_ZxJxHxV.dtype), jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)


# Both, in token chunks -----------------------------------------------------------------------------------------------------------

def routed_attend(q_ZxHxK, k, v, ids_ZxJ, *, log_weight_ZxJ, mode: str = 'mixture', shared_kv=None, routed_scale: float = 1.0,
                  scale: float = 0.0, impl: str = 'auto', block: int = 0, token_chunk: int = 0, gather_limit: int = 1 << 30,
                  mask_PxT=None, remat: bool = True):
  """y [Z, H, V] = combine(routed_partials(..)), a chunk of tokens at a time, so that the partial results never exist at full size.

  Arguments as `routed_partials` and `combine`; shared_kv = (k [M, G, K], v [M, G, V]) is read by every token. token_chunk 0
  keeps the partial results of a chunk within a byte limit; where several chunks are needed, the backward pass computes them
  again unless `remat` is False, and dk and dv are summed over the chunks in the wide dtype. impl capacity and cudnn run in
  rounds over all chapters at once, keys and values in place, `block` rows a chapter and round (ops/rounds.py); auto takes
  cudnn on an NVIDIA GPU in 16 bits.
  """
  q_ZxHxK, k, v, ids_ZxJ, log_weight_ZxJ = jax.tree.map(jnp.asarray, (q_ZxHxK, k, v, ids_ZxJ, log_weight_ZxJ))
  shared_kv, mask_PxT = jax.tree.map(jnp.asarray, (shared_kv, mask_PxT))
  check_heads(q_ZxHxK, k, v)
  if mode not in MODES: raise UserError(f'unknown combination of chapters {mode!r}; one of {", ".join(MODES)}')
  impl = choose_implementation(q_ZxHxK, k, ids_ZxJ, impl=impl, gather_limit=gather_limit,
                               needs_xla=mask_PxT is not None or v.shape[3] != k.shape[3])
  Z, chunk = q_ZxHxK.shape[0], choose_chunk(q_ZxHxK, (k, v), ids_ZxJ, impl=impl, token_chunk=token_chunk)
  if impl == 'cudnn':
    if mask_PxT is not None: raise UserError('cudnn routed attention takes no mask of entries')
    if v.shape[3] != k.shape[3]: raise UserError(f'cudnn routed attention needs values as wide as keys, not {v.shape[3]} and {k.shape[3]}')
    k, v = restore(k, q_ZxHxK.dtype), restore(v, q_ZxHxK.dtype)
  plan = Plan(mode, impl, block, scale, float(routed_scale), remat)
  bank, tokens = (k, v, mask_PxT), (q_ZxHxK, ids_ZxJ, log_weight_ZxJ)
  if impl not in rounds.KERNELS and chunk >= Z: return _attend_chunk(plan, tokens, bank, shared_kv)
  cut = cut_tokens(tokens, chunk)
  if impl in rounds.KERNELS or remat: return join_tokens(_attend_chunks(plan, cut, bank, shared_kv), Z)
  return join_tokens(jax.lax.map(lambda part: _attend_chunk(plan, part, bank, shared_kv), cut), Z)


def choose_chunk(q_ZxHxK, kv, ids_ZxJ, *, impl: str, token_chunk: int = 0) -> int:
  """Tokens of a chunk: as given, else as many as keep partial results within CHUNK_BYTES, in chunks of about equal size."""
  (Z, H, _), (k, v), J = q_ZxHxK.shape, kv, ids_ZxJ.shape[1]
  if token_chunk: return min(token_chunk, Z)
  slots = {'scan': k.shape[0], 'gather': J * k.shape[1] * 2 * k.shape[2] / H}.get(impl, J)
  most = max(1, int(CHUNK_BYTES[impl] // (slots * H * v.shape[3] * q_ZxHxK.dtype.itemsize)))
  chunk = -(-Z // -(-Z // most))
  return min(Z, -(-chunk // 64) * 64)


def cut_tokens(tokens, chunk: int):
  """(q, ids, log weight) as [N, chunk, ..]: padding tokens have no chapters."""
  q_ZxHxK, ids_ZxJ, log_weight_ZxJ = tokens
  extra = -q_ZxHxK.shape[0] % chunk
  def cut(x, fill): return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), constant_values=fill).reshape(-1, chunk, *x.shape[1:])
  return cut(q_ZxHxK, 0), cut(ids_ZxJ, -1), cut(log_weight_ZxJ, 0)


def join_tokens(y_NxZxHxV, Z: int):
  """The first Z of the chunks' tokens [N Z, ..]."""
  return y_NxZxHxV.reshape(-1, *y_NxZxHxV.shape[2:])[:Z]


def _attend_chunk(plan: Plan, tokens, bank, shared_kv):
  (q_ZxHxK, ids_ZxJ, log_weight_ZxJ), (k, v, mask_PxT) = tokens, bank
  partials = routed_partials(q_ZxHxK, k, v, ids_ZxJ, mask_PxT=mask_PxT, scale=plan.scale, impl=plan.impl, block=plan.block)
  return _finish(plan, partials, log_weight_ZxJ, (q_ZxHxK, shared_kv))


def _finish(plan: Plan, partials, log_weight_ZxJ, common):
  """y [Z, H, V] of partial results and of the entries that all tokens read. common = (q, shared_kv)."""
  q_ZxHxK, shared_kv = common
  shared = None if shared_kv is None else attend_all(q_ZxHxK, shared_kv, scale=plan.scale)
  return combine(*partials, log_weight_ZxJ, mode=plan.mode, routed_scale=plan.routed_scale, shared=shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_chunks(plan: Plan, tokens, bank, shared_kv):
  """y [N, chunk, H, V]. The backward pass goes through the chunks again and sums dk and dv in the wide dtype."""
  return _attend_chunks_forward(plan, tokens, bank, shared_kv)[0]


def _attend_chunks_forward(plan, tokens, bank, shared_kv):
  def one(part):
    if plan.impl in rounds.KERNELS: return rounds.forward(plan, part, bank, shared_kv)
    return _attend_chunk(plan, part, bank, shared_kv), ()
  result = jax.lax.map(one, tokens)
  return result[0], (tokens, bank, shared_kv, result)


def _attend_chunks_backward(plan, saved, dy_NxZxHxV):
  tokens, bank, shared_kv, result = saved
  zeros = lambda kv: None if kv is None else tuple(jnp.zeros(x.shape, wide_dtype(x.dtype)) if is_array(x) else None for x in kv)
  def one(totals, part):
    tokens, result, dy = part
    if plan.impl in rounds.KERNELS:
      dtokens, totals = rounds.backward(plan, tokens, bank, shared_kv, result=result, dy_ZxHxV=dy, totals=totals)
    else: dtokens, totals = _pull_chunk(plan, tokens, bank, shared_kv, dy=dy, totals=totals)
    return totals, dtokens
  totals = zeros(bank[:2]), zeros(shared_kv)
  totals, (dq, dlog_weight) = jax.lax.scan(one, totals, (tokens, result, dy_NxZxHxV))
  narrow = lambda totals, like: jax.tree.map(lambda total, x: total.astype(x.dtype), totals, like)
  dbank = tuple(None if total is None else total.astype(x.dtype) for total, x in zip(totals[0], bank[:2], strict=True))
  return (dq, None, dlog_weight), (*dbank, None), None if shared_kv is None else narrow(totals[1], shared_kv)


def _pull_chunk(plan, tokens, bank, shared_kv, *, dy, totals):
  """((dq, d log weight), totals) of one chunk, whose partial results are computed again; tiles add to the totals directly."""
  (q, ids, log_weight), (k, v, mask_PxT) = tokens, bank
  form = Form(plan.scale, choose_block(ids.size, k.shape[0], plan.block))
  if plan.impl == 'tiles': partials, tables = tiles.forward(form, q, bank, ids)
  else:
    trained = [x for x in (k, v) if is_array(x)]
    def run(q, trained):
      rest = iter(trained)
      k, v = (next(rest) if is_array(x) else x for x in bank[:2])
      return routed_partials(q, k, v, ids, mask_PxT=mask_PxT, scale=plan.scale, impl=plan.impl)
    partials, pull = jax.vjp(run, q, trained)
  finish = functools.partial(_finish, plan)
  dpartials, dlog_weight, (dq_shared, dshared) = jax.vjp(finish, partials, log_weight, (q, shared_kv))[1](dy)
  if plan.impl == 'tiles': dq, dkv = tiles.backward(form, (q, bank, ids, partials, tables), dpartials, totals[0])
  else:
    dq, dtrained = pull(dpartials)
    rest = iter(dtrained)
    dkv = tuple(None if total is None else total + next(rest).astype(total.dtype) for total in totals[0])
  return (dq + dq_shared, dlog_weight), (dkv, jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals[1], dshared))


_attend_chunks.defvjp(_attend_chunks_forward, _attend_chunks_backward)
