"""The slot recurrence m_s <- keep_s m_s + address_s bound, read as y = sum_s pick_s m_s: one token, or a sequence in three equal forms.

Slots S superpose bound values of width K per head; `address` comes multiplied by the write gate. Binding and
unbinding happen outside, before and after: unbinding is linear and shared by the slots, so the slots mix first, and
the whole is gated linear attention with addresses as keys. `scan` of the one-token functions is the specification;
`associative` and `chunk` equal it, with gradients.
"""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops import chunked
from memjax.ops.carry import carry as carry_over
from memjax.ops.sequence import hand_over

FORMS, ORDERS = ('scan', 'associative', 'chunk'), ('after', 'before')


def slot_write(state_BxHxSxK, bound_BxHxK, address_BxHxS, log_keep=None):
  """The state after one token: exp(log_keep) * m + address (x) bound, in the dtype of the state.

  Log keep is [B or 1, H, S or 1], [B, H, 1, K] per channel, or None for 1.
  """
  dtype = state_BxHxSxK.dtype
  write = address_BxHxS.astype(dtype)[..., None] * bound_BxHxK.astype(dtype)[:, :, None]
  if log_keep is None: return state_BxHxSxK + write
  return jnp.exp((log_keep if log_keep.ndim == 4 else log_keep[..., None]).astype(dtype)) * state_BxHxSxK + write


def slot_read(state_BxHxSxK, pick_BxGxHxS):
  """The read of one token, sum_s pick_s m_s, in the dtype of the state, [B, G, H, K]."""
  return jnp.einsum('bghs,bhsk->bghk', pick_BxGxHxS.astype(state_BxHxSxK.dtype), state_BxHxSxK)


def slot_mix(state_BxHxSxK, bound_BxLxHxK, address_BxLxHxS, pick_BxLxGxHxS, *, log_keep=None, order: str = 'after',
             reset_BxL=None, mask_BxL=None, form: str = 'chunk', chunk: int = 0, decay: str = 'auto', floor: float = -20.0,
             carry: str = 'auto', axis: str = ''):
  """(final state, reads [B, L, G, H, K] in the dtype of bound) of L tokens.

  m_t = keep_t m_{t-1} + address_t (x) bound_t; y_t reads m_t, or m_{t-1} with order='before'. `log_keep` <= 0 is None,
  per head [B, L, H, 1], per slot [B, L, H, S], constant [1, 1, H, S or 1], or per channel [B, L, H, 1, K] (scan and
  associative only). reset: the state is zero before that token acts. mask False: the token does not exist; it leaves the
  state bit-equal and reads 0. form: scan | associative | chunk, all equal. chunk 0 = automatic. decay of keeps per slot:
  exact | factored (needs chunk * |floor| <= 160, where floor is the least log keep that occurs) | auto. carry between
  chunks: see `ops.carry`. axis: the tokens are one piece of a sequence over that axis of a mesh (not with scan). Compute
  follows the dtype of bound with fp32 accumulation, the state is never narrower than fp32. Raises UserError for names, shapes of
  log keep, or a form that cannot be had.
  """
  inputs = clean(bound_BxLxHxK, address_BxLxHxS, pick_BxLxGxHxS, log_keep=log_keep, reset_BxL=reset_BxL, mask_BxL=mask_BxL)
  options = dict(order=order, form=form, chunk=chunk, decay=decay, floor=floor, carry=carry, axis=axis)
  return _run(state_BxHxSxK, inputs, (slot_read, _chunk_read), mask_BxL=mask_BxL, **options)


def slot_scores(state_BxHxSxK, bound_BxLxHxK, address_BxLxHxS, probe_BxLxGxHxK, **options):
  """<probe_t, m_{t,s}> for every slot, [B, L, G, H, S] in the dtype of bound, without a state per token; options of `slot_mix`.

  For phasor, bipolar and unitary keys w . unbind(query, m) = <bind(query, w), m>: the content read of the original HAMT
  is softmax over slots of these scores at probe = bind(query, w), used as picks in a second pass.
  """
  log_keep, reset, mask = (options.pop(name, None) for name in ('log_keep', 'reset_BxL', 'mask_BxL'))
  inputs = clean(bound_BxLxHxK, address_BxLxHxS, probe_BxLxGxHxK, log_keep=log_keep, reset_BxL=reset, mask_BxL=mask)
  return _run(state_BxHxSxK, inputs, (_score, _chunk_score), mask_BxL=mask, **options)[1]


def slot_copies(state_BxHxSxK, bound_BxLxHxSxK, *, gate_BxLxH=None, log_keep=None, **options):
  """(final state, states seen by each token [B, L, H, S, K]) of S permuted copies: m_s <- keep m_s + gate bound_s.

  The caller binds with S permuted keys and unbinds each copy with its own query (Danihelka et al. 2016); the mean over
  copies has 1/S of the crosstalk variance. Keep is None, per head [B, L, H, 1], or per channel [B, L, H, 1, K] (not in
  chunks). Other options of `slot_mix`.
  """
  B, L, H, S, K = bound_BxLxHxSxK.shape
  if log_keep is not None and log_keep.ndim == 5: log_keep = jnp.tile(log_keep, S)
  elif log_keep is not None and log_keep.shape[-1] != 1: raise UserError('permuted copies take one keep per head, or per channel')
  one = jnp.ones((1, 1, 1, 1), bound_BxLxHxSxK.dtype)
  address = jnp.broadcast_to(one if gate_BxLxH is None else gate_BxLxH[..., None], (B, L, H, 1))
  pick, bound = jnp.broadcast_to(one[None], (B, L, 1, H, 1)), bound_BxLxHxSxK.reshape(B, L, H, S * K)
  state, y = slot_mix(state_BxHxSxK.reshape(B, H, 1, S * K), bound, address, pick, log_keep=log_keep, **options)
  return state.reshape(B, H, S, K), y.reshape(B, L, H, S, K)


def slot_states(state_BxHxSxK, bound_BxLxHxK, address_BxLxHxS, *, chunk: int, log_keep=None, reset_BxL=None, mask_BxL=None,
                carry: str = 'auto'):
  """The states after every `chunk` tokens and after the last one, [B, ceil(L / chunk), H, S, K], by the chunked form."""
  bound, address, _, log_keep, reset = clean(bound_BxLxHxK, address_BxLxHxS, address_BxLxHxS, log_keep=log_keep,
                                             reset_BxL=reset_BxL, mask_BxL=mask_BxL)
  c = chunked.prepare(log_keep, reset, bound.shape[1], chunk=chunk, decay='exact', floor=0.0, order='after')
  state = state_BxHxSxK.astype(jnp.promote_types(jnp.float32, state_BxHxSxK.dtype))
  write = chunked.writes(c, chunked.cut(bound, chunk), chunked.cut(address, chunk))
  before, final = carry_over(c, state, write, how=carry)
  return jnp.moveaxis(jnp.concatenate([before[:, :, 1:], final[:, :, None]], 2), 2, 1)


def clean(bound, address, pick, *, log_keep, reset_BxL, mask_BxL):
  """(bound, address, pick, log keep, reset) in compute dtype, keeps in fp32; masked tokens are neutral even where they are NaN."""
  dtype = bound.dtype
  address, pick = address.astype(dtype), pick.astype(dtype)
  if log_keep is not None: log_keep = log_keep.astype(jnp.promote_types(jnp.float32, dtype))
  if mask_BxL is None: return bound, address, pick, log_keep, reset_BxL
  only = lambda x: jnp.where(mask_BxL.reshape(*mask_BxL.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))
  reset = None if reset_BxL is None else reset_BxL & mask_BxL
  return only(bound), only(address), only(pick), None if log_keep is None else only(log_keep), reset


def plan(log_keep, reset_BxL, length: int, *, order: str, chunk: int, decay: str, floor: float):
  """(decay of the chunks, tokens a chunk) for inputs of `clean`; arguments as in `slot_mix`."""
  is_slot = log_keep is not None and log_keep.shape[-1] > 1
  size = chunked.choose_chunk(length, chunk, is_slot=is_slot, floor=floor)
  return chunked.prepare(log_keep, reset_BxL, length, chunk=size, decay=decay, floor=floor, order=order), size


def check(form: str, order: str, log_keep) -> None:
  """Nothing; raises UserError for an unknown form or order, or keeps per channel in chunked form."""
  if form not in FORMS: raise UserError(f'unknown form {form!r}; one of {", ".join(FORMS)}')
  if order not in ORDERS: raise UserError(f'unknown order {order!r}; one of {", ".join(ORDERS)}')
  if log_keep is not None and log_keep.ndim == 5 and form == 'chunk':
    raise UserError("keep per channel has no chunked form; use form='scan' or 'associative'")


def _run(state, inputs, reads, *, mask_BxL, order='after', form='chunk', carry='auto', chunk=0, decay='auto', floor=-20.0,
         axis=''):
  """(state, outputs) of any read that is linear in the state: `reads` are its one-token and its chunked function."""
  bound, _, _, log_keep, reset = inputs
  check(form, order, log_keep)
  state = state.astype(jnp.promote_types(jnp.float32, state.dtype))
  if form == 'chunk':
    c, size = plan(log_keep, reset, bound.shape[1], order=order, chunk=chunk, decay=decay, floor=floor)
    state, y = _chunk(c, state, (inputs[:3], size), (reads[1], carry, axis))
  elif form == 'scan': state, y = _scan(state, inputs, order, reads[0])
  else: state, y = _associative(state, inputs, (order, axis), reads[0])
  y = y.astype(bound.dtype)
  return state, y if mask_BxL is None else jnp.where(mask_BxL[:, :, None, None, None], y, 0)


def _score(state_BxHxSxK, probe_BxGxHxK):
  return jnp.einsum('bghk,bhsk->bghs', probe_BxGxHxK.astype(state_BxHxSxK.dtype), state_BxHxSxK)


def _scan(state, inputs, order, read):
  bound, address, pick, log_keep, reset = inputs
  if log_keep is not None: log_keep = jnp.broadcast_to(log_keep, (log_keep.shape[0], bound.shape[1], *log_keep.shape[2:]))

  def step(m, token):
    b, a, p, l, r = token
    if r is not None: m = jnp.where(r[:, None, None, None], 0, m)
    after = slot_write(m, b, a, l)
    return after, read(m if order == 'before' else after, p).astype(b.dtype)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (bound, address, pick, log_keep, reset))
  state, y = jax.lax.scan(step, state, tokens)
  return state, jnp.moveaxis(y, 0, 1)


def _associative(state, inputs, ways, read):
  (order, axis), (bound, address, pick, log_keep, reset) = ways, inputs
  write = address.astype(state.dtype)[..., None] * bound.astype(state.dtype)[:, :, :, None]
  keep = jnp.ones((1, 1, 1, 1, 1), state.dtype)
  if log_keep is not None: keep = jnp.exp(log_keep if log_keep.ndim == 5 else log_keep[..., None])
  if reset is not None: keep = jnp.where(reset[:, :, None, None, None], 0, keep)
  keep = jnp.broadcast_to(keep, (keep.shape[0], bound.shape[1], *keep.shape[2:]))
  join = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])
  since, m = jax.lax.associative_scan(join, (keep, write), axis=1)
  final = m[:, -1] + since[:, -1] * state
  if axis: state, final = hand_over(since[:, -1], m[:, -1], state, axis)
  m = m + since * state[:, None]
  seen = m
  if order == 'before':
    seen = jnp.concatenate([state[:, None], m[:, :-1]], 1)
    if reset is not None: seen = jnp.where(reset[:, :, None, None, None], 0, seen)
  return final, jax.vmap(read, 1, 1)(seen, pick)


def _chunk(c, state, cut_up, ways):
  (inputs, size), (read, how, axis) = cut_up, ways
  b, a, p = (chunked.cut(x, size) for x in inputs)
  before, state = carry_over(c, state, chunked.writes(c, b, a), how=how, axis=axis)
  return state, chunked.join(read(c, before.astype(b.dtype), b, a, p), inputs[0].shape[1])


def _chunk_read(c, before, *tokens):
  b, a, p = tokens
  y = jnp.einsum('bhngti,bhnik->bhngtk', chunked.weights(c, p, a), b, preferred_element_type=b.dtype)
  return y + jnp.einsum('bhngts,bhnsk->bhngtk', chunked.entered(c, p), before, preferred_element_type=b.dtype)


def _chunk_score(c, before, *tokens):
  b, a, p = tokens
  past = jnp.einsum('bhngtk,bhnsk->bhngts', p, before, preferred_element_type=b.dtype)
  return chunked.scores(c, p, b, a) + chunked.entered(c, past)
