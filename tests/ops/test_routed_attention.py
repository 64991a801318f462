"""Routed attention: properties P5 of the specification, against a dense oracle that gathers and masks."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import rounds
from memjax.ops.quantize import dequantize, quantize
from memjax.ops.routed_attention import MODES, choose_implementation, combine, routed_attend, routed_partials
from memjax.ops.routed_sharded import routed_attend_sharded
from memjax.ops.tiles import make_tiles, tile_limit

Z, P, T, J, H, G, K, V, M = 19, 6, 5, 3, 4, 2, 6, 5, 4
WAYS = ('gather', 'scan', 'tiles', 'capacity')
SCALE = 1.7


def routes(kind, tokens=Z, chapters=P, slots=J, seed=0):
  """ids [Z, J], distinct in a row: balanced; skewed with empty chapters; all tokens to one chapter; with empty slots and tokens."""
  rng = np.random.default_rng(seed)
  if kind == 'one': return np.tile(np.where(np.arange(slots) == 0, 2 % chapters, -1).astype(np.int32), (tokens, 1))
  noise = rng.normal(size=(tokens, chapters)) + (4.0 * np.arange(chapters) if kind == 'skewed' else 0)
  ids = np.argsort(noise, 1)[:, :slots].astype(np.int32)
  if kind == 'holes': ids[rng.random(ids.shape) < 0.3] = -1; ids[[2, 5]] = -1
  return ids


KINDS = ('balanced', 'skewed', 'one', 'holes')


def draw(*shapes, dtype=np.float64, seed=1):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def bank(dtype=np.float64, shape=(Z, P, T, J, H, G, K, V)):
  """q, k, v, log weights, and a mask of entries in which one chapter is empty."""
  Z, P, T, J, H, G, K, V = shape
  *arrays, weight = draw((Z, H, K), (P, T, G, K), (P, T, G, V), (Z, J), dtype=dtype)
  mask = np.random.default_rng(2).random((P, T)) < 0.7
  mask[1] = False
  return (*arrays, (weight - 1).astype(dtype)), mask | (np.arange(T) == 0)[None] & (np.arange(P) != 1)[:, None]


def dense(q, k, v, ids, mask):
  """(scores [Z, H, J, T] with -inf where nothing is seen, values [Z, H, J, T, V]) by gathering: the definition."""
  at, repeat = jnp.maximum(ids, 0), q.shape[1] // k.shape[2]
  k, v = (jnp.moveaxis(jnp.repeat(x[at], repeat, 3), 3, 1) for x in (k, v))
  s = jnp.einsum('zhk,zhjtk->zhjt', q, k, precision='highest') * q.shape[-1] ** -0.5
  return jnp.where((ids >= 0)[:, None, :, None] & mask[at][:, None], s, -jnp.inf), v


def softmax(s, v):
  """(softmax(s) v over the last axis of s, log-sum-exp); nothing seen: 0 and -inf, safe to differentiate."""
  seen = (s > -jnp.inf).any(-1)
  s = jnp.where(seen[..., None], s, 0)
  o = jnp.einsum('...t,...tv->...v', jax.nn.softmax(s, -1), v, precision='highest')
  return jnp.where(seen[..., None], o, 0), jnp.where(seen, jax.nn.logsumexp(s, -1), -jnp.inf)


def partials_oracle(q, k, v, ids, mask):
  return tuple(jnp.moveaxis(x, 2, 1) for x in softmax(*dense(q, k, v, ids, mask)))


def attend_oracle(q, k, v, log_weight, shared, *, ids, mask, mode):
  """One softmax over all that is read, or one a chapter; SCALE is the routed scale."""
  s, values = dense(q, k, v, ids, mask)
  if shared is not None:
    k, v = (jnp.moveaxis(jnp.repeat(x, q.shape[1] // x.shape[1], 1), 1, 0) for x in shared)
    s_shared, v = jnp.einsum('zhk,hmk->zhm', q, k, precision='highest') * q.shape[-1] ** -0.5, jnp.broadcast_to(v[None], (Z, *v.shape))
  if mode == 'mixture':
    weight = SCALE * jnp.where(ids >= 0, jnp.exp(log_weight), 0)
    y = jnp.sum(softmax(s, values)[0] * weight[:, None, :, None], 2)
    return y if shared is None else y + softmax(s_shared, v)[0]
  s = s + np.log(SCALE) + (log_weight[:, None, :, None] if mode == 'joint_bias' else 0)
  s, values = s.reshape(*s.shape[:2], -1), values.reshape(*s.shape[:2], -1, values.shape[-1])
  if shared is not None: s, values = jnp.concatenate([s, s_shared], -1), jnp.concatenate([values, v], 2)
  return softmax(s, values)[0]


def close(got, want, tolerance):
  """Leaves agree to `tolerance` of the largest entry; infinities in the same places."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.array_equal(np.isfinite(a), np.isfinite(b)) and not np.isnan(a).any()
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@functools.cache
def partials_program(impl, **options):
  """jit of (o, lse, dq, dk, dv) for cotangents of o and of the finite lse."""
  def program(q, k, v, ids, mask, do, dlse):
    def run(q, k, v):
      o, lse = partials_oracle(q, k, v, ids, mask) if impl == 'oracle' else routed_partials(
        q, k, v, ids, mask_PxT=mask, impl=impl, block=4)
      return (o, jnp.where(lse > -jnp.inf, lse, 0)), lse
    (o, _), pull, lse = jax.vjp(run, q, k, v, has_aux=True)
    return o, lse, pull((do, dlse))
  return jax.jit(program)


def check_partials(impl, dtype, tolerances, kinds=KINDS, shape=(Z, P, T, J, H, G, K, V)):
  (q, k, v, weight), mask = bank(dtype, shape)
  do, dlse = draw((*weight.shape, q.shape[1], v.shape[3]), (*weight.shape, q.shape[1]), dtype=dtype, seed=4)
  for i, kind in enumerate(kinds):
    ids = routes(kind, *shape[:2], shape[3])
    arguments = q, k, v, ids, mask if i % 2 else np.ones_like(mask), do, dlse
    got, want = partials_program(impl)(*arguments), partials_program('oracle')(*arguments)
    close(got[:2], want[:2], tolerances[0])
    close(got[2], want[2], tolerances[1])


@pytest.mark.parametrize('impl', WAYS)
def test_partials_equal_the_oracle_in_fp64(impl):
  """P5.1, P5.5: values, log-sum-exps and gradients, for any load of the chapters, grouped heads, empty slots and masks."""
  with jax.enable_x64(): check_partials(impl, np.float64, (1e-12, 1e-12))


def test_tiles_in_fp32():
  check_partials('tiles', np.float32, (1e-5, 1e-4))


@pytest.mark.parametrize('shape', [(7, 3, 1, 1, 2, 2, 4, 4), (9, 3, 3, 3, 2, 1, 4, 4)])
def test_tiles_of_extreme_shapes(shape):
  """One entry and one slot; every chapter chosen."""
  with jax.enable_x64(): check_partials('tiles', np.float64, (1e-12, 1e-12), ('balanced', 'holes'), shape)


def test_gradient_of_the_log_sum_exp_by_differences():
  """P5.4."""
  (q, k, v, weight), mask = bank()
  ids, step = routes('holes'), 1e-5
  with jax.enable_x64():
    run = lambda q, k: partials_program('tiles')(q, k, v, ids, mask, np.zeros((*weight.shape, H, V)), np.ones((*weight.shape, H)))
    total = lambda q, k: np.where(np.isfinite(lse := np.asarray(run(q, k)[1])), lse, 0).sum()
    dq, dk, dv = run(q, k)[2]
    for way, direction, at in ((dq, draw(q.shape, seed=7)[0], 0), (dk, draw(k.shape, seed=8)[0], 1)):
      move = [(q + s * step * direction, k) if at == 0 else (q, k + s * step * direction) for s in (1, -1)]
      slope = (total(*move[0]) - total(*move[1])) / (2 * step)
      assert abs(slope - float((np.asarray(way) * direction).sum())) <= 1e-6 * max(1, abs(slope))
    assert not np.asarray(dv).any()


@functools.cache
def attend_program(impl, mode, shared=True, **options):
  """jit of (y, gradients of q, k, v, log weight, shared) for a cotangent of y."""
  def program(q, k, v, weight, shared_kv, ids, mask, dy):
    def run(q, k, v, weight, shared_kv):
      if impl == 'oracle': return attend_oracle(q, k, v, weight, shared_kv, ids=ids, mask=mask, mode=mode)
      return routed_attend(q, k, v, ids, log_weight_ZxJ=weight, mode=mode, shared_kv=shared_kv, routed_scale=SCALE, impl=impl,
                           mask_PxT=mask, **options)
    y, pull = jax.vjp(run, q, k, v, weight, shared_kv)
    return y, pull(dy)
  return jax.jit(program)


ATTEND = [('gather', 'mixture', {'token_chunk': 8, 'remat': False}), ('tiles', 'mixture', {'token_chunk': 8}),
          ('tiles', 'joint_bias', {'token_chunk': 8}), ('capacity', 'mixture', {'token_chunk': 8, 'block': 4}),
          ('capacity', 'joint', {}), ('capacity', 'joint_bias', {'token_chunk': 8, 'remat': False})]


LONG = [pytest.param(*row, marks=pytest.mark.slow) for row in (ATTEND[0], *ATTEND[4:])]


@pytest.mark.parametrize(('impl', 'mode', 'options'), [*ATTEND[1:4], *LONG])
def test_attention_equals_the_oracle(impl, mode, options):
  """P5.1, P5.8: modes, shared chapters, token chunks of 8 that do not divide 19 tokens, rounds, with and without remat."""
  (q, k, v, weight), mask = bank()
  shared, dy = tuple(draw((M, G, K), (M, G, V), seed=3)), draw((Z, H, V), seed=5)[0]
  with jax.enable_x64():
    for i, kind in enumerate(KINDS):
      ids = routes(kind)
      hidden = np.where(ids < 0, -np.inf, weight)                       # what an empty slot weighs never matters
      see = mask if i % 2 else np.ones_like(mask)
      got = attend_program(impl, mode, **options)(q, k, v, hidden, shared, ids, see, dy)
      want = attend_program('oracle', mode)(q, k, v, weight, shared, ids, see, dy)
      close(got, want, 1e-12)
      assert np.any(got[1][3]) == (mode != 'joint')


@pytest.mark.slow
def test_rounds_in_fp32():
  (q, k, v, weight), mask = bank(np.float32)
  arguments = q, k, v, weight, None, routes('skewed'), mask, draw((Z, H, V), dtype=np.float32)[0]
  got, want = attend_program('capacity', 'mixture')(*arguments), attend_program('oracle', 'mixture')(*arguments)
  close(got[0], want[0], 1e-5)
  close(got[1], want[1], 1e-4)


def test_token_chunks_change_nothing():
  """P5.7."""
  (q, k, v, weight), _ = bank(np.float32)
  run = jax.jit(lambda chunk: routed_attend(q, k, v, routes('skewed'), log_weight_ZxJ=weight, token_chunk=chunk, impl='tiles'),
                static_argnums=0)
  for chunk in (10, 3): close(run(chunk), run(Z), 1e-6)


def test_joint_over_all_chapters_is_dense_attention():
  """P5.2 and P5.3: every chapter chosen, in any order, is attention to the whole bank; equal weights change nothing."""
  (q, k, v, _), _ = bank()
  with jax.enable_x64():
    keys, values = (np.repeat(x.reshape(1, P * T, G, -1), H // G, 2)[0] for x in (k, v))
    p = jax.nn.softmax(jnp.einsum('zhk,mhk->zhm', q, keys) * K ** -0.5, -1)
    want = jnp.einsum('zhm,mhv->zhv', p, values)
    run = jax.jit(lambda k, v, ids: [routed_attend(q, k, v, ids, log_weight_ZxJ=jnp.full((Z, P), -0.3), mode=mode, impl=impl)
                                     for mode, impl in (('joint', 'tiles'), ('joint_bias', 'capacity'))])
    order = np.random.default_rng(3).permutation(P)
    ids = routes('balanced', slots=P)
    for arguments in ((k, v, ids), (k[order], v[order], np.argsort(order)[ids].astype(np.int32))):
      for y in run(*arguments): close(y, want, 1e-12)


def test_scores_of_ten_thousand_in_bf16():
  """P5.6: finite values and gradients, values within the range of v."""
  (q, k, v, weight), mask = bank(np.float32)
  big = [jnp.asarray(x, jnp.bfloat16) for x in (100 * q, 100 * k, v)]
  dy = jnp.ones((Z, H, V), jnp.bfloat16)
  y, grads = attend_program('tiles', 'joint_bias')(*big, weight, None, routes('holes'), mask, dy)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((y, grads)))
  assert y.dtype == jnp.bfloat16 and np.abs(np.asarray(y, np.float32)).max() <= np.abs(v).max() * 1.01


def test_combine_of_nothing_is_zero():
  o, lse = jnp.ones((2, J, H, V)), jnp.full((2, J, H), -jnp.inf)
  for mode in MODES:
    y, grads = jax.jit(jax.value_and_grad(lambda *a: combine(*a, jnp.zeros((2, J)), mode=mode).sum(), (0, 1)))(o, lse)
    assert y == 0 and all(np.isfinite(g).all() and not g.any() for g in grads)


@pytest.mark.parametrize('block', [4, 8])
def test_tables_hold_every_pair_once(block):
  """P5.12."""
  tables = jax.jit(lambda ids: make_tiles(ids, P, block=block))
  for seed, kind in enumerate((*KINDS, 'balanced')):
    ids = routes(kind, seed=seed)
    chapter, pair, row, used = (np.asarray(x) for x in tables(ids))
    count = np.bincount(ids[ids >= 0], minlength=P)
    assert used == -(-count // block).sum() <= tile_limit(ids.size, P, block) == len(chapter)
    assert sorted(pair[pair < ids.size]) == list(np.flatnonzero(ids.reshape(-1) >= 0))
    for u, c in np.argwhere(pair < ids.size): assert ids.reshape(-1)[pair[u, c]] == chapter[u] and row[pair[u, c]] == u * block + c
    assert (row[ids.reshape(-1) < 0] == pair.size).all()


def test_quantised_banks_are_read_as_what_they_stand_for():
  """Codes are restored a few chapters at a time; queries and weights still learn."""
  (q, _, _, weight), _ = bank(np.float32)
  store = jax.jit(lambda x: quantize(x, bits=8, group=0))
  k, v = (store(x) for x in draw((P, T, G, K), (P, T, G, K), dtype=np.float32, seed=9))
  plain = dequantize(k, jnp.float32), dequantize(v, jnp.float32)
  ids = routes('holes')
  def run(q, weight, kv, impl): return routed_attend(q, *kv, ids, log_weight_ZxJ=weight, impl=impl, token_chunk=10)
  grad = jax.jit(jax.value_and_grad(lambda *a: (run(*a) ** 2).sum(), (0, 1)), static_argnums=3)
  close(grad(q, weight, (k, v), 'tiles'), grad(q, weight, plain, 'gather'), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'impl'), [('mixture', 'tiles'), ('joint_bias', 'gather')])
def test_chapters_over_a_mesh(mode, impl):
  """P5.11: chapters over 2 devices, tokens over 2 more, with shared entries: values and gradients as on one."""
  (q, k, v, weight), _ = bank(np.float32, (12, P, T, J, H, G, K, V))
  shared, ids = tuple(draw((M, G, K), (M, G, V), dtype=np.float32, seed=3)), routes('holes', 12)
  mesh = jax.make_mesh((2, 2), ('chapters', 'tokens'), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
  def loss(way, *arrays):
    q, k, v, weight, shared = arrays
    options = dict(log_weight_ZxJ=weight, mode=mode, shared_kv=shared, routed_scale=SCALE, impl=impl)
    if way: y = routed_attend_sharded(q, k, v, ids, mesh=mesh, axis='chapters', token_axis='tokens', **options)
    else: y = routed_attend(q, k, v, ids, **options)
    return (y ** 2).sum(), y
  run = jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4, 5), has_aux=True), static_argnums=0)
  close(run(True, q, k, v, weight, shared), run(False, q, k, v, weight, shared), 1e-6)


def example(impl, **options):
  """(forward, gradient) and their arguments at the shape of section 5.6: 65,536 tokens, 20 of 100 chapters of 1,024 entries."""
  Z, P, T, J, H, K = 65536, 100, 1024, 20, 12, 128
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((Z, H, K), (P, T, H, K), (P, T, H, K))]
  def forward(q, k, v, weight, ids): return routed_attend(q, k, v, ids, log_weight_ZxJ=weight, impl=impl, **options)
  gradient = jax.grad(lambda *a: forward(*a).astype(jnp.float32).sum(), (0, 1, 2, 3))
  return (forward, gradient), (*arrays, jax.ShapeDtypeStruct((Z, J), jnp.float32), jax.ShapeDtypeStruct((Z, J), jnp.int32))


@pytest.mark.slow
def test_memory_at_full_size():
  """P5.9, compiled and not run: gigabytes with tiles, more than a terabyte with gathered keys and values."""
  def temporaries(function, arguments): return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
  functions, arguments = example('tiles')
  forward, gradient = (temporaries(f, arguments) / 2 ** 30 for f in functions)
  assert forward <= 2.5 and gradient <= 4.5
  functions, arguments = example('gather', token_chunk=65536)
  assert temporaries(functions[0], arguments) >= 2 ** 40


@pytest.mark.parametrize('mode', MODES)
def test_cudnn_rounds_lower_for_cuda(mode):
  """The private rules of jax that the GPU path calls are there and take what it gives them; running it needs a GPU."""
  assert rounds._cudnn() is not None
  like = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 4, 64), (P, 64, 2, 64), (P, 64, 2, 64))]
  ids, weight = jax.ShapeDtypeStruct((256, J), jnp.int32), jax.ShapeDtypeStruct((256, J), jnp.float32)
  def loss(q, k, v, weight, ids):
    y = routed_attend(q, k, v, ids, log_weight_ZxJ=weight, mode=mode, impl='cudnn', token_chunk=128)
    return y.astype(jnp.float32).sum()
  text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*like, weight, ids).lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmhaSoftmaxBackward' in text


def test_what_is_chosen_and_what_is_refused():
  (q, k, v, weight), mask = bank(np.float32)
  ids, choose = routes('balanced'), functools.partial(choose_implementation, jnp.asarray(q), jnp.asarray(k), gather_limit=1 << 30)
  assert choose(ids[:4], impl='auto') == 'gather' and choose(ids, impl='auto') == 'tiles' and choose(ids, impl='scan') == 'scan'
  assert choose_implementation(q, k, ids[:4], impl='auto', gather_limit=100) == 'tiles'
  for options in (dict(impl='ragged'), dict(mode='sum'), dict(impl='cudnn', mask_PxT=mask)):
    with pytest.raises(UserError): routed_attend(q, k, v, ids, log_weight_ZxJ=weight, **options)
  with pytest.raises(UserError): routed_partials(q, k[..., :4], v, ids)
  with pytest.raises(UserError): routed_partials(q[:, :3], k, v, ids)
  mesh = jax.make_mesh((4,), ('chapters',), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
  with pytest.raises(UserError): routed_attend_sharded(q, k, v, ids, log_weight_ZxJ=weight, mesh=mesh, axis='chapters')
