"""Routed attention in rounds: all chapters at once, a few rows each, keys and values in place. On a GPU the attention is cuDNN's.

Round r takes rows r C .. (r + 1) C of every chapter's queue of (token, slot) pairs and attends [P, C] queries to [P, T] entries.
No key or value is gathered, and dk and dv of a chapter come out of one product. The number of rounds is found at run time, so
nothing is dropped; balanced routing needs one. What a round returns is merged into the tokens at once.
"""
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.tiles import Sorted, attend_tiles, attend_tiles_back, sort_pairs, take_chapters, wide_dtype

KEPT = ('query', 'key', 'value', 'bias', 'q_seqlen', 'kv_seqlen', 'q_offsets', 'kv_offsets', 'page_table_k', 'page_table_v',
        'score_mod_args')                                       # what jax's rule of the gradient wants of what the forward one took
ANY_VERSION = 10 ** 6     # jax's rule refuses some GPUs with an old cuDNN; versions that old are not supported here
NEVER = 1e30        # a log-sum-exp under which every probability is zero


class Round(NamedTuple):
  """One round: the pair, the token and whether it is one in each row; whether each slot is in it, and in which row [P C]."""
  pair_PxC: jax.Array
  token_PxC: jax.Array
  is_real_PxC: jax.Array
  is_here_ZxJ: jax.Array
  row_ZxJ: jax.Array


class Rows(NamedTuple):
  """What a kernel attends: queries [P, C, H, K], how many of each chapter's count, and the bank."""
  q_PxCxHxK: jax.Array
  count_P: jax.Array
  bank: Any


# The attention of a round: XLA, and cuDNN ----------------------------------------------------------------------------------------

def _chapters(kv, mask_PxT, c, dtype):
  k, v = (take_chapters(x, c[None], dtype) for x in kv)
  return k, v, None if mask_PxT is None else mask_PxT[c][None]


def _xla_forward(rows: Rows, scale: float):
  """(o [P, C, H, V], lse [P, C, H]), a chapter after the other."""
  q, (*kv, mask_PxT) = rows.q_PxCxHxK, rows.bank
  def chapter(c):
    k, v, mask = _chapters(kv, mask_PxT, c, q.dtype)
    return jax.tree.map(lambda x: x[0], attend_tiles(q[c][None], k, v, mask, scale=scale))
  return jax.lax.map(chapter, jnp.arange(q.shape[0]))


def _xla_backward(rows: Rows, lse_PxCxH, o_PxCxHxV, do_PxCxHxV, *, scale: float):
  """(dq, dk, dv) for a softmax whose log-sum-exp is `lse` and whose result is `o`: delta = do . o."""
  q, (*kv, mask_PxT) = rows.q_PxCxHxK, rows.bank
  delta_PxCxH = jnp.einsum('pchv,pchv->pch', do_PxCxHxV, o_PxCxHxV, preferred_element_type=lse_PxCxH.dtype)
  def chapter(c):
    row = lambda *xs: tuple(x[c][None] for x in xs)
    parts = attend_tiles_back(row(q, lse_PxCxH), _chapters(kv, mask_PxT, c, q.dtype), row(do_PxCxHxV, delta_PxCxH), scale=scale)
    return jax.tree.map(lambda x: x[0].astype(q.dtype), parts)             # as cuDNN returns them
  return jax.lax.map(chapter, jnp.arange(q.shape[0]))


@functools.cache
def _cudnn():
  """jax's module of cuDNN attention, None where it has none.

  Its rules rather than `jax.nn.dot_product_attention`, which rounds the log-sum-exp to 16 bits and cannot take one back.
  """
  try:
    from jax._src.cudnn import fused_attention_stablehlo as module
  except ImportError: return None
  wanted = ('_dot_product_attention_fwd_rule', '_dot_product_attention_bwd_rule', 'MaskType', 'AttentionLayout')
  return module if all(hasattr(module, name) for name in wanted) else None


def takes_cudnn(dtype, K: int) -> bool:
  """Whether rounds of cuDNN attention run here: an NVIDIA GPU, 16 bits, heads of at most 128 channels."""
  if jax.default_backend() not in ('gpu', 'cuda') or K > 128 or K % 8 or jnp.dtype(dtype).itemsize != 2: return False
  return 'cuda' in jax.devices()[0].client.platform_version.lower() and _cudnn() is not None


def _cudnn_arguments(rows: Rows, scale) -> dict:
  """Arguments of jax's rules by name, [P, C | T, H | G, K]: padding lengths, no bias, no dropout, no change of scores."""
  cudnn, (k, v, _), none = _cudnn(), rows.bank, jnp.zeros((0,), rows.q_PxCxHxK.dtype)
  count_P = jnp.maximum(rows.count_P, 1).astype(jnp.int32)       # an empty sequence is not safe in every cuDNN; its rows have do = 0
  absent = dict.fromkeys(('bias', 'q_offsets', 'kv_offsets', 'page_table_k', 'page_table_v'), none)
  return {'query': rows.q_PxCxHxK, 'key': k, 'value': v, 'q_seqlen': count_P, 'kv_seqlen': jnp.full_like(count_P, k.shape[1]), **absent,
          'scale': scale or k.shape[3] ** -0.5, 'seed': 42, 'dropout_rate': 0.0, 'variadic_args': (False, False),
          'mask_type': cudnn.MaskType.PADDING, 'layout': cudnn.AttentionLayout.BTNH.value, 'sliding_window_length': None,
          'score_mod': None, 'score_mod_args': (), 'cudnn_version': ANY_VERSION, 'is_training': True, 'return_residual': True}


def _by_name(rule, given: dict):
  """The rule's result; each version of jax names what it takes, and in which order."""
  return rule(*[given[name] for name in inspect.signature(rule).parameters])


def _cudnn_forward(rows: Rows, scale: float):
  (o_PxCxHxV, lse_PxHxC), _ = _by_name(_cudnn()._dot_product_attention_fwd_rule, _cudnn_arguments(rows, scale))
  return o_PxCxHxV, jnp.moveaxis(lse_PxHxC, 1, 2)


def _cudnn_backward(rows: Rows, lse_PxCxH, o_PxCxHxV, do_PxCxHxV, *, scale: float):
  given, cudnn = _cudnn_arguments(rows, scale), _cudnn()
  kept = [name for name in inspect.signature(cudnn._dot_product_attention_fwd_rule).parameters if name in KEPT]
  saved = (*[given[name] for name in kept], jnp.moveaxis(lse_PxCxH, 2, 1), o_PxCxHxV)
  return _by_name(cudnn._dot_product_attention_bwd_rule, {**given, 'res': saved, 'grad_output': (do_PxCxHxV,)})[:3]


KERNELS = {'capacity': (_xla_forward, _xla_backward), 'cudnn': (_cudnn_forward, _cudnn_backward)}


# Rounds --------------------------------------------------------------------------------------------------------------------------

def _capacity(plan, tokens: int, J: int, P: int) -> int:
  """Rows a chapter and round: a quarter more than the mean, in steps of 8 (64 for cuDNN); never more than the tokens."""
  if plan.block: return min(plan.block, tokens)
  unit = 64 if plan.impl == 'cudnn' else 8
  return min(-(-5 * tokens * J // (4 * P * unit)) * unit, -(-tokens // unit) * unit)


def _view(pairs: Sorted, ids_ZxJ, r, capacity: int) -> Round:
  J, P = ids_ZxJ.shape[1], pairs.count_P.shape[0]
  rank_C = r * capacity + jnp.arange(capacity, dtype=jnp.int32)
  pair_PxC = pairs.order_X[jnp.minimum(pairs.start_P[:, None] + rank_C[None], pairs.order_X.shape[0] - 1)]
  place_ZxJ = pairs.rank_X.reshape(ids_ZxJ.shape) - r * capacity
  is_here = (ids_ZxJ >= 0) & (place_ZxJ >= 0) & (place_ZxJ < capacity)
  row_ZxJ = jnp.where(is_here, jnp.clip(ids_ZxJ, 0, P - 1) * capacity + place_ZxJ, 0)
  return Round(pair_PxC, pair_PxC // J, rank_C[None] < pairs.count_P[:, None], is_here, row_ZxJ)


def _loop(plan, pairs: Sorted, tokens, *, bank, body, carry):
  """`body(view, rows, carry)` over the rounds that these ids need."""
  q_ZxHxK, ids_ZxJ, _ = tokens
  capacity = _capacity(plan, *ids_ZxJ.shape, bank[0].shape[0])
  def run(r, carry):
    view = _view(pairs, ids_ZxJ, r, capacity)
    rows = Rows(q_ZxHxK[view.token_PxC], jnp.clip(pairs.count_P - r * capacity, 0, capacity), bank)
    return body(view, rows, carry)
  return jax.lax.fori_loop(0, -(-pairs.count_P.max() // capacity), run, carry)


def _slots(view: Round, x_PxC, fill=0):
  """What the rows of this round mean to each slot [Z, J, ..]; `fill` for slots of other rounds."""
  flat = x_PxC.reshape(-1, *x_PxC.shape[2:])[view.row_ZxJ]
  return jnp.where(view.is_here_ZxJ.reshape(*view.is_here_ZxJ.shape, *(1,) * (flat.ndim - 2)), flat, fill)


def _sum_rows(view: Round, x_PxC, weight_ZxJ):
  """The sum [Z, ..], wide, over the slots of this round, of their rows times a weight [Z, J] or [Z, J, H].

  Slots are gathered one by one: compilers fuse that into a single pass in which [Z, J, ..] never exists.
  """
  flat, wide, total = x_PxC.reshape(-1, *x_PxC.shape[2:]), wide_dtype(x_PxC.dtype), 0
  spread = lambda a: a.reshape(*a.shape, *(1,) * (flat.ndim - a.ndim))
  for j in range(weight_ZxJ.shape[1]):
    rows = flat[view.row_ZxJ[:, j]].astype(wide) * spread(weight_ZxJ[:, j])
    total = total + jnp.where(spread(view.is_here_ZxJ[:, j]), rows, 0)
  return total


def _bias(plan, log_weight_ZxJ, wide):
  """What the mode adds to the scores of a slot: log s, and log w in joint_bias."""
  log_weight_ZxJ = log_weight_ZxJ.astype(wide)
  return jnp.log(jnp.asarray(plan.routed_scale, wide)) + (log_weight_ZxJ if plan.mode == 'joint_bias' else jnp.zeros_like(log_weight_ZxJ))


def _merge(plan, view: Round, results, *, log_weight_ZxJ, carry):
  """(top, total, y) after this round: softmax over slots that goes on from round to round; in mixture y alone, weighted."""
  (top, total, y), (o_PxCxHxV, lse_PxCxH) = carry, results
  wide = y.dtype
  if plan.mode == 'mixture':
    weight = jnp.where(view.is_here_ZxJ, plan.routed_scale * jnp.exp(log_weight_ZxJ.astype(wide)), 0)
    return top, total, y + _sum_rows(view, o_PxCxHxV, weight)
  score = _slots(view, lse_PxCxH, -jnp.inf) + jnp.where(view.is_here_ZxJ, _bias(plan, log_weight_ZxJ, wide), 0)[..., None]
  new = jnp.maximum(top, score.max(1))
  safe = jnp.where(new > -jnp.inf, new, 0)
  share, keep = jnp.exp(score - safe[:, None]), jnp.exp(top - safe)
  return new, total * keep + share.sum(1), y * keep[..., None] + _sum_rows(view, o_PxCxHxV, share)


def _shared_rows(q_ZxHxK, shared) -> Rows:
  """The shared chapters as a round of their own: every token attends to them."""
  return Rows(q_ZxHxK[None], jnp.full((1,), q_ZxHxK.shape[0]), (shared[0][None], shared[1][None], None))


def forward(plan, tokens, bank, shared):
  """(y [Z, H, V], what the backward pass keeps: the log-sum-exp of all that a joint softmax saw, partial results without remat, order)."""
  q_ZxHxK, ids_ZxJ, log_weight_ZxJ = tokens
  attend, wide, (Z, H, V) = KERNELS[plan.impl][0], wide_dtype(q_ZxHxK.dtype), (*q_ZxHxK.shape[:2], bank[1].shape[3])
  top, total, y = jnp.full((Z, H), -jnp.inf, wide), jnp.zeros((Z, H), wide), jnp.zeros((Z, H, V), wide)
  if shared is not None:
    o, top = jax.tree.map(lambda x: x[0], attend(_shared_rows(q_ZxHxK, shared), plan.scale))
    y, total = o.astype(wide), jnp.ones_like(total)
  partials = ()
  if _keeps(plan): partials = jnp.zeros((*ids_ZxJ.shape, H, V), q_ZxHxK.dtype), jnp.zeros((*ids_ZxJ.shape, H), wide)
  def body(view, rows, carry):
    state, partials = carry
    results = attend(rows, plan.scale)
    partials = tuple(_slots(view, new, old) for new, old in zip(results, partials, strict=False))
    return _merge(plan, view, results, log_weight_ZxJ=log_weight_ZxJ, carry=state), partials
  pairs = sort_pairs(ids_ZxJ, bank[0].shape[0])
  (top, total, y), partials = _loop(plan, pairs, tokens, bank=bank, body=body, carry=((top, total, y), partials))
  if plan.mode == 'mixture': return y.astype(q_ZxHxK.dtype), (None, partials, pairs)
  safe = jnp.where(total > 0, total, 1)
  return (y / safe[..., None]).astype(q_ZxHxK.dtype), (jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf), partials, pairs)


def _keeps(plan) -> bool:
  """Whether partial results are kept for the backward pass; joint needs none."""
  return not plan.remat and plan.mode != 'joint'


def backward(plan, tokens, bank, shared, *, result, dy_ZxHxV, totals):
  """((dq, d log weight), totals) with this chunk's dk, dv, and those of `shared`, added to the wide `totals` (None: not wanted).

  mixture: each slot is a softmax of its own with do = s w dy. Joint modes: one softmax over all slots, so that every row has
  do = dy, o = y and the log-sum-exp of its token less the bias of its slot: no partial result is needed but for d log weight.
  """
  (q_ZxHxK, ids_ZxJ, log_weight_ZxJ), (y_ZxHxV, (lse_ZxH, partials, pairs)) = tokens, result
  (attend, pull), wide = KERNELS[plan.impl], wide_dtype(q_ZxHxK.dtype)
  weight_X = (plan.routed_scale * jnp.exp(log_weight_ZxJ.astype(wide))).reshape(-1)
  bias_X, dtype = _bias(plan, log_weight_ZxJ, wide).reshape(-1), q_ZxHxK.dtype
  def body(view, rows, carry):
    dq, dlog_weight, dkv = carry
    real = view.is_real_PxC[..., None]
    do = dy_ZxHxV[view.token_PxC]
    if plan.mode != 'joint':
      o, lse = [x.reshape(-1, *x.shape[2:])[view.pair_PxC] for x in partials] if partials else attend(rows, plan.scale)
    if plan.mode == 'mixture':
      do = (do.astype(wide) * weight_X[view.pair_PxC][..., None, None]).astype(dtype)
      slope, total, mean = jnp.sum(do.astype(wide) * o.astype(wide), (2, 3)), lse, o
    else:
      total, mean = lse_ZxH[view.token_PxC] - bias_X[view.pair_PxC][..., None], y_ZxHxV[view.token_PxC]
    total = jnp.where(real & (total > -jnp.inf), total, NEVER)
    if plan.mode == 'joint_bias':
      share = jnp.exp(lse - total)[..., None]
      slope = jnp.sum(share * do.astype(wide) * (o.astype(wide) - mean.astype(wide)), (2, 3))
    part, *parts = pull(rows, total, mean, jnp.where(real[..., None], do, 0), scale=plan.scale)
    dq = dq + _sum_rows(view, part, jnp.ones(ids_ZxJ.shape, wide))
    if plan.mode != 'joint': dlog_weight = dlog_weight + _slots(view, slope)
    return dq, dlog_weight, _add(dkv, parts)
  carry = jnp.zeros(q_ZxHxK.shape, wide), jnp.zeros(ids_ZxJ.shape, wide), totals[0]
  dq, dlog_weight, dkv = _loop(plan, pairs, tokens, bank=bank, body=body, carry=carry)
  dshared = totals[1]
  if shared is not None:
    rows, lse, mean = _shared_rows(q_ZxHxK, shared), lse_ZxH, y_ZxHxV
    if plan.mode == 'mixture': mean, lse = jax.tree.map(lambda x: x[0], attend(rows, plan.scale))
    part, *parts = pull(rows, lse[None], mean[None], dy_ZxHxV[None], scale=plan.scale)
    dq, dshared = dq + part[0].astype(wide), _add(dshared, [x[0] for x in parts])
  return (dq.astype(dtype), dlog_weight.astype(log_weight_ZxJ.dtype)), (dkv, dshared)


def _add(totals, parts):
  return tuple(None if total is None else total + part.astype(total.dtype) for total, part in zip(totals, parts, strict=True))
