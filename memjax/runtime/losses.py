"""Cross-entropy over tokens as sums and counts: means are taken once, at the end, never of means."""
import functools
import math
from collections.abc import Callable
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
  here_BxLxA = jax.lax.broadcasted_iota(target_BxL.dtype, logits_BxLxA.shape, 2) == target_BxL[..., None]
  picked_BxL = jnp.sum(jnp.where(here_BxLxA, logits_BxLxA, 0), -1)           # a gather's gradient would be a scatter, a pass of its own
  nats_BxL = jax.nn.logsumexp(logits_BxLxA, -1) - picked_BxL
  hit_BxL = jnp.argmax(logits_BxLxA, -1) == target_BxL
  return Totals(jnp.sum(jnp.where(weight_BxL, nats_BxL, 0)), jnp.sum(weight_BxL, dtype=jnp.int32),
                jnp.sum(hit_BxL & weight_BxL, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_losses(cut: tuple[Callable, int], params: Any, x_BxLxD: jax.Array, target: tuple[jax.Array, jax.Array]) -> Totals:
  """`token_losses` of the logits `head(params, x)` for a target (target [B, L], weight [B, L]), `size` tokens of a row at a time;
  `cut` = (head, size).

  The logits of all tokens never exist together. The gradient of a piece is taken where its logits are, in the forward pass,
  and waits as one array like x and one like `params`, so that nothing is computed twice.
  """
  head, size = cut
  def piece(total, part):
    return add(total, token_losses(head(params, part[0]), *part[1])), None
  return jax.lax.scan(piece, _nothing(x_BxLxD), _cut(size, (x_BxLxD, target)))[0]


def _nothing(x):
  return Totals(jnp.zeros((), jnp.promote_types(jnp.float32, x.dtype)), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _cut(size, tree):
  """Pieces of `size` tokens, [N, B, size, ...]; tokens that fill the last one weigh nothing."""
  def one(a):
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
  return jax.tree.map(one, tree)


def _head_losses_forward(cut, params, x, target):
  head, size = cut
  def piece(carry, part):
    total, so_far = carry
    def nats(params, x):
      totals = token_losses(head(params, x), *part[1])
      return totals.nats, totals
    (params_g, x_g), totals = jax.grad(nats, argnums=(0, 1), has_aux=True)(params, part[0])
    return (add(total, totals), jax.tree.map(jnp.add, so_far, params_g)), x_g
  start = _nothing(x), jax.tree.map(jnp.zeros_like, params)
  (total, params_g), x_g = jax.lax.scan(piece, start, _cut(size, (x, target)))
  return total, (params_g, jnp.moveaxis(x_g, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :x.shape[1]])


def _head_losses_backward(cut, saved, g):
  return *jax.tree.map(lambda a: (a * g.nats).astype(a.dtype), saved), None


head_losses.defvjp(_head_losses_forward, _head_losses_backward)


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
