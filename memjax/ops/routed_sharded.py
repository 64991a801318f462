"""Routed attention with the chapters over one axis of a mesh, and the tokens over another."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.config.errors import UserError
from memjax.ops.routed_attention import (
  choose_chunk,
  choose_implementation,
  combine_with_lse,
  cut_tokens,
  join_tokens,
  routed_attend,
  routed_partials,
)
from memjax.ops.tiles import attend_all


def routed_attend_sharded(q_ZxHxK, k, v, ids_ZxJ, *, log_weight_ZxJ, mesh, axis: str = '', token_axis: str = '', mode: str = 'mixture',
                          shared_kv=None, routed_scale: float = 1.0, mask_PxT=None, **form):
  """y [Z, H, V] of `routed_attend`, with k, v (and the mask) split over `axis` by chapter, and the tokens over `token_axis`.

  Each device attends its own chapters; slots of others are empty there. mixture: y = psum y_local. Joint modes: with the
  log-sum-exp l of each device, m = pmax l, y = psum(e^(l - m) y_local) / psum e^(l - m) (section 5.5). An axis of '' is not
  split; everything is replicated over the axes of the mesh that are not named. The entries of shared_kv are replicated.
  Raises UserError where an axis does not divide what it splits.
  """
  for name, size, what in ((axis, k.shape[0], 'chapters'), (token_axis, ids_ZxJ.shape[0], 'tokens')):
    if name and size % mesh.shape[name]: raise UserError(f'{size} {what} do not divide over {mesh.shape[name]} devices ({name!r})')
  chapters, tokens = PartitionSpec(axis or None), PartitionSpec(token_axis or None)
  def local(bank, token_arrays, shared_kv):
    (k, v, mask), (q, ids, log_weight) = bank, token_arrays
    if axis:
      ids = ids - k.shape[0] * jax.lax.axis_index(axis)
      ids = jnp.where((ids >= 0) & (ids < k.shape[0]), ids, -1)
    options = dict(log_weight_ZxJ=log_weight, mode=mode, routed_scale=routed_scale, mask_PxT=mask, **form)
    if not axis: return routed_attend(q, k, v, ids, shared_kv=shared_kv, **options)
    return (_sum_mixture if mode == 'mixture' else _merge_joint)(q, (k, v), ids, axis=axis, shared_kv=shared_kv, options=options)
  # An output that an axis does not split is the same on each of its devices, which check_vma cannot see through custom_vjp.
  call = jax.shard_map(local, mesh=mesh, in_specs=(chapters, tokens, PartitionSpec()), out_specs=tokens, check_vma=False)
  return call((k, v, mask_PxT), (q_ZxHxK, ids_ZxJ, log_weight_ZxJ), shared_kv)


def _sum_mixture(q_ZxHxK, kv, ids_ZxJ, *, axis, shared_kv, options):
  y = routed_attend(q_ZxHxK, *kv, ids_ZxJ, **options)
  y = jax.lax.psum(y.astype(jnp.promote_types(jnp.float32, y.dtype)), axis)
  if shared_kv is not None: y = y + attend_all(q_ZxHxK, shared_kv, scale=options.get('scale', 0.0))[0].astype(y.dtype)
  return y.astype(q_ZxHxK.dtype)


def _merge_joint(q_ZxHxK, kv, ids_ZxJ, *, axis, shared_kv, options):
  y, lse = _local_joint(q_ZxHxK, kv, ids_ZxJ, **options)
  y, dtype = y.astype(lse.dtype), y.dtype
  top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
  if shared_kv is not None:
    o_shared, lse_shared = attend_all(q_ZxHxK, shared_kv, scale=options.get('scale', 0.0))
    top = jnp.maximum(top, jax.lax.stop_gradient(lse_shared))
  top = jnp.where(top > -jnp.inf, top, 0)
  share = jnp.where(lse > -jnp.inf, jnp.exp(jnp.where(lse > -jnp.inf, lse, 0) - top), 0)
  total, y = jax.lax.psum((share, share[..., None] * y), axis)
  if shared_kv is not None:
    share = jnp.exp(lse_shared - top)
    total, y = total + share, y + share[..., None] * o_shared.astype(y.dtype)
  return (y / jnp.where(total > 0, total, 1)[..., None]).astype(dtype)


def _local_joint(q_ZxHxK, kv, ids_ZxJ, *, log_weight_ZxJ, mode, routed_scale, mask_PxT, impl='auto', token_chunk=0, remat=True,
                 gather_limit=1 << 30, **form):
  """(y, lse) over the chapters of this device, a chunk of tokens at a time."""
  impl = choose_implementation(q_ZxHxK, kv[0], ids_ZxJ, impl=impl, gather_limit=gather_limit, needs_xla=True)
  chunk = choose_chunk(q_ZxHxK, kv, ids_ZxJ, impl=impl, token_chunk=token_chunk)
  def one(tokens):
    q, ids, log_weight = tokens
    o, lse = routed_partials(q, *kv, ids, mask_PxT=mask_PxT, impl=impl, **form)
    return combine_with_lse(o, lse, log_weight, mode=mode, routed_scale=routed_scale)
  Z = q_ZxHxK.shape[0]
  if chunk >= Z: return one((q_ZxHxK, ids_ZxJ, log_weight_ZxJ))
  return tuple(join_tokens(x, Z) for x in jax.lax.map(jax.checkpoint(one) if remat else one,
                                                      cut_tokens((q_ZxHxK, ids_ZxJ, log_weight_ZxJ), chunk)))
