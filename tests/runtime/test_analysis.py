"""What the analysis says is what the memory did: use is no norm, recall follows the theory, replay sees what was stored."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.mixers import AddressConfig, HolographicConfig, HolographicSeedConfig
from memjax.data.tokens import Tokens
from memjax.models.decoder import build_decoder, init_params
from memjax.ops.binding import bind
from memjax.runtime.analysis import text
from memjax.runtime.analysis.measure import measure_capacity, median_ms
from memjax.runtime.analysis.observe import list_places, observe, quantiles, replay, round_list, slot_norms
from memjax.runtime.reading import Run
from tests.pieces import ByteTokenizer, small_config


def make_run(mixers, pattern, **model):
  config = small_config('plays', mixers=mixers, pattern=pattern, vocabulary=256, **model)
  built = build_decoder(config.model)
  params = jax.jit(lambda key: init_params(built, key)[0])(jax.random.key(0))
  return Run('', config, built, params, ByteTokenizer(), 1, {}, 'hash')


@pytest.fixture(scope='module')
def tokens():
  token_N = np.random.default_rng(0).integers(97, 123, 200).astype(np.uint8)
  return Tokens(token_N, np.array([0, 100]), 200, '', 256, 10, 'made up', 'val')


@pytest.mark.slow
def test_slot_use_not_a_norm(tokens):
  """Writing ten times larger values grows the norms tenfold and leaves use, picks and effective slots alone."""
  found = make_run({'mem': HolographicConfig(heads=2)}, ('mem',))
  grown = jax.tree_util.tree_map_with_path(lambda path, x: 10 * x if "['value']" in jax.tree_util.keystr(path) else x, found.params)
  (plain, _), (large, _) = (observe(run, tokens, rows=2, length=16) for run in (found, found._replace(params=grown)))
  one, ten = plain['layers'][0], large['layers'][0]
  np.testing.assert_allclose(ten['state_norm'], 10 * np.asarray(one['state_norm']), rtol=1e-3)
  for name in ('use', 'pick', 'effective_slots', 'gate', 'horizon'): np.testing.assert_allclose(ten[name], one[name], rtol=1e-4)
  np.testing.assert_allclose(np.sum(one['use'], -1), 1, rtol=1e-3)                # unit addresses
  np.testing.assert_allclose(ten['read_norm'], 10 * np.asarray(one['read_norm']), rtol=1e-3)


@pytest.mark.slow
def test_every_layer_is_found_and_kinds_without_keys_are_no_trouble(tokens):
  copies = HolographicConfig(heads=1, slots=2, address=AddressConfig(kind='copies'))
  found = make_run({'seed': HolographicSeedConfig(key_width=8, slots=3), 'copies': copies}, ('copies', 'seed'), repeats=2)
  assert [place.label for place in list_places(found.model.config)] == ['0 copies', '1 seed', '2 copies', '3 seed']
  config = small_config('plays', mixers={'a': copies, 'b': copies}, pattern=('a+b', 'b'), prefix=('b',), suffix=('a',)).model
  assert [place[:4] for place in list_places(config)] == [
      ('0 b', 'b', 'prefix', 'layer_0'), ('1 a', 'a', 'repeats', 'layer_0'), ('1 b', 'b', 'repeats', 'layer_0'),
      ('2 b', 'b', 'repeats', 'layer_1'), ('3 a', 'a', 'suffix', 'layer_0')]
  report, arrays = observe(found, tokens, rows=2, length=16)
  assert arrays == {} and [np.shape(layer['state_norm']) for layer in report['layers']] == [(1, 2), (1, 3), (1, 2), (1, 3)]
  assert ['use' in layer for layer in report['layers']] == [False, True, False, True]
  seed = report['layers'][1]
  assert np.ptp(seed['state_norm']) > 1e-3                                       # before the norm of the write, which makes all alike


@pytest.mark.slow
def test_states_are_watched_in_pieces_that_make_the_whole(tokens):
  found = make_run({'mem': HolographicConfig(heads=2)}, ('mem',))
  layer = observe(found, tokens, rows=2, length=16)[0]['layers'][0]
  assert layer['tokens'] == list(range(1, 17))
  batch = np.concatenate([[10], tokens.token_N[:15]])[None].astype(np.int32)
  _, state, _ = found.model.apply({'params': found.params}, batch, found.model.init_state(1), position_BxL=np.arange(16)[None])
  other = np.concatenate([[10], tokens.token_N[100:115]])[None].astype(np.int32)
  _, second, _ = found.model.apply({'params': found.params}, other, found.model.init_state(1), position_BxL=np.arange(16)[None])
  norms = [np.asarray(slot_norms(s['repeats']['layer_0']['mem'])[0, 0]) for s in (state, second)]
  np.testing.assert_allclose(layer['state_norm'], np.mean(norms, 0), rtol=1e-3)


@pytest.mark.parametrize('kind', ['phasor', 'bipolar'])
def test_random_keys_recall_as_the_theory_says(kind):
  generator = np.random.default_rng(1)
  key = np.sign(generator.standard_normal((1, 400, 2, 128)))
  if kind == 'phasor': key = np.sqrt(0.5) * key                                  # unit modulus of each pair
  unit = generator.standard_normal((1, 400, 2, 2))
  arrays = {'key_BxLxHxK': key, 'address_BxLxHxS': unit / np.linalg.norm(unit, axis=-1, keepdims=True)}
  found = measure_capacity(kind, arrays, effective=2.0, trials=3, most=200)
  assert found['state_floats'] == found['floats'] == 512 and found['pairs'][-1] == 200
  assert found['theory'][0] > 0.99 and found['theory'][-1] < 0.4
  for name in ('trained', 'random'): np.testing.assert_allclose(found[name], found['theory'], atol=0.12)
  collapsed = {**arrays, 'address_BxLxHxS': np.broadcast_to(np.array([1.0, 0.0]), unit.shape)}
  worse = measure_capacity(kind, collapsed, effective=1.0, trials=3, most=200)
  assert sum(worse['trained']) < sum(found['trained']) - 0.3                     # one slot in use holds less


def test_replay_reads_what_was_written_and_only_since_the_document_began():
  generator, B, L, S, K = np.random.default_rng(2), 2, 8, 8, 16
  key = np.sign(generator.standard_normal((B, L, 1, K))).astype(np.float32)
  value = generator.standard_normal((B, L, 1, K)).astype(np.float32)
  address = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, L, 1, S))
  bound = np.asarray(bind('bipolar', jnp.asarray(key), jnp.asarray(value)))
  position = np.tile(np.arange(L), (B, 1))
  position[:, 4:] -= 4                                                           # a second document begins at token 4
  kept = np.where((np.arange(L) >= 4)[None, :, None, None], bound, 0)
  m = np.einsum('blhs,blhk->bhsk', address, kept)
  arrays = {'key_BxLxHxK': key, 'value_BxLxHxK': value, 'address_BxLxHxS': address}
  found = replay('bipolar', arrays, jnp.asarray(m), position)
  np.testing.assert_allclose(found['cosine'], 1, atol=1e-4)
  assert found['delay'] == [0, 1, 2, 3] and max(map(abs, found['control'])) < 0.95


def test_small_tools():
  assert round_list([[1.23456789, 0.0], [1e-9 / 3, 12345678.0]]) == [[1.2346, 0.0], [3.3333e-10, 12346000.0]] and round_list([]) == []
  assert quantiles(np.arange(101)) == [5, 25, 50, 75, 95]
  calls = []
  assert median_ms(lambda: calls.append(jnp.zeros(()))) >= 0 and len(calls) >= 4
  assert [text.shown(t) for t in ('a', ' ', '\n', 'two ', 'extraordinary', '\x00', '', '\ufffd')] == [
      'a', '␣', '↵', 'two', 'extraord…', '□', '∅', '□']
