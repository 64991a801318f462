"""Writes found where a chunk is complete, against a loop over tokens with `jax.grad`, and against `chunk_gates`."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.neural_nets import Plain, inner_loss
from memjax.ops.neural_parity import chunk_gates
from memjax.ops.neural_reference import _update
from memjax.ops.neural_scan import mix
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, problem, rule, run, start_of

ATTENTION = {'first': rule(mode='block', kind='attention', activation='gelu'),
             'second-zero': rule('cascade', order=2, mode='block', kind='attention', decay_to='zero', residual=False),
             'pairs-huber': rule('nesterov', mode='block', kind='attention', loss='huber', argument=.5, pairs=2, first_order=True)}


def loop(given, start, memory, tokens, *, gates, chunk):
  """`reference` for a network that mixes tokens: each gradient is that of one token's loss after the keys of its chunk."""
  (query, key, value), P = tokens, given.pairs
  full = {name: leaf.at[:, :, 0].add(start.fast[name]) for name, leaf in memory.items()}
  at = lambda weights: Plain(weights, start.slow, given.dtype)
  out = []
  for t in range(query.shape[2]):
    first = t - t % chunk
    if t == first: held = {name: leaf[:, :, 0] for name, leaf in full.items()}
    out.append(given.network(at(held), query[:, :, first:t + 1])[:, :, -1])
    fixed = jax.lax.stop_gradient(held) if given.first_order else held
    g = jax.tree.map(jnp.zeros_like, held)
    for pair in range(P):
      end = t * P + pair + 1
      def loss(weights, end=end, first=first):
        y = given.network(at(weights), key[:, :, first * P:end])[:, :, -1]
        return jnp.sum(inner_loss(given.loss, y, value[:, :, end - 1], scale=given.scale, argument=given.argument))
      g = jax.tree.map(jnp.add, g, jax.grad(loss)(fixed))
    now = jax.tree.map(lambda a, t=t: a[:, :, t], gates)
    full = {name: _update(given, start.fast[name], leaf, g[name], gates=now) for name, leaf in full.items()}
  return {name: leaf.at[:, :, 0].add(-start.fast[name]) for name, leaf in full.items()}, jnp.stack(out, 2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ATTENTION)
def test_attention_equals_the_loop(name):
  """In float64, with tokens that do not write and a last chunk that is not complete."""
  given = ATTENTION[name]
  with jax.enable_x64():
    arguments = problem(given, L=7)
    (out, grads), (want, want_grads) = (run(form, given, arguments, chunk=3) for form in (mix, loop))
  assert furthest(out, want) <= 1e-12
  assert furthest(grads, want_grads) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(('momentum', 'refresh'), [('none', 0), ('first', 0), ('first', 1), ('first', 2)])
def test_chunk_gates_in_the_scan(momentum, refresh):
  given, C, L = rule(momentum, mode='chunk_gates', decay_to='zero', refresh=refresh), 3, 11
  with jax.enable_x64():
    (fast, slow), memory, tokens, found = problem(given, L=L)
    whole = lambda a: jnp.repeat(jnp.asarray(a[:, :, :L:C]), C, 2)[:, :, :L]
    found = found._replace(eta=whole(found.eta), alpha=whole(found.alpha), write=np.ones_like(found.write))
    memory, start = jax.tree.map(np.zeros_like, memory), start_of(jax.tree.map(jnp.asarray, fast), slow, 2)
    y = quick(lambda: mix(given, start, memory, tokens, gates=found, chunk=C)[1])()
    tokens = tuple(map(jnp.asarray, tokens))
    both = tuple(a[:, :, :L // C * C:C] for a in (found.eta, found.alpha))
    want = quick(lambda: chunk_gates(given, start, tokens, theta=jnp.asarray(found.theta), chunk_gate=both, chunk=C, refresh=refresh))()
  assert furthest(y, want) <= 1e-12
