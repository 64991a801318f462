"""Starts of low-rank changes inside the kernel: PiSSA and OLoRA take a part of W for s A B and leave W - s A B, whose sum is W again.

The host is another one afterwards, so that its changes say nothing without it: `difference` gives what training did as changes of
the host as it was, which can be merged there and written as PEFT reads them.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from memjax.adapters.lora import KERNEL, Adapter, Factors, extract, insert, module_at, replaced
from memjax.config.errors import UserError, nearest
from memjax.config.lora import LoraConfig, rank_of, scale_of, split_rule
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, param_shapes

STARTS = ('pissa', 'olora')


def start_inside(config: ModelConfig, params: dict, how: str) -> dict:
  """The parameters of a host with changes that begin as a part of its kernels: config and the sum are those of the host up to rounding.

  pissa (Meng et al. 2024): W = U S V, A = U_r (S_r / s)^1/2, B = (S_r / s)^1/2 V_r, of the R largest singular values. olora
  (Bueyuekakyuez 2024): W^T = Q T, A = T_r^T and B = Q_r^T. Quantise the host afterwards, if at all: what is left of W has less to lose.
  Raises UserError for another start, for magnitudes, kernels of integers, ranks above the sides of a kernel, and changes that are there.
  """
  lora = config.block.lora
  if how not in STARTS: raise UserError(f'how must be one of {", ".join(STARTS)}, not {how!r}{nearest(how, STARTS)}')
  if not lora.rank: raise UserError('config.model.block.lora.rank is 0: there are no low-rank changes to start')
  if lora.dora: raise UserError(f'{how} does not go with magnitudes (config.model.block.lora.dora)')
  if config.block.quant.storage: raise UserError(f'{how} begins in the float kernels; quantise the host afterwards')
  changed = [path.replace('lora_a', KERNEL) for path in named(param_shapes(build_decoder(config))[0]) if path.endswith('/lora_a')]
  for path in changed:
    node = module_at(params, path)
    rank, scale = rank_of(lora, path), scale_of(lora, path)
    if rank > min(node[KERNEL].shape[-2:]): raise UserError(f'{path} is {list(node[KERNEL].shape)}; its rank cannot be {rank}')
    a, b, rest = _split(node[KERNEL], scale, rank=rank, how=how)
    params = insert(replaced(params, path, {**node, KERNEL: rest}), {path: Factors(a, b, scale)})
  return params


@functools.partial(jax.jit, static_argnames=('rank', 'how'))
def _split(kernel: jax.Array, scale: float, *, rank: int, how: str) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(A, B, W - s A B)."""
  w, turned = kernel.astype(jnp.promote_types(jnp.float32, kernel.dtype)), lambda x: jnp.swapaxes(x, -1, -2)
  if how == 'pissa':
    u, size, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(size[..., :rank] / scale)
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
  else:
    q, t = jnp.linalg.qr(turned(w))
    a, b = turned(t[..., :rank, :]), turned(q[..., :rank])
  return a, b, (w - scale * jnp.matmul(a, b, precision='highest')).astype(kernel.dtype)


def difference(params: dict, begun: dict, lora: LoraConfig) -> tuple[LoraConfig, Adapter]:
  """(settings, changes) of rank 2 R of the host as it was before `start_inside`: s (A B - A0 B0), from what training made of `begun`."""
  now, then, grown = extract(params, lora), extract(begun, lora), 2 ** 0.5 if lora.stabilised else 2
  if now.keys() != then.keys(): raise UserError('the parameters do not hold the changes that they began with')
  twice = lambda rules, factor: tuple(f'{pattern}={_plain(float(value) * factor)}' for pattern, _, value in map(split_rule, rules))
  settings = dataclasses.replace(lora, rank=2 * lora.rank, alpha=lora.alpha * grown, ranks=twice(lora.ranks, 2),
                                 alphas=twice(lora.alphas, grown))
  join = lambda x, y, axis: jnp.concatenate([x, y], axis)
  return settings, {path: Factors(join(one.a, then[path].a, -1), join(one.b, -then[path].b, -2), scale_of(settings, path))
                    for path, one in now.items()}


def _plain(value: float) -> str:
  return str(int(value)) if value == math.floor(value) else f'{value:.12f}'
