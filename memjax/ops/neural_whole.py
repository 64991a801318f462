"""Writes that are found together where a chunk is complete: networks that mix tokens, and gates of whole chunks.

A network that mixes tokens (attention) has no rank-1 gradients; but sum_i w_i g_i is the gradient of sum_i w_i l_i, so that one
backward pass for each level of the memory gives what a chunk pushes. In mode 'chunk_gates' (`neural_parity`) a chunk has one momentum
and one forgetting, gradients are taken at the learned weights or at those after the last `refresh` chunks, and the token that
completes a chunk reads it.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.ops.neural import Factors, Rule, Tokens, Weights, anchor, commit, factors, finish
from memjax.ops.neural_nets import Plain, inner_loss
from memjax.ops.neural_reads import read_anchor
from memjax.ops.neural_steps import Coefficients, Gates, coefficients, dense, for_pairs, steps


class Whole(NamedTuple):
  """What chunks hand on: the memory; in mode 'chunk_gates' with `refresh` also the weights [B, H, ...] minus their start where gradients
  are taken, and the chunks since then [B]."""
  fast: dict
  fixed: Any = None
  count_B: Any = None


def is_whole(rule: Rule) -> bool:
  """Whether writes wait for the end of their chunk."""
  return rule.network.mixes or rule.mode == 'chunk_gates'


def whole_coefficients(rule: Rule, gates: Gates) -> Coefficients:
  """What whole chunks do; in mode 'chunk_gates' the gates of all tokens of a chunk are equal, and each gradient counts in full."""
  if rule.mode != 'chunk_gates': return coefficients(rule.momentum, gates, inside=False, pairs=rule.pairs)
  given = steps(rule.momentum, jax.tree.map(lambda a: a[..., 0], gates)._replace(write=jnp.ones_like(gates.write[..., 0])))
  push = jnp.broadcast_to(jnp.stack(given.push, -1)[..., None], (*given.push[0].shape, len(given.push), gates.write.shape[-1]))
  return for_pairs(Coefficients(None, push, dense(given.turn, len(given.push)), push), rule.pairs)


def write_whole(rule: Rule, start: Weights, memory: Whole, tokens: Tokens, *, made: Coefficients) -> tuple[Whole, Factors]:
  """(what a complete chunk leaves, what is told of its tokens)."""
  if rule.network.mixes: found, told = weighted_gradients(rule, start, memory.fast, tokens, push=made.push)
  else: found = told = factors(rule, _fixed(start, memory), start.slow, tokens)
  fast = finish(rule, start, commit(rule, start, memory.fast, found=found, coefficients=made))
  if memory.fixed is None: return Whole(fast), told
  count_B = jnp.where(memory.count_B + 1 == rule.refresh, 0, memory.count_B + 1)
  moves = lambda new, old: jnp.where((count_B == 0).reshape(-1, *(1,) * (new.ndim - 1)), new, old)
  return Whole(fast, {name: moves(fast[name][0], a) for name, a in memory.fixed.items()}, count_B), told


def _fixed(start, memory):
  return start.fast if memory.fixed is None else {name: start.fast[name] + a for name, a in memory.fixed.items()}


def tell_whole(rule: Rule, start: Weights, memory: Whole, tokens: Tokens) -> Factors:
  """What is told of the tokens of a chunk, whether or not it is complete."""
  if not rule.network.mixes: return factors(rule, _fixed(start, memory), start.slow, tokens)
  return weighted_gradients(rule, start, memory.fast, tokens, push=jnp.zeros((*tokens.weight.shape[:2], 0, tokens.weight.shape[2])))[1]


def weighted_gradients(rule: Rule, start: Weights, memory: dict, tokens: Tokens, *, push: jax.Array) -> tuple[dict, Factors]:
  """(sum_i push[q, i] g_i by name, levels q one after the other, what is told): gradients at the anchor of a network that mixes tokens.
  The norm told is that of the gradient in the prediction."""
  wide, weights = tokens.weight.dtype, anchor(start, memory)
  if rule.first_order: weights = jax.lax.stop_gradient(weights)
  value = tokens.value.astype(wide)
  each = lambda y: inner_loss(rule.loss, y, value, scale=rule.scale, argument=rule.argument)
  def losses(weights):
    y = rule.network(Plain(weights, start.slow, rule.dtype), tokens.key.astype(wide))
    return each(y), y
  loss, pull, y = jax.vjp(losses, weights, has_aux=True)
  found = [pull(push[:, :, q] * tokens.weight)[0] for q in range(push.shape[2])]
  error = jax.grad(lambda y: jnp.sum(each(y)))(y)
  norm = jnp.sqrt(jnp.maximum(jnp.sum(error * error, -1), 1e-24))
  return {name: [one[name] for one in found] for name in memory}, Factors(None, None, loss, norm, jnp.ones_like(norm))


def read_whole(rule: Rule, start: Weights, old: Whole, query: jax.Array, *, new: Whole | None = None) -> jax.Array:
  """y [B, H, C, V] of the queries of a chunk at the memory before it; `new`: what the last of them reads in mode 'chunk_gates'."""
  if rule.mode != 'chunk_gates' or new is None: return read_anchor(rule, start, old.fast, query)
  early, last = query[:, :, :-1], query[:, :, -1:]
  return jnp.concatenate([read_anchor(rule, start, old.fast, early), read_anchor(rule, start, new.fast, last)], 2)
