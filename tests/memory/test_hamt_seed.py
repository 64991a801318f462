"""The seed's model at full size, and the defects that the original is known for: kept, cured or refused."""
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.flags import load
from memjax.config.mixers import HolographicConfig
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.ops import holographic_seed as ops
from memjax.ops.binding import bind, unbind
from tests.memory.seed import B, D, K, L, S, call, make, positions, tree

FILE = 'configs/hamt_seed.py'
SIGNS, SPECTRUM = [1, -1, -1, 1, -1, -1, 1, 1], [-0.99827349, -0.69083124]     # of seed 0 at position 0
X_BxLxD = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, D)), jnp.float32)


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


@pytest.mark.slow
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
    m = ops.superpose(binding, m, *token, gate_BxS=jnp.full((1, 1), gate), decay=0.0)
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
    m = ops.superpose('bipolar', jnp.zeros((1, 2, 16)), value, value, gate_BxS=jnp.full((1, 2), gate), decay=1e-4)
    return ops.normalise_slots(kind, 'bipolar', m, 1.0)
  np.testing.assert_allclose(after(0.1, 'rms'), after(0.9, 'rms'), atol=1e-5)
  assert jnp.abs(after(0.1, 'none') - after(0.9, 'none')).min() > 0.5


def test_gating_off_is_not_amnesia():
  """Kept in this kind: without gates the state is the newest token alone. The other kind has no such switch."""
  memory = make(gating=False, norm='none')
  params = tree(memory)
  inputs = jax.jit(lambda: memory.apply({'params': params}, X_BxLxD, positions(B, L), method='project'))()
  _, state, aux = jax.jit(lambda: call(memory, params, X_BxLxD))()
  newest = bind('bipolar', inputs.key_BxLxK[:, -1], inputs.value_BxLxK[:, -1])
  np.testing.assert_allclose(state.m_BxSxK, jnp.broadcast_to(newest[:, None], (B, S, K)), atol=1e-6)
  assert aux['gate_mean'] == 1 and memory.inert == ('select/bias', 'select/kernel')
  with pytest.raises(TypeError): HolographicConfig(gating=False)


def test_aux_is_not_degenerate():
  """It is, in this kind: the immediate loss falls as the gates open (forgetting all else) and as values shrink."""
  memory = make(norm='none')
  params = {name: leaf for name, leaf in jax.tree.map(jnp.float32, tree(make())).items() if name != 'scale'}
  loss = jax.jit(lambda p: call(memory, p, X_BxLxD)[2]['immediate'])
  def opened(bias): return loss(params | {'gate_out': jax.tree.map(jnp.zeros_like, params['gate_out']) | {'bias': jnp.full((S,), bias)}})
  losses = [float(opened(bias)) for bias in (-2.0, 0.0, 2.0, 9.0)]
  assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3 * losses[0]
  shrunk = params | {'item': jax.tree.map(lambda a: 0.5 * a, params['item'])}
  assert loss(shrunk) < 0.5 * loss(params)


def test_slots_hardly_differ_at_the_start():
  """The counterpart of `test_slots_differ`: scalar gates near 1/2 give every slot the same item, S_eff 1."""
  memory = make(slots=8)
  aux = jax.jit(lambda params: call(memory, params, X_BxLxD)[2])(tree(memory, scale=0.02))
  assert aux['effective_slots'] == pytest.approx(1, abs=0.05) and aux['gate_mean'] == pytest.approx(0.5, abs=0.05)
  gate = jnp.eye(4)[None]
  assert ops.effective_slots(gate, jnp.ones((1, 4))) == pytest.approx(4)


def test_hrr_keys_unitary():
  """Gaussian keys return one item at cosine .7, unitary ones exactly."""
  assert remember(1, 1.0, 'none', binding='hrr')[0] == pytest.approx(0.70, abs=0.03)
  assert remember(1, 1.0, 'none', binding='hrr', unitary=True)[0] == pytest.approx(1, abs=1e-5)
