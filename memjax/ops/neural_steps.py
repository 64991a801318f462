"""The inner optimiser of a neural memory as one linear recurrence, and its coefficients over a chunk of tokens.

A token turns the stack M = (W, S1, S2) of weights and momenta and pushes its gradient g into it:

    M_t = turn_t M_{t-1} - push_t g_t            turn [Q, Q], push [Q], functions of the token's gates alone

so that inside a chunk that starts from M_0, with products of turns alone,

    W_t = sum_q reach[q, t] M_0[q] - sum_i weigh[t, i] g_i          M_C = turn M_0 - sum_i push[:, i] g_i

No quotient and no logarithm: gates of exactly 0 and 1 have the right values and gradients. Step sizes are part of g.
Sparse matrices are dictionaries {(row, column): array}, missing entries zero.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.pallas_unroll import unroll_fused

SUMS = 128                           # longest chunk whose gradient is taken by sums over later tokens, which need C^3 operations
PART = 32                            # chunks whose gradients are taken together
MOMENTA = ('none', 'first', 'nesterov', 'cascade', 'muon')


class Steps(NamedTuple):
  """One linear step for each token: entries of `turn` and `push`, arrays of any equal shape."""
  turn: dict
  push: list


class Gates(NamedTuple):
  """Of each token: step size, momentum and forgetting in [0, 1], whether it writes; for a cascade also the momenta above the first and
  the mixture (c0, c1, ..); rate: factors on its gradient by fast tensor. Arrays of any equal shape, tokens last."""
  theta: jax.Array
  eta: jax.Array
  alpha: jax.Array
  write: jax.Array
  higher: tuple = ()
  mix: tuple = ()
  rate: dict | None = None


class Coefficients(NamedTuple):
  """Of a chunk: weigh [..., C, C], reach [..., Q, C], and what the whole chunk does: turn [..., Q, Q], push [..., Q, C]. Only
  token reads need `weigh`."""
  weigh: jax.Array | None
  reach: jax.Array
  turn: jax.Array
  push: jax.Array


def levels(momentum: str, order: int = 0) -> int:
  """Q, tensors kept for each fast tensor: the weights and the momenta, of which a cascade has `order`."""
  return {'none': 1, 'cascade': 1 + order}.get(momentum, 2)


def turns(momentum: str, order: int = 0) -> set[tuple[int, int]]:
  """The entries of a turn that are not zero for every gate: W follows all momenta, each momentum those below it."""
  if momentum == 'muon': return {(0, 0), (1, 1)}
  size = levels(momentum, order)
  return {(0, 0), *((row, column) for column in range(1, size) for row in (0, *range(column, size)))}


def steps(momentum: str, gates: Gates) -> Steps:
  """The step of each token; where it does not write nothing changes.

  none: W <- (1 - alpha) W - g. first: S <- eta S - g, W <- (1 - alpha) W + S. nesterov: W adds eta S - g instead of S. cascade:
  S1 <- eta S1 - g, S_n <- eta_n S_n + S_{n-1}, W adds -c0 g + c1 S1 + c2 S2 + ... muon: S as first, W only forgets: the orthogonalised
  S joins it where a chunk ends. (g with its step size.)
  """
  keep, eta = 1 - gates.alpha, gates.eta
  one, zero = jnp.ones_like(keep), jnp.zeros_like(keep)
  if momentum == 'none': turn, push = {(0, 0): keep}, [one]
  elif momentum == 'first': turn, push = {(0, 0): keep, (0, 1): eta, (1, 1): eta}, [one, one]
  elif momentum == 'muon': turn, push = {(0, 0): keep, (1, 1): eta}, [zero, one]
  elif momentum == 'nesterov': turn, push = {(0, 0): keep, (0, 1): eta * eta, (1, 1): eta}, [1 + eta, one]
  else:
    order, each = len(gates.mix) - 1, (keep, eta, *gates.higher)
    above = [sum(gates.mix[n:]) for n in range(order + 1)]                  # S_n holds all momenta below it: what W takes of each
    turn = {at: each[at[1]] * above[at[1]] if at[0] == 0 and at[1] else each[at[1]] for at in sorted(turns('cascade', order))}
    push = [above[0], *[one] * order]
  still = lambda at: one if at[0] == at[1] else zero
  return Steps({at: jnp.where(gates.write, a, still(at)) for at, a in turn.items()}, [jnp.where(gates.write, a, zero) for a in push])


def product(a: dict, b: dict) -> dict:
  """The matrix product of two sparse matrices."""
  out = {}
  for (row, inner), x in a.items():
    for (other, column), y in b.items():
      if inner == other: out[row, column] = out[row, column] + x * y if (row, column) in out else x * y
  return out


def dense(entries: dict, size: int) -> jax.Array:
  """The matrices [..., Q, Q] with these entries."""
  zero = jnp.zeros_like(entries[0, 0])
  return jnp.stack([jnp.stack([entries.get((row, column), zero) for column in range(size)], -1) for row in range(size)], -2)


def unroll(given: Steps, *, inside: bool = True, fused: bool = False) -> Coefficients:
  """Coefficients of the chunks on the last axis (C tokens), by doubling: two neighbouring pieces join by one outer product.

  log2(C) elementwise levels whose largest array is the result. Without `inside` only what whole chunks do, O(C log C). `fused`: by
  kernels that go token by token, for chunks of a power of two up to 128.
  """
  C = given.push[0].shape[-1]
  if inside and fused and 1 < C <= SUMS and not C & (C - 1): return Coefficients(**unroll_fused(given.turn, given.push))
  return _unroll_inside(given) if inside and C <= SUMS else _unroll(given, inside=inside)


def _pieces(given):
  """(turns, pushes) of pieces of one token, [..., pieces, 1], filled up to a power of two by tokens that do nothing."""
  C = given.push[0].shape[-1]
  padded = 1 << (C - 1).bit_length()
  def pad(a, value): return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, padded - C)], constant_values=value)[..., None]
  return {at: pad(a, float(at[0] == at[1])) for at, a in given.turn.items()}, [pad(a, 0.0) for a in given.push]


def _unroll(given, *, inside):
  C, size = given.push[0].shape[-1], len(given.push)
  turn, push = _pieces(given)                                                            # [..., pieces, tokens of a piece]
  weigh = push[0][..., None] if inside else None                                         # [..., pieces, tokens, tokens]
  while push[0].shape[-2] > 1: turn, push, weigh = _join(turn, push, weigh)
  whole = lambda a: a[..., 0, :C]
  reach = [whole(turn[0, q]) if (0, q) in turn else jnp.zeros_like(given.push[0]) for q in range(size)]
  return Coefficients(weigh[..., 0, :C, :C] if inside else None, jnp.stack(reach, -2),
                      dense({at: a[..., 0, -1] for at, a in turn.items()}, size), jnp.stack([whole(a) for a in push], -2))


_unroll_inside = jax.custom_vjp(lambda given: _unroll(given, inside=True))


def _between(given):
  """Entries of turn_t .. turn_{i+1}, [..., C (t), C (i)]; 0 where i is later than t."""
  C, (turn, push) = given.push[0].shape[-1], _pieces(given)
  held = {at: jnp.full_like(a, float(at[0] == at[1]))[..., None] for at, a in turn.items()}
  while push[0].shape[-2] > 1:
    left, right = (lambda a: a[..., 0::2, :, :]), (lambda a: a[..., 1::2, :, :])
    ahead, behind = {at: a[..., 1::2, :, None] for at, a in turn.items()}, {at: left(a)[..., -1:, :] for at, a in held.items()}
    cross, (turn, push, _) = product(ahead, behind), _join(turn, push, None)
    held = {at: jnp.concatenate([jnp.concatenate([left(a), jnp.zeros_like(left(a))], -1), jnp.concatenate([cross[at], right(a)], -1)], -2)
            for at, a in held.items()}
  return {at: a[..., 0, :C, :C] for at, a in held.items()}


def _unroll_backward(given, ct):
  """The gradient by sums over later tokens: that of the doubling adds up many small pieces, each an array of its own."""
  held, size, last = _between(given), len(given.push), slice(-1, None)
  multiply = lambda spec, a, b: jnp.einsum(spec, a, b, precision='highest')
  entry = lambda at, rows=slice(None): held[at][..., rows, :] if at in held else 0.0
  ends = lambda p, ct_rows: sum(entry((q, p), last)[..., 0, :] * ct_rows[q] for q in range(size) if (q, p) in held)
  push = [(jnp.sum(entry((0, p)) * ct.weigh, -2) if (0, p) in held else 0.0) + ends(p, [ct.push[..., q, :] for q in range(size)])
          for p in range(size)]
  turn = dict.fromkeys(given.turn)
  for q in range(size):
    seen = sum(held[q, p] * given.push[p][..., None, :] for p in range(size) if (q, p) in held)        # row q of tokens before: pushes,
    first = [sum(held[q, p][..., 0] * given.turn[p, r][..., :1] for p in range(size) if (q, p) in held and (p, r) in given.turn)
             for r in range(size)]                                                                     # and the memory at the start
    first = jnp.stack([jnp.zeros_like(given.push[0]) + a for a in first], -2)
    one = jnp.zeros_like(first[..., :1]).at[..., q, :].set(1)
    seen = jnp.pad(seen[..., :-1, :], [(0, 0)] * (seen.ndim - 2) + [(1, 0), (0, 0)])
    first = jnp.concatenate([one, first[..., :-1]], -1)
    met = multiply('...ti,...ji->...tj', ct.weigh, seen) + multiply('...rt,...rj->...tj', ct.reach, first)
    whole = multiply('...pi,...ji->...pj', ct.push, seen) + multiply('...pr,...rj->...pj', ct.turn, first)
    for p in range(size):
      if (p, q) not in turn: continue
      own = jnp.sum(held[0, p] * met, -2) if (0, p) in held else 0.0
      turn[p, q] = own + ends(p, [whole[..., row, :] for row in range(size)])
  return (Steps(turn, push),)


def _unroll_backward_in_parts(given, ct):
  """The same a number of chunks at a time, for its arrays are many."""
  if given.push[0].ndim < 2 or given.push[0].shape[0] <= PART: return _unroll_backward(given, ct)
  return jax.lax.map(lambda one: _unroll_backward(*one), (given, ct), batch_size=PART)


_unroll_inside.defvjp(lambda given: (_unroll(given, inside=True), given), _unroll_backward_in_parts)


def _join(turn, push, weigh):
  """Pieces of twice the length."""
  first, second = (lambda a: a[..., 0::2, :]), (lambda a: a[..., 1::2, :])
  odd, even = {at: second(a) for at, a in turn.items()}, {at: first(a) for at, a in turn.items()}
  end1, end2 = ({at: a[..., -1:] for at, a in half.items()} for half in (even, odd))
  push1, push2 = [first(a) for a in push], [second(a) for a in push]
  carried = [sum(end2[row, q] * push1[q] for q in range(len(push)) if (row, q) in end2) for row in range(len(push))]
  moved = product(odd, end1)
  turn = {at: jnp.concatenate([even[at], moved[at]], -1) for at in turn}
  push = [jnp.concatenate(pair, -1) for pair in zip(carried, push2, strict=True)]
  if weigh is None: return turn, push, None
  cross = sum(odd[0, q][..., :, None] * push1[q][..., None, :] for q in range(len(push)) if (0, q) in odd)
  weigh1, weigh2 = weigh[..., 0::2, :, :], weigh[..., 1::2, :, :]
  upper, lower = jnp.concatenate([weigh1, jnp.zeros_like(weigh1)], -1), jnp.concatenate([cross, weigh2], -1)
  return turn, push, jnp.concatenate([upper, lower], -2)


def advance(given: Steps, turn: jax.Array, push: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(turn [..., Q, Q], push [..., Q, C]) of a chunk after one more token, which takes the slot where `at` [..., C] is 1.

  The row form of `unroll`: row 0 of the two are `reach` and `weigh` of that token. Entries of `given` have shape [...].
  """
  size = len(given.push)
  one = dense(given.turn, size)
  multiply = lambda a, b: jnp.sum(a[..., :, :, None] * b[..., None, :, :], -2)
  return multiply(one, turn), multiply(one, push) + jnp.stack(given.push, -1)[..., None] * at[..., None, :]


def windowed(given: Coefficients, theta: jax.Array, window: int, gamma: jax.Array | None = None) -> Coefficients:
  """Coefficients of the omega rule: the step at t follows theta_t times sum_n gamma_n g_{t-n} over the last `window` gradients.

  theta [..., C]; gamma [H, window], theta then [..., H, C]; None = 1. Columns cover window - 1 tokens before the chunk, then its own:
  [..., C, window - 1 + C].
  """
  C = theta.shape[-1]
  back = jnp.arange(C)[:, None] - jnp.arange(1 - window, C)[None]
  band, spec = ((back >= 0) & (back < window)).astype(theta.dtype), '...t,ti->...i'
  if gamma is not None: band, spec = band[None] * gamma[:, jnp.clip(back, 0, window - 1)], '...hrt,hti->...hri'
  spread = lambda a: a if a is None else jnp.einsum(spec, a * theta[..., None, :], band, precision='highest')
  return given._replace(weigh=spread(given.weigh), push=spread(given.push))


def coefficients(momentum: str, gates: Gates, *, inside: bool = True, window: int = 1, pairs: int = 1, gamma: jax.Array | None = None,
                 fused: bool = False) -> Coefficients:
  """Coefficients of the chunks on the last axis, with a column for each of `pairs` gradients of a token; gamma as in `windowed`; `fused`
  by kernels."""
  found = unroll(steps(momentum, gates), inside=inside, fused=fused)
  return for_pairs(found if window == 1 else windowed(found, jnp.where(gates.write, gates.theta, 0), window, gamma), pairs)


def weights(gates: Gates, window: int = 1) -> jax.Array:
  """What the gradient of each token is multiplied by: theta, or 1 where steps follow windows of tokens; 0 where it does not write."""
  return jnp.where(gates.write, gates.theta if window == 1 else jnp.ones_like(gates.theta), 0)


def for_pairs(given: Coefficients, pairs: int) -> Coefficients:
  """The same with every column `pairs` times, for tokens of as many gradients."""
  if pairs == 1: return given
  more = lambda a: a if a is None else jnp.repeat(a, pairs, -1)
  return given._replace(weigh=more(given.weigh), push=more(given.push))


def read_before(given: Coefficients) -> Coefficients:
  """The same with reads of W_{t-1} instead of W_t."""
  first = jnp.zeros_like(given.reach[..., :1]).at[..., 0, :].set(1)
  return given._replace(reach=jnp.concatenate([first, given.reach[..., :-1]], -1),
                        weigh=jnp.concatenate([jnp.zeros_like(given.weigh[..., :1, :]), given.weigh[..., :-1, :]], -2))
