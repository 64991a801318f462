"""Batches of token rows: endless for training, a pure function of seed and step; each token once for evaluation.

The targets are the tokens t_0 .. t_{N-1} of a split. The input for a target is the token before it, and `bos` where the
target is the first of its document; so every document looks like bos d_0 d_1 ... whatever stands before it in its row.
`position` counts from 0 at that bos, and at the start of a row that begins inside a document: memories are empty there.
In order 'packed' (and for conversations, of which only some targets have a weight) rows hold whole documents: `packing`.
"""
import hashlib
from collections.abc import Iterator

import numpy as np

from memjax.config.errors import UserError
from memjax.config.schema import Config
from memjax.data.packing import Plan, plan_rows, row_indices
from memjax.data.tokens import Tokens

Batch = dict[str, np.ndarray]


def gather(tokens: Tokens, index_BxL: np.ndarray, first_BxL: np.ndarray, bos: int) -> Batch:
  """{'token', 'target', 'position'} of the targets at `index_BxL`; `first_BxL` is where the row's memory begins."""
  start_BxL = tokens.starts[np.searchsorted(tokens.starts, index_BxL, side='right') - 1]
  before_BxL = tokens.token_N[np.maximum(index_BxL - 1, 0)].astype(np.int32)
  return {'token': np.where(index_BxL == start_BxL, np.int32(bos), before_BxL),
          'target': tokens.token_N[index_BxL].astype(np.int32),
          'position': (index_BxL - np.maximum(start_BxL, first_BxL)).astype(np.int32)}


def phase(seed: int, epoch: int, count: int) -> int:
  """A number below `count` that depends on seed and epoch alone: where the first window of an epoch starts."""
  return int.from_bytes(hashlib.sha256(f'{seed}/{epoch}'.encode()).digest()[:8], 'little') % count


def shuffled(tokens: Tokens, start_B: np.ndarray, length: int) -> Batch:
  """Rows of `length` tokens from each start on, going on at the beginning of the split after its end."""
  run_BxL = start_B[:, None] + np.arange(length, dtype=np.int64)[None, :]
  wrapped_BxL = run_BxL >= len(tokens)
  first_BxL = np.where(wrapped_BxL, 0, np.broadcast_to(start_B[:, None], run_BxL.shape))
  return gather(tokens, run_BxL % len(tokens), first_BxL, tokens.bos)


def lanes(tokens: Tokens, step: int, row_B: np.ndarray, shape: tuple[int, int]) -> Batch:
  """Step `step` of the lanes `row_B` of `shape` = (lanes in all, length): each lane is read over and over."""
  count, length = shape
  lane = len(tokens) // count
  offset_L = (step * length + np.arange(length, dtype=np.int64)) % lane
  first_BxL = np.broadcast_to((row_B * lane)[:, None], (len(row_B), length))
  return gather(tokens, first_BxL + offset_L[None, :], first_BxL, tokens.bos)


def train_dataset(tokens: Tokens, config: Config, process_index: int = 0, process_count: int = 1):
  """The grain MapDataset whose element n is this process's batch of step n, whichever elements were read before.

  Process p of P holds the p-th block of B / P rows, so the blocks in order are the batch of a single process.
  """
  import grain  # seconds of import that a config error must not cost

  batch, length = config.training.batch, config.training.length
  rows = split_rows(batch, process_count)
  block_B = np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int64)
  if config.data.order == 'lanes':
    need(tokens, batch * length, f'{batch} lanes of at least {length}')
    steps = grain.MapDataset.range(1).repeat()
    return steps.map_with_index(lambda step, _: weighted(lanes(tokens, step, block_B, (batch, length))))
  if config.data.order == 'packed':
    plan = plan_rows(tokens, length)
    order = grain.MapDataset.range(plan.rows).seed(config.seed).shuffle().repeat()
    blocks = order.batch(rows, drop_remainder=True)[process_index::process_count]
    return blocks.map(lambda row_B: packed(tokens, plan, row_B))
  need(tokens, length, f'one row of {length}')
  windows = len(tokens) // length

  def start(index: int, window: int) -> np.int64:
    return np.int64((phase(config.seed, index // windows, len(tokens)) + int(window) * length) % len(tokens))

  # Batching before slicing gives each process a block; slicing after repeat keeps the order independent of their count.
  order = grain.MapDataset.range(windows).seed(config.seed).shuffle().repeat().map_with_index(start)
  # Without drop_remainder grain computes the endless length in floating point, which overflows.
  blocks = order.batch(rows, drop_remainder=True)[process_index::process_count]
  return blocks.map(lambda at_B: weighted(shuffled(tokens, at_B, length)))


def train_batches(tokens: Tokens, config: Config, start_step: int = 0, *, process_index: int = 0,
                  process_count: int = 1) -> Iterator[Batch]:
  """Batches of steps start_step, start_step + 1, ...: a pure function of seed and step, prefetched by a thread.

  {'token', 'target', 'position'} int32 and 'weight' bool (all True), each [B / process_count, L]. Order 'shuffle'
  covers the split once an epoch in windows of L whose offsets differ from epoch to epoch. In order 'lanes' row b reads
  the b-th of B equal parts on and on. Order 'packed' covers the documents once an epoch, in rows of whole ones; 'mask' is where
  there is a token, 'weight' where it is a target. UserError for too few tokens or rows that do not divide over the processes.
  """
  import grain

  dataset = train_dataset(tokens, config, process_index, process_count)
  iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))
  iterator.set_state({'next_index': start_step})
  return iterator


def packed(tokens: Tokens, plan: Plan, row_B: np.ndarray, bos: int | None = None) -> Batch:
  """Rows of a plan, padding masked, with the weights of the tokens."""
  index_BxL, first_BxL, mask_BxL = row_indices(plan, row_B)
  bos = tokens.bos if bos is None else bos
  weight_BxL = mask_BxL if tokens.weight_N is None else mask_BxL & tokens.weight_N[index_BxL]
  return {**blank(gather(tokens, index_BxL, first_BxL, bos), mask_BxL, bos), 'mask': mask_BxL, 'weight': weight_BxL}


def blank(batch: Batch, mask_BxL: np.ndarray, bos: int) -> Batch:
  """The batch with nothing but zeros, and bos as its input, where there is no token."""
  return {name: np.where(mask_BxL, array, np.int32(bos if name == 'token' else 0)) for name, array in batch.items()}


def weighted(batch: Batch) -> Batch:
  """The batch with every target scored."""
  return {**batch, 'weight': np.ones(batch['target'].shape, bool)}


def need(tokens: Tokens, count: int, what: str) -> None:
  """UserError where the split holds fewer tokens."""
  if len(tokens) < count:
    raise UserError(f'the {tokens.split or "given"} split of {tokens.name or "the text"} has {len(tokens)} tokens; '
                    f'{what} tokens needs {count}: shorten training.length or training.batch, or give more text')


def split_rows(batch: int, process_count: int) -> int:
  """Rows of each process; UserError where they do not divide."""
  if batch % process_count: raise UserError(f'a batch of {batch} rows does not divide over {process_count} processes')
  return batch // process_count


def eval_batches(tokens: Tokens, *, batch: int, length: int, context: int = 0, stream: bool = False,
                 bos: int | None = None, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
  """Batches of equal shape that score every token of the split exactly once.

  As training batches, with 'mask' (there is a token) and 'weight' (it is scored here). Sliding: rows start every
  length - context tokens and score all but their first `context` targets, the first row all. Stream: row b reads the
  b-th of `batch` equal parts from batch to batch, its state carried by the caller, and nothing is read twice. Padding
  is masked, and every process gets equally many batches. Conversations are packed whole, and their weights say what is scored:
  no more than their first `length` targets. `bos` is that of the tokenizer unless given. UserError for
  a context that fills the row, or rows that do not divide over the processes.
  """
  if context and stream: raise UserError('context does not apply to a stream, which carries the memory instead')
  if not 0 <= context < length:
    raise UserError(f'a context of {context} tokens leaves nothing to score in rows of {length}')
  rows = split_rows(batch, process_count)
  block = slice(process_index * rows, (process_index + 1) * rows)
  bos = tokens.bos if bos is None else bos
  if tokens.weight_N is not None:
    if context or stream: raise UserError('conversations are scored whole: neither a context nor a stream applies to them')
    plan = plan_rows(tokens, length)
    starts = range(block.start, plan.rows + block.start, batch)
    return (packed(tokens, plan, np.arange(start, start + rows), bos) for start in starts)
  parts = _stream_rows(tokens, batch, length) if stream else _sliding_rows(tokens, batch, length, context)
  return (_padded(tokens, bos, *(part[block] for part in arrays)) for arrays in parts)


def eval_count(tokens: Tokens, *, batch: int, length: int, context: int = 0, stream: bool = False) -> int:
  """Number of batches that `eval_batches` yields."""
  if tokens.weight_N is not None: return _ceil(plan_rows(tokens, length).rows, batch)
  if stream: return _ceil(_ceil(len(tokens), batch), length)
  return _ceil(_windows(len(tokens), length, context), batch)


def _ceil(count: int, by: int) -> int:
  return (count + by - 1) // by


def _windows(count: int, length: int, context: int) -> int:
  return 1 + max(0, _ceil(count - length, length - context))


def _sliding_rows(tokens: Tokens, batch: int, length: int, context: int) -> Iterator[tuple]:
  """(index, first index of the row, first scored index, end of the row's tokens), per batch."""
  count, stride = len(tokens), length - context
  windows = _windows(count, length, context)
  for begin in range(0, windows, batch):
    row_B = np.arange(begin, begin + batch, dtype=np.int64)
    first_B = row_B * stride
    scored_B = np.where(row_B > 0, first_B + context, first_B)
    end_B = np.where(row_B < windows, count, 0)    # rows beyond the last window are empty
    yield first_B[:, None] + np.arange(length, dtype=np.int64)[None, :], first_B, scored_B, end_B


def _stream_rows(tokens: Tokens, batch: int, length: int) -> Iterator[tuple]:
  """As `_sliding_rows`, for lanes."""
  lane = _ceil(len(tokens), batch)
  first_B = np.arange(batch, dtype=np.int64) * lane
  end_B = np.minimum(first_B + lane, len(tokens))
  for begin in range(0, lane, length):
    yield (first_B + begin)[:, None] + np.arange(length, dtype=np.int64)[None, :], first_B, first_B, end_B


def _padded(tokens: Tokens, bos: int, index_BxL: np.ndarray, *bounds: np.ndarray) -> Batch:
  first_BxL, scored_BxL, end_BxL = (np.broadcast_to(bound_B[:, None], index_BxL.shape) for bound_B in bounds)
  mask_BxL = index_BxL < end_BxL
  batch = gather(tokens, np.minimum(index_BxL, len(tokens) - 1), first_BxL, bos)
  return {**blank(batch, mask_BxL, bos), 'mask': mask_BxL, 'weight': mask_BxL & (index_BxL >= scored_BxL)}
