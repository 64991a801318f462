"""Padding, holes, packed documents, cuts and tokens that may not write, to rounding: specification 16.2 and property 30."""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.memory.exactly import B, D, L, exact, far

# What each of them adds to the state or to the way through a chunk.
CASES = ('neural-exact', 'neural-tnt', 'neural-omega', 'neural-features', 'neural-surprise', 'neural-attention')
cases = pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
row = lambda tree, b: jax.tree.map(lambda a: a[b], tree)


def placed(x, at):
  """(x, position, mask) of L slots with the tokens of one text at the given ones, NaN elsewhere."""
  out, position, mask = np.full((L, D), np.nan), np.zeros(L, np.int32), np.zeros(L, bool)
  out[at], position[at], mask[at] = x, np.arange(len(x)), True
  return out, position, mask


def stacked(*rows):
  return tuple(np.stack(a) for a in zip(*rows, strict=True))


@cases
def test_padding_of_any_length_after_a_text(name):
  """Rows of 0 to 12 tokens, padded with NaN, read and leave what the text alone does."""
  with jax.enable_x64():
    c = exact(name)
    y, _ = c.run(c.params, c.x, c.empty, c.position)
    states, state = [row(c.empty, 0)], c.empty
    for n in range(1, L + 1):
      x, position, mask = stacked(placed(c.x[0, :n], np.arange(n)), placed(c.x[1, :L - n], np.arange(L - n)))
      got, state = c.run(c.params, x, c.empty, position, mask_BxL=mask)
      assert far((got[0, :n], got[1, :L - n]), (y[0, :n], y[1, :L - n])) <= 1e-13, n
      assert not np.asarray(got[0, n:]).any()
      states.append(row(state, 0))
      if n == L: assert far(row(state, 1), row(c.empty, 1)) == 0
    short, after = c.run(c.params, c.x[:, :7], c.empty, c.position[:, :7])
    assert far(row(after, 0), states[7]) <= 1e-13 and far(short[0], y[0, :7]) <= 1e-13


@cases
def test_holes_anywhere_change_nothing(name):
  """The same text with holes full of NaN: outputs, final state, gradients of parameters and tokens; none reaches a hole."""
  with jax.enable_x64():
    c, n, rng = exact(name), 8, np.random.default_rng(0)
    at = [np.sort(rng.permutation(L)[:n]) for _ in range(B)]
    alone, holes = (stacked(*(placed(c.x[b, :n], spots[b]) for b in range(B))) for spots in ([np.arange(n)] * B, at))
    (y, end), (got, after) = (c.run(c.params, x, c.empty, position, mask_BxL=mask) for x, position, mask in (alone, holes))
    (params, x), (own, there) = (c.grad(c.params, x, position, mask, 1.0) for x, position, mask in (alone, holes))
  for b in range(B):
    assert far((got[b, at[b]], there[b, at[b]]), (y[b, :n], x[b, :n])) <= 1e-12
    assert not np.delete(np.asarray(there[b]), at[b], 0).any()
  assert far(after, end) <= 1e-12 and far(own, params) <= 1e-12


@cases
def test_packed_documents_are_separate_runs(name):
  """Two documents in a row, cut inside a chunk: outputs, final state, gradients, and none between them."""
  with jax.enable_x64():
    c, n = exact(name), 5
    packed = np.concatenate([np.arange(n), np.arange(L - n)])[None].repeat(B, 0)
    real = np.ones((B, L), bool)
    first, second = (stacked(*(placed(c.x[b, part], np.arange(len(c.x[b, part]))) for b in range(B))) for part in (np.s_[:n], np.s_[n:]))
    y, end = c.run(c.params, c.x, c.empty, packed, mask_BxL=real)
    runs = [c.run(c.params, x, c.empty, position, mask_BxL=mask) for x, position, mask in (first, second)]
    assert far(y, np.concatenate([runs[0][0][:, :n], runs[1][0][:, :L - n]], 1)) <= 1e-12
    assert far(end, runs[1][1]) <= 1e-12
    own, there = c.grad(c.params, c.x, packed, real, 1.0)
    (a, x_a), (b, x_b) = c.grad(c.params, *first, 0.0), c.grad(c.params, *second, 1.0)
    assert far(own, jax.tree.map(jnp.add, a, b)) <= 1e-12
    assert far(there, np.concatenate([x_a[:, :n], x_b[:, :L - n]], 1)) <= 1e-12


@cases
def test_any_cuts_give_one_call(name):
  """Pieces of any length, at random cuts of two texts of 24 tokens, from the state of the piece before; empty pieces among them."""
  with jax.enable_x64():
    c, rng, length = exact(name), np.random.default_rng(0), 2 * L
    x = rng.normal(size=(B, length, D))
    y, end = c.run(c.params, x, c.empty, np.broadcast_to(np.arange(length)[None], (B, length)))
    for _ in range(4):
      state, done, out = c.empty, np.zeros(B, int), [[] for _ in range(B)]
      while (done < length).any():
        sizes = np.minimum(rng.integers(0, L + 1, B), length - done)
        xs, positions, masks = stacked(*(placed(x[b, done[b]:done[b] + sizes[b]], np.arange(sizes[b])) for b in range(B)))
        got, state = c.run(c.params, xs, state, positions + done[:, None], mask_BxL=masks)
        for b in range(B): out[b].append(got[b, :sizes[b]])
        done += sizes
      assert far(np.stack([np.concatenate(one) for one in out]), y) <= 1e-12
      assert far(state, end) <= 1e-12


@cases
def test_tokens_that_may_not_write_leave_every_bit(name):
  """One token and a call of several, NaN among them: the state of the row is bit-equal, the other row goes on as if alone."""
  with jax.enable_x64():
    c, n = exact(name), 7
    mask = np.broadcast_to(np.arange(L)[None] < n, (B, L))
    _, state = c.run(c.params, np.where(mask[..., None], c.x, 0), c.empty, c.position, mask_BxL=mask)
    for length in (1, L):
      x = c.x[:, :length].copy()
      x[0, ::2] = np.nan
      write, at = np.array([[False], [True]]).repeat(length, 1), c.position[:, :length] + n
      y, after = c.flow_run(c.params, x, state, at, write_mask_BxL=write)
      chex.assert_trees_all_equal(row(after, 0), row(state, 0))
      want, end = c.run(c.params, c.x[:, :length], state, at)
      assert far((y[1], row(after, 1)), (want[1], row(end, 1))) <= 1e-12
      assert np.isfinite(np.asarray(y[0, 1::2])).all() and (length == 1 or np.asarray(y[0, 1::2]).any())
