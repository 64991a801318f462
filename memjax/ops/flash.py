"""Causal attention of whole rows without their scores in memory: flash attention (Dao et al. 2022) through cuDNN."""
import functools

import jax
import jax.numpy as jnp

from memjax.config.errors import UserError
from memjax.ops.sequence import has_whole_rows

BACKENDS = ('auto', 'xla', 'cudnn', 'cudnn_rows')


def capability() -> tuple[int, ...]:
  """The CUDA compute capability of the first device; () where there is none."""
  text = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
  return tuple(map(int, text.split('.'))) if text.replace('.', '').isdigit() else ()


def obstacle(q_BxLxHxK: jax.Array, *, persistent: int = 0) -> str:
  """Why cuDNN cannot compute attention of these queries, or ''. A CPU computes the same by `jax.nn.dot_product_attention` in XLA."""
  width, is_cpu = q_BxLxHxK.shape[-1], jax.default_backend() == 'cpu'
  widest = 256 if capability() >= (9,) else 128
  reasons = {
    'has no persistent tokens': persistent > 0,
    'runs on one device, or on the rows of each': not has_whole_rows(),
    'needs an NVIDIA GPU of compute capability 8.0 or above': not is_cpu and capability() < (8,),
    'needs bfloat16 or float16': not is_cpu and q_BxLxHxK.dtype not in (jnp.bfloat16, jnp.float16),
    f'needs head widths that are multiples of 8 up to {widest}': not is_cpu and (width % 8 > 0 or width > widest),
  }
  return next((text for text, holds in reasons.items() if holds), '')


def is_flash(backend: str, q_BxLxHxK: jax.Array, **options) -> bool:
  """Whether cuDNN computes this attention. Raises UserError where another backend than auto asks for what it cannot compute."""
  if backend not in BACKENDS: raise UserError(f'unknown backend {backend!r}; one of {", ".join(BACKENDS)}')
  if backend == 'xla': return False
  reason = obstacle(q_BxLxHxK, **options)
  if backend != 'auto' and reason: raise UserError(f'backend={backend!r} {reason}; use xla or auto')
  return backend != 'auto' or (not reason and jax.default_backend() == 'gpu')


def flash(q_BxLxHxK: jax.Array, k_BxLxGxK: jax.Array, v_BxLxGxK: jax.Array, *, window: int = 0) -> jax.Array:
  """softmax(q k / sqrt(K)) v over the keys up to the query's own, with `window` over the last so many, [B, L, H, K].

  G key heads serve H query heads in equal groups. Every row is one text from its first token on.
  """
  near = (window - 1, 0) if 0 < window < q_BxLxHxK.shape[1] else None
  attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=near,
                             implementation='xla' if jax.default_backend() == 'cpu' else 'cudnn')
  # jax gives cuDNN an array of no elements for what is not used, and would keep it for the backward pass. Under shard_map that enters
  # another shard_map, and jaxlib 0.11.2 ends there in a segmentation fault.
  has_elements = lambda _, *__, **params: 0 not in params.get('shape', ())
  return jax.checkpoint(attend, policy=has_elements, prevent_cse=False)(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
