"""Whether chunks of a neural memory are written and read by fused kernels or by XLA, the reference."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops import pallas_neural
from memjax.ops.backend import is_hopper
from memjax.ops.neural import Rule, Tokens
from memjax.ops.sequence import has_whole_rows

WIDEST = 64                          # channels of a key at which the kernels were timed; wider tiles may not fit shared memory


def is_fused(rule: Rule, tokens: Tokens, size: int) -> bool:
  """Whether the kernels write chunks of `size` tokens: rule.backend pallas | xla | auto = pallas where it was timed, if it can be had.

  Raises UserError where backend='pallas' asks for what they cannot compute.
  """
  if rule.backend == 'xla': return False
  reason = obstacle(rule, tokens, size)
  if rule.backend == 'pallas' and reason: raise UserError(f"exec.backend='pallas' {reason}; use xla or auto")
  return rule.backend == 'pallas' or (not reason and rule.network.key_width <= WIDEST and is_hopper())


def obstacle(rule: Rule, tokens: Tokens, size: int) -> str:
  """Why the kernels cannot write these chunks, or ''."""
  rows = tokens.weight.shape[-1]
  reasons = {
    'computes in bfloat16': rule.dtype != jnp.bfloat16 and jax.default_backend() != 'cpu',
    'takes one step size for all tensors': tokens.rate is not None,
    'takes steps that follow one token': rows != size * rule.pairs,
    'runs on one device, or on the rows of each': not has_whole_rows(),
    'computes two layers with silu and residual, loss l2 without clip, decay to the start and at most one momentum, one pair a '
    'token, at sizes that are powers of two, 16 to 128': not pallas_neural.supports(rule, rows),
  }
  return next((text for text, holds in reasons.items() if holds), '')
