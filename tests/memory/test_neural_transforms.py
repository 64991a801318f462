"""A neural memory under the transformations of JAX, from its default start: specification properties 36, 43, 44, 46 and 47."""
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralNetConfig, NeuralProjConfig, NeuralRuleConfig, NeuralWriteConfig
from memjax.memory.registry import make_memory
from tests.laws.cases import MORE, neural
from tests.laws.test_laws import close, parameters

B, L, D = 8, 10, 8
X = np.asarray(jax.random.normal(jax.random.key(3), (B, L, D)))
CASES = {'token': neural(rule=NeuralRuleConfig(clip=.1)), 'surprise': MORE['neural-surprise']}


def at(rows): return np.broadcast_to(np.arange(L)[None], (rows, L))


def grads(memory, params, x):
  """((loss, outputs), gradients of parameters and tokens) of some rows."""
  def loss(params, x):
    y = memory.apply(params, x, memory.init_state(len(x)), position_BxL=at(len(x)))[0]
    return jnp.sum(jnp.sin(3 * y)), y
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_transformations_change_nothing(name):
  """Outputs and gradients of a program run twice, mapped over, on eight devices; other groups, remat and loops; not compiled."""
  memory = make_memory(CASES[name], D)
  params = parameters(memory, X[:, :1], memory.init_state(B), at(B)[:, :1])
  run = jax.jit(functools.partial(grads, memory))
  want = run(params, X)
  chex.assert_trees_all_equal(run(params, X), want)                                     # bit-equal
  (each, many), (parts, x) = jax.jit(jax.vmap(run, (None, 0)))(params, X.reshape(4, 2, L, D))
  whole = lambda a: a.reshape(B, L, D)
  close(((each.sum(), whole(many)), (jax.tree.map(lambda a: a.sum(0), parts), whole(x))), want)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  def rows(params, x):
    (total, y), (own, there) = grads(memory, params, x)
    return (jax.lax.psum(total, 'data'), y), (jax.lax.psum(own, 'data'), there)
  split = ((P(), P('data')), (P(), P('data')))
  apart = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P('data')), out_specs=split, check_vma=False)
  close(jax.device_get(jax.jit(apart)(params, X)), jax.device_get(want))
  changed = dataclasses.replace(CASES[name].exec, group=2, remat='all', unroll=4)
  close(jax.jit(functools.partial(grads, make_memory(dataclasses.replace(CASES[name], exec=changed), D)))(params, X), want)
  if name == 'token': close(memory.apply(params, X, memory.init_state(B), position_BxL=at(B))[0], want[0][1])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['default', 'neural-omega', 'neural-features', 'neural-rope', 'neural-ttt'])
def test_the_default_start_is_reached(name):
  """From what `init` makes, every parameter gets a finite, non-zero gradient in the first step, but for momenta whose share starts at 0."""
  config = neural() if name == 'default' else MORE[name]
  memory = make_memory(config, D)
  init = jax.jit(lambda key: memory.init(key, X[:, :1], memory.init_state(B), position_BxL=at(B)[:, :1]))
  params = nn.unbox(init(jax.random.key(0)))
  own = jax.jit(lambda params: grads(memory, params, X)[1][0])(params)
  for path, a in jax.tree_util.tree_leaves_with_path(own):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    assert np.isfinite(a).all() and (np.abs(a).max() > 0) != where.endswith(('eta2', 'eta3', 'eta2_bias', 'eta3_bias')), where
  assert jax.tree.map(jnp.shape, nn.unbox(init(jax.random.key(1)))) == jax.tree.map(jnp.shape, params)
  chex.assert_trees_all_equal(nn.unbox(init(jax.random.key(0))), params)


TABLE = list(itertools.product((1, 17, 32, 77, 512, 1023), (1, 4), (1, 2), ('none', 'first', 'second'), ('l2', 'rms', 'none'), (0., 1.),
                               (False, True), (False, True)))
PAIRWISE = [(*row, n % 2) for n, row in enumerate(TABLE[::57])]       # every choice with every other one, as is tested below


def test_shapes_cover_every_pair_of_choices():
  for one, other in itertools.combinations(range(len(TABLE[0])), 2):
    assert {(row[one], row[other]) for row in PAIRWISE} == {(row[one], row[other]) for row in TABLE}


@pytest.mark.slow
@pytest.mark.parametrize('row', PAIRWISE, ids=str)
def test_shapes_and_types(row):
  """Outputs like the input, a state like the empty one, what is told of every token [B, L, H], without computing anything."""
  length, heads, pairs, momentum, norm, clip, rates, masked, narrow = row
  config = NeuralConfig(heads=heads, chunk=16, rule=NeuralRuleConfig(momentum=momentum, clip=clip), exec=NeuralExecConfig(aligned=True),
                        write=NeuralWriteConfig(pairs=pairs, per_tensor=rates), proj=NeuralProjConfig(qk_norm=norm),
                        net=NeuralNetConfig(expansion=2))
  dtype = jnp.bfloat16 if narrow else jnp.float32
  memory = make_memory(config, D, dtype=dtype)
  x, state = jax.ShapeDtypeStruct((2, length, D), dtype), memory.init_state(2)
  flow = dict(position_BxL=np.broadcast_to(np.arange(length)[None], (2, length)), collect=True)
  if masked: flow['mask_BxL'] = np.ones((2, length), bool)
  def call(x):
    params = memory.init(jax.random.key(0), x[:, :1], state, position_BxL=jnp.zeros((2, 1), jnp.int32))
    return memory.apply(params, x, state, **flow)
  y, after, aux = jax.eval_shape(call, x)
  assert y.shape == x.shape and y.dtype == dtype
  assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
  told = aux.pop('statistics')
  for kind in ('theta', 'alpha', 'inner_loss', 'surprise', 'kept', *(('eta',) if momentum != 'none' else ())):
    assert (told[f'{kind}_BxLxH'].shape, told[f'{kind}_BxLxH'].dtype) == ((2, length, heads), jnp.float32)
  assert all(a.shape == () and a.dtype == jnp.float32 for a in aux.values()) and ('clipped' in aux) == (clip > 0)
