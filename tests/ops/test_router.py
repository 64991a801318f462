"""Router statistics against their one-token forms and a numpy loop, selection, losses: sections 4 and 6, P4 and P6."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import router
from memjax.ops.router_losses import chapter_counts, router_losses, router_monitors
from tests.ops.inputs import quick
from tests.ops.oracle import relative

B, L, D, W, BLOCK = 4, 24, 3, 5, 4
KINDS = ('prefix', 'rolling', 'chunk')
FIRST = np.array([0.5, -1.0, 2.0])


def draw(seed):
  """x, mask and segment: rows with padding on either side, none, and nothing real; documents start at real tokens alone."""
  rng = np.random.default_rng(seed)
  mask = rng.random((B, L)) < 0.75
  mask[0], mask[1, :6], mask[2, -5:] = True, False, False
  if seed % 2: mask[3] = False
  return rng.normal(size=(B, L, D)), mask, np.cumsum(mask & (rng.random((B, L)) < 0.12), 1).astype(np.int32)


SHAPES = {'prefix': dict(total_BxD=(B, D)), 'rolling': dict(ring_BxWxD=(B, W, D)), 'chunk': dict(previous_BxD=(B, D), total_BxD=(B, D))}


def empty(kind, dtype=float):
  return {name: np.zeros(shape, dtype) for name, shape in SHAPES[kind].items()} | dict(count_B=np.zeros(B, np.int32))


def named(kind, after):
  return dict(zip((*SHAPES[kind], 'count_B'), after, strict=True))


def fast(kind, x, mask, segment, state):
  """(u, state) of the form over L."""
  if kind == 'prefix': u, *after = router.prefix_mean(x, mask, segment, **state)
  elif kind == 'rolling': u, *after = router.rolling_mean(x, mask, segment, **state, window=W)
  else: u, *after = router.previous_chunk_mean(x, mask, segment, **state, block=BLOCK, first_D=jnp.asarray(FIRST, x.dtype))
  return u, named(kind, after)


def one(kind, x, state):
  """(u, state) of one token: write, then read."""
  if kind == 'prefix':
    after = named(kind, router.prefix_mean_write(x, **state))
    return router.prefix_mean_read(**after), after
  if kind == 'rolling':
    after = named(kind, router.rolling_mean_write(x, **state))
    return router.rolling_mean_read(**after), after
  after = named(kind, router.previous_chunk_mean_write(x, **state, block=BLOCK))
  kept = {name: after[name] for name in ('previous_BxD', 'count_B')}
  return router.previous_chunk_mean_read(**kept, block=BLOCK, first_D=jnp.asarray(FIRST, x.dtype)), after


def slow(kind, x, mask, segment, state):
  """(u, state) as a scan of one token."""
  def pick(keep, new, old): return jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)
  def step(carry, token):
    state, document = carry
    x, real, segment = token
    state = pick(segment != document, jax.tree.map(jnp.zeros_like, state), state)
    u, after = one(kind, x, state)
    return (pick(real, after, state), segment), u
  tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x, mask, segment))
  (state, _), u = jax.lax.scan(step, (state, jnp.zeros(len(x), jnp.int32)), tokens)
  return jnp.moveaxis(u, 0, 1), state


def truth(kind, x, mask, segment):
  """u by the definition, from lists of the document's real tokens."""
  u = np.zeros_like(x)
  for b, t in zip(*np.nonzero(mask), strict=True):
    past = np.array([x[b, i] for i in range(t + 1) if mask[b, i] and segment[b, i] == segment[b, t]])
    start = (len(past) - 1) // BLOCK * BLOCK
    if kind == 'chunk': u[b, t] = past[start - BLOCK:start].mean(0) if start else FIRST
    else: u[b, t] = past[-W if kind == 'rolling' else 0:].mean(0)
  return u


fast_jit = quick(fast, static_argnums=0)
slow_jit = quick(slow, static_argnums=0)


@pytest.mark.parametrize('kind', KINDS)
def test_forms_agree(kind):
  """Definition == one token at a time == the form over L, outputs and state, also when a call is cut in two; P4.3, P4.4."""
  with jax.enable_x64():
    for seed in range(4):
      x, mask, segment = draw(seed)
      want, (u, after), (v, last) = truth(kind, x, mask, segment), *(f(kind, x, mask, segment, empty(kind)) for f in (fast_jit, slow_jit))
      assert np.all(np.isfinite(u)) and np.abs((np.asarray(u) - want)[mask]).max() <= 1e-12
      assert np.abs((np.asarray(v) - want)[mask]).max() <= 1e-12
      for name in after: assert np.abs(np.asarray(after[name]) - np.asarray(last[name])).max() <= 1e-12, name
      is_early = np.arange(L)[None] < 9
      first, state = fast_jit(kind, x, mask & is_early, segment * is_early + segment[:, 8:9] * ~is_early, empty(kind))
      second, state = fast_jit(kind, x, mask & ~is_early, np.maximum(segment - segment[:, 8:9], 0), state)
      assert np.abs((np.where(is_early[..., None], first, second) - want)[mask]).max() <= 1e-12
      for name in after: assert np.abs(np.asarray(after[name]) - np.asarray(state[name])).max() <= 1e-12, name


@pytest.mark.parametrize('kind', KINDS)
def test_single_precision_and_masks(kind):
  """fp32 inside whatever comes in; what is masked may be anything, and leaves the state as it was, bit for bit."""
  x, mask, segment = draw(1)
  x = np.where(mask[..., None], x, np.nan).astype(np.float32)
  u, after = fast_jit(kind, x, mask, segment, empty(kind, np.float32))
  assert u.dtype == np.float32 and np.all(np.isfinite(u))
  assert np.abs((np.asarray(u) - truth(kind, x.astype(float), mask, segment))[mask]).max() <= 1e-6
  _, again = fast_jit(kind, x, np.zeros_like(mask), np.zeros_like(segment), after)
  for name in after: assert np.array_equal(again[name], after[name]), name
  half = jax.eval_shape(lambda x: fast(kind, x, mask, segment, empty(kind, np.float32)), jnp.zeros(x.shape, jnp.bfloat16))
  assert all(leaf.dtype == (jnp.int32 if leaf.ndim == 1 else jnp.float32) for leaf in jax.tree.leaves(half))


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_equal_the_scan_and_are_causal(kind):
  """P4.2: exactly zero towards later tokens and other documents."""
  with jax.enable_x64():
    x, mask, segment = draw(2)
    weight = np.random.default_rng(9).normal(size=x.shape) * mask[..., None]
    def loss(x, state, f):
      u, after = f(kind, x, mask, segment, state)
      return jnp.sum(u * weight) + sum(jnp.sum(jnp.sin(leaf)) for name, leaf in after.items() if name != 'count_B')
    state = {name: np.random.default_rng(3).normal(size=leaf.shape) for name, leaf in empty(kind).items() if name != 'count_B'}
    def grads(x, state):
      counts = dict(count_B=jnp.full(B, 7, jnp.int32))
      return [jax.grad(lambda x, s: loss(x, s | counts, f), (0, 1))(x, state) for f in (fast, slow)]
    got, want = quick(grads)(x, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True): assert relative(a, b) <= 1e-12
    place, document = np.arange(L), np.repeat([0, 1, 2], (5, L - 7, 2))[None].repeat(B, 0).astype(np.int32)
    def reach(x): return jnp.sum(fast(kind, x, None, document, empty(kind))[0][0, 15])
    grad = np.asarray(quick(jax.grad(reach))(x))
    # the prefix reaches back to the document's start, a window of 5 to 11; 15 is token 10 of its document, in block 2
    seen = {'prefix': (place >= 5) & (place <= 15), 'rolling': (place >= 11) & (place <= 15), 'chunk': (place >= 9) & (place <= 12)}[kind]
    assert np.all(grad[1:] == 0) and np.all(grad[0, ~seen] == 0) and np.all(grad[0, seen] != 0)


def test_padding_after_a_row_changes_no_bit():
  """Outputs and state of a short row are those of the row alone."""
  x = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
  for kind in KINDS:
    whole, state = fast_jit(kind, x, np.arange(L)[None].repeat(B, 0) < 7, np.zeros((B, L), np.int32), empty(kind, np.float32))
    alone, want = fast_jit(kind, x[:, :7], None, None, empty(kind, np.float32))
    assert np.array_equal(whole[:, :7], alone)
    for name in want: assert np.array_equal(state[name], want[name]), name


def test_rolling_windows_of_every_size():
  x, mask, segment = draw(0)
  for window in (1, 6, 8, 40):
    state = dict(ring_BxWxD=np.zeros((B, window, D), np.float32), count_B=np.zeros(B, np.int32))
    u, ring, _ = quick(lambda x: router.rolling_mean(x, mask, segment, **state, window=window))(x.astype(np.float32))
    for b, t in zip(*np.nonzero(mask), strict=True):
      past = np.array([x[b, i] for i in range(t + 1) if mask[b, i] and segment[b, i] == segment[b, t]])
      assert np.abs(u[b, t] - past[-window:].mean(0)).max() <= 2e-6
    assert ring.shape == (B, window, D)
  with pytest.raises(UserError, match='window'):
    router.rolling_mean(x, ring_BxWxD=jnp.zeros((B, 3, D)), count_B=jnp.zeros(B, jnp.int32), window=4)


def test_rolling_does_not_drift():
  """A huge old token leaves no trace once it is out of the window."""
  x = np.ones((1, 40, 1), np.float32)
  x[0, 3] = 3e7
  state = dict(ring_BxWxD=np.zeros((1, W, 1), np.float32), count_B=np.zeros(1, np.int32))
  u, _ = quick(lambda x: fast('rolling', x, None, None, state))(x)
  assert np.array_equal(np.asarray(u)[0, 3 + W:], np.ones((40 - 3 - W, 1)))


def test_sequence_means_look_ahead():
  x, mask, segment = draw(2)
  with jax.enable_x64():
    whole, rolled = quick(lambda x: (router.sequence_mean(x, mask, segment), router.sequence_rolling_mean(x, mask, segment, window=W)))(x)
    moved = quick(lambda x: router.sequence_mean(x))(x)
  whole, rolled, means = np.asarray(whole), np.asarray(rolled), truth('rolling', x, mask, segment)
  for b, t in zip(*np.nonzero(mask), strict=True):
    same = mask[b] & (segment[b] == segment[b, t])
    assert np.abs(whole[b, t] - x[b, same].mean(0)).max() <= 1e-12 and np.abs(rolled[b, t] - means[b, same].mean(0)).max() <= 1e-12
  assert relative(moved, np.broadcast_to(x.mean(1, keepdims=True), x.shape)) <= 1e-12


# Selection --------------------------------------------------------------------------------------------------------------------

def test_select():
  """P4.7, P4.8: distinct routed chapters, weights that sum to one, the bias in the selection alone."""
  logit = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)
  ids, log_weight = quick(lambda z: router.select(z, top_k=3, shared=2))(logit)
  want = 2 + np.argsort(-logit[..., 2:], -1)[..., :3]
  assert ids.dtype == jnp.int32 and np.array_equal(ids, want)
  p = np.exp(logit[..., 2:]) / np.exp(logit[..., 2:]).sum(-1, keepdims=True)
  chosen = np.take_along_axis(p, want - 2, -1)
  assert relative(np.exp(log_weight), chosen / chosen.sum(-1, keepdims=True)) <= 1e-6
  _, full = quick(lambda z: router.select(z, top_k=3, shared=2, weight_norm='full'))(logit)
  assert relative(np.exp(full), chosen) <= 1e-6
  bias = np.array([0, 0, 0, 0, 0, 2.0], np.float32)
  ids, log_weight = quick(lambda z: router.select(z, top_k=3, shared=2, bias_P=bias))(logit)
  assert np.all(ids[..., 0] == 7) and np.array_equal(ids[..., 1], 2 + np.argsort(-logit[..., 2:7], -1)[..., 0])
  chosen = np.take_along_axis(p, np.asarray(ids) - 2, -1)
  assert relative(np.exp(log_weight), chosen / chosen.sum(-1, keepdims=True)) <= 1e-6


def test_select_survives_extreme_logits_and_refuses_too_many():
  logit = np.array([[0, -1e4, 1e4, -2e4]], np.float32)
  f = lambda z: jnp.sum(router.select(z, top_k=3)[1])
  assert np.isfinite(quick(f)(logit)) and np.all(np.isfinite(quick(jax.grad(f))(logit)))
  assert quick(lambda z: router.select(z.astype(jnp.bfloat16), top_k=2))(logit)[1].dtype == jnp.float32
  for bad in (dict(top_k=3, shared=2), dict(top_k=0), dict(top_k=1, weight_norm='sum')):
    with pytest.raises(UserError): router.select(logit, **bad)


# Losses -----------------------------------------------------------------------------------------------------------------------

LEGACY = dict(balance_form='legacy', auxiliary_form='legacy_mse')
FORMS = {'normalized': {}, 'cv2': dict(auxiliary_form='cv2'), 'legacy': LEGACY}


def losses(logit, ids, real=None, **options):
  """{form: {loss: float}} of every form."""
  real = np.ones(len(ids), bool) if real is None else real
  got = quick(lambda z, i, r: {form: router_losses(z, i, r, **given, **options) for form, given in FORMS.items()})(logit, ids, real)
  return jax.tree.map(float, got)


@pytest.mark.parametrize('chapters, top_k', [(16, 4), (100, 20), (4096, 64)])
def test_values_of_the_table(chapters, top_k):
  """P6.1, P6.2."""
  C, k, units = chapters, top_k, chapters // 4
  even, same = np.arange(units * k).reshape(units, k) % C, (3 + np.arange(k))[None].repeat(units, 0) % C
  got = losses(np.zeros((units, C), np.float32), even)
  z = pytest.approx(np.log(C) ** 2, rel=1e-6)
  assert got['normalized'] == {'balance': pytest.approx(1, rel=1e-6), 'auxiliary': pytest.approx(0, abs=2e-6), 'z': z}
  assert got['cv2']['auxiliary'] == pytest.approx(0, abs=1e-6)
  assert got['legacy'] == {'balance': pytest.approx(k, rel=1e-6), 'auxiliary': pytest.approx((C - 1) ** 2 / C ** 4, rel=1e-6), 'z': z}
  got = losses(np.where(np.arange(C) == 3, 200, 0).astype(np.float32)[None].repeat(units, 0), same)
  assert got['normalized']['balance'] == pytest.approx(C / k, rel=1e-6)
  assert got['normalized']['auxiliary'] == pytest.approx(np.log(C), rel=1e-6)
  assert got['cv2']['auxiliary'] == pytest.approx(C - 1, rel=1e-6)
  assert got['legacy']['balance'] == pytest.approx(C, rel=1e-6)
  assert got['legacy']['auxiliary'] == pytest.approx((1 - 1 / C) / C, rel=1e-6)


def test_random_values_shared_chapters_and_pads():
  """P6.3, and every term against numpy: shared chapters count in the legacy forms alone."""
  rng, S, C, k = np.random.default_rng(0), 2, 7, 3
  logit = rng.normal(size=(11, S + C))
  ids, real = S + np.argsort(rng.random((11, C)), -1)[:, :k], np.arange(11) % 4 != 1
  p, every = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (logit[real, S:], logit[real]))
  counts, G = np.bincount(ids[real].ravel(), minlength=S + C), real.sum()
  mean = p.mean(0)
  want = {'balance': C * (counts[S:] / (G * k) * mean).sum(), 'auxiliary': np.log(C) + (mean * np.log(mean)).sum(),
          'z': (np.log(np.exp(logit[real, S:]).sum(-1)) ** 2).mean()}
  legacy = {'balance': (S + C) * (counts / G * every.mean(0)).sum(), 'auxiliary': (((every ** 2).mean(0) - 1 / (S + C)) ** 2).mean(),
            'z': want['z']}
  spoiled, gone = np.where(real[:, None], logit, np.nan), np.where(real[:, None], ids, -1)
  with jax.enable_x64():
    for x, i in ((logit, ids), (spoiled, gone)):
      got = losses(x, i, real, shared=S)
      assert got['normalized'] == pytest.approx(want, rel=1e-12) and got['legacy'] == pytest.approx(legacy, rel=1e-12)
      assert got['cv2']['auxiliary'] == pytest.approx(mean.var() / mean.mean() ** 2, rel=1e-12)
  assert np.array_equal(chapter_counts(gone, real, S + C), counts)


def test_gradients():
  """P6.2, P6.6: balance through P alone; finite where p underflows and where nothing is real."""
  rng, real = np.random.default_rng(0), np.array([True, True, False, True, True])
  logit, ids = rng.normal(size=(5, 6)), rng.integers(0, 6, (5, 2))
  total = lambda z, name, **options: router_losses(z, ids, real, **options)[name]
  with jax.enable_x64():
    for name, options in (('balance', {}), ('auxiliary', {}), ('auxiliary', dict(auxiliary_form='cv2')), ('z', {}), ('auxiliary', LEGACY)):
      f = quick(lambda z: total(z, name, **options))
      grad, way = quick(jax.grad(lambda z: total(z, name, **options)))(logit), rng.normal(size=logit.shape)
      numeric = (f(logit + 1e-5 * way) - f(logit - 1e-5 * way)) / 2e-5
      assert abs(np.sum(grad * way) - numeric) <= 1e-7 and np.all(grad[2] == 0) and np.any(grad[0] != 0)
  steep = np.where(np.eye(5, 6)[:, :6] * 0 + np.arange(6) == 0, 400, 0).astype(np.float32)
  for units in (real, np.zeros(5, bool)):
    f = lambda z: router_losses(z, ids, units)
    values, grads = quick(lambda z: (f(z), jax.grad(lambda z: sum(f(z).values()))(z)))(steep)
    assert np.all(np.isfinite(grads)) and all(np.isfinite(v) for v in values.values())
    if not units.any(): assert all(v == 0 for v in values.values()) and np.all(grads == 0)


def test_monitors():
  C, k = 8, 2
  watch = quick(lambda z, i, r: router_monitors(z, i, r, shared=1))
  every, one = np.ones(4, bool), np.where(np.arange(C + 1) == 3, 200.0, 0).astype(np.float32)[None].repeat(4, 0)
  even = watch(np.zeros((4, C + 1), np.float32), 1 + np.arange(8).reshape(4, k), every)
  assert even == pytest.approx(dict(router_entropy=np.log(C), router_mean_entropy=np.log(C), chapter_coverage=1, chapter_gini=0,
                                    top_share=1 / C), abs=1e-6)
  skewed = watch(one, np.full((4, 1), 3), every)
  assert skewed == pytest.approx(dict(router_entropy=0, router_mean_entropy=0, chapter_coverage=1 / C, chapter_gini=1 - 1 / C,
                                      top_share=1), abs=1e-6)
  apart = watch(200 * np.eye(4, C + 1, 1, dtype=np.float32), 1 + np.arange(4)[:, None], every)
  assert float(apart['router_entropy']) < 1e-6 and float(apart['router_mean_entropy']) == pytest.approx(np.log(4), abs=1e-6)
  assert all(v == 0 for v in watch(one, np.full((4, 1), 3), ~every).values())
  grad = quick(jax.grad(lambda z: sum(router_monitors(z, np.full((4, 1), 3), every).values())))(one)
  assert np.all(grad == 0)


def test_unknown_forms():
  for options in (dict(balance_form='x'), dict(auxiliary_form='mse')):
    with pytest.raises(UserError, match='unknown'): router_losses(np.zeros((2, 3)), np.zeros((2, 1), int), np.ones(2, bool), **options)
