"""What pieces of a sequence on different devices hand to each other, against loops over the pieces."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from memjax.memory.pieces import over_pieces
from memjax.ops.binding import key_map
from memjax.ops.flash import flash
from memjax.ops.recurrence import slot_mix
from memjax.ops.sequence import from_before, from_piece, hand_over, in_turn
from tests.shard_maps import empty, shard_maps

PIECES = 4


def split(fn, *specs, out):
  mesh = jax.make_mesh((PIECES,), ('sequence',), devices=jax.devices()[:PIECES], axis_types=(jax.sharding.AxisType.Auto,))
  return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))


ROW, ALL = P(None, 'sequence'), P()


def test_neighbours_and_single_pieces():
  x = np.arange(8.0).reshape(2, 4)
  def fn(x, first): return from_before(x, first, 'sequence'), from_piece((x, x > 2), 'sequence'), from_piece(x, 'sequence', 1)
  before, (last, flag), second = split(fn, ROW, ALL, out=(ROW, ALL, ALL))(x, np.full((2, 1), -1.0))
  np.testing.assert_array_equal(before, [[-1, 0, 1, 2], [-1, 4, 5, 6]])
  np.testing.assert_array_equal(last, [[3], [7]])
  np.testing.assert_array_equal(second, [[1], [5]])
  assert flag.dtype == bool and flag.all()


def test_states_are_handed_over_in_order():
  draw = np.random.default_rng(0)
  decay, left, first = draw.uniform(size=(2, 4)), draw.normal(size=(2, 4)), draw.normal(size=(2, 1))
  decay[1, 2] = 0.0                                   # a document starts in the third piece
  weight = draw.normal(size=(2, 4))
  run = split(lambda d, u, s: hand_over(d, u, s, 'sequence'), ROW, ROW, ALL, out=(ROW, ALL))
  def loop(decay, left, state):
    before = []
    for i in range(PIECES):
      before.append(state)
      state = decay[:, i:i + 1] * state + left[:, i:i + 1]
    return jnp.concatenate(before, 1), state
  loss = lambda fn: lambda *x: jnp.sum(weight * fn(*x)[0]) + jnp.sum(fn(*x)[1] ** 2)
  with jax.enable_x64():
    got, want = (jax.jit(jax.value_and_grad(loss(fn), (0, 1, 2)))(decay, left, first) for fn in (run, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


def test_pieces_take_turns():
  x, first = np.random.default_rng(1).normal(size=(2, 8)), np.ones((2,))
  def read(x, s):
    y = jnp.tanh(s[:, None] * jnp.cumsum(x, 1))
    return y[:, -1], y
  run = split(lambda x, s: in_turn(lambda s: read(x, s), s, 'sequence'), ROW, ALL, out=(ALL, ROW))
  def loop(x, s):
    parts = []
    for i in range(PIECES):
      s, y = read(x[:, 2 * i:2 * i + 2], s)
      parts.append(y)
    return s, jnp.concatenate(parts, 1)
  loss = lambda fn: lambda *x: jnp.sum(fn(*x)[0]) + jnp.sum(fn(*x)[1] ** 2)
  with jax.enable_x64():
    got, want = (jax.jit(jax.value_and_grad(loss(fn), (0, 1)))(x, first) for fn in (run, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize('form, order', [('chunk', 'after'), pytest.param('associative', 'before', marks=pytest.mark.slow),
                                         pytest.param('chunk', 'before', marks=pytest.mark.slow)])
def test_slots_over_pieces(form, order):
  draw = np.random.default_rng(2)
  B, L, H, S, K = 2, 16, 1, 2, 3
  arrays = [draw.normal(size=(B, L, H, K)), draw.normal(size=(B, L, H, S)), draw.normal(size=(B, L, 1, H, S)),
            -draw.uniform(size=(B, L, H, S))]
  state, reset = draw.normal(size=(B, H, S, K)), np.zeros((B, L), bool)
  reset[1, [5, 8]] = True
  def mix(state, bound, address, pick, log_keep, reset, **axis):
    return slot_mix(state, bound, address, pick, log_keep=log_keep, reset_BxL=reset, form=form, order=order, chunk=2, **axis)
  with jax.enable_x64():
    want = jax.jit(mix)(state, *arrays, reset)
    got = split(lambda *x: mix(*x, axis='sequence'), ALL, *(ROW,) * 5, out=(ALL, ROW))(state, *arrays, reset)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), got, want)


@jax.custom_vjp
def product(x, unused):
  return x * x


# As attention by cuDNN in jax: an array of no elements stands for what is not used, and the backward pass takes it.
product.defvjp(lambda x, unused: (x * x, (x, unused)), lambda kept, dy: (2 * kept[0] * dy + kept[1].sum(), jnp.zeros_like(kept[1])))


class Squares(nn.Module):
  def parallel(self, state, inputs): return state, jax.lax.cond(inputs.sum() > 0, lambda x: flash(x, x, x), jnp.sin, inputs)


@pytest.mark.parametrize('remat', [False, True])
def test_nothing_empty_enters_the_backward_pass(remat, monkeypatch):
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, *_, **__: product(q, jnp.zeros(0)))
  mesh = jax.make_mesh((2, 1), ('data', 'fsdp'), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2)
  x = np.arange(1.0, 9, dtype=np.float32).reshape(4, 2, 1, 1)
  with jax.set_mesh(mesh):
    loss = lambda x: over_pieces(Squares().bind({}), jax.sharding.get_abstract_mesh(), {}, x)[1].sum()
    gradient = jax.jit(jax.grad(jax.checkpoint(loss) if remat else loss))
    found = list(shard_maps(gradient.trace(x).jaxpr.jaxpr))
    assert len(found) >= 2 and not empty(found)
    np.testing.assert_allclose(gradient(x), 2 * x, rtol=1e-6)


@pytest.mark.parametrize('kind', ['phasor', 'unitary'])
def test_keys_keep_nothing_empty(kind):
  keep = jax.eval_shape(lambda z: jax.vjp(functools.partial(key_map, kind), z)[1], jnp.ones((2, 8)))
  assert jax.tree.leaves(keep) and all(np.prod(x.shape) for x in jax.tree.leaves(keep))
