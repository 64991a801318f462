"""The seed's memory against a loop written from section 11 of the specification, and the defects that the seed is known for."""
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.errors import ConfigError, UserError
from memjax.config.flags import load
from memjax.config.mixers import HolographicConfig, HolographicSeedConfig
from memjax.memory import holographic_seed
from memjax.memory.registry import make_memory
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.ops import holographic_seed as ops
from memjax.ops.binding import bind, unbind

FILE = 'configs/hamt_seed.py'
B, L, D, K, S = 2, 7, 6, 8, 3
SMALL = dict(key_width=K, slots=S)
SIGNS, SPECTRUM = [1, -1, -1, 1, -1, -1, 1, 1], [-0.99827349, -0.69083124]     # of seed 0 at position 0


def tree(memory, seed=0, scale=0.6):
  """Random parameters of a memory, biases and norm scales included, float64."""
  x_BxLxD, position_BxL = jnp.zeros((1, 2, memory.width)), jnp.zeros((1, 2), jnp.int32)
  make = lambda: memory.init(jax.random.key(0), x_BxLxD, memory.init_state(1), position_BxL=position_BxL)['params']
  shapes = jax.tree.map(lambda a: a.shape, jax.eval_shape(lambda: nn.unbox(make())))
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: draw.normal(size=shape) * scale + (shape == ()), shapes, is_leaf=lambda s: isinstance(s, tuple))


def make(*, width=D, dtype=jnp.float32, std=0.0, **options):
  return make_memory(HolographicSeedConfig(**{**SMALL, **options}), width, dtype=dtype, std=std)


def positions(batch, length, start=0):
  return jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32)[None], (batch, length))


def call(memory, params, x, state=None, position=None, **context):
  """(output, state, aux) of one call."""
  state = memory.init_state(x.shape[0]) if state is None else state
  position = positions(*x.shape[:2]) if position is None else position
  return memory.apply({'params': params}, x, state, position_BxL=position, **context)


@pytest.fixture(scope='module')
def small():
  """A memory of the default options at tiny size, its parameters and a compiled call."""
  memory = make()
  params = jax.tree.map(jnp.float32, tree(memory))
  return memory, params, jax.jit(lambda p, x, *rest, **context: call(memory, p, x, *rest, **context))


@pytest.fixture(scope='module')
def x_BxLxD():
  return jnp.asarray(np.random.default_rng(1).normal(size=(B, L, D)), jnp.float32)


# The loop of section 11, in float64 and the time domain ----------------------------------------------------------------------

def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def spectrum_basis(width):
  """The orthonormal real DFT: [dc, nyquist (even widths), cosines, sines] in columns."""
  n, f = np.arange(width)[:, None], np.arange(1, (width + 1) // 2)[None]
  columns = [np.full((width, 1), width ** -0.5)]
  if width % 2 == 0: columns.append((-1.0) ** n * width ** -0.5)
  turns = 2 * np.pi * n * f / width
  return np.concatenate([*columns, math.sqrt(2 / width) * np.cos(turns), -math.sqrt(2 / width) * np.sin(turns)], 1)


def in_time(params, c, width):
  """The parameters of section 11 from ours, which emit and take spectra: multiplied by the basis where they meet the memory."""
  p = jax.tree.map(np.asarray, params)
  if c.binding == 'bipolar': return p
  back = spectrum_basis(c.key_width).T
  p = {**p, **{n: {m: a @ back for m, a in p[n].items()} for n in ('item', 'retrieve_down')}}
  p['select'] = {**p['select'], 'kernel': p['select']['kernel'] @ back}
  for name in ('gate_in', 'out'):
    if name not in p: continue
    kernel = p[name]['kernel']
    p[name] = {**p[name], 'kernel': np.concatenate([kernel[:width], back.T @ kernel[width:]])}
  return p


def keys_in_time(c, position):
  draw = jax.jit(lambda position: ops.position_keys(c.binding, position, c.key_width, seed=c.key_seed, unitary=c.unitary))
  key = np.float64(draw(position))
  if c.binding == 'bipolar': return key
  real = 2 - c.key_width % 2
  return key / np.sqrt(np.where(np.arange(c.key_width) < real, c.key_width, c.key_width / 2)) @ spectrum_basis(c.key_width).T


def circulant(x):
  """C with C @ v = x convolved with v: C_{jn} = x_{(j - n) mod K}; its transpose correlates."""
  n = np.arange(len(x))
  return x[(n[:, None] - n[None]) % len(x)]


def norm_of(c, m, scale):
  if c.norm == 'none': return m
  if c.norm == 'layer': return (m - m.mean()) / np.sqrt(m.var() + 1e-5) * scale
  return m / np.sqrt(np.mean(m * m) + 1e-8) * scale


def oracle(params, c, x, m, key, position, mask, write, target):
  """(o [B, L, D], m [B, S, K], immediate loss, v): the equations of section 11, one row and one token after the other."""
  p = in_time(params, c, x.shape[-1])
  dense = lambda name, h: h @ p[name]['kernel'] + p[name]['bias']
  bound = (lambda k, v: k * v) if c.binding == 'bipolar' else (lambda k, v: circulant(k) @ v)
  unbound = (lambda k, v: k * v) if c.binding == 'bipolar' else (lambda k, v: circulant(k).T @ v)
  v_all, o, m, errors = dense('item', x), np.zeros_like(x), np.array(m), []
  for b in range(x.shape[0]):
    for t in range(x.shape[1]):
      if position[b, t] == 0 and mask[b, t]: m[b] = 0
      v, q, k = v_all[b, t], dense('query', x[b, t]), key[b, t]
      u = dense('retrieve_down', gelu(dense('retrieve_up', q)) if c.retrieval_hidden else q)
      r = [unbound(u / max(np.linalg.norm(u), 1e-12), m[b, s]) for s in range(c.slots)]
      logit = np.array([p['select']['kernel'] @ r_s + p['select']['bias'] for r_s in r])
      alpha = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
      read = sum(a * r_s for a, r_s in zip(alpha, r, strict=True)) * mask[b, t]
      o[b, t] = dense('out', np.concatenate([q, read]))
      if not (mask[b, t] and write[b, t]): continue
      g = np.ones(c.slots)
      if c.gating:
        sizes = np.array([np.linalg.norm(m[b, s]) for s in range(c.slots)])
        hidden = gelu(dense('gate_in', np.concatenate([q, v])) + sizes @ p['gate_sizes']['kernel'])
        g = sigmoid(hidden @ p['gate_out']['kernel'] + p['gate_out']['bias'])
      m[b] = [norm_of(c, (1 - g[s]) * (1 - c.decay) * m[b, s] + g[s] * bound(k, v), p.get('scale')) for s in range(c.slots)]
      errors.append(np.mean((np.mean([unbound(k, m[b, s]) for s in range(c.slots)], 0) - target[b, t]) ** 2))
  return o, m, np.mean(errors), v_all


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
  def gates(m): return jnp.sum(ops.write_gate(m, ones, jnp.ones((S, D)), jnp.ones((D, S)), jnp.zeros(S)))
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


# The whole model -------------------------------------------------------------------------------------------------------------

def count(model):
  return sum(a.size for a in jax.tree.leaves(param_shapes(build_decoder(model))[0]))


@pytest.mark.parametrize('variant', ['quick', 'wikitext', 'large', 'demo'])
def test_parameter_counts_are_those_of_the_docstring(variant):
  with open(FILE, encoding='utf-8') as file: stated = dict(re.findall(r'^(\w+) .* ([\d,]{10,}) ', file.read(), re.M))
  assert count(load(f'{FILE}:{variant}').model) == int(stated[variant].replace(',', ''))


def test_parameter_counts_of_the_original():
  """33,665,832; vocabulary 1,000 with 256 positions; vocabulary 5,000 with 2,048 positions; layer and memory alone."""
  for vocabulary, rows, total in ((50_257, 128, 33_665_832), (1_000, 256, 21_088_808), (5_000, 2_048, 22_571_560)):
    changes = f'model.vocabulary={vocabulary}', f'model.embedding.max_position={rows}'
    assert count(load(FILE, *changes, 'evaluation.length=128').model) == total
  shapes = param_shapes(build_decoder(load(FILE, 'model.repeats=1').model))[0]['repeats']['layer_0']
  assert sum(a.size for a in jax.tree.leaves(shapes)) == 5_191_690
  memory = shapes['mixers']['seed']
  sizes = {part: sum(a.size for a in jax.tree.leaves([leaf for name, leaf in memory.items() if name.startswith(part)]))
           for part in ('item', 'query', 'retrieve', 'select', 'gate', 'out', 'scale')}
  assert sizes == dict(item=263_168, query=65_792, retrieve=2_624_512, select=1_025, gate=332_040, out=327_936, scale=1)


def test_unknown_variant_is_one_line():
  with pytest.raises(UserError, match=r"no variant 'qick' .*; did you mean 'quick'"): load(f'{FILE}:qick')


def test_loss_at_step_0_is_that_of_guessing():
  """Within .1 of ln 50,257, at full size but one layer."""
  model = build_decoder(load(FILE, 'model.repeats=1').model)
  @jax.jit
  def loss():
    params, _ = init_params(model, jax.random.key(0))
    token = jax.random.randint(jax.random.key(1), (1, 17), 0, 256)
    logits, _, _ = model.apply({'params': params}, token[:, :-1], model.init_state(1), position_BxL=positions(1, 16))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, 1:, None], -1).mean()
  assert loss() == pytest.approx(math.log(50_257), abs=0.1)


# Defects of the original, kept, cured or refused (section 18) ----------------------------------------------------------------

def remember(count, gate, kind, *, width=512, binding='bipolar', unitary=False):
  """Cosines of the values read back with their keys after `count` writes at one gate, oldest first."""
  key = jax.jit(lambda at: ops.position_keys(binding, at, width, seed=0, unitary=unitary))(jnp.arange(count)[None])
  value = jnp.asarray(np.random.default_rng(0).normal(size=(1, count, width)), jnp.float32)
  def write(m, token):
    m = ops.superpose(binding, m, *token, jnp.full((1, 1), gate), 0.0)
    return ops.normalise_slots(kind, binding, m, 1.0), None
  run = jax.jit(lambda key, value: unbind(binding, key, jax.lax.scan(
      write, jnp.zeros((1, 1, width)), (key[0][:, None], value[0][:, None]))[0]))
  unit = lambda a: np.asarray(a) / np.linalg.norm(a, axis=-1, keepdims=True)
  return np.sum(unit(run(key, value)) * unit(value), -1)[0]


def test_keys_are_deterministic():
  """The same at any offset and in every version: 8 signs and 2 numbers of a seed, written down once."""
  draw = jax.jit(lambda at: [ops.position_keys(*kind, 8, seed=seed) for kind, seed in (
      (('bipolar', at), 0), (('bipolar', at[:, 30:]), 0), (('bipolar', at), 1), (('hrr', at), 0))])
  signs, late, other, spectra = map(np.asarray, draw(jnp.arange(40)[None]))
  assert np.array_equal(signs[:, 30:], late) and not np.array_equal(signs, other)
  assert signs[0, 0].tolist() == SIGNS and set(np.unique(signs)) == {-1, 1}
  np.testing.assert_allclose(spectra[0, 0, :2], SPECTRUM, rtol=1e-5)


def test_norm_in_the_write_forgets_at_a_fixed_rate():
  """The counterpart of `test_norm_is_at_read_time`: at gate 1/2 the newest keeps .71 at any N, the mean falls to .05."""
  ten, fifty = remember(10, 0.5, 'rms'), remember(50, 0.5, 'rms')
  assert ten[-1] == pytest.approx(0.71, abs=0.05) and fifty[-1] == pytest.approx(0.71, abs=0.05)
  assert fifty.mean() == pytest.approx(0.05, abs=0.02)


def test_first_gate_has_no_effect_under_rms():
  """The counterpart of `test_gate_matters_at_first_token`: kept in this kind, visible without the norm."""
  value = jnp.ones((1, 16))
  def after(gate, kind):
    m = ops.superpose('bipolar', jnp.zeros((1, 2, 16)), value, value, jnp.full((1, 2), gate), 1e-4)
    return ops.normalise_slots(kind, 'bipolar', m, 1.0)
  np.testing.assert_allclose(after(0.1, 'rms'), after(0.9, 'rms'), atol=1e-5)
  assert jnp.abs(after(0.1, 'none') - after(0.9, 'none')).min() > 0.5


def test_gating_off_is_not_amnesia(x_BxLxD):
  """Kept in this kind: without gates the state is the newest token alone. The other kind has no such switch."""
  memory = make(gating=False, norm='none')
  params = tree(memory)
  inputs = jax.jit(lambda: memory.apply({'params': params}, x_BxLxD, positions(B, L), method='project'))()
  _, state, aux = jax.jit(lambda: call(memory, params, x_BxLxD))()
  newest = bind('bipolar', inputs.key_BxLxK[:, -1], inputs.value_BxLxK[:, -1])
  np.testing.assert_allclose(state.m_BxSxK, jnp.broadcast_to(newest[:, None], (B, S, K)), atol=1e-6)
  assert aux['gate_mean'] == 1 and memory.inert == ('select/bias', 'select/kernel')
  with pytest.raises(TypeError): HolographicConfig(gating=False)


def test_aux_is_not_degenerate(small, x_BxLxD):
  """It is, in this kind: the immediate loss falls as the gates open (forgetting all else) and as values shrink."""
  memory = make(norm='none')
  params = {name: leaf for name, leaf in small[1].items() if name != 'scale'}
  loss = jax.jit(lambda p: call(memory, p, x_BxLxD)[2]['immediate'])
  def opened(bias): return loss(params | {'gate_out': jax.tree.map(jnp.zeros_like, params['gate_out']) | {'bias': jnp.full((S,), bias)}})
  losses = [float(opened(bias)) for bias in (-2.0, 0.0, 2.0, 9.0)]
  assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3 * losses[0]
  shrunk = params | {'item': jax.tree.map(lambda a: 0.5 * a, params['item'])}
  assert loss(shrunk) < 0.5 * loss(params)


def test_slots_hardly_differ_at_the_start(x_BxLxD):
  """The counterpart of `test_slots_differ`: scalar gates near 1/2 give every slot the same item, S_eff 1."""
  memory = make(slots=8)
  aux = jax.jit(lambda params: call(memory, params, x_BxLxD)[2])(tree(memory, scale=0.02))
  assert aux['effective_slots'] == pytest.approx(1, abs=0.05) and aux['gate_mean'] == pytest.approx(0.5, abs=0.05)
  gate = jnp.eye(4)[None]
  assert ops.effective_slots(gate, jnp.ones((1, 4))) == pytest.approx(4)


def test_hrr_keys_unitary():
  """Gaussian keys return one item at cosine .7, unitary ones exactly."""
  assert remember(1, 1.0, 'none', binding='hrr')[0] == pytest.approx(0.70, abs=0.03)
  assert remember(1, 1.0, 'none', binding='hrr', unitary=True)[0] == pytest.approx(1, abs=1e-5)
