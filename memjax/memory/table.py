"""The tables of learned entries behind memory banks: in a layer of their own, or at the decoder where layers share them."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from memjax.layers.linear import partitioned
from memjax.ops.quantize import Quantized, dequantize, fake_quantize, lsq, quantize


@struct.dataclass
class Table:
  """M entries: the rows themselves, or factors A [M, R] and B [D, R] of A B^T; `rows` and `mix` may be stored as integers."""
  rows_MxD: Any
  mix_DxR: Any = None

  def tokens(self, chapter: jax.Array | None = None, *, chapters: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    """The entries [M, D] as numbers, or those of one of `chapters` equal parts, [T, D]."""
    rows = self.rows_MxD
    if chapter is not None:
      size = jax.tree.leaves(rows)[0].shape[0] // chapters
      rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, chapter * size, size), rows)
    rows = as_float(rows, dtype)
    return rows if self.mix_DxR is None else rows @ as_float(self.mix_DxR, dtype).T


def as_float(x: Any, dtype: Any) -> jax.Array:
  """x in `dtype`, whether it is stored as numbers or as integers with scales."""
  return dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype)


class EntryTable(nn.Module):
  """The table of one `BankConfig`; `width` is that of the model. Entries start as N(0, std^2) in every form.

  A factorised entry is a sum of R products, so A ~ N(0, std^2) and B ~ N(0, 1 / R).
  """
  config: Any
  width: int

  @nn.compact
  def __call__(self) -> Table:
    """The table, rounded where training goes through the rounding."""
    shape, axis = self.config.shape, self.config.form.axis
    split = (f'chapters_{axis}' if axis else None, 'embed' if axis != 'fsdp' else None)
    full = shape.width or self.width
    if not shape.low_rank: return Table(self._stored('entries', split, shape.std, (shape.entries, full)))
    rows = self._stored('entries', (split[0], None), shape.std, (shape.entries, shape.rank))
    if shape.low_rank == 'reduced': return Table(rows)
    return Table(rows, self._stored('mix', ('embed', None), shape.rank ** -0.5, (full, shape.rank)))

  def _stored(self, name: str, axes: tuple, std: float, shape: tuple[int, ...]) -> Any:
    q, init = self.config.quant, nn.initializers.normal(std)
    if not q.bits or q.target == 'kv': return self.param(name, partitioned(init, axes), shape)
    how = dict(bits=q.bits, scheme=q.scheme, group=q.group)
    if not q.train:
      made = quantize(init(self.make_rng('params'), shape), **how) if self.is_initializing() else None
      start = lambda key, part: getattr(made or quantize(init(key, shape), **how), part)
      part = lambda part: self.param(f'{name}_{part}', partitioned(start, axes), part)
      return Quantized(part('codes'), part('scale'), width=shape[-1], **how)
    x = self.param(name, partitioned(init, axes), shape)
    if q.train == 'straight': return fake_quantize(x, **how)
    top = 2 ** (q.bits - 1) - 1
    step = self.param(f'{name}_step', partitioned(nn.initializers.constant(2 * std * (2 / jnp.pi) ** 0.5 / top ** 0.5), (axes[0], None)),
                      (shape[0], 1))
    return lsq(x, step, bits=q.bits)


class ValueTable(nn.Module):
  """The N^2 values of one `ProductKeyConfig`, N(0, 1 / width) at initialisation (Berges et al. 2024)."""
  config: Any
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    """values [M, V]."""
    width = self.config.value_width or self.width
    return self.param('values', partitioned(nn.initializers.normal(width ** -0.5), (None, 'embed')), (self.config.keys ** 2, width))
