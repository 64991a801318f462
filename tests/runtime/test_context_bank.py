"""Context banks on disk: P9.4, and what is refused."""
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.context import ContextConfig
from memjax.config.errors import UserError
from memjax.config.schema import Config, ModelConfig
from memjax.ops.context import clear_bank, empty_bank
from memjax.runtime.context_bank import banks_of, fingerprint_of, load_bank, map_banks, save_bank

CONFIG = ContextConfig(heads=1, slots=3, clusters=2, top_k=1)


def filled(seed, batch=(2,), config=CONFIG):
  """A bank of random content, int leaves included."""
  rng = np.random.default_rng(seed)
  draw = lambda a: jnp.asarray(rng.integers(9, size=a.shape) if a.dtype == jnp.int32 else rng.normal(size=a.shape), a.dtype)
  return jax.tree.map(draw, empty_bank(config, 4, batch=batch))


STATE = {'prefix': {'layer_0': {'ctx': filled(1), 'near': jnp.ones((2, 3))}}, 'repeats': {'layer_0': {'ctx': filled(2, (2, 5))}}}
EMPTY = jax.tree.map(jnp.zeros_like, STATE)


def test_saved_banks_come_back_bit_for_bit(tmp_path):
  """P9.4: of all layers at once; what is no bank is left alone. A bank alone is a state too."""
  path = tmp_path / 'user.npz'
  save_bank(path, filled(3), 'abc')
  chex.assert_trees_all_equal_dtypes(load_bank(path, 'abc', clear_bank(filled(3))), filled(3))
  chex.assert_trees_all_equal(load_bank(path, 'abc', clear_bank(filled(3))), filled(3))
  save_bank(path, STATE, 'abc')
  back = load_bank(path, 'abc', EMPTY)
  chex.assert_trees_all_equal(banks_of(back), banks_of(STATE))
  assert not np.asarray(back['prefix']['layer_0']['near']).any()
  assert [file.name for file in tmp_path.iterdir()] == ['user.npz']


def test_banks_of_a_state_can_be_cleared():
  cleared = map_banks(clear_bank, STATE)
  assert list(banks_of(STATE)) == ['prefix/layer_0/ctx', 'repeats/layer_0/ctx']
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(banks_of(cleared)))
  assert cleared['prefix']['layer_0']['near'] is STATE['prefix']['layer_0']['near']


def test_fingerprint_is_that_of_config_and_parameters():
  config = Config(model=ModelConfig(width=8, mixers={'ctx': CONFIG}, pattern=('ctx',)))
  params = {'a': jnp.ones((3, 2)), 'b': {'c': jnp.zeros(2)}}
  print_ = fingerprint_of(config, params)
  assert print_ == fingerprint_of(dataclasses.replace(config, seed=5), jax.tree.map(jnp.copy, params)) and len(print_) == 8
  assert print_ != fingerprint_of(config, params | {'a': params['a'].at[1, 1].add(1e-6)})
  assert print_ != fingerprint_of(dataclasses.replace(config, model=dataclasses.replace(config.model, repeats=3)), params)


def test_other_models_and_shapes_are_refused(tmp_path):
  """P9.4: one line that names the file and the reason."""
  path = tmp_path / 'user.npz'
  save_bank(path, STATE, 'abc')
  narrow = filled(1, config=dataclasses.replace(CONFIG, slots=4))
  for given, says in [((path, 'abd', EMPTY), 'holds the banks of another model: fingerprint abc, not abd'),
                      ((path, 'abc', {'prefix': EMPTY['prefix']}),
                       'does not fit: repeats/layer_0/ctx/age is int32[2, 5, 3], the state wants nothing'),
                      ((path, 'abc', EMPTY | {'repeats': {'layer_0': {'ctx': narrow}}}), 'the state wants int32[2, 4]'),
                      ((tmp_path / 'none.npz', 'abc', EMPTY), 'no such file: '), ((tmp_path, 'abc', EMPTY), 'cannot be read: ')]:
    with pytest.raises(UserError, match=str(given[0])) as caught: load_bank(*given)
    assert says in str(caught.value) and '\n' not in str(caught.value)
  with pytest.raises(UserError, match='holds no context bank'): save_bank(path, {'near': jnp.ones(2)}, 'abc')
  with pytest.raises(UserError, match='cannot be written'): save_bank(tmp_path / 'none' / 'x.npz', STATE, 'abc')
  chex.assert_trees_all_equal(load_bank(path, 'abc', STATE), STATE)


def test_damage_is_told(tmp_path):
  """Cut anywhere, or any byte of the content changed."""
  path, bad = tmp_path / 'user.npz', tmp_path / 'bad.npz'
  save_bank(path, STATE, 'abc')
  whole = path.read_bytes()
  at = whole.index(np.asarray(STATE['repeats']['layer_0']['ctx'].slots).tobytes()) + 9
  flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
  for content in [b'', whole[:100], whole[:-30], flipped, b'not a zip file at all']:
    bad.write_bytes(content)
    with pytest.raises(UserError, match='is damaged or no file of context banks'): load_bank(bad, 'abc', EMPTY)
  with open(bad, 'wb') as file: np.savez(file, other=np.ones(2))
  with pytest.raises(UserError, match='is damaged'): load_bank(bad, 'abc', EMPTY)
  with open(bad, 'wb') as file: np.savez(file, record=np.array(json.dumps({'format': 2})))
  with pytest.raises(UserError, match='is of format 2, this version reads 1'): load_bank(bad, 'abc', EMPTY)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'user.npz'
  save_bank(path, STATE, 'abc')
  def full(file, **arrays):
    file.write(b'half')
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(np, 'savez', full)
  with pytest.raises(UserError, match='cannot be written: No space left'): save_bank(path, EMPTY, 'abc')
  assert [file.name for file in tmp_path.iterdir()] == ['user.npz']
  chex.assert_trees_all_equal(load_bank(path, 'abc', STATE), STATE)
