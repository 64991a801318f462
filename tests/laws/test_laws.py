"""The laws of every memory (docs: CONTRIBUTING.md). None may be skipped; tolerances are relative to the largest entry."""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.memory.base import Memory
from memjax.memory.registry import MEMORIES, make_memory
from tests.laws.cases import FULL, MORE, QUICK, WIRED
from tests.laws.wired import ByToken, Stage, Wiring

B, L, D, CUT = 2, 11, 8, 5
EVERY = {**FULL, **MORE}


class Case:
  """One memory with parameters, inputs and jitted calls shared by all its laws."""

  def __init__(self, config):
    self.memory = build(config)
    self.x = jax.random.normal(jax.random.key(1), (B, L, D))
    self.position = jnp.broadcast_to(jnp.arange(L)[None], (B, L)).at[1, 7:].set(jnp.arange(L - 7))
    self.state = self.memory.init_state(B, L)
    self.params = parameters(self.memory, self.x, self.state, self.position)
    self.run = jax.jit(functools.partial(call, self.memory))
    self.spec = jax.jit(functools.partial(call, slow(self.memory)))
    self.pull = jax.jit(functools.partial(pull, self.memory))


def build(config, **options):
  """The module of a case."""
  return Stage(config.model(D, **options)) if isinstance(config, Wiring) else make_memory(config, D, **options)


def call(memory, params, x, state, position, **flow):
  """(y, state) of one call."""
  return memory.apply(params, x, state, position_BxL=position, **flow)[:2]


def pull(memory, params, x, state, position, cotangent):
  """The gradient by x of the sum of outputs times `cotangent`."""
  return jax.vjp(lambda x: call(memory, params, x, state, position)[0], x)[1](cotangent)[0]


def slow(memory):
  """The memory with `parallel` replaced by its specification, the scan of `step`."""
  if isinstance(memory, Stage): return ByToken(memory)
  class Slow(type(memory)):
    def parallel(self, *args, **kwargs): return Memory.scan(self, *args, **kwargs)
  return Slow(**{n: getattr(memory, n) for n in ('config', 'width', 'dtype', 'std', 'grafted')})


def parameters(memory, x, state, position):
  """Random parameters, also where training starts from zeros or ones, so that every path carries signal."""
  shapes = nn.unbox(jax.eval_shape(lambda: memory.init(jax.random.key(0), x, state, position_BxL=position)))
  rng = np.random.default_rng(0)
  def one(path, leaf):
    name = jax.tree_util.keystr(path)
    start = 1.0 if 'scale' in name else 2.0 if 'keep_bias' in name else 0.0
    spread = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 and 'taps' not in name else 0.3
    value = start + spread * rng.normal(size=leaf.shape)
    if 'taps' in name: value[0] += 1
    return jnp.asarray(value, leaf.dtype)
  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def case(name):
  return Case(EVERY[name])


def close(actual, expected, tolerance=1e-5):
  def check(a, b):
    scale = max(1.0, float(jnp.max(jnp.abs(b)))) if b.size else 1.0
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance * scale, rtol=0)
  jax.tree.map(check, actual, expected)


def timed(names, also=()):
  """The names as parameters: one memory of each kind in the default suite, variants of a kind in the slow one."""
  return [name if name in (*QUICK, *also) else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


full = pytest.mark.parametrize('name', timed(FULL))
every = pytest.mark.parametrize('name', timed(EVERY))


def test_every_registered_kind_is_tested():
  assert {config.kind for config in FULL.values()} == {FULL[name].kind for name in (*QUICK, *WIRED)} == {*MEMORIES, 'mag', 'mac'}


@every
def test_zero(name):
  state = build(EVERY[name]).init_state(B, L)
  for leaf in jax.tree.leaves(state):
    assert leaf.shape[0] == B and not np.asarray(leaf).any()


@every
def test_scan(name):
  """Outputs, final state and gradients of the fast form are those of the scan of `step`; with a mask and a reset inside."""
  c = case(name)
  mask = jnp.ones((B, L), bool).at[0, 8:].set(False)
  def value_and_grad(memory):
    def loss(params, x):
      out = call(memory, params, x, c.state, c.position, mask_BxL=mask)
      return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out) if leaf.dtype == x.dtype), out
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(c.params, c.x)
  close(value_and_grad(c.memory), value_and_grad(slow(c.memory)))


@pytest.mark.parametrize('name', timed(EVERY, WIRED))
def test_step(name):
  c = case(name)
  y, end = c.run(c.params, c.x, c.state, c.position)
  state, steps = c.state, []
  for t in range(L):
    out, state = c.run(c.params, c.x[:, t:t + 1], state, c.position[:, t:t + 1])
    steps.append(out)
  close((jnp.concatenate(steps, 1), state), (y, end))


@pytest.mark.parametrize('name', timed(name for name in FULL if not isinstance(FULL[name], Wiring)))
def test_no_tokens(name):
  """A call of no tokens reads nothing and leaves the state as it was."""
  c = case(name)
  y, state = jax.eval_shape(functools.partial(call, c.memory), c.params, c.x[:, :0], c.state, c.position[:, :0])
  assert (y.shape, y.dtype) == ((B, 0, D), c.x.dtype) and jax.tree.map(lambda a: a.shape, state) == jax.tree.map(lambda a: a.shape, c.state)
  full = jax.tree.map(jnp.ones_like, c.state)
  assert call(c.memory, c.params, c.x[:, :0], full, c.position[:, :0])[1] is full


@full
def test_prefill_of_ragged_rows_then_steps(name):
  c = case(name)
  position = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  y, _ = c.run(c.params, c.x, c.state, position)
  lengths = (3, CUT)
  pad = jnp.stack([jnp.pad(c.x[b, :n], ((CUT - n, 0), (0, 0)), constant_values=jnp.nan) for b, n in enumerate(lengths)])
  mask = jnp.stack([jnp.arange(CUT) >= CUT - n for n in lengths])
  where = jnp.stack([jnp.clip(jnp.arange(CUT) - (CUT - n), 0) for n in lengths])
  head, state = c.run(c.params, pad, c.state, where, mask_BxL=mask)
  for b, n in enumerate(lengths): close(head[b, CUT - n:], y[b, :n])
  at = jnp.array(lengths)
  for _ in range(L - CUT):
    out, state = c.run(c.params, jnp.take_along_axis(c.x, at[:, None, None], 1), state, at[:, None])
    close(out[:, 0], jnp.stack([y[b, at[b]] for b in range(B)]))
    at = at + 1


@full
def test_split_anywhere(name):
  c = case(name)
  y, end = c.run(c.params, c.x, c.state, c.position)
  first, state = c.run(c.params, c.x[:, :CUT], c.state, c.position[:, :CUT])
  second, state = c.run(c.params, c.x[:, CUT:], state, c.position[:, CUT:])
  close((jnp.concatenate([first, second], 1), state), (y, end))


@every
def test_mask(name):
  """Holes, padding and NaN in masked tokens change nothing; a padded row equals the compacted row."""
  c = case(name)
  hole = jnp.array([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0], [1] * L], bool)
  keep = np.flatnonzero(np.asarray(hole[0]))
  position = jnp.cumsum(hole.astype(jnp.int32), 1) - 1
  y, end = c.run(c.params, jnp.where(hole[..., None], c.x, jnp.nan), c.state, jnp.maximum(position, 0), mask_BxL=hole)
  assert np.isfinite(y).all()
  row = lambda tree: jax.tree.map(lambda a: a[:1], tree)
  alone, alone_end = c.run(c.params, c.x[:1, keep], row(c.state), jnp.arange(len(keep))[None])
  close((y[:1, keep], row(end)), (alone, alone_end))
  nothing = jnp.zeros((B, L), bool)
  chex.assert_trees_all_equal(c.run(c.params, c.x * jnp.nan, end, c.position, mask_BxL=nothing)[1], end)


@full
def test_write_mask(name):
  """A token that may not write reads like any other and leaves no trace."""
  c = case(name)
  write = jnp.ones((B, L), bool).at[:, 4].set(False).at[:, 6].set(False)
  position = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  y, end = c.run(c.params, c.x, c.state, position, write_mask_BxL=write)
  close((y, end), c.spec(c.params, c.x, c.state, position, write_mask_BxL=write))
  keep = np.flatnonzero(np.asarray(write[0]))
  without, without_end = c.run(c.params, c.x[:, keep], c.state, position[:, keep])
  close((y[:, keep], end), (without, without_end))
  assert np.abs(np.asarray(y[:, 4])).max() > 0


@pytest.mark.parametrize('name', timed(FULL, WIRED))
def test_causal(name):
  c = case(name)
  position = jnp.broadcast_to(jnp.arange(1, L + 1)[None], (B, L))
  t = 6
  weight = jax.random.normal(jax.random.key(5), (D,))
  grad = c.pull(c.params, c.x, c.state, position, jnp.zeros(c.x.shape).at[0, t].set(weight))
  size = np.abs(np.asarray(grad)).max(-1)
  assert not size[0, t + 1:].any() and not size[1].any() and np.isfinite(size).all()
  assert size[0, t] > 0
  if c.memory.reaches_back: assert size[0, t - 1] > 0 and (size[0, t - 2:t] > 0).all()


@full
def test_reset_forgets_everything(name):
  c = case(name)
  y, end = c.run(c.params, c.x, c.state, c.position)
  other, other_end = c.run(c.params, c.x.at[1, :7].add(1.0), c.state, c.position)
  row = lambda tree: jax.tree.map(lambda a: a[1], tree)
  chex.assert_trees_all_equal(row(end), row(other_end))
  close(y[1, 7:], other[1, 7:], 1e-6)
  grad = c.pull(c.params, c.x, c.state, c.position, jnp.zeros(y.shape).at[1, 7:].set(2 * y[1, 7:]))              # of the sum of squares
  assert not np.asarray(grad[1, :7]).any() and np.asarray(grad[1, 7:]).any()
  close(y[1, 7:], c.run(c.params, c.x[1:, 7:], jax.tree.map(lambda a: a[1:], c.state), c.position[1:, 7:])[0][0])


@pytest.mark.parametrize('name', timed(name for name in FULL if not isinstance(FULL[name], Wiring)))
def test_identity_when_grafted(name):
  """A fresh graft adds exactly nothing: its output projection starts at zero, whatever the other parameters are."""
  c = case(name)
  memory = make_memory(EVERY[name], D, grafted=True)
  fresh = nn.unbox(jax.jit(lambda key: memory.init(key, c.x, c.state, position_BxL=c.position))(jax.random.key(0)))
  host = jax.random.normal(jax.random.key(8), (B, L, D))
  out = jax.jit(lambda host: host + call(memory, fresh, host, c.state, c.position)[0])(host)
  chex.assert_trees_all_equal(out, host)


def test_identity_of_a_grafted_gate():
  """A fresh memory at the gate of attention leaves its output bit-equal, and the gate learns: exactly one factor starts at zero."""
  wiring, x = EVERY['mag'], jax.random.normal(jax.random.key(8), (B, L, D))
  memory = build(wiring, grafted=True)
  state, position = memory.init_state(B, L), jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  params = nn.unbox(jax.jit(lambda: memory.init(jax.random.key(0), x, state, position_BxL=position))())
  alone = make_memory(wiring.a, D)
  def run(params, x): return call(memory, params, x, state, position)[0]
  host = jax.jit(lambda x: call(alone, {'params': params['params']['stage']['a']}, x, state['a'], position)[0])(x)
  chex.assert_trees_all_equal(jax.jit(run)(params, x), host)
  gain = jax.jit(jax.grad(lambda params: jnp.sum(run(params, x) ** 2)))(params)['params']['stage']['fuse']['norm_memory']['scale']
  assert (np.abs(np.asarray(gain)) > 0).all()


@every
def test_reach(name):
  """Every parameter gets a finite, non-zero gradient from the outputs and the enabled auxiliary losses."""
  c = case(name)
  def loss(params):
    context = {'position_BxL': c.position, 'key': jax.random.key(4), 'token_BxL': jnp.arange(B * L).reshape(B, L)}
    y, _, aux = c.memory.apply(params, c.x, c.state, **context)
    return jnp.mean(jnp.square(y - 1)) + aux.get('penalty', 0.0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(c.params)):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    inert = where.endswith(tuple(getattr(c.memory, 'inert', ())) or '-')          # the seed's parameters that cancel, named by the kind
    assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 0) != inert, where


@full
def test_traced_once(name):
  c = case(name)
  chex.clear_trace_counter()
  run = jax.jit(chex.assert_max_traces(lambda *args: c.memory.apply(*args[:3], position_BxL=args[3])[0], n=1))
  for x in (c.x, c.x + 1): jax.eval_shape(run, c.params, x, c.state, c.position)                          # traces, and compiles nothing


@full
def test_dtype(name):
  """bf16 compute keeps an fp32 state and stays within 2e-2."""
  c = case(name)
  memory = build(EVERY[name], dtype=jnp.bfloat16)
  state = memory.init_state(B, L)
  assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))
  y, end, _ = jax.jit(lambda x: memory.apply(c.params, x, state, position_BxL=c.position))(c.x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16 and jax.tree.map(lambda a: a.dtype, end) == jax.tree.map(lambda a: a.dtype, state)
  exact = c.run(c.params, c.x.astype(jnp.bfloat16).astype(jnp.float32), c.state, c.position)[0]
  error = np.asarray(y, np.float32) - np.asarray(exact)
  assert np.sqrt((error ** 2).mean()) <= 2e-2 * np.sqrt((np.asarray(exact) ** 2).mean())


@full
def test_mesh(name):
  c = case(name)
  x, position = jnp.tile(c.x, (4, 1, 1)), jnp.tile(c.position, (4, 1))
  state = c.memory.init_state(4 * B, L)
  expected = c.run(c.params, x, state, position)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  actual = jax.block_until_ready(c.run(c.params, *jax.device_put((x, state, position), rows)))
  close(jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name != 'window')) for name in sorted(FULL)])
def test_pieces(name):
  """Mesh, with the tokens of a row on two devices: the same reads, and a state that goes on as well."""
  c, cut = case(name), L - 1
  def read(x, position):
    y, state = c.run(c.params, x[:, :cut], c.state, position[:, :cut])
    return y, c.run(c.params, x[:, cut:], state, position[:, cut:])[0]
  expected = read(c.x, c.position)
  mesh = jax.make_mesh((1, 1, 2), ('data', 'fsdp', 'sequence'), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh): actual = jax.block_until_ready(read(c.x, c.position))
  close(jax.device_get(actual), jax.device_get(expected))
