"""Batches against a plain loop over the tokens: pure in seed and step, equal over processes, every token scored once."""
import dataclasses
import itertools

import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.schema import Config, DataConfig, TrainingConfig
from memjax.data.pipeline import eval_batches, eval_count, phase, train_batches, train_dataset
from memjax.data.tokens import Tokens

BOS = 999


def make_tokens(count, starts=(0,)):
  """Token n is n + 1, so that a target says where it comes from."""
  return Tokens(np.arange(1, count + 1, dtype=np.uint16), np.array(starts, np.int64), count, 'f', 1000, BOS, 'text', 'val')


def make_config(batch=4, length=8, order='shuffle', seed=0):
  return Config(seed=seed, data=DataConfig(order=order), training=TrainingConfig(batch=batch, length=length))


def take(tokens, config, steps, **rest): return list(itertools.islice(train_batches(tokens, config, **rest), steps))


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left: np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def check_row(tokens, row, started=None):
  """Input and position of every target of a row by a loop; `started`: position of the token before the row, if it goes on."""
  starts, position = set(tokens.starts.tolist()), -1 if started is None else started
  for column, target in enumerate(row['target'].tolist()):
    index = target - 1
    fresh = index in starts
    position = 0 if fresh else position + 1
    assert row['token'][column] == (BOS if fresh else index)    # the token before has the number of this place
    assert row['position'][column] == position, (column, row['position'])
  return position


def rows_of(batch): return [{name: array[row] for name, array in batch.items()} for row in range(len(batch['target']))]


@pytest.mark.parametrize('count, starts', [(8, (0,)), (37, (0, 5, 6, 20)), (64, (0, 63)), (67, (0, 1, 2))])
def test_shuffled_rows_are_windows_with_fresh_positions(count, starts):
  tokens = make_tokens(count, starts)
  for batch in take(tokens, make_config(), 20):
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        'token': ('int32', (4, 8)), 'target': ('int32', (4, 8)), 'position': ('int32', (4, 8)), 'weight': ('bool', (4, 8))}
    assert batch['weight'].all()
    for row in rows_of(batch):
      check_row(tokens, row)
      first = row['target'][0] - 1
      assert row['target'].tolist() == [(first + column) % count + 1 for column in range(8)]


def test_an_epoch_reads_each_window_once_at_offsets_of_its_own():
  tokens, config = make_tokens(83), make_config(batch=5)
  firsts = np.concatenate([batch['target'][:, 0] - 1 for batch in take(tokens, config, 6)])    # 3 epochs of 10 windows
  offsets, orders = set(), set()
  for epoch in range(3):
    mine = firsts[10 * epoch:10 * epoch + 10]
    at = (mine - phase(0, epoch, 83)) % 83
    assert sorted(at.tolist()) == [8 * window for window in range(10)]
    offsets.add(phase(0, epoch, 83) % 8)
    orders.add(tuple(at.tolist()))
  assert len(orders) == 3 and len(offsets) > 1


@pytest.mark.parametrize('order', ['shuffle', 'lanes'])
def test_a_batch_is_a_pure_function_of_seed_and_step(order):
  tokens, config = make_tokens(150, (0, 40, 77)), make_config(order=order)
  batches = take(tokens, config, 12)
  for start in (0, 1, 5, 11): assert_equal(take(tokens, config, 1, start_step=start)[0], batches[start])
  dataset = train_dataset(tokens, config)
  for step in (7, 0, 11): assert_equal(dataset[step], batches[step])    # in any order
  assert_equal(take(tokens, config, 1, start_step=10**7)[0], dataset[10**7])
  resumed = take(tokens, config, 6) + take(tokens, config, 6, start_step=6)
  for left, right in zip(resumed, batches, strict=True): assert_equal(left, right)


def test_the_seed_changes_the_shuffle_and_not_the_lanes():
  tokens = make_tokens(400)
  for order, same in (('shuffle', False), ('lanes', True)):
    left, right = (take(tokens, make_config(order=order, seed=seed), 3) for seed in (0, 1))
    assert all(np.array_equal(a['target'], b['target']) for a, b in zip(left, right, strict=True)) == same


@pytest.mark.parametrize('order', ['shuffle', 'lanes'])
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_hold_blocks_of_the_same_batch(order, processes):
  tokens, config = make_tokens(150, (0, 40, 77)), make_config(order=order)
  parts = [take(tokens, config, 9, start_step=3, process_index=index, process_count=processes) for index in range(processes)]
  for whole, *blocks in zip(take(tokens, config, 9, start_step=3), *parts, strict=True):
    assert_equal(whole, {name: np.concatenate([block[name] for block in blocks]) for name in whole})


@pytest.mark.parametrize('count, starts', [(32, (0,)), (95, (0, 5, 24, 60)), (150, (0, 37, 38))])
def test_lanes_go_on_from_step_to_step_and_start_again_at_their_end(count, starts):
  tokens, config = make_tokens(count, starts), make_config(order='lanes')
  lane = count // 4
  batches = take(tokens, config, 12)
  for row in range(4):
    whole = {name: np.concatenate([batch[name][row] for batch in batches]) for name in batches[0]}
    expected = [row * lane + place % lane + 1 for place in range(12 * 8)]
    assert whole['target'].tolist() == expected
    for begin in range(0, 12 * 8, lane):    # from one start of the lane to the next
      check_row(tokens, {name: array[begin:begin + lane] for name, array in whole.items()})


@pytest.mark.parametrize('order, count, said', [
    ('shuffle', 7, '7 tokens; one row of 8 tokens needs 8'), ('lanes', 31, '31 tokens; 4 lanes of at least 8 tokens needs 32')])
def test_too_few_tokens_are_one_line_with_the_numbers(order, count, said):
  with pytest.raises(UserError, match=said): train_batches(make_tokens(count), make_config(order=order))
  take(make_tokens(count + 1), make_config(order=order), 1)


def test_rows_that_do_not_divide_are_refused():
  with pytest.raises(UserError, match='does not divide'): train_batches(make_tokens(99), make_config(), process_count=3)
  with pytest.raises(UserError, match='does not divide'):
    eval_batches(make_tokens(99), batch=4, length=8, process_count=3)


SWEEP = [(count, batch, length, context, stream) for count in (1, 2, 7, 8, 9, 40, 41) for batch in (1, 3) for length in (1, 8)
         for context, stream in ((0, False), (0, True), (1, False), (5, False), (7, False)) if context < length]


@pytest.mark.parametrize('count, batch, length, context, stream', SWEEP)
def test_evaluation_scores_every_token_once(count, batch, length, context, stream):
  starts = tuple(start for start in (0, 3, 4, 9, 33) if start < count)
  tokens, sizes = make_tokens(count, starts), {'batch': batch, 'length': length, 'context': context, 'stream': stream}
  batches = list(eval_batches(tokens, **sizes))
  assert len(batches) == eval_count(tokens, **sizes)
  scored = np.concatenate([each['target'][each['weight']] for each in batches])
  assert sorted(scored.tolist()) == list(range(1, count + 1))
  position = [None] * batch
  for each in batches:
    for array in each.values(): assert array.shape == (batch, length)
    assert not (each['weight'] & ~each['mask']).any()
    for number, row in enumerate(rows_of(each)):
      assert (np.diff(row['mask'].astype(int)) <= 0).all()    # padding at the end
      assert (row['token'][~row['mask']] == BOS).all() and not row['position'][~row['mask']].any()
      real = {name: array[row['mask']] for name, array in row.items()}
      last = check_row(tokens, real, position[number] if stream else None)
      if stream: position[number] = last
      assert np.all(np.diff(real['target']) == 1)
      # Apart from the first row a target is scored with its full context, or sees back to the start of its document.
      if not stream and len(real['target']) and real['target'][0] > 1: assert not real['weight'][:context].any()


def test_evaluation_reads_no_row_of_padding_only_before_the_last_batch():
  tokens = make_tokens(40)
  for stream in (False, True):
    batches = list(eval_batches(tokens, batch=3, length=8, stream=stream))
    assert all(each['mask'].any() for each in batches)


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('processes', [2, 4])
def test_evaluation_over_processes_is_the_same_in_blocks(stream, processes):
  tokens, sizes = make_tokens(77, (0, 20)), {'batch': 4, 'length': 8, 'stream': stream}
  parts = [list(eval_batches(tokens, **sizes, process_index=index, process_count=processes)) for index in range(processes)]
  for whole, *blocks in zip(eval_batches(tokens, **sizes), *parts, strict=True):    # strict: equally many
    assert_equal(whole, {name: np.concatenate([block[name] for block in blocks]) for name in whole})


def test_evaluation_takes_another_first_input():
  batch = next(eval_batches(make_tokens(9, (0, 4)), batch=1, length=8, bos=5))
  assert batch['token'].tolist() == [[5, 1, 2, 3, 5, 5, 6, 7]] and batch['position'].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


@pytest.mark.parametrize('wrong', [{'context': 8}, {'context': -1}, {'context': 9}, {'context': 1, 'stream': True}])
def test_impossible_contexts_are_refused(wrong):
  with pytest.raises(UserError, match='context'): eval_batches(make_tokens(40), batch=1, length=8, **wrong)


def test_large_splits_do_not_overflow():
  class Endless:    # token n is n % 251, without the memory
    def __len__(self): return 2**33
    def __getitem__(self, index): return (index % 251).astype(np.uint8)

  tokens = dataclasses.replace(make_tokens(1), token_N=Endless(), starts=np.array([0, 2**32 + 5]))
  batch = next(train_batches(tokens, make_config(batch=2, order='lanes'), start_step=2**29))
  lane, offset = 2**32, 8 * 2**29 % 2**32
  assert batch['target'][1, 0] == (lane + offset) % 251 and batch['position'][1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
