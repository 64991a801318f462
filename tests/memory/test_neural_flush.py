"""What waits for the end of a chunk, written early: specification 10 and property 32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from tests.memory.exactly import B, exact, far

CASES = [pytest.param(name, marks=pytest.mark.slow) for name in ('neural', 'neural-exact', 'neural-omega', 'neural-clip')]
READ = 7                              # tokens of the text, in the middle of a chunk


def flushed(c):
  """(the state after READ tokens, the same flushed, reads of the tokens that follow from either: none of them writes)."""
  _, state = c.run(c.params, c.x[:, :READ], c.empty, c.position[:, :READ])
  flush = jax.jit(lambda params, state: c.memory.apply(params, state, method='flush'))
  after, silent = flush(c.params, state), np.zeros((B, c.x.shape[1] - READ), bool)
  read = lambda state: c.flow_run(c.params, c.x[:, READ:], state, c.position[:, READ:], write_mask_BxL=silent)[0]
  return state, after, (read(state), read(after)), flush


def slots(state):
  """How many tokens wait, in all memories of a state."""
  found = jax.tree_util.tree_leaves_with_path(state)
  return np.stack([leaf for path, leaf in found if 'slot_B' in jax.tree_util.keystr(path)])


@pytest.mark.parametrize('name', CASES)
def test_reads_stay_what_they_were(name):
  """And a chunk begins; flushing again changes nothing."""
  with jax.enable_x64():
    c = exact(name)
    state, after, (want, got), flush = flushed(c)
    assert far(got, want) <= 1e-12 and np.abs(want).max() > 0.1
    assert slots(state).any() and not slots(after).any() and far(flush(c.params, after), after) == 0


@pytest.mark.slow
def test_block_memories_read_what_was_flushed():
  with jax.enable_x64():
    c = exact('neural-block')
    state, after, (before, got), _ = flushed(c)
    seen = state.replace(anchor={name: levels[0] for name, levels in after.fast.items()})
    want = c.flow_run(c.params, c.x[:, READ:], seen, c.position[:, READ:], write_mask_BxL=np.zeros((B, c.x.shape[1] - READ), bool))[0]
    assert far(got, want) <= 1e-12 and far(got, before) > 1e-3


@pytest.mark.slow
def test_local_memories_are_flushed_with_the_large_one():
  with jax.enable_x64():
    state, after, reads, _ = flushed(exact('neural-tnt'))
    assert slots(state).shape[0] == 3 and slots(state).any(1).sum() > 1 and not slots(after).any() and np.isfinite(reads[1]).all()


def test_parts_of_whole_chunks_are_not_flushed():
  with jax.enable_x64():
    c = exact('neural-attention')
    with pytest.raises(UserError, match='write whole chunks; read tokens up to the end of one'):
      jax.eval_shape(lambda params, state: c.memory.apply(params, state, method='flush'), c.params, jax.tree.map(jnp.asarray, c.empty))
