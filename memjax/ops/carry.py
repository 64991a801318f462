"""Chunk states from what each chunk leaves: x_n = g_n x_{n-1} + u_n over N chunks, in fp32, by scan, matmul or associative scan."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.chunked import Chunks, keeps
from memjax.ops.sequence import hand_over

CARRIES = ('auto', 'scan', 'matmul', 'associative')


def carry(c: Chunks, state_BxHxSxK, write_BxHxNxSxK, *, how: str = 'auto', axis: str = ''):
  """(states before each chunk [B, H, N, S, K], final state [B, H, S, K]).

  scan: one small step a chunk, best on CPU; matmul: one N x N decay matrix per head (or slot), best for few chunks on
  an accelerator; associative: log N steps. auto chooses by backend and sizes. With `axis`, the chunks are those of one piece of
  a sequence over that axis of a mesh (see `ops.sequence`). Raises UserError for another name.
  """
  if how not in CARRIES: raise UserError(f'unknown carry {how!r}; one of {", ".join(CARRIES)}')
  N, S, K = write_BxHxNxSxK.shape[2:]
  slots = 1 if c.total is None else c.total.shape[-1]
  if how == 'auto':
    how = 'matmul' if slots * N <= S * K else 'associative'
    if jax.default_backend() == 'cpu': how = 'scan'
  if N == 1: how = 'scan'
  run = {'scan': _scan, 'matmul': _matmul, 'associative': _associative}[how]
  if not axis: return run(c, state_BxHxSxK, write_BxHxNxSxK)
  before, left = run(c, jnp.zeros_like(state_BxHxSxK), write_BxHxNxSxK)
  since = _since(c, N, write_BxHxNxSxK.dtype)
  first, final = hand_over(since[:, :, -1], left, state_BxHxSxK, axis)
  return before + since[:, :, :-1] * first[:, :, None], final


def _since(c, count, dtype):
  """Decay of the state before all chunks up to each border of chunks, [b, H, N + 1, s, 1]; zero once a segment started."""
  log = jnp.zeros((1, 1, 1, 1), dtype) if c.total is None else c.total[..., -1, :]
  log = jnp.broadcast_to(log, (*log.shape[:2], count, log.shape[3]))
  since = jnp.exp(jnp.pad(jnp.cumsum(log, 2), ((0, 0), (0, 0), (1, 0), (0, 0))))[..., None]
  if c.segment is None: return since
  ids = jnp.concatenate([c.entering[..., 0], c.segment[:, :, -1:, -1]], 2)[..., None, None]
  return jnp.where(ids == c.entering[:, :, :1, :1, None], since, 0)


def _scan(c, state, write):
  decay = keeps(c, write.shape[2], write.dtype)
  if write.shape[2] == 1: return state[:, :, None], decay[:, :, 0] * state + write[:, :, 0]
  step = lambda m, gu: (gu[0] * m + gu[1], m)
  final, before = jax.lax.scan(step, state, (jnp.moveaxis(decay, 2, 0), jnp.moveaxis(write, 2, 0)))
  return jnp.moveaxis(before, 0, 2), final


def _associative(c, state, write):
  join = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])
  decay, after = jax.lax.associative_scan(join, (keeps(c, write.shape[2], write.dtype), write), axis=2)
  after = after + decay * state[:, :, None]
  return jnp.concatenate([state[:, :, None], after[:, :, :-1]], 2), after[:, :, -1]


def _matmul(c, state, write):
  N, dtype = write.shape[2], write.dtype
  n = jnp.arange(N + 1)
  allowed = (n[None, :] <= n[:, None])[None, None, None]
  if c.segment is not None:
    ids = jnp.concatenate([c.entering[..., 0], c.segment[:, :, -1:, -1]], 2)[:, :, None]
    allowed = allowed & (ids[..., :, None] == ids[..., None, :])
  if c.total is None: matrix = allowed.astype(dtype)
  else:                      # sums of log keeps between chunks by masked cumulative sums: differences of large sums would lose digits
    log = jnp.moveaxis(c.total[..., -1, :], 3, 2)
    log = jnp.pad(jnp.broadcast_to(log, (*log.shape[:3], N)), ((0, 0), (0, 0), (0, 0), (1, 0)))
    between = jnp.cumsum(jnp.where((n[None, :] < n[:, None])[None, None, None], log[..., :, None], 0), 3)
    matrix = jnp.exp(jnp.where(allowed, between, -jnp.inf))
  matrix = jnp.broadcast_to(matrix, (*write.shape[:2], *matrix.shape[2:]))
  rows = jnp.concatenate([state[:, :, None], write], 2)
  precision = jax.lax.Precision.HIGHEST
  if matrix.shape[2] == 1: states = jnp.einsum('bhnj,bhjsk->bhnsk', matrix[:, :, 0], rows, precision=precision)
  else: states = jnp.einsum('bhsnj,bhjsk->bhnsk', matrix, rows, precision=precision)
  return states[:, :, :-1], states[:, :, -1]
