"""The Pallas kernels of holographic mixing: what a stretch of tokens leaves and reads, and the gradients of readers and writers.

A program takes one row, one head and one segment of consecutive chunks, and holds the state [S, K] in registers. The start of each
segment comes from outside (`ops/pallas_mixing.py`), so that a long sequence fills the card. Refs come as dictionaries. The
backward pass is two kernels because one would need more registers than there are: forwards over the chunks for what reads
(queries, picks), backwards for what writes (keys, values, addresses, keeps).
"""
import functools

import jax
import jax.numpy as jnp

from memjax.ops.pallas_chunk import (
  columns,
  decay,
  decayed_pairs,
  dot,
  into,
  keep_gradient,
  load,
  load_basis,
  load_vectors,
  product,
  scaled,
  store,
  store_slots,
  store_states,
  wide,
)


def _load_state(plan, ref, dtype):
  return tuple(ref[:, c].astype(dtype) for c in columns(plan, ref))


def _store_state(plan, ref, parts):
  for x, c in zip(parts, columns(plan, ref), strict=True): ref[:, c] = x.astype(ref.dtype)


def _empty(plan, width, dtype):
  return tuple(jnp.zeros((plan.padded, width // plan.parts), dtype) for _ in range(plan.parts))


def _bound(plan, items, basis):
  key, value = into(plan, items['key'], basis, is_key=True), into(plan, items['value'], basis)
  return key, value, product(plan, key, value)


def _advance(d, state, weight, items, *, dtype):
  """The state after a chunk, or (with picks and cotangents of reads) the gradient of the state before it."""
  return tuple(d.over * m + dot(weight, x, dtype, left=0) for m, x in zip(state, items, strict=True))


def _weights(d, items, dtype):
  """(W, picks and addresses with the factors of keeps per slot)."""
  p, a = scaled(items['pick'], d.reading), scaled(items['address'], d.writing)
  return decayed_pairs(d, dot(p, a, dtype, right=1)), p, a


def _mixed(weights, entering, bound, state, *, dtype):
  return tuple(dot(weights, b, dtype) + dot(entering, m, dtype) for b, m in zip(bound, state, strict=True))


def _pair_sum(x, y, dtype):
  """sum over parts of x y^T."""
  return functools.reduce(jnp.add, (dot(a, b, dtype, right=1) for a, b in zip(x, y, strict=True)))


def write_kernel(plan, refs, out):
  """What a segment alone leaves in the slots."""
  dtype, basis = refs['value'].dtype, load_basis(plan, refs)
  def body(n, state):
    items = load(plan, refs, n)
    d = decay(plan, items, dtype)
    return _advance(d, state, scaled(items['address'], d.stay), _bound(plan, items, basis)[2], dtype=dtype)
  empty = _empty(plan, refs['value'].shape[-1], wide(dtype))
  _store_state(plan, out['state'], jax.lax.fori_loop(0, plan.chunks, body, empty))


def read_kernel(plan, refs, out):
  """Reads of a segment from the state before it, and the state after it."""
  dtype, basis = refs['value'].dtype, load_basis(plan, refs)
  def body(n, state):
    items = load(plan, refs, n)
    d, bound = decay(plan, items, dtype), _bound(plan, items, basis)[2]
    mixed = _mixed(_weights(d, items, dtype)[0], scaled(items['pick'], d.enter), bound, state, dtype=dtype)
    query = into(plan, items['query'], basis, is_key=True)
    store(plan, out['y'], n, product(plan, query, mixed, conjugate=True), basis=basis)
    return _advance(d, state, scaled(items['address'], d.stay), bound, dtype=dtype)
  state = _load_state(plan, refs['start'], wide(dtype))
  _store_state(plan, out['state'], jax.lax.fori_loop(0, plan.chunks, body, state))


def read_back_kernel(plan, refs, out):
  """Gradients of queries and picks, what the reads of a segment alone leave in the gradient of its start, and what the next kernel needs:
  the state before every chunk, and (keeps) pick times its gradient."""
  dtype, basis = refs['value'].dtype, load_basis(plan, refs)
  def body(n, carried):
    state, dstart, since = carried
    items = load(plan, refs, n)
    d, bound = decay(plan, items, dtype), _bound(plan, items, basis)[2]
    query, dy = into(plan, items['query'], basis, is_key=True), into(plan, items['dy'], basis)
    dmixed = product(plan, query, dy)
    weights, _, address = _weights(d, items, dtype)
    entering = scaled(items['pick'], d.enter)
    mixed = _mixed(weights, entering, bound, state, dtype=dtype)
    store(plan, out['query'], n, product(plan, dy, mixed, conjugate=True), basis=basis, is_key=True)
    inside = dot(decayed_pairs(d, _pair_sum(dmixed, bound, dtype)), address, dtype)
    dpick = scaled(inside, d.reading) + scaled(_pair_sum(dmixed, state, dtype), d.enter)
    store_slots(plan, out['pick'], n, dpick)
    if plan.keep:
      store_states(plan, out['states'], n, state)
      picked = items['pick'] * dpick
      store_slots(plan, out['picked'], n, picked if plan.keep == 'slot' else jnp.sum(picked, 1))
    dstart = tuple(x + since * dot(entering, y, dtype, left=0) for x, y in zip(dstart, dmixed, strict=True))
    return _advance(d, state, scaled(items['address'], d.stay), bound, dtype=dtype), dstart, since * d.over
  state = _load_state(plan, refs['start'], wide(dtype))
  since = jnp.ones((plan.padded, 1) if plan.keep == 'slot' else (), wide(dtype))
  empty = _empty(plan, refs['value'].shape[-1], wide(dtype))
  _store_state(plan, out['state'], jax.lax.fori_loop(0, plan.chunks, body, (state, empty, since))[1])


def _keep_terms(plan, items, parts):
  """The terms of `keep_gradient` from gradients of addresses by part; summed over slots for one keep a head."""
  inside, leaving, crossing = parts
  inside, leaving = items['address'] * inside, items['address'] * leaving
  if plan.keep == 'slot': return items['picked'], inside, leaving, jnp.sum(crossing, 1)[None]
  return items['picked'], jnp.sum(inside, 1), jnp.sum(leaving, 1), jnp.sum(crossing)


def write_back_kernel(plan, refs, out):
  """Gradients of keys, values, addresses and keeps of a segment and of the state before it, from that of the state after it."""
  dtype, basis = refs['value'].dtype, load_basis(plan, refs)
  def body(step, dstate):
    n = plan.chunks - 1 - step
    items = load(plan, refs, n)
    d, (key, value, bound) = decay(plan, items, dtype), _bound(plan, items, basis)
    dmixed = product(plan, into(plan, items['query'], basis, is_key=True), into(plan, items['dy'], basis))
    weights, pick, _ = _weights(d, items, dtype)
    staying = scaled(items['address'], d.stay)
    dbound = tuple(dot(weights, y, dtype, left=0) + dot(staying, m, dtype) for y, m in zip(dmixed, dstate, strict=True))
    value = into(plan, load_vectors(plan, refs, 'value', n), basis)
    store(plan, out['key'], n, product(plan, value, dbound, conjugate=True), basis=basis, is_key=True)
    key = into(plan, load_vectors(plan, refs, 'key', n), basis, is_key=True)
    store(plan, out['value'], n, product(plan, key, dbound, conjugate=True), basis=basis)
    inside = scaled(dot(decayed_pairs(d, _pair_sum(dmixed, bound, dtype)), pick, dtype, left=0), d.writing)
    leaving = scaled(_pair_sum(bound, dstate, dtype), d.stay)
    store_slots(plan, out['address'], n, inside + leaving)
    if plan.keep:
      crossing = functools.reduce(jnp.add, (jnp.sum(x * y, 1, keepdims=True) for x, y in zip(items['states'], dstate, strict=True)))
      store_slots(plan, out['log'], n, keep_gradient(plan, d, _keep_terms(plan, items, (inside, leaving, d.over * crossing))))
    return _advance(d, dstate, scaled(items['pick'], d.enter), dmixed, dtype=dtype)
  dstate = _load_state(plan, refs['dend'], wide(dtype))
  _store_state(plan, out['state'], jax.lax.fori_loop(0, plan.chunks, body, dstate))
