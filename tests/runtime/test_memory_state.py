"""Memories as values: a text that was interrupted goes on bit for bit, forks part, merges are means."""
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import generate
from memjax.config.errors import UserError
from memjax.config.flags import call
from memjax.config.mixers import HolographicConfig, WindowConfig
from memjax.config.neural import NeuralConfig, NeuralExecConfig, NeuralLocalsConfig, NeuralNetConfig, NeuralRuleConfig
from memjax.config.schema import ModelConfig
from memjax.data.tokenizers import ByteTokenizer
from memjax.memory.registry import make_memory
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.memory_state import _flush, _merged, flush, fork, load_state, merge, reset, save_state
from memjax.runtime.reading import open_run
from memjax.runtime.sampling import Sampler, Sampling
from tests.pieces import make_workdir, small_config, write_plays

NEAR = WindowConfig(heads=1, window=4)
NEURAL = NeuralConfig(heads=2, chunk=4, net=NeuralNetConfig(kind='linear'), exec=NeuralExecConfig(group=-1))


def model_of(*pattern, **mixers):
  mixers = {'near': NEAR, 'mem': NEURAL, **mixers}
  return build_decoder(ModelConfig(width=8, hidden=-1, vocabulary=11, repeats=2, pattern=pattern, mixers=mixers))


def filled(model, seed, rows=2):
  """A state of random numbers whose chunks are complete."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * (a.dtype != jnp.int32), a.dtype), model.init_state(rows))


def memory(state): return state['repeats']['layer_0']['mem']


def test_a_state_comes_back_bit_for_bit_and_to_its_own_model_alone(tmp_path):
  model, path = model_of('near+mem:mac'), tmp_path / 'm.npz'
  state = filled(model, 0)
  save_state(path, state, 'abc', position=7)
  back, position = load_state(path, 'abc', jax.eval_shape(lambda: model.init_state(2)))
  chex.assert_trees_all_equal(back, state)
  assert position == 7
  for given, says in [((path, 'abd', state), 'holds the state of another model: fingerprint abc, not abd'),
                      ((path, 'abc', model.init_state(1)), 'does not fit: '), ((tmp_path / 'no', 'abc', state), 'no such file: ')]:
    with pytest.raises(UserError, match=says) as caught: load_state(*given)
    assert '\n' not in str(caught.value)
  path.write_bytes(path.read_bytes()[:90])
  with pytest.raises(UserError, match='is damaged or no file of memory states'): load_state(path, 'abc', state)


def test_forks_share_nothing_and_rows_are_emptied():
  state = filled(model_of('near+mem'), 0)
  other = fork(state)
  chex.assert_trees_all_equal(other, state)
  jax.tree.map(lambda a: a.delete(), other)
  half = reset(state, jnp.array([True, False]))
  assert not any(np.asarray(a[0]).any() for a in jax.tree.leaves(half))
  chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1], half), jax.tree.map(lambda a: a[1], state))


@pytest.mark.parametrize('layer, chunk', [('mem>near', 4), ('near+mem:mac', 2)])
def test_merging_is_the_weighted_mean_of_the_differences(layer, chunk):
  model = model_of(layer, mem=dataclasses.replace(NEURAL, chunk=chunk))
  one, two = filled(model, 0), filled(model, 1)
  merged = merge(model.config, [one, two], [1, 3])
  mean = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, memory(one).fast, memory(two).fast)
  chex.assert_trees_all_close(memory(merged).fast, mean, rtol=1e-5, atol=1e-6)
  near = merged['repeats']['layer_0']['near']
  if layer.endswith('mac'): chex.assert_trees_all_equal(near.start, {name: levels[0] for name, levels in memory(merged).fast.items()})
  assert not any(np.asarray(a).any() for a in (jax.tree.leaves(near) if layer == 'mem>near' else [*near.token, near.slot_B]))
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, one)


def test_what_waits_is_flushed_and_then_merges():
  model = model_of('mem>near', mem=dataclasses.replace(NEURAL, chunk=4))
  params, state = jax.jit(lambda key: init_params(model, key)[0])(jax.random.key(0)), filled(model, 0)
  state['repeats']['layer_0']['mem'] = memory(state).replace(slot_B=memory(state).slot_B + 2)
  after = flush(model, params, state)
  programs = _flush._cache_size()
  flush(model_of('mem>near', mem=dataclasses.replace(NEURAL, chunk=4)), params, after)
  assert _flush._cache_size() == programs                              # an equal model, the same shapes: one program
  assert not np.asarray(memory(after).slot_B).any() and np.abs(memory(after).fast['w_0'][0] - memory(state).fast['w_0'][0]).max() > 1e-4
  chex.assert_trees_all_equal_shapes_and_dtypes(merge(model.config, [after, after], [1, 1]), state)
  wired = model_of('near+mem:mac', mem=dataclasses.replace(NEURAL, chunk=2))
  with pytest.raises(UserError, match='mem lies in a layer of kind mac, whose segments end with its chunks'):
    jax.eval_shape(lambda: flush(wired, init_params(wired, jax.random.key(0))[0], wired.init_state(1)))


def test_what_cannot_be_merged():
  model = model_of('near+mem')
  state = filled(model, 0)
  late = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.int32 else a, state)
  other, near = model_of('mem', mem=HolographicConfig(heads=2)), model_of('near')
  for given, says in [((model.config, [state, late], [1, 1]), 'state 2 holds 1 tokens of a chunk of mem that is not complete'),
                      ((model.config, [state], [1, 1]), 'a weight for each of 1 states'),
                      ((model.config, [state], [0]), 'with a positive sum'),
                      ((other.config, [other.init_state(1)], [1]), r"kind 'holographic' \(mixer mem\) have no mean"),
                      ((near.config, [near.init_state(1)], [1]), 'wants a model with a memory of kind neural')]:
    with pytest.raises(UserError, match=says): merge(*given)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('state')
  text = write_plays(folder / 'plays')
  return make_workdir(folder / 'run', small_config(text, mixers={'near': NEAR, 'mem': NEURAL}, pattern=('near+mem',)))


def go(run, *words):
  return call(generate.main, flags=generate.FLAGS, takes_config=False, argv=[f'--workdir={run}', '--temperature=0', *words])


@pytest.mark.slow
def test_generate_goes_on_where_a_text_ended(run, tmp_path, capsys):
  """Two commands write what one would have, fed with all that was read and drawn; 7 tokens are no whole number of chunks."""
  path = tmp_path / 'm.npz'
  assert go(run, '--prompt=A rose', '--max_new_tokens=7', f'--keep_state={path}') == 0
  first = capsys.readouterr().out[:-1]
  assert go(run, '--prompt= by any', '--max_new_tokens=9', f'--state={path}') == 0
  second = capsys.readouterr().out[:-1]
  found = open_run(str(run))
  _, position = load_state(path, _fingerprint(path), found.model.init_state(1))
  assert position == 1 + 6 + 7
  sampler = Sampler(found.model, Sampling(temperature=0)).within(ByteTokenizer().vocabulary)
  drawn = lambda tokens, count: np.concatenate([a[0] for a in sampler.stream(found.params, [tokens], count)])
  tokens = np.concatenate([[found.tokenizer.bos], found.tokenizer.encode('A rose')])
  tokens = np.concatenate([tokens, drawn(tokens, 7)])
  assert first == 'A rose' + found.tokenizer.decode(list(tokens[7:]))
  tokens = np.concatenate([tokens, found.tokenizer.encode(' by any')])
  assert go(run, '--prompt=a', f'--state={tmp_path}/no') == 2 and 'no such file: ' in capsys.readouterr().err
  assert second == ' by any' + found.tokenizer.decode(list(drawn(tokens, 9)))


def _fingerprint(path):
  from memjax.runtime.arrays import read_arrays
  return read_arrays(path, prefix='state', what='memory states')[0]['fingerprint']


def test_what_generate_refuses(tmp_path, capsys):
  for words, says in [(('--prompt=a', '--prompt=b', '--state=x'), 'are for one prompt'), (('--chat', '--state=x'), 'are for one prompt'),
                      (('--prompt=a', '--stop=b', f'--keep_state={tmp_path}/x'), '--keep_state does not go with --stop'),
                      (('--prompt=a', f'--keep_state={tmp_path}/no/x'), '--keep_state')]:
    assert go(tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert says in err and 'Traceback' not in err


def test_local_memories_begin_anew_in_a_mean():
  """Of mode tnt the large memory has a mean; the local ones, which live for a shard, start again."""
  config = NeuralConfig(heads=1, chunk=2, net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='tnt'),
                        locals=NeuralLocalsConfig(chunks=(1,), shard=2))
  one = jax.tree.map(jnp.ones_like, make_memory(config, 4).init_state(1))
  states = [jax.tree.map(lambda a, n=n: n * a, one) for n in (1, 4)]
  states = [state.replace(whole=state.whole.replace(slot_B=jnp.zeros((1,), jnp.int32))) for state in states]
  mean = _merged(states, np.array([2 / 3, 1 / 3]), 'mem')
  for leaf in jax.tree.leaves((mean.whole.fast, mean.whole.anchor)): np.testing.assert_allclose(leaf, 2.0, rtol=1e-6)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((mean.local, mean.place_B)))
