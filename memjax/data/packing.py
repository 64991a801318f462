"""Whole documents in rows of equal length: which go together, and where each begins. Nothing crosses their borders, for each
begins at position 0, where attention and memories are reset."""
from typing import NamedTuple

import numpy as np

from memjax.config.errors import UserError
from memjax.data.tokens import Tokens


class Plan(NamedTuple):
  """Pieces of documents in the order of their rows."""
  first_S: np.ndarray        # index of the first target of each piece
  length_S: np.ndarray       # targets of each piece
  border_R: np.ndarray       # pieces border_R[r] .. border_R[r + 1] - 1 stand in row r
  length: int                # L

  @property
  def rows(self) -> int:
    """Number of rows."""
    return len(self.border_R) - 1


def plan_rows(tokens: Tokens, length: int) -> Plan:
  """All documents in rows of `length` targets: plain text cut into pieces of that length, conversations cut off after it.

  The first token of a conversation is only an input, for templates write what begins a text. Conversations without a target
  that is trained on are left out. Raises UserError if none is left.
  """
  end_S = np.append(tokens.starts[1:], len(tokens))
  if tokens.weight_N is None:
    first_S = np.concatenate([np.arange(start, end, length) for start, end in zip(tokens.starts, end_S, strict=True)])
    length_S = np.minimum(length, end_S[np.searchsorted(tokens.starts, first_S, side='right') - 1] - first_S)
  else:
    first_S, length_S = tokens.starts + 1, np.minimum(end_S - tokens.starts - 1, length)
    first_S, length_S = first_S[length_S > 0], length_S[length_S > 0]
    kept_S = counts(tokens.weight_N, first_S, first_S + length_S) > 0
    first_S, length_S = first_S[kept_S], length_S[kept_S]
  if not len(first_S):
    raise UserError(f'no conversation in the {tokens.split} split of {tokens.name} has a reply within {length + 1} tokens; '
                    'raise training.length')
  row_S = fit(length_S, length)
  order_S = np.argsort(row_S, kind='stable')
  border_R = np.searchsorted(row_S[order_S], np.arange(row_S.max() + 2))
  return Plan(first_S[order_S], length_S[order_S], border_R, length)


def counts(weight_N: np.ndarray, first_S: np.ndarray, end_S: np.ndarray) -> np.ndarray:
  """How many weights are True in each of some ranges that are not empty, in order and apart; nothing as long as the text is made."""
  edges = np.stack([first_S, end_S], 1).ravel()
  edges = edges[edges < len(weight_N)]              # the last range may end with the text
  return np.add.reduceat(weight_N, edges, dtype=np.int64)[::2] if len(edges) else np.zeros(0, np.int64)


def fit(length_S: np.ndarray, room: int) -> np.ndarray:
  """The row of each piece, rows in the order of their first piece: the longest first, each where the least room is left.

  Best fit decreasing (Johnson 1973) uses at most 11 / 9 of the fewest rows. A pure function of the lengths.
  """
  found_S, waiting, free, count = np.empty(len(length_S), np.int64), [[] for _ in range(room + 1)], 0, 0
  for index in np.argsort(-length_S, kind='stable').tolist():
    size = int(length_S[index])
    fitting = free >> size             # bit n of `free`: some row has room for n more
    if fitting:
      rest = size + (fitting & -fitting).bit_length() - 1
      row = waiting[rest].pop()
      if not waiting[rest]: free ^= 1 << rest
    else: row, rest, count = count, room, count + 1
    found_S[index], rest = row, rest - size
    waiting[rest].append(row)
    if rest: free |= 1 << rest
  _, first_R, own_S = np.unique(found_S, return_index=True, return_inverse=True)
  return np.argsort(np.argsort(first_R))[own_S]


def row_indices(plan: Plan, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(index of each target, first index of its piece, mask) of some rows, [B, L]; rows beyond the last are empty."""
  index_BxL, first_BxL = np.zeros((2, len(row_B), plan.length), np.int64)
  mask_BxL = np.zeros((len(row_B), plan.length), bool)
  for number, row in enumerate(row_B):
    if row >= plan.rows: continue
    pieces = slice(plan.border_R[row], plan.border_R[row + 1])
    first_S, length_S = plan.first_S[pieces], plan.length_S[pieces]
    size = length_S.sum()
    begin_S = np.cumsum(length_S) - length_S
    first_BxL[number, :size] = np.repeat(first_S, length_S)
    index_BxL[number, :size] = np.arange(size) + np.repeat(first_S - begin_S, length_S)
    mask_BxL[number, :size] = True
  return index_BxL, first_BxL, mask_BxL
