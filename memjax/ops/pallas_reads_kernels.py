"""The Pallas kernels of the reads y = q + (1 + gain_t) (.) norm(act(q W_up_t) W_down_t) of a chunk's tokens, each through its own weights.

    W_t = home + sum_q reach[q, t] M_q - sum_i weigh[t, i] a_i (x) d_i         formed by products of tokens with tokens, never as weights

A program takes the tokens of one chunk, row and head, and goes through hidden channels a block at a time. Refs come as dictionaries:

    query, key [C, K]; up [Q K + C, F]: levels of M, then d of the first layer; hidden [C, F]: its activations where a chunk writes
    down [F, Q V]: levels side by side; d [C, V] of the second layer; gain [Q, V], pushed [C, V]: a (.) d of the gain
    reach [Q, C], weigh [C, C]; home_up, home_down: the learned start, where weights decay to it; home_gain: that of the gain, or a slow
    gain, which has no levels
    made [C, V]: outputs before their norm; met [C, C]: products of activations with `hidden`; dy: the cotangent of reads
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from memjax.ops.neural_nets import ACTIVATIONS, EPSILON
from memjax.ops.pallas_chunk import dot, wide


class Plan(NamedTuple):
  """What is fixed while tracing: rows of text, the chunks of which lie one after the other; hidden channels come in `blocks` of `block`,
  operands of products in `dtype`."""
  rows: int
  levels: int
  blocks: int
  block: int
  activation: str
  dtype: Any
  is_compiled: bool = True


def _fence(plan):
  """What programs wrote so far can be read; keeps loads behind it, for fewer registers."""
  if plan.is_compiled: plgpu.debug_barrier()


def _wide(plan, refs, name):
  return refs[name][...].astype(wide(plan.dtype))


def _operand(plan, refs, name):
  return refs[name][...].astype(plan.dtype)


def _by_token(x):
  return x[:, None]


def _parts(plan, size):
  """Where the levels of a stack lie."""
  return [pl.ds(q * size, size) for q in range(plan.levels)]


def _block(plan, n):
  return pl.ds(pl.multiple_of(n * plan.block, plan.block), plan.block)


def _tail(plan, refs):
  """Where d lies below the levels of `up`."""
  C, K = refs['query'].shape
  return pl.ds(plan.levels * K, C)


def _met_keys(plan, refs):
  """Products of queries with keys, before `weigh`."""
  return dot(_operand(plan, refs, 'query'), refs['key'][...], plan.dtype, right=1)


def _weighed(plan, refs, x):
  """x (.) -weigh as an operand."""
  return (x * -refs['weigh'][...]).astype(plan.dtype)


def _held(plan, refs):
  """What a program reads once: queries and what they meet as operands, reach by level. A loop would load it again with every block."""
  return {'query': _operand(plan, refs, 'query'), 'seen': _weighed(plan, refs, _met_keys(plan, refs)),
          'reach': [_by_token(refs['reach'][q]) for q in range(plan.levels)]}


def _first_layer(plan, refs, at):
  """(d, the learned start or None, the levels) of the hidden channels `at`, each loaded once for the products before and after."""
  home = refs['home_up'][:, at] if 'home_up' in refs else None
  return refs['up'][_tail(plan, refs), at], home, [refs['up'][part, at] for part in _parts(plan, refs['query'].shape[1])]


def _hidden(plan, held, layer):
  """(hidden channels before their activation, rounded; what each level gives them, before reach)."""
  tail, home, levels = layer
  z = dot(held['seen'], tail, plan.dtype)
  if home is not None: z += dot(held['query'], home, plan.dtype)
  levels = [dot(held['query'], level, plan.dtype) for level in levels]
  for reach, level in zip(held['reach'], levels, strict=True): z += reach * level
  return z.astype(plan.dtype).astype(z.dtype), levels


def _normed(plan, made):
  """(layer norm of outputs, its scale)."""
  y = made - _mean(made)
  size = jax.lax.rsqrt(_mean(y * y) + EPSILON)
  return y * size, size


def _mean(x):
  return _by_token(jnp.sum(x, 1) / x.shape[1])


def _gain(plan, refs):
  """1 + the gain of each token."""
  gain = 1 + refs['home_gain'][...][None] if 'home_gain' in refs else 1
  if 'gain' not in refs: return gain
  for q in range(plan.levels): gain += _by_token(refs['reach'][q]) * refs['gain'][q][None]
  return gain - dot(refs['weigh'][...], refs['pushed'][...], plan.dtype)


def read_kernel(plan, refs, out):
  """y; and where `out` has them, what the gradient needs: made, met."""
  act, (C, V), dtype = ACTIVATIONS[plan.activation], refs['d'].shape, plan.dtype
  held = _held(plan, refs)
  def body(n, sums):
    made, met = sums
    at = _block(plan, n)
    h = act(_hidden(plan, held, _first_layer(plan, refs, at))[0]).astype(dtype)
    if 'home_down' in refs: made += dot(h, refs['home_down'][at], dtype)
    for reach, part in zip(held['reach'], _parts(plan, V), strict=True):
      made += dot((reach * h).astype(dtype), refs['down'][at, part], dtype)
    return made, met - dot(-h, refs['hidden'][:, at], dtype, right=1)         # a difference, as in `token_kernel`
  zeros = lambda width: jnp.zeros((C, width), wide(dtype))
  made, met = jax.lax.fori_loop(0, plan.blocks, body, (zeros(V), zeros(C)))
  if 'met' in out: out['met'][...] = met.astype(dtype)
  made = (made + dot(_weighed(plan, refs, met), refs['d'][...], dtype)).astype(dtype)
  if 'made' in out: out['made'][...] = made
  unit, _ = _normed(plan, made.astype(wide(dtype)))
  out['y'][...] = (_wide(plan, refs, 'query') + _gain(plan, refs) * unit).astype(out['y'].dtype)


def norm_kernel(plan, refs, out):
  """Cotangents through the norm and its gain: dmade of outputs, dmet of products with `hidden`, those of the gain and of d, and shares of
  those of `weigh` and `reach`."""
  dtype, dy = plan.dtype, _wide(plan, refs, 'dy')
  unit, size = _normed(plan, _wide(plan, refs, 'made'))
  dgain, dunit = dy * unit, dy * _gain(plan, refs)
  dmade = ((dunit - _mean(dunit) - unit * _mean(dunit * unit)) * size).astype(dtype)
  out['dmade'][...] = dmade
  if 'home_gain' in refs: out['home_gain'][...] = jnp.sum(dgain, 0)
  met, dmet = _wide(plan, refs, 'met'), dot(dmade, refs['d'][...], dtype, right=1)
  out['dmet'][...] = _weighed(plan, refs, dmet)
  out['d'][...] = dot(_weighed(plan, refs, met), dmade, dtype, left=0).astype(out['d'].dtype)
  some_weigh = met * dmet
  if 'gain' in refs:
    out['pushed'][...] = -dot(refs['weigh'][...], dgain, dtype, left=0)
    some_weigh += dot(dgain, refs['pushed'][...], dtype, right=1)
    for q in range(plan.levels):
      out['gain'][q] = jnp.sum(dgain * _by_token(refs['reach'][q]), 0)
      out['some_reach'][q] = jnp.sum(dgain * refs['gain'][q][None], 1)
  out['some_weigh'][...] = some_weigh.astype(out['some_weigh'].dtype)


def token_kernel(plan, refs, out):
  """Cotangents of queries, keys and coefficients; and for those of weights, h and dz [C, F] on both sides of the activation, and seen."""
  (C, K), dtype = refs['query'].shape, plan.dtype
  held = _held(plan, refs) | {'dmade': refs['dmade'][...], 'dmet': refs['dmet'][...]}
  out['seen'][...] = held['seen']
  def body(n, sums):
    at, (dquery, dseen, dreach) = _block(plan, n), sums
    layer = tail, home, levels = _first_layer(plan, refs, at)
    dz, more = _down_back(plan, refs, out, at=at, given=(held, layer))
    if home is not None: dquery += dot(dz, home, dtype, right=1)
    for reach, level in zip(held['reach'], levels, strict=True): dquery += dot((reach * dz).astype(dtype), level, dtype, right=1)
    # A difference: a last product that Triton adds to a sum itself is still under way where it loads the next block over its operands.
    dseen -= dot(-dz, tail, dtype, right=1)
    return dquery, dseen, tuple(a + b for a, b in zip(dreach, more, strict=True))
  zeros = lambda width: jnp.zeros((C, width), wide(dtype))
  reach = tuple(refs['some_reach'][q] if 'some_reach' in refs else jnp.zeros((C,), wide(dtype)) for q in range(plan.levels))
  dquery, dseen, dreach = jax.lax.fori_loop(0, plan.blocks, body, (zeros(K), zeros(C), reach))
  _fence(plan)
  for q in range(plan.levels): out['reach'][q] = dreach[q]
  out['weigh'][...] = -_wide(plan, refs, 'some_weigh') - dseen * _met_keys(plan, refs)
  dseen = _weighed(plan, refs, dseen)
  out['key'][...] = dot(dseen, _operand(plan, refs, 'query'), dtype, left=0).astype(out['key'].dtype)
  dquery += dot(dseen, refs['key'][...], dtype) + _wide(plan, refs, 'dy')
  out['query'][...] = dquery.astype(out['query'].dtype)


def _down_back(plan, refs, out, *, at, given):
  """(cotangents of hidden channels `at` before their activation, those of reach by level) through the second layer; writes both sides of
  the activation."""
  act, dtype, (held, layer), more = ACTIVATIONS[plan.activation], plan.dtype, given, []
  z, levels = _hidden(plan, held, layer)
  h, slope = jax.jvp(act, (z,), (jnp.ones_like(z),))
  out['h'][:, at] = h.astype(dtype)
  dh = dot(held['dmet'], refs['hidden'][:, at], dtype)
  if 'home_down' in refs: dh += dot(held['dmade'], refs['home_down'][at], dtype, right=1)
  for reach, part in zip(held['reach'], _parts(plan, held['dmade'].shape[1]), strict=True):
    back = dot(held['dmade'], refs['down'][at, part], dtype, right=1)
    more.append(jnp.sum(h * back, 1))
    dh += reach * back
  dz = (dh * slope).astype(dtype)
  out['dz'][:, at] = dz
  return dz, [some + jnp.sum(dz.astype(z.dtype) * level, 1) for some, level in zip(more, levels, strict=True)]


def weight_kernel(plan, refs, out):
  """Cotangents of weights, of a block of hidden channels and several chunks of one row; of the learned start the sum over these."""
  dtype, (R, K), V = plan.dtype, refs['query'].shape[::2], refs['dmade'].shape[2]
  def body(n, sums):
    h, dz, dmade, query = (refs[name][n] for name in ('h', 'dz', 'dmade', 'query'))
    out['hidden'][n] = dot(refs['dmet'][n], h, dtype, left=0).astype(out['hidden'].dtype)
    out['up'][n, pl.ds(plan.levels * K, h.shape[0])] = dot(refs['seen'][n], dz, dtype, left=0).astype(out['up'].dtype)
    for q, (above, below) in enumerate(zip(_parts(plan, K), _parts(plan, V), strict=True)):
      scaled = lambda x, q=q: _by_token(refs['reach'][n, q]) * x.astype(wide(dtype))
      out['up'][n, above] = dot(query, scaled(dz), dtype, left=0).astype(out['up'].dtype)
      out['down'][n, :, below] = dot(scaled(h), dmade, dtype, left=0).astype(out['down'].dtype)
    if 'home_up' not in out: return sums
    # A difference: products that Triton adds to a sum itself are still under way where it loads the next chunk over their operands.
    return sums[0] - dot(query, dz, dtype, left=0), sums[1] - dot(h, dmade, dtype, left=0)
  zeros = lambda *shape: jnp.zeros(shape, wide(dtype))
  sums = jax.lax.fori_loop(0, R, body, (zeros(K, plan.block), zeros(plan.block, V)) if 'home_up' in out else ())
  if 'home_up' in out: out['home_up'][...], out['home_down'][...] = -sums[0], -sums[1]
