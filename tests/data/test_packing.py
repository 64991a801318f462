"""Rows of whole documents: every target once, nothing lost, padding masked, and nothing that crosses a border."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.banks import BankConfig, BankFormConfig, BankShapeConfig, RouterConfig
from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.schema import Config, DataConfig, EmbeddingConfig, ModelConfig, TrainingConfig
from memjax.data.packing import fit, plan_rows
from memjax.data.pipeline import eval_batches, eval_count, train_batches, train_dataset
from memjax.data.tokens import Tokens
from memjax.models.decoder import build_decoder, init_params

BOS = 99


def make_tokens(sizes, weights=None):
  """Documents of some sizes; token n is n + 1. `weights` by document; () makes plain text of them."""
  starts = np.cumsum([0, *sizes[:-1]])
  weight_N = None if weights is None else np.concatenate([np.asarray(weight, bool) for weight in weights])
  return Tokens(np.arange(1, sum(sizes) + 1, dtype=np.uint16), starts, 7 * sum(sizes), 'f', 1000, BOS, 'text', 'val', weight_N=weight_N)


def make_config(batch=2, length=8, seed=0):
  return Config(seed=seed, data=DataConfig(order='packed'), training=TrainingConfig(batch=batch, length=length))


def take(tokens, config, steps, **rest): return list(itertools.islice(train_batches(tokens, config, **rest), steps))


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left: np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def joined(batches): return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize('sizes, room', [((8,), 8), ((3, 5, 8, 1, 7, 2, 6), 8), ((5,) * 9, 8), (tuple(range(1, 40)), 40)])
def test_rows_hold_what_fits_and_no_more(sizes, room):
  row_S = fit(np.array(sizes), room)
  filled_R = np.bincount(row_S, sizes)
  assert filled_R.max() <= room and filled_R.min() > 0
  assert len(filled_R) <= np.ceil(11 / 9 * np.ceil(sum(sizes) / room) + 1) or min(sizes) > room // 2
  firsts = [int(np.argmax(row_S == row)) for row in range(len(filled_R))]
  assert firsts == sorted(firsts)                       # numbered as their documents come


def test_long_and_short_fit_together():
  assert fit(np.array([3, 5, 8, 1, 7]), 8).tolist() == [0, 0, 1, 2, 2]


SIZES, WEIGHTS = (5, 9, 3, 20, 1, 4), ([0, 0, 1, 1, 0], [0] * 8 + [1], [0, 1, 1], [0] * 9 + [1] * 11, [1], [0, 0, 0, 1])


@pytest.mark.parametrize('labelled', [False, True])
def test_an_epoch_has_every_target_once(labelled):
  """Plain text is cut, conversations are cut off; a conversation whose replies are beyond the end of the row is left out."""
  tokens = make_tokens(SIZES, WEIGHTS if labelled else None)
  plan = plan_rows(tokens, 8)
  batch = joined(take(tokens, make_config(batch=1), plan.rows))
  assert {name: array.dtype.name for name, array in batch.items()} == {
      'token': 'int32', 'target': 'int32', 'position': 'int32', 'mask': 'bool', 'weight': 'bool'}
  real, found = batch['mask'], sorted(batch['target'][batch['mask']].tolist())
  assert (np.diff(real.astype(int), axis=1) <= 0).all() and not (batch['weight'] & ~real).any()
  assert (batch['token'][~real] == BOS).all() and not batch['target'][~real].any() and not batch['position'][~real].any()
  if not labelled:
    assert found == list(range(1, 43)) and batch['weight'][real].all()
    return
  # the documents of 20 and of 1 tokens are gone, the first token of the others is no target
  assert found == [*range(2, 6), *range(7, 15), *range(16, 18), *range(40, 43)]
  assert sorted(batch['target'][batch['weight']].tolist()) == [3, 4, 14, 16, 17, 42]


@pytest.mark.parametrize('labelled', [False, True])
def test_positions_begin_anew_with_each_document(labelled):
  tokens = make_tokens(SIZES, WEIGHTS if labelled else None)
  starts = set(tokens.starts.tolist())
  batch = joined(take(tokens, make_config(batch=1), plan_rows(tokens, 8).rows))
  for row in range(len(batch['token'])):
    before, position = None, -1
    for column in np.flatnonzero(batch['mask'][row]):
      index = batch['target'][row, column] - 1
      position = position + 1 if before == index - 1 and index - labelled not in starts else 0
      assert batch['position'][row, column] == position
      assert batch['token'][row, column] == (BOS if index in starts else index)
      before = index


def test_batches_are_a_pure_function_of_seed_and_step():
  tokens = make_tokens([3, 7, 2, 5, 8, 4, 6, 1, 7, 3])
  batches = take(tokens, make_config(), 9)
  for step in (0, 4, 8): assert_equal(take(tokens, make_config(), 1, start_step=step)[0], batches[step])
  dataset = train_dataset(tokens, make_config())
  for step in (5, 2): assert_equal(dataset[step], batches[step])
  other = take(tokens, make_config(seed=1), 9)
  assert any(not np.array_equal(a['target'], b['target']) for a, b in zip(batches, other, strict=True))
  for count in (2, 4):
    config = make_config(batch=4)
    parts = [take(tokens, config, 5, process_index=index, process_count=count) for index in range(count)]
    for whole, *blocks in zip(take(tokens, config, 5), *parts, strict=True): assert_equal(whole, joined(blocks))


@pytest.mark.parametrize('batch, processes', [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_evaluation_scores_each_reply_once(batch, processes):
  tokens = make_tokens(SIZES, WEIGHTS)
  sizes = {'batch': batch, 'length': 8}
  parts = [list(eval_batches(tokens, **sizes, process_index=index, process_count=processes)) for index in range(processes)]
  assert {len(part) for part in parts} == {eval_count(tokens, **sizes)}
  whole = joined([each for part in parts for each in part])
  assert sorted(whole['target'][whole['weight']].tolist()) == [3, 4, 14, 16, 17, 42]
  assert tokens.bytes_per_token == 7 * 42 / 18
  with pytest.raises(UserError, match='neither a context nor a stream'): eval_batches(tokens, **sizes, stream=True)
  with pytest.raises(UserError, match='neither a context nor a stream'): eval_batches(tokens, **sizes, context=2)


def test_no_reply_within_a_row_is_one_line():
  tokens = make_tokens((9, 2), ([0] * 8 + [1], [0, 0]))
  with pytest.raises(UserError, match='no conversation in the val split of text has a reply within 8 tokens; raise training'):
    train_batches(tokens, make_config(length=7))


MIXERS = {'full': AttentionConfig(heads=2), 'near': WindowConfig(heads=2, window=8), 'mem': HolographicConfig(heads=2),
          'bank': BankConfig(heads=2, zero_out=False, shape=BankShapeConfig(entries=8, chapters=4), form=BankFormConfig(kind='gather'),
                             router=RouterConfig(top_k=2, strategy='prefix-mean'))}


@pytest.mark.parametrize('layer', ['full', *(pytest.param(layer, marks=pytest.mark.slow) for layer in ('near', 'mem', 'full>bank'))])
def test_nothing_crosses_a_border(layer):
  """No gradient by the tokens of another document of the row, some by each of one's own, and the logits are those of the document
  alone: attention, a window, holographic memory, the statistic of a router."""
  config = ModelConfig(width=8, hidden=8, vocabulary=32, mixers=MIXERS, pattern=(layer,), repeats=1, embedding=EmbeddingConfig(tie=False))
  decoder = build_decoder(config)
  params = init_params(decoder, jax.random.key(1))[0]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def look(table, batch, weight_BxL):
    given = {'params': {**params, 'embed': {'table': table}}}
    logits, _, _ = decoder.apply(given, batch['token'], decoder.init_state(1), position_BxL=batch['position'], mask_BxL=batch['mask'])
    return jnp.sum(jax.nn.log_softmax(logits)[..., 0] * weight_BxL), logits

  sizes, table = [6, 5, 4], params['embed']['table']
  batch = next(eval_batches(make_tokens(sizes, [[1] * size for size in sizes]), batch=1, length=16))
  columns_of = np.split(np.arange(12), [5, 9])
  assert [batch['token'][0, columns].tolist() for columns in columns_of] == [[1, 2, 3, 4, 5], [7, 8, 9, 10], [12, 13, 14]]
  for columns in columns_of:
    weight_BxL, alone = np.zeros((1, 16), np.float32), {name: np.zeros_like(array) for name, array in batch.items()}
    weight_BxL[0, columns[-1]] = 1
    (_, logits), gradient = look(table, batch, weight_BxL)
    size_A = np.abs(gradient).max(-1)                 # the chunked form of holographic memory forgets to 1e-10, not to nothing
    assert np.flatnonzero(size_A > (1e-9 * size_A.max() if layer == 'mem' else 0)).tolist() == batch['token'][0, columns].tolist()
    for name in batch: alone[name][0, :len(columns)] = batch[name][0, columns]
    (_, single), _ = look(table, alone, weight_BxL)
    np.testing.assert_allclose(logits[0, columns], single[0, :len(columns)], atol=1e-5)
