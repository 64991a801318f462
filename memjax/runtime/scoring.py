"""From a batch to its cross-entropy: logits at once where they are small, piece by piece where they are not."""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from memjax.config.schema import ModelConfig
from memjax.layers.axes import SEQUENCE
from memjax.models.decoder import head, head_params
from memjax.runtime.losses import Totals, head_losses, token_losses

LOGITS = 1 << 27                       # logits of a device that may exist together (512 MiB in float32)


def piece_length(config: ModelConfig, params: dict, shape: tuple[int, int]) -> int:
  """Tokens of a row whose logits are made together, so that a device holds LOGITS of them; 0 = all at once.

  All at once as well where rows lie in pieces on several devices, and where the head is stored in few bits or has dropout, whose
  gradient or random numbers belong to one call.
  """
  batch, length = shape
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else mesh.size
  pieces = -(-batch * length * config.vocabulary // (LOGITS * devices))
  split = not mesh.empty and mesh.shape.get(SEQUENCE, 1) > 1
  if pieces == 1 or split or config.block.lora.dropout: return 0
  if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(head_params(config, params))): return 0
  return -(-length // min(pieces, length))


def score(model: Any, params: dict, memory: Any, batch: dict, **call: Any) -> tuple[Totals, dict, Any]:
  """(Totals of the targets of a batch, aux, memory after it); `call` are further keywords of the decoder."""
  apply = functools.partial(model.apply, {'params': params}, batch['token'], memory, position_BxL=batch['position'],
                            mask_BxL=batch.get('mask'), **call)
  target, size = (batch['target'], batch['weight']), piece_length(model.config, params, batch['token'].shape)
  if not size:
    logits_BxLxA, memory, aux = apply()
    return token_losses(logits_BxLxA, *target), aux, memory
  x_BxLxD, memory, aux = apply(headless=True)
  return head_losses((functools.partial(head, model.config), size), head_params(model.config, params), x_BxLxD, target), aux, memory
