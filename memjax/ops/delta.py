"""The gated delta rule over slots: a write first takes out what its address already holds (DeltaNet, Yang et al. 2024).

u_t = beta_t (bound_t - sum_s address_ts keep_ts m_{t-1,s}),   m_s <- keep_s m_s + address_s u_t,   address a unit vector.

By chunks the u of C tokens solve one unit-triangular system, which does not depend on the carried state and so is solved for all
chunks at once; only the substitution of the state runs from chunk to chunk.
"""
import jax
import jax.numpy as jnp

from memjax.ops import chunked
from memjax.ops.recurrence import check, clean, plan, slot_read, slot_write


def slot_delta(state_BxHxSxK, bound_BxLxHxK, address_BxLxHxS, pick_BxLxGxHxS, *, beta_BxLxH, log_keep=None,
               order: str = 'after', reset_BxL=None, mask_BxL=None, form: str = 'chunk', chunk: int = 0, decay: str = 'auto',
               floor: float = -20.0):
  """(final state, reads [B, L, G, H, K]) of L tokens under the slot delta rule; arguments as in `slot_mix`.

  Addresses are unit vectors, beta in [0, 1] is the step (it takes the place of the write gate). form: scan | chunk, equal.
  """
  check('chunk' if form == 'associative' else form, order, log_keep)
  bound, address, pick, log_keep, reset = clean(bound_BxLxHxK, address_BxLxHxS, pick_BxLxGxHxS, log_keep=log_keep,
                                                reset_BxL=reset_BxL, mask_BxL=mask_BxL)
  beta = beta_BxLxH if mask_BxL is None else jnp.where(mask_BxL[..., None], beta_BxLxH, 0)
  state = state_BxHxSxK.astype(jnp.promote_types(jnp.float32, state_BxHxSxK.dtype))
  tokens = (bound, address, pick, beta.astype(state.dtype))
  if form == 'scan': state, y = _scan(state, tokens, (log_keep, reset), order)
  else:
    c, size = plan(log_keep, reset, bound.shape[1], order=order, chunk=chunk, decay=decay, floor=floor)
    state, y = _chunk(c, state, tokens, size)
  y = y.astype(bound.dtype)
  return state, y if mask_BxL is None else jnp.where(mask_BxL[:, :, None, None, None], y, 0)


def delta_write(state_BxHxSxK, bound_BxHxK, address_BxHxS, *, beta_BxH, log_keep=None):
  """The state after one token of the slot delta rule; log keep [B or 1, H, S or 1] or None."""
  zero = jnp.zeros_like(bound_BxHxK)
  kept = slot_write(state_BxHxSxK, zero, jnp.zeros_like(address_BxHxS), log_keep)
  held = slot_read(kept, address_BxHxS[:, None])[:, 0]
  return slot_write(kept, beta_BxH.astype(kept.dtype)[..., None] * (bound_BxHxK.astype(kept.dtype) - held), address_BxHxS)


def _scan(state, tokens, decay, order):
  (log_keep, reset), length = decay, tokens[0].shape[1]
  if log_keep is not None: log_keep = jnp.broadcast_to(log_keep, (log_keep.shape[0], length, *log_keep.shape[2:]))

  def step(m, token):
    (b, a, p, beta), l, r = token
    if r is not None: m = jnp.where(r[:, None, None, None], 0, m)
    after = delta_write(m, b, a, beta_BxH=beta, log_keep=l)
    return after, slot_read(m if order == 'before' else after, p).astype(b.dtype)
  state, y = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, log_keep, reset)))
  return state, jnp.moveaxis(y, 0, 1)


def _chunk(c, state, tokens, size):
  bound, address, pick, beta = tokens
  wide = state.dtype
  b, a, p = (chunked.cut(x, size) for x in (bound, address, pick))
  step = chunked.cut(beta[..., None], size)                                     # [B, H, N, C, 1]
  inclusive, a_wide = c._replace(is_before=False), a.astype(wide)
  system = jnp.tril(chunked.weights(inclusive, (a_wide * step)[:, :, :, None], a_wide)[:, :, :, 0], -1)
  meets = chunked.entered(inclusive, a_wide[:, :, :, None])[:, :, :, 0]
  right = step * jnp.concatenate([b.astype(wide), meets], -1)
  solved = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
  fresh, against = solved[..., :b.shape[-1]], solved[..., b.shape[-1]:]
  leaves, keeps = chunked.left(c, a_wide), chunked.keeps(c, b.shape[2], wide)

  def advance(m, chunk):
    fresh, against, leaves, keep = chunk
    u = fresh - jnp.einsum('bhcs,bhsk->bhck', against, m)
    return keep * m + jnp.einsum('bhcs,bhck->bhsk', leaves, u), (m, u)
  over = tuple(jnp.moveaxis(x, 2, 0) for x in (fresh, against, leaves, keeps))
  state, (before, u) = jax.lax.scan(advance, state, over)
  before, u = (jnp.moveaxis(x, 0, 2).astype(bound.dtype) for x in (before, u))
  y = jnp.einsum('bhngti,bhnik->bhngtk', chunked.weights(c, p, a), u, preferred_element_type=u.dtype)
  y = y + jnp.einsum('bhngts,bhnsk->bhngtk', chunked.entered(c, p), before, preferred_element_type=u.dtype)
  return state, chunked.join(y, bound.shape[1])
