"""Memory networks and feature maps of the user's own, by name: `net.kind='custom'`, `net.function=NAME` and `proj.features=NAME`.

    def bilinear(ops, x): return ops.linear('down', ops.linear('up', x) * ops.scale('g_0', ops.linear('side', x)))
    custom('bilinear', bilinear, fast=lambda K, V: {'up': (K, 8), 'side': (K, 8), 'g_0': (8,), 'down': (8, V)})
    feature_map('with_squares', lambda x: jnp.concatenate([x, x * x], -1))

A config that names one can only be read where it was registered before.
"""
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.errors import UserError
from memjax.config.registered import FEATURES, NETWORKS

VECTORS = ('b_', 'g_')                  # how the names of biases and gains begin
Shapes = dict[str, tuple[int, ...]]


class Custom(NamedTuple):
  """A network: y [B, H, C, V] of (ops, x [B, H, C, K]), and the shapes of its tensors for one head by (K, V)."""
  function: Callable
  fast: Callable[[int, int], Shapes]
  slow: Callable[[int, int], Shapes]


def custom(name: str, function: Callable, *, fast: Callable[[int, int], Shapes],
           slow: Callable[[int, int], Shapes] = lambda K, V: {}) -> None:
  """Registers a memory network written against an interpreter (`neural_nets`).

  Tokens (axis 2 of x) must not see each other, and each fast tensor is used once: matrices by `ops.linear`, vectors, whose names begin
  with 'b_' or 'g_', by `ops.bias` and `ops.scale`. A tensor used twice or not at all raises when a program is traced. Raises UserError
  for a name in use and for tensors of other names and shapes.
  """
  _check_new('network', name, NETWORKS)
  for tensor, shape in fast(2, 2).items():
    if len(shape) not in (1, 2): raise UserError(f'fast tensor {tensor!r} of network {name!r} has {len(shape)} axes; 1 or 2 are known')
    if tensor == 'gain' or tensor.startswith(VECTORS) != (len(shape) == 1):
      raise UserError(f"fast tensor {tensor!r} of network {name!r}: names of vectors, and of no matrices, begin with 'b_' or 'g_'")
  NETWORKS[name] = Custom(function, fast, slow)


def feature_map(name: str, function: Callable[[jax.Array], jax.Array]) -> None:
  """Registers a map of queries and keys [..., K] after their norm; step sizes take it to leave lengths alone. Raises UserError for a name
  in use."""
  _check_new('feature map', name, FEATURES)
  FEATURES[name] = function


def _check_new(what: str, name: str, table: dict) -> None:
  if not name.isidentifier() or name == 'polynomial' or name in table:
    raise UserError(f'{what} {name!r} cannot be registered: names are identifiers that are not in use')


def features(x: jax.Array, name: str, degree: int = 2) -> jax.Array:
  """The feature map `name` of x [..., K]: '' x itself, 'polynomial' all monomials up to a degree, or a registered one."""
  if name == '': return x
  return polynomial(x, degree) if name == 'polynomial' else FEATURES[name](x)


def feature_width(width: int, name: str, degree: int = 2) -> int:
  """The channels of `features` of `width` channels."""
  return jax.eval_shape(lambda x: features(x, name, degree), jax.ShapeDtypeStruct((1, width), jnp.float32)).shape[-1]


def polynomial(x: jax.Array, degree: int) -> jax.Array:
  """Monomials of degrees 1 to `degree` of x [..., K], so that <phi(x), phi(y)> = sum_n <x, y>^n / n! over sum_n 1 / n! (ATLAS, arXiv
  2505.23735): unit vectors stay unit vectors. A constant would be a key that all tokens share; there is none."""
  total, out = sum(1 / math.factorial(n) for n in range(1, degree + 1)), []
  for n in range(1, degree + 1):
    powers = list(itertools.combinations_with_replacement(range(x.shape[-1]), n))
    same = [math.prod(math.factorial(sum(1 for _ in run)) for _, run in itertools.groupby(power)) for power in powers]
    made = jnp.asarray((total * np.array(same)) ** -0.5, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    for channel in zip(*powers, strict=True): made = made * x[..., np.array(channel)]
    out.append(made)
  return jnp.concatenate(out, -1)
