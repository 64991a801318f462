"""The memory of kind `context`: against a loop in numpy, P9.3, P9.5, P9.7, and every option of its config."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.context import ContextConfig
from memjax.memory.registry import make_memory
from tests.laws.test_laws import parameters
from tests.ops.test_context import Loop, same

B, L, D, H = 2, 23, 4, 2
BASE = ContextConfig(heads=H, slots=3, ratio=2)
FLOW = {'mask_BxL': 0.85, 'write_mask_BxL': 0.8}


def setting(config, dtype=jnp.float32, seed=0):
  """(memory, parameters, x, position without a start, empty bank)."""
  memory, x = make_memory(config, D, dtype=dtype), jax.random.normal(jax.random.key(seed), (B, L, D), dtype)
  position, state = jnp.broadcast_to(1 + jnp.arange(L)[None], (B, L)), memory.init_state(B)
  return memory, parameters(memory, x, state, position), x, position, state


def run(memory, params, x, position, state, **flow):
  """(y [B, L, D], bank, aux), compiled."""
  call = jax.jit(lambda params, x, state, flow: memory.apply(params, x, state, position_BxL=position, **flow))
  return call(params, x, state, flow)


def loop(config, params, x, flow, *, pending):
  """[(y [L, D], Loop)] of each row, token by token, from a bank whose pool holds so many zeros."""
  p, G, K = {name: np.asarray(leaf['kernel']) for name, leaf in params['params'].items()}, config.kv_heads or H, D // H
  rows = []
  for b in range(B):
    bank, y = Loop(config, D), np.zeros((L, D))
    bank.pending = pending
    for t in range(L):
      if not flow['mask_BxL'][b, t]: continue
      if flow['reset_BxL'][b, t]: bank = Loop(config, D)
      head = lambda h, name: p[name][:, h * G // H * K:][:, :K]
      q = (x[b, t] @ p['query']).reshape(H, K)
      mixed, mass = bank.read(np.stack([head(h, 'key') @ q[h] for h in range(H)]) / np.sqrt(K))
      y[t] = np.concatenate([mixed[h] @ head(h, 'value') for h in range(H)]) @ p['out']
      if not flow['write_mask_BxL'][b, t]: continue
      bank.account(mass)
      bank.take(x[b, t], config.ratio)
    rows.append((y, bank))
  return rows


@pytest.mark.parametrize('options', [{'ratio': 3, 'kv_heads': 1}, {'ratio': 30}, {'ratio': 4, 'clusters': 2, 'top_k': 1, 'slots': 4}],
                         ids=['grouped', 'one window', 'clusters'])
def test_memory_equals_a_loop(options):
  """Reads and banks in fp64, with masked tokens, tokens that may not write and documents starting inside of windows."""
  config, rng = dataclasses.replace(BASE, **options), np.random.default_rng(3)
  with jax.enable_x64():
    memory, params, x, position, state = setting(config, jnp.float64)
    flow = {name: rng.random((B, L)) < share for name, share in FLOW.items()} | {'reset_BxL': np.zeros((B, L), bool)}
    flow['reset_BxL'][1, [5, 9, 10]] = True
    pending = config.ratio - 2
    state = dataclasses.replace(state, pending=state.pending + pending)
    y, bank, _ = run(memory, params, x, position, state, **flow)
    rows = loop(config, params, np.asarray(x), flow, pending=pending)
    for b, (want, row) in enumerate(rows):
      np.testing.assert_allclose(y[b], want, atol=1e-12)
      same(jax.tree.map(lambda a, b=b: a[b], bank), row)
    assert rows[0][1].clock and np.abs(rows[0][0]).max() > 0.01


@pytest.mark.slow
def test_one_cluster_is_dense_attention():
  """P9.3; more clusters than a token reads are not."""
  memory, params, *rest = setting(dataclasses.replace(BASE, slots=6))
  def clustered(**options):
    config = dataclasses.replace(BASE, slots=6, **options)
    other = make_memory(config, D)
    return run(other, params, *rest[:2], other.init_state(B))[0]
  dense = run(memory, params, *rest)[0]
  for options in ({'clusters': 1, 'top_k': 1}, {'clusters': 3, 'top_k': 3, 'iterations': 1}):
    np.testing.assert_allclose(clustered(**options), dense, atol=1e-5)
  assert np.abs(clustered(clusters=3, top_k=1) - dense).max() > 0.01


def test_empty_bank_changes_nothing():
  """P9.5: the output is exactly 0 until a slot is made, and for a token whose document has none."""
  memory, params, x, position, state = setting(dataclasses.replace(BASE, ratio=4))
  host = jax.random.normal(jax.random.key(9), x.shape)
  y, bank, _ = run(memory, params, x, position, state, reset_BxL=jnp.zeros((B, L), bool).at[:, 6].set(True))
  empty = np.r_[0:4, 6:10]
  assert np.array_equal((host + y)[:, empty], host[:, empty]) and np.abs(y[:, [4, 5, 10, 11]]).min(-1).max() > 0
  assert bank.clock.tolist() == [4, 4]


@pytest.mark.slow
def test_nothing_learned_depends_on_an_update():
  """P9.7: updates leave parameters as they are, and no gradient of the bank reaches them or the inputs."""
  memory, params, x, position, state = setting(BASE)
  before = jax.tree.map(np.array, params)
  run(memory, params, x, position, state)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  bank = run(memory, params, x, position, state)[1]
  for tokens in (L, 1):
    def held(params, x, bank_of_before, tokens=tokens):
      bank = run(memory, params, x[:, :tokens], position[:, :tokens], dataclasses.replace(bank_of_before, **whole))[1]
      return sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(bank) if leaf.dtype == x.dtype)
    whole = {name: leaf for name, leaf in vars(bank).items() if leaf.dtype != x.dtype}
    real = dataclasses.replace(bank, **{name: leaf.astype(x.dtype) for name, leaf in whole.items()})
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.grad(held, argnums=(0, 1, 2))(params, x, real)))


@pytest.mark.slow
def test_bank_lives_on_over_prompts():
  """A second prompt at position 0 starts anew, unless it is told that nothing is reset."""
  memory, params, x, _, state = setting(BASE)
  position = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  first, bank, _ = run(memory, params, x, position, state)
  again = run(memory, params, x, position, bank)
  on = run(memory, params, x, position, bank, reset_BxL=jnp.zeros((B, L), bool))
  np.testing.assert_array_equal(again[0], first)
  assert int(on[1].clock[0]) == 2 * L // 2 > int(again[1].clock[0]) and np.abs(on[0][:, 0]).max() > 0


def test_monitors_and_statistics():
  memory, params, x, position, state = setting(dataclasses.replace(BASE, slots=16))
  aux = jax.jit(lambda: memory.apply(params, x, state, position_BxL=position, collect=True))()[2]
  assert float(aux['fill']) == pytest.approx(11 / 16) and float(aux['used']) == pytest.approx(1)       # the last slot has one reader
  assert float(run(memory, params, x[:, :2], position[:, :2], state)[2]['used']) == 0
  seen = aux['statistics']
  assert seen['read_norm_BxL'].shape == (B, L) and seen['bank_age_BxS'].max() == 10


CLUSTERS = {'clusters': 2, 'top_k': 1}
# (fields, what they change: the parameters, the output, or the bank; the rest of the config where they apply)
OPTIONS = [
    ({'heads': 4}, 'output', {}), ({'kv_heads': 1}, 'shape', {}), ({'slots': 4}, 'output', {}), ({'ratio': 3}, 'output', {}),
    (CLUSTERS, 'output', {}), ({'top_k': 2}, 'output', CLUSTERS), ({'iterations': 1}, 'output', CLUSTERS),
    ({'merge': 'sum'}, 'output', {}), ({'merge': 'evict'}, 'output', {}), ({'decay': 0.5}, 'output', {}),
    ({'new_importance': 9.0}, 'output', {}), ({'threshold': 0.6}, 'bank', {}), ({'out_gate': 'silu'}, 'shape', {})]


@functools.cache
def outcome(config):
  """What `run` returns."""
  return run(*setting(config))


@pytest.mark.slow
@pytest.mark.parametrize(('fields', 'effect', 'rest'), OPTIONS, ids=[str(fields) for fields, *_ in OPTIONS])
def test_option(fields, effect, rest):
  old, new = (dataclasses.replace(BASE, **{**rest, **more}) for more in ({}, fields))
  shapes, new_shapes = (jax.tree.map(jnp.shape, setting(config)[1]) for config in (old, new))
  assert (shapes != new_shapes) == (effect == 'shape')
  if effect == 'shape': return
  (y, bank, _), (other, other_bank, _) = outcome(old), outcome(new)
  assert np.isfinite(other).all()
  assert (np.abs(y - other).max() > 1e-4) == (effect == 'output')
  assert effect == 'output' or np.abs(bank.refs - other_bank.refs).max() > 0


def test_every_field_and_choice_has_a_row():
  fields = {field.name: field for field in dataclasses.fields(ContextConfig)}
  rows = {(name, value) for more, *_ in OPTIONS for name, value in more.items()}
  assert {name for name, _ in rows} == set(fields)
  for name, field in fields.items():
    assert {choice for choice in field.metadata['choices'] if choice != field.default} <= {value for n, value in rows if n == name}
