"""How many pairs a holographic memory holds: measured recall of every binding and slot address beside the theory.

N pairs of random keys and random items of a codebook are superposed; an item counts as recalled when the read decodes to
it. Theory: `recall_probability` with n = K * S_eff floats. `none` has no keys to tell the pairs apart, and copies have
their own keys per slot: both are printed under their own label and belong to no target.

  python -m benchmarks.capacity --small          two CPU cores, about a minute
  python -m benchmarks.capacity                  two CPU cores, about ten minutes
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from memjax.ops.binding import bind, key_map, unbind
from memjax.ops.holographic import effective_slots, recall_capacity, recall_probability
from memjax.ops.keys import permutation, permute
from memjax.ops.recurrence import slot_states
from memjax.ops.routing import address_map

QUERIES = 16           # pairs asked back in each trial: the first ones


class Memory(NamedTuple):
  """One row of the table: binding, how keys are drawn, slots and their addresses, whether the trace is kept by sign only."""
  label: str
  binding: str
  keys: str = 'unit'
  slots: int = 1
  address: str = 'same'
  is_sign: bool = False


KEYED = (Memory('phasor', 'phasor'), Memory('bipolar', 'bipolar'), Memory('unitary', 'unitary'), Memory('hrr', 'hrr', 'gaussian'),
         Memory('hlb', 'hlb', 'gaussian'))
VARIANTS = (Memory('bipolar, tanh keys', 'bipolar', 'gaussian'), Memory('elementwise, Gaussian keys', 'bipolar', 'raw'),
            Memory('bipolar, sign of the trace', 'bipolar', is_sign=True), Memory('none (no keys)', 'none'))
SLOTTED = tuple(Memory(label, 'phasor', slots=8, address=address) for label, address in (
    ('signed unit addresses', 'content'), ('top-1 slot', 'top1'), ('permuted copies', 'copies'), ('softmax, temperature 1/4', 'softmax/4'),
    ('softmax, unit logits', 'softmax'), ('same write to all slots', 'same')))


def draw_keys(memory: Memory, key, shape: tuple[int, ...]):
  """Keys as the layer makes them: from Gaussian projections, exactly of unit modulus ('unit'), mapped ('gaussian') or 'raw'."""
  z = jax.random.normal(key, shape)
  if memory.keys == 'raw' or memory.binding == 'none': return z
  if memory.keys == 'unit' and memory.binding == 'bipolar': return key_map('bipolar', z, squash='sign')
  return key_map(memory.binding, z, eps=1e-12 if memory.keys == 'unit' else 1e-6)


def draw_addresses(memory: Memory, key, shape: tuple[int, ...]):
  """Addresses from unit-variance logits; 'same' is 1 / sqrt(S) in every slot."""
  z = jax.random.normal(key, (*shape, memory.slots))
  if memory.address in ('same', 'copies'): return jnp.full_like(z, memory.slots ** -0.5)
  kind, _, factor = memory.address.partition('/')
  return address_map(kind, z, temperature=1 / float(factor or 1))


def superpose(memory: Memory, loads: tuple[int, ...], key_BxLxK, value_BxLxK, address_BxLxS):
  """The first pairs read back, [B, loads, QUERIES, K], when the first n pairs of each load n were written."""
  B, _, K = key_BxLxK.shape
  chunk = math.gcd(*loads)
  at = np.array(loads) // chunk - 1
  query, is_copies = key_BxLxK[:, :QUERIES], memory.address == 'copies'
  slots, width = (1, memory.slots * K) if is_copies else (memory.slots, K)
  if is_copies:                                   # one slot of S * K channels: what `slot_copies` does
    index = np.stack([permutation(0, K, memory.binding, stream=f'copy/{s}') for s in range(memory.slots)])
    bound = bind(memory.binding, permute(key_BxLxK, index), value_BxLxK[:, :, None]).reshape(B, -1, 1, width)
  else: bound = bind(memory.binding, key_BxLxK, value_BxLxK)[:, :, None]
  address = jnp.ones((B, bound.shape[1], 1, 1)) if is_copies else address_BxLxS[:, :, None]
  state = slot_states(jnp.zeros((B, 1, slots, width)), bound, address, chunk=chunk)[:, at, 0]
  if is_copies:
    return jnp.mean(unbind(memory.binding, permute(query, index)[:, None], state.reshape(B, -1, 1, memory.slots, K)), 3)
  if memory.is_sign: state = jnp.sign(state)
  mixed = jnp.einsum('bqs,bnsk->bnqk', address_BxLxS[:, :QUERIES], state)
  return unbind(memory.binding, query[:, None], mixed)


@functools.partial(jax.jit, static_argnames=('memory', 'loads', 'trials', 'width', 'items'))
def recall(memory: Memory, loads: tuple[int, ...], seed, *, trials: int, width: int, items: int):
  """The fraction of items recalled at each number of pairs, of QUERIES or more, [loads]."""
  keys = jax.random.split(jax.random.key(seed), 4)
  codebook = jax.random.normal(keys[0], (items, width))
  codebook = codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True)
  item_BxL = jax.random.randint(keys[1], (trials, max(loads)), 0, items)
  key = draw_keys(memory, keys[2], (trials, max(loads), width))
  address = draw_addresses(memory, keys[3], (trials, max(loads)))
  read = superpose(memory, loads, key, jnp.take(codebook, item_BxL, axis=0), address)
  found = jnp.argmax(jnp.einsum('bnqk,mk->bnqm', read, codebook), -1)
  return jnp.mean(found == item_BxL[:, None, :QUERIES], (0, 2))


def measure(memory: Memory, loads, *, trials: int, width: int = 512, items: int = 1000, seed: int = 0) -> list[float]:
  """Recall at each number of pairs; batches of at most 50 trials bound the memory of this measurement."""
  sizes = dict(trials=min(trials, 50), width=width, items=items)
  batches = [recall(memory, tuple(loads), 1000 * seed + b, **sizes) for b in range(-(-trials // 50))]
  return np.mean([np.asarray(b, np.float64) for b in batches], 0).tolist()


def pairs_at_half(memory: Memory, guess: float, *, trials: int, width: int, items: int = 1000) -> float:
  """The number of pairs at which half of the items are recalled, interpolated between three loads around a guess."""
  loads = [max(QUERIES, 4 * round(guess * factor / 4)) for factor in (0.8, 1.0, 1.25)]
  measured = measure(memory, loads, trials=trials, width=width, items=items)
  return float(np.exp(np.interp(-0.5, -np.array(measured), np.log(loads))))


def state_floats(memory: Memory, width: int) -> float:
  """The n of the theory: width * S_eff, S for permuted copies, times 2 / pi for a trace kept by sign."""
  if memory.address == 'copies': return width * memory.slots
  address = draw_addresses(memory, jax.random.key(0), (1, 20_000))[:, :, None]
  return width * float(effective_slots(address)[0]) * (2 / np.pi if memory.is_sign else 1)


def run_table(memories, loads, *, trials: int, width: int, items: int, seed: int) -> list[dict[str, Any]]:
  """One dictionary a memory: its floats, recall and theory at each load, the largest difference in points."""
  rows = []
  for memory in memories:
    floats = state_floats(memory, width)
    theory = [recall_probability(n, floats=floats, items=items) for n in loads]
    measured = measure(memory, loads, trials=trials, width=width, items=items, seed=seed)
    worst = 100 * max(abs(a - b) for a, b in zip(measured, theory, strict=True))
    half = recall_capacity(0.5, floats=floats, items=items)
    rows.append({'memory': memory.label, 'slots': memory.slots, 'floats': floats, 'pairs': list(loads), 'recall': measured,
                 'theory': theory, 'worst_points': None if memory.binding == 'none' else worst, 'theory_half': half})
  return rows


def report(title: str, rows: list[dict[str, Any]]) -> None:
  """Prints recall by number of pairs, each memory over its theory."""
  loads, shown = rows[0]['pairs'], []
  for row in rows:
    cells = lambda values: {f'N {n}': value for n, value in zip(loads, values, strict=True)}
    shown.append({'memory': row['memory'], 'floats': round(row['floats']), **cells(row['recall']), 'points': row['worst_points']})
    shown.append({'memory': '  theory', **cells(row['theory'])})
  common.show(title, shown, ('memory', 'floats', *(f'N {n}' for n in loads), 'points'))


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the tables; returns the result."""
  make = common.parser('capacity', __doc__)
  make.add_argument('--width', type=int, default=512, help='channels a slot')
  make.add_argument('--items', type=int, default=1000, help='codebook size')
  make.add_argument('--trials', type=int, default=0, help='memories filled at each load; default 2000, small 200')
  make.add_argument('--seed', type=int, default=0)
  a = make.parse_args(argv)
  scale, sizes = a.width / 512, dict(trials=a.trials or (200 if a.small else 2000), width=a.width, items=a.items, seed=a.seed)
  loads = [max(QUERIES, 8 * round(n * scale / 8)) for n in ((16, 24, 32, 48, 64, 96) if a.small else (16, 24, 32, 48, 64, 96, 128))]
  slot_loads = [max(QUERIES, 8 * round(n * scale / 8)) for n in ((64, 192, 384) if a.small else (32, 64, 96, 128, 192, 256, 384, 512))]
  keyed = run_table(KEYED, loads, **sizes)
  report(f'One slot, K={a.width}, {a.items} items', keyed)
  others = run_table(VARIANTS, loads, **sizes)
  report('Variants', others)
  slotted = run_table(SLOTTED, slot_loads, **{**sizes, 'trials': max(50, sizes['trials'] // 4)})
  report('Eight slots, phasor', slotted)
  judged = [{'what': f'{row["memory"]}: 3 points minus the largest difference from theory', 'value': 3 - row['worst_points'], 'target': 0.0}
            for row in keyed]
  common.judge(judged)
  result = {**sizes, 'seeds': [a.seed], 'keyed': keyed, 'variants': others, 'slotted': slotted, 'targets': judged}
  common.save('capacity', a.output, result, commit=a.commit)
  return result


if __name__ == '__main__':
  main()
