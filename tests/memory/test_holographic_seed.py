"""The seed's memory against a loop written from the specification; the protocol; every option."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import ConfigError, UserError
from memjax.config.mixers import HolographicSeedConfig
from memjax.memory import holographic_seed
from memjax.ops import holographic_seed as ops
from tests.memory.seed import B, D, K, L, S, call, keys_in_time, make, oracle, positions, spectrum_basis, tree


@pytest.fixture(scope='module')
def small():
  """A memory of the default options at tiny size, its parameters and a compiled call."""
  memory = make()
  params = jax.tree.map(jnp.float32, tree(memory))
  return memory, params, jax.jit(lambda p, x, *rest, **context: call(memory, p, x, *rest, **context))


@pytest.fixture(scope='module')
def x_BxLxD():
  return jnp.asarray(np.random.default_rng(1).normal(size=(B, L, D)), jnp.float32)


CASES = {
    'default': {},
    'bipolar-layer': dict(norm='layer', decay=0.1),
    'hrr-rms': dict(binding='hrr', retrieval_hidden=0),
    'hrr-layer-unitary-odd': dict(binding='hrr', norm='layer', unitary=True, key_width=9, retrieval_hidden=5),
    'hrr-none-ungated': dict(binding='hrr', norm='none', gating=False),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_loop(name):
  """Outputs, state, loss and every gradient, through resets, masks, write masks and a state carried in, in float64."""
  with jax.enable_x64(True):
    memory = make(dtype=jnp.float64, immediate=0.7, **CASES[name])
    c, params, draw = memory.config, tree(memory), np.random.default_rng(3)
    x, weight = draw.normal(size=(2, B, L, D))
    m, weight_m = draw.normal(size=(2, B, c.slots, c.key_width)) * 0.5
    position = np.int32([[5, 6, 7, 8, 9, 10, 11], [3, 4, 0, 0, 1, 2, 3]])
    mask = np.array([[1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 1]], bool)
    write = np.array([[1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    def run(params, x, m):
      o, state, aux = call(memory, params, x, holographic_seed.SeedState(m), jnp.asarray(position), mask_BxL=jnp.asarray(mask),
                           write_mask_BxL=jnp.asarray(write))
      return jnp.sum(o * weight) + jnp.sum(state.m_BxSxK * weight_m) + aux['penalty'], (o, state.m_BxSxK, aux['immediate'])
    (_, (o, new, immediate)), gradient = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(params, x, m)
    back = spectrum_basis(c.key_width) if c.binding == 'hrr' else np.eye(c.key_width)
    tokens = keys_in_time(c, position), position, mask, write
    target = oracle(params, c, x, m @ back.T, *tokens, np.zeros((B, L, c.key_width)))[3]
    o_, new_, immediate_, _ = oracle(params, c, x, m @ back.T, *tokens, target)
    exact = 1e-10 if c.binding == 'bipolar' else 5e-6      # other keys are float32
    np.testing.assert_allclose(o, o_, atol=exact)
    np.testing.assert_allclose(new, new_ @ back, atol=exact)
    assert immediate == pytest.approx(immediate_, rel=1e-6)
    def value(at):
      o, new, immediate, _ = oracle(at[0], c, at[1], at[2] @ back.T, *tokens, target)
      return np.sum(o * weight) + np.sum(new @ back * weight_m) + c.immediate * immediate
    compare_gradients((params, x, m), gradient, value, memory.inert)


def compare_gradients(at, gradient, value, inert):
  """Each leaf's gradient along one random direction against the central difference of the loop."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(at)
  draw, names = np.random.default_rng(4), [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
  for i, ((_, leaf), slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
    if names[i].endswith(inert): assert names[i].endswith('select/kernel') or not np.any(slope)
    direction = draw.normal(size=np.shape(leaf))
    ends = [[a + step * direction if j == i else a for j, (_, a) in enumerate(leaves)] for step in (1e-5, -1e-5)]
    difference = (value(jax.tree.unflatten(structure, ends[0])) - value(jax.tree.unflatten(structure, ends[1]))) / 2e-5
    assert np.sum(slope * direction) == pytest.approx(difference, rel=1e-5, abs=1e-6), names[i]
    if not names[i].endswith(inert): assert np.any(slope), names[i]


# The protocol ----------------------------------------------------------------------------------------------------------------

def test_split_calls_and_single_tokens_equal_one_call(small, x_BxLxD):
  """Outputs and state of 7 = 3 + 1 + 1 + 1 + 1 tokens, the last ones through the step of generation; two forwards are bit-equal."""
  memory, params, run = small
  y, state, _ = run(params, x_BxLxD)
  cuts, part, pieces = (0, 3, 4, 5, 6, 7), memory.init_state(B), []
  for start, end in itertools.pairwise(cuts):
    piece, part, _ = run(params, x_BxLxD[:, start:end], part, positions(B, end - start, start))
    pieces.append(piece)
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), y, atol=2e-6)
  np.testing.assert_allclose(part.m_BxSxK, state.m_BxSxK, atol=2e-6)
  assert jnp.array_equal(run(params, x_BxLxD)[0], y)


def remat(scan, v):
  """Some outputs of a scan over v [1, L, 64] with a state [1, 64, 64], and the final state."""
  def body(m, v): return (m := jnp.sin(m + v[:, None])), jnp.sum(m * m, -1)
  state, y = scan(body, jnp.zeros((1, 64, 64)), v)
  return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state)), (state, y)


def plain_scan(body, state, v):
  state, y = jax.lax.scan(body, state, jnp.swapaxes(v, 0, 1))
  return state, jnp.swapaxes(y, 0, 1)


def test_remat_scan_equals_the_plain_one():
  """70 tokens: a whole piece of 64 and a rest; outputs, state and gradient. 5 tokens: the rest alone."""
  for length in (70, 5):
    v = jnp.asarray(np.random.default_rng(5).normal(size=(1, length, 64)), jnp.float32)
    fast, slow = (jax.jit(jax.value_and_grad(lambda v, scan=scan: remat(scan, v), has_aux=True))(v)
                  for scan in (lambda *a: ops.remat_scan(*a, every=64), plain_scan))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_remat_keeps_one_state_in_64():
  """Temporary memory of the gradient over 512 tokens: 8 states and 64 more, not 512."""
  def bytes_of(scan):
    grad = jax.jit(jax.grad(lambda v: remat(scan, v)[0]))
    return grad.lower(jnp.ones((1, 512, 64))).compile().memory_analysis().temp_size_in_bytes
  assert bytes_of(lambda *a: ops.remat_scan(*a, every=64)) < 0.4 * bytes_of(plain_scan)


def test_padding_changes_nothing(small, x_BxLxD):
  """Left pad = right pad = none; masked tokens leave the state bit-equal and may be NaN; write masks forbid writing only."""
  memory, params, run = small
  row, nan = x_BxLxD[:1], jnp.full((1, 2, D), jnp.nan)
  y, state, aux = run(params, row)
  padded = lambda *rest, mask: run(params, *rest, mask_BxL=mask, write_mask_BxL=jnp.ones((1, L + 2), bool))
  for left in (True, False):
    join = lambda a, pad: jnp.concatenate([pad, a] if left else [a, pad], 1)
    mask = join(jnp.ones((1, L), bool), jnp.zeros((1, 2), bool))
    x, position = join(row, nan), join(positions(1, L), jnp.full((1, 2), 99, jnp.int32))
    y_, state_, aux_ = padded(x, memory.init_state(1), position, mask=mask)
    np.testing.assert_allclose(y_[:, 2:] if left else y_[:, :-2], y, atol=2e-6)
    np.testing.assert_allclose(state_.m_BxSxK, state.m_BxSxK, atol=2e-6)
    for name in aux: np.testing.assert_allclose(aux_[name], aux[name], rtol=1e-5, err_msg=name)
  _, same, _ = padded(x, state, position, mask=jnp.zeros((1, L + 2), bool))
  assert jnp.array_equal(same.m_BxSxK, state.m_BxSxK)
  forbid = jnp.zeros((1, L + 2), bool)
  y_, same, aux_ = run(params, x, state, positions(1, L + 2, 5), mask_BxL=mask, write_mask_BxL=forbid)
  assert jnp.array_equal(same.m_BxSxK, state.m_BxSxK) and jnp.abs(y_[:, :L] - y).max() > 1e-3 and aux_['penalty'] == 0


def test_state_per_row(small, x_BxLxD):
  """No buffer is shared across rows: a row in a batch is the row alone, and no gradient crosses."""
  memory, params, run = small
  y, state, _ = run(params, x_BxLxD)
  alone, one, _ = run(params, x_BxLxD[1:])
  np.testing.assert_allclose(alone[0], y[1], atol=1e-6)
  np.testing.assert_allclose(one.m_BxSxK[0], state.m_BxSxK[1], atol=1e-6)
  slope = jax.jit(jax.grad(lambda x: jnp.sum(call(memory, params, x)[0][0, 3])))(x_BxLxD)
  assert not slope[1].any() and not slope[0, 4:].any()
  assert slope[0, :3].any(-1).all() and slope[0, 3].any()


def test_first_token_of_a_document_meets_an_empty_memory(small, x_BxLxD):
  """Reads before any write are exactly 0, also where position 0 resets a used state."""
  memory, params, _ = small
  read = jax.jit(lambda m: memory.apply({'params': params}, x_BxLxD, holographic_seed.SeedState(m), method='mix',
                                        position_BxL=positions(B, L))[0])
  for m in (jnp.zeros((B, S, K)), jnp.ones((B, S, K))):
    y = read(m)
    assert not y[:, 0].any() and y[:, 1:].any()


def test_gradient_at_the_empty_state_is_finite():
  """The slot norms of the gate are 0 / 0 at an empty slot without the safe form; the norms of the write are finite too."""
  empty, ones = jnp.zeros((1, S, K)), jnp.ones((1, D))
  def gates(m): return jnp.sum(ops.write_gate(m, ones, (jnp.ones((S, D)), jnp.ones((D, S)), jnp.zeros(S))))
  for f in (gates, lambda m: ops.slot_sizes(m).sum()): assert not jax.jit(jax.grad(f))(empty).any()
  for kind in ('rms', 'layer'):
    assert jnp.isfinite(jax.grad(lambda m: ops.normalise_slots(kind, 'hrr', m, 1.0).sum())(empty)).all()


def test_bfloat16_keeps_a_float32_state(small, x_BxLxD):
  _, params, run = small
  y, state, _ = run(params, x_BxLxD)
  half, half_state, _ = jax.jit(lambda p, x: call(make(dtype=jnp.bfloat16), p, x))(params, x_BxLxD)
  rms = lambda a: float(jnp.sqrt(jnp.mean(jnp.square(jnp.float32(a)))))
  assert half.dtype == jnp.bfloat16 and half_state.m_BxSxK.dtype == jnp.float32
  assert rms(half - y) < 2e-2 * rms(y) and rms(half_state.m_BxSxK - state.m_BxSxK) < 2e-2 * rms(state.m_BxSxK)


# Options ---------------------------------------------------------------------------------------------------------------------

OPTIONS = {'key_width': 10, 'slots': 2, 'binding': 'hrr', 'gating': False, 'decay': 0.3, 'norm': 'layer', 'retrieval_hidden': 0,
           'dropout': 0.5, 'immediate': 0.0, 'key_seed': 1, 'unitary': True}


def test_every_option_changes_the_output(x_BxLxD):
  """One option moved, parameters otherwise equal: the output differs, or for the loss weight the penalty alone."""
  assert set(OPTIONS) == set(HolographicSeedConfig.__dataclass_fields__)
  cases = {n: {n: v} for n, v in OPTIONS.items()} | {'': {}, 'random': {}, 'unitary': {'binding': 'hrr', 'unitary': True}}
  memories, x, dropped = {name: make(**options) for name, options in cases.items()}, x_BxLxD[:1, :3], ('random', 'dropout')
  keys = {name: jax.random.key(2) if name in dropped else None for name in cases}
  out = jax.jit(lambda params, keys: {n: call(m, params[n], x, key=keys[n])[::2] for n, m in memories.items()})(
      {n: jax.tree.map(jnp.float32, tree(m)) for n, m in memories.items()}, keys)
  for name in OPTIONS:
    y, aux = out[{'unitary': 'binding', 'dropout': 'random'}.get(name, '')]
    if name == 'immediate': assert jnp.array_equal(out[name][0], y) and out[name][1]['penalty'] == 0 < aux['penalty']
    else: assert float(jnp.abs(out[name][0] - y).max()) > 1e-4, name
  assert float(jnp.abs(out['random'][0] - out[''][0]).max()) > 1e-4


def test_norm_none_has_no_scale():
  assert set(tree(make())) - set(tree(make(norm='none'))) == {'scale'}


def test_loss_of_weight_0_is_not_traced():
  trace = lambda m: str(jax.make_jaxpr(lambda p: call(m, p, jnp.zeros((B, L, D))))(tree(m)))
  assert len(trace(make(immediate=0.0)).splitlines()) < len(trace(make()).splitlines())


def test_bad_options_are_refused():
  for options in ({'unitary': True}, {'binding': 'bipolr'}, {'decay': 1.5}, {'slots': 0}, {'norm': 'batch'}):
    with pytest.raises(ConfigError): HolographicSeedConfig(**options)
  with pytest.raises(UserError, match='unknown norm'): ops.normalise_slots('batch', 'bipolar', jnp.zeros((1, 1, 2)))
