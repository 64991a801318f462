"""Rotary position embedding (Su et al. 2021) in the half-split layout, with frequencies stretched to longer texts."""
import math

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.attention import RopeConfig


def frequencies(width: int, base: float, rope: RopeConfig = RopeConfig()) -> np.ndarray:
  """Angle of each pair of channels per position, float64 [width / 2], computed on the host.

  f_i = base^(-2i/K), then by kind: linear f / factor; llama3 (Grattafiori et al. 2024) and yarn (Peng et al. 2023) divide only
  the slow ones, with a ramp between. Slow means few turns f n / 2 pi within the n tokens of `rope.original`.
  """
  f = base ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
  if rope.kind == 'default': return f
  if rope.kind == 'linear': return f / rope.factor
  slow = _slow_llama3(f, rope) if rope.kind == 'llama3' else _slow_yarn(width, base, rope)
  return f * (1 - slow) + f / rope.factor * slow


def _slow_llama3(f: np.ndarray, rope: RopeConfig) -> np.ndarray:
  """Share of the stretch by the turns within the original text: 1 below low_factor, 0 above high_factor."""
  turns = f * rope.original / (2 * np.pi)
  return np.clip((rope.high_factor - turns) / (rope.high_factor - rope.low_factor), 0, 1)


def _slow_yarn(width: int, base: float, rope: RopeConfig) -> np.ndarray:
  """Share of the stretch by channel: a ramp between the channels, rounded outwards, that turn beta_fast and beta_slow times."""
  channel = lambda turns: width * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(base))
  first = max(math.floor(channel(rope.beta_fast)), 0)
  last = min(math.ceil(channel(rope.beta_slow)), width - 1)
  return np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)


def magnitude(rope: RopeConfig) -> float:
  """Factor on rotated queries and keys: that of yarn, 1 for the other kinds."""
  if rope.kind != 'yarn': return 1.0
  return rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0


def rotate(x_BxLxHxK: jax.Array, position_BxL: jax.Array, frequency_1: np.ndarray, *, scale: float = 1.0) -> jax.Array:
  """x with channels (i, i + K/2) rotated as a pair by position * frequency[i], times `scale`; computed in float32 at least."""
  angle_BxLx1xK = position_BxL.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequency_1, jnp.float32).reshape(1, 1, 1, -1)
  cos, sin = jnp.cos(angle_BxLx1xK), jnp.sin(angle_BxLx1xK)
  if scale != 1: cos, sin = cos * scale, sin * scale
  wide = x_BxLxHxK.astype(jnp.promote_types(jnp.float32, x_BxLxHxK.dtype))
  a, b = jnp.split(wide, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxLxHxK.dtype)
