"""What the write kernels of a neural memory compute token by token: silu, the errors of M(x) = x + (1 + gain) (.) norm(out), and back."""
import jax
import jax.numpy as jnp

from memjax.ops.neural_nets import EPSILON


def held(hold, tile):
  """The tile, or zeros where a document starts (hold = 0)."""
  return jnp.where(hold > 0, tile, jnp.zeros_like(tile))


def silu(z):
  """(silu, its first, its second derivative)."""
  s = 1 / (1 + jnp.exp2(z * -1.4426950408889634))             # to base 2: one instruction raises it
  slope = s * (1 - s)
  return z * s, s + z * slope, slope * (2 + z * (1 - 2 * s))


def judge(scale, out, items):
  """(d of w_1, a (.) d of the gain, loss) of tokens (key, value, weight, gain) from what the network gives before its norm."""
  key, value, weight, gain = items
  width = out.shape[1]
  mean = lambda x: (jnp.sum(x, 1) / width)[:, None]
  y = out - mean(out)
  size = jax.lax.rsqrt(mean(y * y) + EPSILON)
  unit = y * size
  error = key + unit * (1 + gain)[None] - value
  pull = error * (2 * scale * weight)[:, None]
  inner = pull * (1 + gain)[None]
  return (inner - mean(inner) - unit * mean(inner * unit)) * size, unit * pull, scale * jnp.sum(error * error, 1)


def judge_back(scale, out, items, *, cotangents):
  """(a (.) d of the gain, cotangents of out, of the error, of weight, of gain) through `judge`."""
  (key, value, weight, gain), (dd, dread, dloss) = items, cotangents
  mean = lambda x: (jnp.sum(x, 1) / out.shape[1])[:, None]
  y = out - mean(out)
  size = jax.lax.rsqrt(mean(y * y) + EPSILON)
  unit, rate, gain = y * size, (2 * scale * weight)[:, None], (1 + gain)[None]
  error = key + unit * gain - value
  pull = rate * error
  inner = pull * gain
  of_d = dd * size
  common = mean(of_d * unit)
  dinner = of_d - mean(of_d) - unit * common
  dpull = dinner * gain if dread is None else dinner * gain + dread * unit
  derror = rate * dpull + (2 * scale * dloss)[:, None] * error
  tilt = mean(inner * unit)
  dunit = derror * gain - of_d * tilt - inner * common
  if dread is not None: dunit += dread * pull
  dgain = jnp.sum(dinner * pull + derror * unit, 0)
  stretch = mean(of_d * (inner - mean(inner) - unit * tilt) + dunit * unit)
  dy = size * (dunit - stretch * unit)
  return unit * pull, dy - mean(dy), derror, 2 * scale * jnp.sum(dpull * error, 1), dgain
