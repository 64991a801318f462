"""The context bank against a loop in numpy: section 9 of the specification, P9.1, P9.2, P9.6."""
import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.context import ContextConfig
from memjax.ops import context as ops
from tests.ops.inputs import quick
from tests.ops.oracle import relative

S, D = 4, 5
CONFIGS = {
    'weighted': ContextConfig(slots=S), 'sum': ContextConfig(slots=S, merge='sum', decay=0.5),
    'evict': ContextConfig(slots=S, merge='evict', decay=0.9, new_importance=2.0),
    'online': ContextConfig(slots=S, clusters=3, top_k=2), 'lloyd': ContextConfig(slots=S, clusters=3, top_k=1, iterations=2)}
STEPS, RATIO = 9, 3


class Loop:
  """A bank as numpy arrays and plain loops; `config` as for the real one."""

  def __init__(self, config, width=D):
    c = self.config = config
    self.slots, self.centroids = np.zeros((c.slots, width)), np.zeros((c.clusters, width))
    self.importance, self.refs, self.age, self.valid, self.assign = (np.zeros(c.slots) for _ in range(5))
    self.clock, self.total, self.pending = 0, np.zeros(width), 0

  @property
  def used(self): return [s for s in range(self.config.slots) if self.valid[s]]

  def omega(self, s): return self.importance[s] * self.config.decay ** self.age[s]

  def members(self, n): return [s for s in self.used if self.assign[s] == n + 1]

  def see(self, query):
    """Slots that a token with queries [H, D] reads."""
    if not self.config.clusters: return self.used
    alive = [n for n in range(self.config.clusters) if self.members(n)]
    best = sorted(alive, key=lambda n: -(query.sum(0) @ self.centroids[n]))[:self.config.top_k]
    return [s for s in self.used if self.assign[s] - 1 in best]

  def read(self, query):
    """(mixed [H, D], mass [S]) of one token."""
    mixed, mass, seen = np.zeros_like(query), np.zeros(len(self.valid)), self.see(query)
    for h, q in enumerate(query):
      p = np.array([np.exp(q @ self.slots[s]) for s in seen])
      for s, share in zip(seen, p / p.sum() if seen else [], strict=True):
        mixed[h] += share * self.slots[s]
        mass[s] += share / len(query)
    return mixed, mass

  def account(self, mass):
    self.importance += mass
    self.refs += mass > self.config.threshold

  def take(self, x, ratio):
    """Pools one token; a slot where the pool is full."""
    self.total, self.pending = self.total + x, self.pending + 1
    if self.pending < ratio: return
    self.age += self.valid
    self.clock += 1
    at = self.place()
    self.slots[at], self.importance[at], self.valid[at] = self.total / ratio, self.config.new_importance, 1
    self.refs[at] = self.age[at] = self.assign[at] = 0
    self.total, self.pending = np.zeros_like(self.total), 0
    if self.config.iterations: self.lloyd()
    elif self.config.clusters: self.join(at)

  def place(self):
    """A free place, made by merging or evicting if there is none."""
    free = [s for s in range(len(self.valid)) if not self.valid[s]]
    if free: return free[0]
    if self.config.merge == 'evict': return min(self.used, key=self.omega)
    def cost(pair):
      i, j = pair
      return self.omega(i) * self.omega(j) / (self.omega(i) + self.omega(j)) * ((self.slots[i] - self.slots[j]) ** 2).sum()
    i, j = min(itertools.combinations(self.used, 2), key=cost)
    keep, drop = (i, j) if self.omega(i) >= self.omega(j) else (j, i)
    a, b = self.omega(keep), self.omega(drop)
    x, y = self.slots[keep], self.slots[drop]
    self.slots[keep] = x + y if self.config.merge == 'sum' else (a * x + b * y) / (a + b)
    self.importance[keep] += self.importance[drop]
    self.refs[keep] += self.refs[drop]
    self.age[keep] = min(self.age[keep], self.age[drop])
    self.valid[drop] = self.assign[drop] = 0
    return drop

  def far(self, s, n): return ((self.slots[s] - self.centroids[n]) ** 2).sum()

  def means(self):
    for n in range(self.config.clusters): self.centroids[n] = np.mean([self.slots[s] for s in self.members(n)] or [0 * self.slots[0]], 0)

  def join(self, at):
    empty = [n for n in range(self.config.clusters) if not self.members(n)]
    self.assign[at] = 1 + (empty[0] if empty else min(range(self.config.clusters), key=lambda n: self.far(at, n)))
    self.means()

  def lloyd(self):
    """Farthest-point start; with more clusters than slots some stay empty."""
    chosen = self.used[:1]
    while len(chosen) < min(self.config.clusters, len(self.used)):
      chosen.append(max(self.used, key=lambda s: min(((self.slots[s] - self.slots[t]) ** 2).sum() for t in chosen)))
    alive = range(len(chosen))
    for n, s in enumerate(chosen): self.centroids[n] = self.slots[s]
    for _ in range(self.config.iterations):
      for s in self.used: self.assign[s] = 1 + min(alive, key=lambda n: self.far(s, n))
      self.means()


def same(bank, loop):
  """Every leaf of a bank is that of the loop."""
  for field in dataclasses.fields(bank):
    want = np.asarray(getattr(loop, field.name), np.float64)
    np.testing.assert_allclose(np.asarray(getattr(bank, field.name), np.float64), want, atol=1e-11, err_msg=field.name)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ('sum', 'evict', 'lloyd')]


@pytest.mark.parametrize('name', ['weighted', 'online', *LONG])
def test_updates_and_reads_equal_a_loop(name):
  """Tokens read, account and pool one after the other, in fp64: mixed slots, masses and every leaf after each slot."""
  config, rng = CONFIGS[name], np.random.default_rng(1)
  tokens, queries = 1 + rng.normal(size=(STEPS * RATIO, D)), rng.normal(size=(STEPS * RATIO, 2, D))
  def token(bank, x, query):
    mixed, mass = ops.read_slots(query[None], bank, ops.route(query[None], bank, config.top_k))
    return ops.pool(ops.account(bank, mass, threshold=config.threshold), x[None], jnp.ones(1, bool)), mixed[0], mass[0]
  with jax.enable_x64():
    token, append = quick(token), quick(lambda bank: ops.append(bank, config))
    bank, loop = ops.empty_bank(config, D, dtype=jnp.float64), Loop(config)
    for x, query in zip(tokens, queries, strict=True):
      bank, mixed, mass = token(bank, x, query)
      want, want_mass = loop.read(query)
      np.testing.assert_allclose(mixed, want, atol=1e-12)
      np.testing.assert_allclose(mass, want_mass, atol=1e-12)
      loop.account(want_mass)
      loop.take(x, RATIO)
      if bank.pending == RATIO:
        bank = append(bank)
        same(bank, loop)
  assert bank.clock == STEPS and np.asarray(bank.valid).all()


def test_read_gradient_is_that_of_the_query_alone():
  """By finite differences in fp64; none through the slots, and none through the mass."""
  rng, config = np.random.default_rng(2), CONFIGS['weighted']
  query, weight, step = rng.normal(size=(2, 3, D)), rng.normal(size=(2, 3, D)), 1e-6
  with jax.enable_x64():
    bank = dataclasses.replace(ops.empty_bank(config, D, dtype=jnp.float64), slots=jnp.asarray(rng.normal(size=(S, D))),
                               valid=jnp.ones(S, jnp.int32).at[1].set(0))
    def look(query, slots):
      full = dataclasses.replace(bank, slots=slots)
      mixed, mass = ops.read_slots(query, full, ops.route(query, full, 1))
      return jnp.sum(mixed * weight) + 100 * mass[0, 0]
    f, g = quick(look), quick(jax.grad(look, argnums=(0, 1)))
    by_query, by_slots = g(query, bank.slots)
    g_fixed = quick(lambda query: jnp.sum(ops.read_slots(query, bank, ops.route(query, bank, 1))[0] * weight))
    numbers = np.zeros_like(query)
    for at in np.ndindex(query.shape):
      shift = np.zeros_like(query)
      shift[at] = step
      numbers[at] = (g_fixed(query + shift) - g_fixed(query - shift)) / (2 * step)
    assert f(query, bank.slots) != g_fixed(query)
  assert relative(by_query, numbers) <= 1e-8 and not np.asarray(by_slots).any()


def test_capacity_holds_and_one_trace_serves_all_updates():
  """P9.1."""
  config = ContextConfig(slots=S, clusters=2, top_k=2)
  chex.clear_trace_counter()
  @chex.assert_max_traces(n=1)
  def update(bank, x): return ops.append(ops.pool(bank, x, jnp.ones(2, bool)), config)
  update, bank = jax.jit(update), ops.empty_bank(config, D)
  for x in np.random.default_rng(3).normal(size=(50, 2, D)).astype(np.float32):
    new = update(bank, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, bank)
    bank = new
    assert int(bank.valid.sum()) == min(int(bank.clock), S)
  assert int(bank.clock) == 50 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bank))


def append_all(config, rows, dtype=jnp.float64):
  """The bank after each row became a slot."""
  bank = ops.empty_bank(config, rows.shape[1], dtype=dtype)
  update = quick(lambda bank, x: ops.append(ops.pool(bank, x[None], jnp.ones(1, bool)), config))
  for x in rows: bank = update(bank, x)
  return bank


def test_merging_identical_slots_loses_nothing():
  """P9.2: of S different contents any number of copies leaves the S contents, importance counts the copies."""
  rows = np.random.default_rng(4).normal(size=(S - 1, D)) * 30
  order = [0, 1, 0, 2, 1, 1, 2, 0, 0, 0]
  bank = append_all(ContextConfig(slots=S, decay=0.5), rows[order].astype(np.float32), jnp.float32)
  kept = [np.flatnonzero(np.abs(np.asarray(bank.slots) - row).max(-1) <= 1e-4) for row in rows]
  assert [len(k) for k in kept].count(0) == 0
  assert [float(sum(bank.importance[k])) for k in kept] == [5, 3, 2]


def test_weighted_mean_is_conserved():
  """P9.2: with equal weights by age, sum omega x / sum omega is the mean of all that was pooled; 'sum' conserves the sum."""
  rows = np.random.default_rng(5).normal(size=(20, D))
  with jax.enable_x64():
    bank = append_all(ContextConfig(slots=S, decay=1.0), rows)
    mean = (bank.importance[:, None] * bank.slots).sum(0) / bank.importance.sum()
    assert relative(mean, rows.mean(0)) <= 1e-12 and float(bank.importance.sum()) == 20
    assert relative(append_all(ContextConfig(slots=S, merge='sum'), rows).slots.sum(0), rows.sum(0)) <= 1e-12


def test_very_old_slots_still_merge():
  """omega underflows to 0 in float32: the merged slot is then the plain mean."""
  rows = np.eye(D, dtype=np.float32)
  bank = append_all(ContextConfig(slots=2, decay=0.0), rows[:3], jnp.float32)
  np.testing.assert_array_equal(bank.slots, [(rows[0] + rows[1]) / 2, rows[2]])


def test_equal_slots_tie_at_exactly_zero():
  """Rounding must not decide between equal pairs, or two ways of computing the same would part."""
  rows = (1000 * np.random.default_rng(9).normal(size=(2, 64))).astype(np.float32)[[0, 1, 0, 1]]
  bank = append_all(ContextConfig(slots=4), rows, jnp.float32)
  cost = np.asarray(quick(lambda bank: ops.merge_cost(bank, 0.99))(bank))
  assert cost[0, 2] == cost[1, 3] == 0 and np.isinf(cost[np.tril_indices(4)]).all()
  assert np.isfinite(cost[np.triu_indices(4, 1)]).all() and (cost[[0, 0, 1, 2], [1, 3, 2, 3]] > 1e6).all()


def test_empty_clusters_are_seeded_and_equal_slots_share_one():
  config = ContextConfig(slots=4, clusters=3, top_k=1, iterations=1)
  points = np.float32([[0, 0], [0, 1], [9, 0], [9, 1]])
  full = dataclasses.replace(append_all(config, points, jnp.float32), assign=jnp.int32([1, 1, 1, 3]),
                             centroids=jnp.float32([[0, 0], [9, 0.4], [8, 2]]))
  moved = quick(ops.lloyd_step)(full)                                 # cluster 2 had no slots: its centroid attracts none
  assert moved.assign.tolist() == [1, 1, 2, 3]                        # slot 2 was the farthest from its centroid
  np.testing.assert_array_equal(moved.centroids, [[0, 0.5], [9, 0], [9, 1]])
  same_slots = append_all(config, points[[3, 3, 3, 3]], jnp.float32)
  assert same_slots.assign.tolist() == [1] * 4 and not np.asarray(same_slots.centroids[1:]).any()


def test_users_do_not_mix_under_vmap():
  """P9.6: each row equals the row alone; NaN in one leaves the others bit-equal."""
  config, rows = CONFIGS['lloyd'], np.random.default_rng(6).normal(size=(3, STEPS, D)).astype(np.float32)
  def run(bank, x_LxD):
    def one(bank, x): return ops.append(ops.pool(bank, x[None], jnp.ones(1, bool)), config), None
    return jax.lax.scan(one, bank, x_LxD)[0]
  users, alone = quick(jax.vmap(run)), quick(run)
  empty = ops.empty_bank(config, D, batch=(3,))
  banks = users(empty, rows)
  row = lambda tree, b: jax.tree.map(lambda a: a[b], tree)
  for b in range(3): chex.assert_trees_all_close(row(banks, b), alone(row(empty, b), rows[b]), atol=1e-5)
  spoilt = users(empty, np.where(np.arange(3)[:, None, None] == 1, np.nan, rows))
  for b in (0, 2): chex.assert_trees_all_equal(row(spoilt, b), row(banks, b))


def test_borders_equal_a_loop():
  rng, ratio = np.random.default_rng(7), 5
  late = quick(lambda pending, wrote, reset: ops.past_border(pending, wrote, reset, ratio))
  for case in range(60):
    wrote, reset = rng.random(ratio) < (0.9, 0.5)[case % 2], rng.random(ratio) < (0, 0.3, 0.7)[case % 3]
    count = pending = int(rng.integers(ratio))
    want, done = [], False
    for w, r in zip(wrote, reset, strict=True):
      want.append(done)
      count = (0 if r else count) + w
      if count == ratio: count, done = 0, True
    assert late(jnp.int32(pending), wrote, reset).tolist() == want


def test_two_banks_become_one():
  config = ContextConfig(slots=S, decay=1.0, clusters=2, top_k=1)
  one, two = np.random.default_rng(8).normal(size=(2, 3, D)).astype(np.float32)
  a, b = append_all(config, one, jnp.float32), append_all(config, two, jnp.float32)
  both = quick(lambda a, b: ops.merge_banks(a, b, config))(ops.pool(a, one, jnp.ones(3, bool)), b)
  assert np.asarray(both.valid).all() and int(both.clock) == 6 and int(both.pending) == 3 and np.asarray(both.assign).all()
  mean = (both.importance[:, None] * both.slots).sum(0) / both.importance.sum()
  assert relative(mean, np.concatenate([one, two]).mean(0)) <= 1e-5
  chex.assert_trees_all_close(quick(lambda a, b: ops.merge_banks(a, b, config))(ops.clear_bank(a), b), b, atol=1e-6)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(ops.clear_bank(both)))
