"""Global and local memories at once against one after the other: specification 8.2 and property 28."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops.neural_reference import reference
from memjax.ops.neural_tnt import Part, tnt
from tests.ops.inputs import quick
from tests.ops.neural_cases import furthest, gates, problem, rule, start_of

B, H, L, SHARD = 2, 2, 13, 4


def case(whole_chunk=4):
  """(tokens, global part, local parts)."""
  parts = []
  for seed, (mode, chunk) in enumerate((('block', whole_chunk), ('token', 2), ('token', 4))):
    given = rule(mode=mode, depth=1)
    (fast, slow), _, tokens, _ = problem(given, L=L, seed=seed)
    found = jax.tree.map(jnp.asarray, gates(np.random.default_rng(seed + 9), (B, H, L), hard=False))
    parts.append(Part(given, start_of(jax.tree.map(jnp.asarray, fast), slow, B), found, chunk))
  return tuple(map(jnp.asarray, tokens)), parts[0], tuple(parts[1:])


def one_after_the_other(tokens, whole, local):
  """The same by the reference loop, shard by shard, with projected queries from a loop over tokens."""
  def run(part, tokens, span):
    memory = {name: jnp.zeros((B, H, part.rule.levels, *a.shape[2:])) for name, a in part.start.fast.items()}
    return reference(part.rule, part.start, memory, tokens, gates=jax.tree.map(lambda a: a[:, :, span], part.gates), chunk=part.chunk)[1]
  y = run(whole, tokens, slice(0, L))
  for part in local:
    pieces = []
    for begin in range(0, L, SHARD):
      span = slice(begin, min(begin + SHARD, L))
      q, k, v = (np.asarray(a)[:, :, span] for a in tokens)
      write, p = np.asarray(part.gates.write)[:, :, span], np.zeros_like(q)
      for t in range(q.shape[2]):
        for i in range(t - t % part.chunk, t + 1):
          inner = np.sum(k[:, :, i] * q[:, :, t], -1, keepdims=True) / np.sum(k[:, :, i] ** 2, -1, keepdims=True)
          p[:, :, t] += write[:, :, i, None] * k[:, :, i] * inner
      pieces.append(run(part, (jnp.asarray(p), k, v), span))
    y += jnp.concatenate(pieces, 2)
  return y


@pytest.mark.slow
def test_shards_at_once_equal_shards_in_turn():
  with jax.enable_x64():
    tokens, whole, local = case()
    got = quick(lambda: tnt(tokens, whole, local, shard=SHARD))()
    assert furthest(got, quick(lambda: jnp.asarray(one_after_the_other(tokens, whole, local)))()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize('project', [True, False])
def test_every_past_token_counts(project):
  """The last token's read depends on every earlier token that writes, and on no later one."""
  with jax.enable_x64():
    tokens, whole, local = case()
    ones = lambda part: part._replace(gates=part.gates._replace(write=jnp.ones((B, H, L), bool)))
    whole, local, t = ones(whole), tuple(map(ones, local)), 10
    f = lambda value: jnp.sum(tnt((*tokens[:2], value), whole, local, shard=SHARD, project=project)[0, 0, t] ** 2)
    size = np.abs(quick(jax.grad(f))(tokens[2]))[0, 0].max(-1)
  assert (size[:t + 1] > 0).all() and not size[t + 1:].any()


def test_shards_are_whole_chunks():
  with jax.enable_x64():
    tokens, whole, local = case(whole_chunk=3)
    with pytest.raises(UserError, match='shard=4 is not a multiple of chunk=3'): tnt(tokens, whole, local, shard=SHARD)
