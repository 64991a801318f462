"""Helpers of the seed's tests, and the memory written once more: a loop from section 11 of the specification, in float64."""
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from memjax.config.mixers import HolographicSeedConfig
from memjax.memory.registry import make_memory
from memjax.ops import holographic_seed as ops

B, L, D, K, S = 2, 7, 6, 8, 3
SMALL = dict(key_width=K, slots=S)


def tree(memory, seed=0, scale=0.6):
  """Random parameters of a memory, biases and norm scales included, float64."""
  x_BxLxD, position_BxL = jnp.zeros((1, 2, memory.width)), jnp.zeros((1, 2), jnp.int32)
  make = lambda: memory.init(jax.random.key(0), x_BxLxD, memory.init_state(1), position_BxL=position_BxL)['params']
  shapes = jax.tree.map(lambda a: a.shape, jax.eval_shape(lambda: nn.unbox(make())))
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: draw.normal(size=shape) * scale + (shape == ()), shapes, is_leaf=lambda s: isinstance(s, tuple))


def make(*, width=D, dtype=jnp.float32, std=0.0, **options):
  return make_memory(HolographicSeedConfig(**{**SMALL, **options}), width, dtype=dtype, std=std)


def positions(batch, length, start=0):
  return jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32)[None], (batch, length))


def call(memory, params, x, state=None, position=None, **context):
  """(output, state, aux) of one call."""
  state = memory.init_state(x.shape[0]) if state is None else state
  position = positions(*x.shape[:2]) if position is None else position
  return memory.apply({'params': params}, x, state, position_BxL=position, **context)


# The loop of section 11, in float64 and the time domain ----------------------------------------------------------------------

def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def spectrum_basis(width):
  """The orthonormal real DFT: [dc, nyquist (even widths), cosines, sines] in columns."""
  n, f = np.arange(width)[:, None], np.arange(1, (width + 1) // 2)[None]
  columns = [np.full((width, 1), width ** -0.5)]
  if width % 2 == 0: columns.append((-1.0) ** n * width ** -0.5)
  turns = 2 * np.pi * n * f / width
  return np.concatenate([*columns, math.sqrt(2 / width) * np.cos(turns), -math.sqrt(2 / width) * np.sin(turns)], 1)


def in_time(params, c, width):
  """The parameters of section 11 from ours, which emit and take spectra: multiplied by the basis where they meet the memory."""
  p = jax.tree.map(np.asarray, params)
  if c.binding == 'bipolar': return p
  back = spectrum_basis(c.key_width).T
  p = {**p, **{n: {m: a @ back for m, a in p[n].items()} for n in ('item', 'retrieve_down')}}
  p['select'] = {**p['select'], 'kernel': p['select']['kernel'] @ back}
  for name in ('gate_in', 'out'):
    if name not in p: continue
    kernel = p[name]['kernel']
    p[name] = {**p[name], 'kernel': np.concatenate([kernel[:width], back.T @ kernel[width:]])}
  return p


def keys_in_time(c, position):
  draw = jax.jit(lambda position: ops.position_keys(c.binding, position, c.key_width, seed=c.key_seed, unitary=c.unitary))
  key = np.float64(draw(position))
  if c.binding == 'bipolar': return key
  real = 2 - c.key_width % 2
  return key / np.sqrt(np.where(np.arange(c.key_width) < real, c.key_width, c.key_width / 2)) @ spectrum_basis(c.key_width).T


def circulant(x):
  """C with C @ v = x convolved with v: C_{jn} = x_{(j - n) mod K}; its transpose correlates."""
  n = np.arange(len(x))
  return x[(n[:, None] - n[None]) % len(x)]


def norm_of(c, m, scale):
  if c.norm == 'none': return m
  if c.norm == 'layer': return (m - m.mean()) / np.sqrt(m.var() + 1e-5) * scale
  return m / np.sqrt(np.mean(m * m) + 1e-8) * scale


def oracle(params, c, x, m, key, position, mask, write, target):
  """(o [B, L, D], m [B, S, K], immediate loss, v): the equations of section 11, one row and one token after the other.

  A masked token enters as zeros.
  """
  x = np.where(mask[..., None], x, 0)
  p = in_time(params, c, x.shape[-1])
  dense = lambda name, h: h @ p[name]['kernel'] + p[name]['bias']
  bound = (lambda k, v: k * v) if c.binding == 'bipolar' else (lambda k, v: circulant(k) @ v)
  unbound = (lambda k, v: k * v) if c.binding == 'bipolar' else (lambda k, v: circulant(k).T @ v)
  v_all, o, m, errors = dense('item', x), np.zeros_like(x), np.array(m), []
  for b in range(x.shape[0]):
    for t in range(x.shape[1]):
      if position[b, t] == 0 and mask[b, t]: m[b] = 0
      v, q, k = v_all[b, t], dense('query', x[b, t]), key[b, t]
      u = dense('retrieve_down', gelu(dense('retrieve_up', q)) if c.retrieval_hidden else q)
      r = [unbound(u / max(np.linalg.norm(u), 1e-12), m[b, s]) for s in range(c.slots)]
      logit = np.array([p['select']['kernel'] @ r_s + p['select']['bias'] for r_s in r])
      alpha = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
      read = sum(a * r_s for a, r_s in zip(alpha, r, strict=True)) * mask[b, t]
      o[b, t] = dense('out', np.concatenate([q, read]))
      if not (mask[b, t] and write[b, t]): continue
      g = np.ones(c.slots)
      if c.gating:
        sizes = np.array([np.linalg.norm(m[b, s]) for s in range(c.slots)])
        hidden = gelu(dense('gate_in', np.concatenate([q, v])) + sizes @ p['gate_sizes']['kernel'])
        g = sigmoid(hidden @ p['gate_out']['kernel'] + p['gate_out']['bias'])
      m[b] = [norm_of(c, (1 - g[s]) * (1 - c.decay) * m[b, s] + g[s] * bound(k, v), p.get('scale')) for s in range(c.slots)]
      errors.append(np.mean((np.mean([unbound(k, m[b, s]) for s in range(c.slots)], 0) - target[b, t]) ** 2))
  return o, m, np.mean(errors), v_all
