"""Cross-entropy over tokens as sums and counts: means are taken once, at the end, never of means."""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Totals(NamedTuple):
  """Sums over scored tokens; they add up over micro-batches, segments, batches and devices."""
  nats: Any                            # sum of -log p(target)
  tokens: Any                          # how many targets were scored
  correct: Any                         # how many had the largest logit


def token_losses(logits_BxLxA: jax.Array, target_BxL: jax.Array, weight_BxL: jax.Array) -> Totals:
  """Totals of the targets whose weight is True, in float32 at least; the others get no gradient, not even from NaN."""
  wide = jnp.promote_types(jnp.float32, logits_BxLxA.dtype)
  logits_BxLxA = jnp.where(weight_BxL[..., None], logits_BxLxA.astype(wide), 0)
  picked_BxL = jnp.take_along_axis(logits_BxLxA, target_BxL[..., None], -1)[..., 0]
  nats_BxL = jax.nn.logsumexp(logits_BxLxA, -1) - picked_BxL
  hit_BxL = jnp.argmax(logits_BxLxA, -1) == target_BxL
  return Totals(jnp.sum(jnp.where(weight_BxL, nats_BxL, 0)), jnp.sum(weight_BxL, dtype=jnp.int32),
                jnp.sum(hit_BxL & weight_BxL, dtype=jnp.int32))


def add(a: Totals, b: Totals) -> Totals:
  """Sums of both."""
  return Totals(*(x + y for x, y in zip(a, b, strict=True)))


def scores(totals: Totals, bytes_per_token: float) -> dict[str, float]:
  """{'loss' in nats a token, 'perplexity', 'bits_per_byte', 'accuracy', 'tokens'} of totals on the host.

  bits per byte = loss / ln 2 / bytes per token, with bytes of the UTF-8 text: comparable between tokenizers.
  """
  tokens = max(int(totals.tokens), 1)
  loss = float(totals.nats) / tokens
  perplexity = math.exp(loss) if loss < 700 else math.inf
  return {'loss': loss, 'perplexity': perplexity, 'bits_per_byte': loss / math.log(2) / bytes_per_token,
          'accuracy': float(totals.correct) / tokens, 'tokens': int(totals.tokens)}
