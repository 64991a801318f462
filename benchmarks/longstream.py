"""A stream of 1,000,000 tokens through memories that learn at test time: bytes of state, finite values, and whether time per token grows.

Random tokens are read in calls of the parallel form, cut inside chunks; the state is kept from call to call. Then tokens are decoded one
by one from the state after 10,000 tokens and from the one at the end, in turn, so that a busy machine slows both alike; the medians are
compared. The same is done for calls of the parallel form.

  python -m benchmarks.longstream --small        two CPU cores, under a minute a model
  python -m benchmarks.longstream
"""
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, neural_models
from memjax.models.decoder import build_decoder, init_params

VOCABULARY, EARLY = 256, 10_000


def read_call(model, size: int, params, state, number):
  """(state, whether all logits are finite) after call `number` of `size` random tokens."""
  token_BxL = jax.random.randint(jax.random.fold_in(jax.random.key(1), number), (1, size), 0, VOCABULARY)
  position_BxL = number * size + jnp.arange(size)[None]
  logits, state, _ = model.apply({'params': params}, token_BxL, state, position_BxL=position_BxL)
  return state, jnp.isfinite(logits).all()


def decode_call(model, size: int, params, state, first):
  """The state after `size` tokens fed back one by one from position `first`."""
  def step(carry, position):
    state, token_B = carry
    logits, state, _ = model.apply({'params': params}, token_B[:, None], state, position_BxL=jnp.full((1, 1), position))
    return (state, jnp.argmax(logits[:, 0], -1).astype(jnp.int32)), None
  return jax.lax.scan(step, (state, jnp.zeros((1,), jnp.int32)), first + jnp.arange(size))[0][0]


def state_bytes(state: Any) -> int:
  """Bytes of all leaves."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def compare(call, early: Any, late: Any, repeats: int) -> dict[str, float]:
  """{'early_us', 'late_us', 'ratio'}: medians of `call(which)` on both in turn; the ratio is that of the two medians."""
  times: dict[str, list[float]] = {'early': [], 'late': []}
  for round_ in range(repeats + 1):
    for name, given in (('early', early), ('late', late)) if round_ % 2 else (('late', late), ('early', early)):
      started = time.perf_counter()
      jax.block_until_ready(call(*given))
      if round_: times[name].append(1e6 * (time.perf_counter() - started))
  early_us, late_us = (statistics.median(times[name]) for name in ('early', 'late'))
  return {'early_us': early_us, 'late_us': late_us, 'ratio': late_us / early_us}


def run_model(name: str, a: Any) -> dict[str, Any]:
  """The row of one model."""
  config = neural_models.model_config(name, width=a.width, layers=a.layers, heads=a.heads, window=64, vocabulary=VOCABULARY, dtype=a.dtype,
                                      base=a.base, aligned=False)
  model = build_decoder(config)
  params = jax.jit(lambda key: init_params(model, key)[0])(jax.random.key(0))
  read = jax.jit(functools.partial(read_call, model, a.call))
  decode = jax.jit(functools.partial(decode_call, model, a.decoded))
  state, finite, early, started = model.init_state(1), True, None, time.perf_counter()
  sizes = {state_bytes(state)}
  for number in range(a.tokens // a.call):
    state, fine = read(params, state, jnp.int32(number))
    finite &= bool(fine)
    sizes.add(state_bytes(state))
    if (number + 1) * a.call == EARLY: early = state
    if number % 50 == 49: print(f'{name}: {(number + 1) * a.call:,} tokens, {time.perf_counter() - started:.0f} s', flush=True)
  finite &= all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
  spent, ends = time.perf_counter() - started, [(early, EARLY), (state, a.tokens)]
  steps = compare(lambda state, at: decode(params, state, jnp.int32(at)), *ends, a.repeats)
  calls = compare(lambda state, at: read(params, state, jnp.int32(at // a.call)), *ends, a.repeats)
  per = lambda found, size: {key: value / (1 if key == 'ratio' else size) for key, value in found.items()}
  return {'model': name, 'tokens': a.tokens, 'state_bytes': max(sizes), 'constant': len(sizes) == 1, 'finite': finite, 'seconds': spent,
          'decode': per(steps, a.decoded), 'parallel': per(calls, a.call)}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Time per token after 10,000 tokens over that at the end, within 10 %."""
  return [{'what': f'{row["model"]}, {form}: time at {EARLY:,} tokens over time at {row["tokens"]:,}', 'value': 1 / row[form]['ratio'],
           'target': 0.9} for row in rows for form in ('decode', 'parallel')]


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  make = common.parser('longstream', __doc__)
  make.add_argument('--models', type=lambda text: text.split(';'), default=['LMM', 'MAC', 'window + linear exact'], help='separated by ;')
  sizes = dict(tokens=1_000_000, call=5000, decoded=2000, width=512, layers=1, heads=8, repeats=9)
  for option, default in sizes.items(): make.add_argument(f'--{option}', type=int, default=default)
  make.add_argument('--base', type=float, default=1.0, help='gates.theta_base of deep memories')
  a = make.parse_args(argv)
  if a.small:
    make.set_defaults(width=16, heads=1, decoded=500)
    a = make.parse_args(argv)
  if EARLY % a.call or a.tokens % a.call or a.tokens < EARLY: make.error(f'--call must divide {EARLY} and --tokens')
  a.dtype = 'bfloat16' if common.on_gpu() else 'float32'
  rows: list[dict[str, Any]] = []
  for name in a.models:
    rows.append(run_model(name, a))
    result = {'options': {k: v for k, v in vars(a).items() if k not in ('output', 'commit')}, 'seeds': [0], 'dtype': a.dtype, 'rows': rows,
              'targets': targets(rows)}
    common.save('longstream', a.output, result, commit=a.commit)
  flat = [{**row, **{f'{form} {key}': row[form][key] for form in ('decode', 'parallel') for key in row[form]}} for row in rows]
  common.show(f'Streams of {a.tokens:,} tokens', flat, ('model', 'state_bytes', 'constant', 'finite', 'seconds', 'decode early_us',
                                                        'decode late_us', 'decode ratio', 'parallel ratio'))
  common.judge(result['targets'])
  return result


if __name__ == '__main__':
  main()
