"""Recall rows: keys once, queries at even offsets, values as targets."""
import functools

import jax
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.data.synthetic import mqar

SIZES = {'batch': 8, 'length': 64, 'pairs': 8, 'vocabulary': 64}
make = jax.jit(mqar, static_argnames=('batch', 'length', 'pairs', 'vocabulary', 'rewrite'))


@functools.cache
def rows(seed=0, **sizes):
  return {name: np.asarray(array) for name, array in make(jax.random.key(seed), **{**SIZES, **sizes}).items()}


@pytest.mark.parametrize('sizes', [{}, {'rewrite': 3}, {'pairs': 16, 'vocabulary': 128}])
def test_rows_ask_each_key_once_for_its_latest_value(sizes):
  batch = rows(**sizes)
  pairs, rewrite = sizes.get('pairs', SIZES['pairs']), sizes.get('rewrite', 0)
  half = sizes.get('vocabulary', SIZES['vocabulary']) // 2
  for token_L, target_L, weight_L in zip(batch['token'], batch['target'], batch['weight'], strict=True):
    keys, values = token_L[0:2 * pairs:2], token_L[1:2 * pairs:2]
    stored = dict(zip(keys.tolist(), values.tolist(), strict=True))    # later pairs replace earlier ones
    assert len(stored) == pairs - rewrite and len(set(values.tolist())) == pairs
    assert keys.min() >= 1 and keys.max() < half <= values.min() and values.max() < 2 * half
    at = np.flatnonzero(weight_L)
    assert at.min() >= 2 * pairs and not np.any((at - 2 * pairs) % 2)
    assert sorted(token_L[at].tolist()) == sorted(stored)
    assert target_L[at].tolist() == [stored[key] for key in token_L[at].tolist()]
    assert not target_L[~weight_L].any()


def test_same_key_same_rows_and_other_key_other_rows():
  again = make(jax.random.key(0), **SIZES)
  for name, array in rows().items(): np.testing.assert_array_equal(array, again[name])
  assert (rows(1)['token'] != rows()['token']).mean() > 0.5
  assert len({tuple(row) for row in rows()['token'].tolist()}) == SIZES['batch']


def test_filler_covers_the_vocabulary_and_early_gaps_are_likelier():
  batch = rows(batch=256)
  filler = batch['token'][:, 16:][~batch['weight'][:, 16:]]
  assert set(filler.tolist()) == set(range(64))
  gap = (np.nonzero(batch['weight'])[1] - 16) // 2
  assert (gap < 12).sum() > 1.3 * (gap >= 12).sum()    # p(g) ~ 1 / (g + 1) nearly; uniform gaps give 1.0
  assert gap.max() == 23


def test_dtypes_and_positions():
  batch = rows()
  assert {name: array.dtype.name for name, array in batch.items()} == {
      'token': 'int32', 'target': 'int32', 'position': 'int32', 'weight': 'bool'}
  np.testing.assert_array_equal(batch['position'][3], np.arange(64))


@pytest.mark.parametrize('sizes', [{'length': 31}, {'vocabulary': 17}, {'pairs': 0}, {'rewrite': 5}, {'rewrite': -1}])
def test_sizes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(UserError): mqar(jax.random.key(0), **{**SIZES, **sizes})
