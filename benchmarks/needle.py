"""A needle in a haystack, after the single-needle tasks of RULER (Hsieh et al. 2024), far beyond the length of training.

Three kinds share a batch. A needle is MARK, a key, a value; at the end of the row stand ASK and a key, and the value must follow. It
counts when all its tokens are the most probable ones, each given those before it, so that greedy decoding would write it.

- passkey: four digits under the one key PASS, in random noise
- number: four digits under a random key, in a sentence that repeats
- word: one word of 32 under a random key, in random noise, among three needles with other keys

Training rows of `number` hold four needles, and all needles are asked for; otherwise training and test differ in length alone.
Rows longer than those of training are read in parts with the state carried; full attention keeps all keys and values. Each
memory that learns at test time is also tested frozen (step sizes of zero) and off (what it reads is replaced by zeros). All seeds
and rates of a model train at once; validation rows of the training length choose the rate.

  python -m benchmarks.needle --small                       two CPU cores, three models, some minutes each
  python -m benchmarks.needle --models "MAC;MAG" --name a   one process of several that share a GPU; see benchmarks.join
"""
import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, language_models, neural_models
from memjax.config.schema import EmbeddingConfig, ModelConfig
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.workarounds import avoid_crash

KINDS = ('passkey', 'number', 'word')
DIGITS, SENTENCE, WORDS, KEYS, NOISE = 4, 16, 32, 32, 48
NOISE_0, KEY_0, WORD_0 = 0, NOISE, NOISE + KEYS
DIGIT_0 = WORD_0 + WORDS
MARK, ASK, PASS = (DIGIT_0 + 10 + n for n in range(3))
VOCABULARY = PASS + 1
SLOT = DIGITS + 2                           # tokens of a needle, and of a question with its answer
CHANCE = {'passkey': 10.0 ** -DIGITS, 'number': 10.0 ** -DIGITS, 'word': 1 / WORDS}


class Rows(NamedTuple):
  """What rows consist of: how many needles of each kind, how many of them are asked for."""
  needles: tuple[int, int, int]
  asked: tuple[int, int, int]


TRAIN, TEST = Rows((1, 4, 4), (1, 4, 4)), Rows((1, 1, 4), (1, 1, 1))


class Hidden(NamedTuple):
  """The needles of a batch: kind [B], keys [B, N], values [B, N, 4], which part of the row each is in (by rank) and where in that
  part, both in [0, 1); the sentence that a row of `number` repeats."""
  kind_B: jax.Array
  key_BxN: jax.Array
  value_BxNxV: jax.Array
  order_BxN: jax.Array
  place_BxN: jax.Array
  sentence_BxS: jax.Array


def hide(key: jax.Array, batch: int, count: int) -> Hidden:
  """Needles for rows of the three kinds in turn; `count` a row at most."""
  one, two, three, four, five, six = jax.random.split(key, 6)
  kind_B = jnp.arange(batch) % len(KINDS)
  keys = KEY_0 + jax.lax.top_k(jax.random.uniform(one, (batch, KEYS)), count)[1]
  keys = jnp.where(kind_B[:, None] == 0, PASS, keys)
  shape = (batch, count, DIGITS)
  value = jnp.where(kind_B[:, None, None] == 2, WORD_0 + jax.random.randint(two, shape, 0, WORDS),
                    DIGIT_0 + jax.random.randint(three, shape, 0, 10))
  order, place = (jax.random.uniform(k, (batch, count)) for k in (four, five))
  return Hidden(kind_B, keys, value, order, place, NOISE_0 + jax.random.randint(six, (batch, SENTENCE), 0, NOISE))


def part_of_rows(key: jax.Array, hidden: Hidden, rows: Rows, span: tuple[Any, int, Any]) -> dict[str, jax.Array]:
  """{'token', 'target', 'position', 'weight', 'final'} [B, S] of tokens start .. start + S of rows of `total`; span = start, S, total.

  `weight` marks the tokens after which one of an answer follows, 'final' those of the last question. Questions end the row.
  """
  (start, size, total), (B, N) = span, hidden.key_BxN.shape
  position_S = start + jnp.arange(size)
  noise = jax.random.randint(jax.random.fold_in(key, start), (B, size), 0, NOISE) + NOISE_0
  token = jnp.where(hidden.kind_B[:, None] == 1, hidden.sentence_BxS[:, position_S % SENTENCE], noise)
  count_B, asked_B = (jnp.array(counts)[hidden.kind_B][:, None] for counts in rows)
  length_B = jnp.where(hidden.kind_B == 2, 3, SLOT)[:, None]
  hay = total - SLOT * max(rows.asked)
  rank_BxN = jnp.argsort(jnp.argsort(jnp.where(jnp.arange(N)[None] < count_B, hidden.order_BxN, 2)))
  answer = jnp.zeros((B, size), bool)
  final = answer
  for n in range(N):
    body = jnp.concatenate([jnp.full((B, 1), MARK), hidden.key_BxN[:, n:n + 1], hidden.value_BxNxV[:, n]], 1)
    first = (hay * rank_BxN[:, n:n + 1]) // count_B + (hidden.place_BxN[:, n:n + 1] * (hay // count_B - SLOT)).astype(jnp.int32)
    offset = position_S[None] - first
    here = (offset >= 0) & (offset < length_B) & (n < count_B)
    token = jnp.where(here, jnp.take_along_axis(body, jnp.clip(offset, 0, SLOT - 1), 1), token)
    offset = position_S[None] - (total - SLOT * n - length_B)                 # questions stand at the ends of their slots, last first
    here = (offset >= 0) & (offset < length_B) & (n < asked_B)
    asked = jnp.take_along_axis(body.at[:, 0].set(ASK), jnp.clip(offset, 0, SLOT - 1), 1)
    token, answer = jnp.where(here, asked, token), answer | (here & (offset >= 2))
    final = final | (here & (offset >= 2) & (n == 0))
  ahead = lambda a: jnp.pad(a[:, 1:], ((0, 0), (0, 1)))
  return {'token': token, 'target': ahead(token), 'weight': ahead(answer), 'final': ahead(final),
          'position': jnp.broadcast_to(position_S[None], (B, size))}


def advance(model, params, state, data):
  """(nll [B, S], right [B, S], state) of a part."""
  logits, state, _ = model.apply({'params': params}, data['token'], state, position_BxL=data['position'])
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, data['target'])
  return nll, jnp.argmax(logits, -1) == data['target'], state


def train_steps(model, optimizer, a, params, moments, first, rate, seed):
  """(params, moments, loss, share of answer tokens right) after `per_call` steps of one member."""
  schedule = optax.cosine_onecycle_schedule(a.steps, 1.0, 0.1)
  def step(carry, number):
    params, moments = carry
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), number)
    data = part_of_rows(key, hide(key, a.batch, max(TRAIN.needles)), TRAIN, (0, a.length, a.length))
    def loss(params):
      nll, right, _ = advance(model, params, model.init_state(a.batch), data)
      count = data['weight'].sum()
      return jnp.where(data['weight'], nll, 0).sum() / count, (right & data['weight']).sum() / count
    (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments, params)
    size = -rate * schedule(number)
    return (jax.tree.map(lambda p, u: p + size * u, params, updates), moments), (value, right)
  (params, moments), (value, right) = jax.lax.scan(step, (params, moments), first + jnp.arange(a.per_call))
  return params, moments, value.mean(), right.mean()


def test_rows(model, a, params, seed, number, parts):
  """Share of answers right by kind [3], of `eval_batch` rows of `parts` x `length` tokens. One program serves all lengths."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), seed), number)
  hidden = hide(key, a.eval_batch, max(TEST.needles))
  def part(number, carry):
    state, wrong_B = carry
    data = part_of_rows(key, hidden, TEST, (number * a.length, a.length, parts * a.length))
    _, right, state = advance(model, params, state, data)
    return state, wrong_B | (data['final'] & ~right).any(1)
  longest = max(a.lengths) if 'full' in model.config.mixers else 0
  state = model.init_state(a.eval_batch, longest)
  wrong_B = jax.lax.fori_loop(0, parts, part, (state, jnp.zeros((a.eval_batch,), bool)))[1]
  return (~wrong_B).reshape(-1, len(KINDS)).mean(0)


class Run:
  """One model, all its members: functions to be compiled (`jobs`, then `cases`), training and tests."""

  def __init__(self, config: ModelConfig, a):
    self.model, self.a = build_decoder(config), a
    self.members = [(rate, seed) for rate in a.rates for seed in a.seeds]
    self.rate_M, self.seed_M = jnp.array([r for r, _ in self.members]), jnp.array([s for _, s in self.members], jnp.int32)
    init = lambda seed: init_params(self.model, jax.random.fold_in(jax.random.key(1), seed))[0]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95),
                            optax.add_decayed_weights(0.01, language_models.decays(jax.eval_shape(init, 0))))
    start = jax.vmap(lambda seed: (lambda params: (params, optimizer.init(params)))(init(seed)))
    shapes, number = jax.eval_shape(start, self.seed_M), jax.ShapeDtypeStruct((), jnp.int32)
    train = jax.vmap(functools.partial(train_steps, self.model, optimizer, a), (0, 0, None, 0, 0))
    self.jobs = {'start': (start, (self.seed_M,)), 'train': (train, (*shapes, number, self.rate_M, self.seed_M))}
    test = functools.partial(test_rows, self.model, a)
    self.jobs['test'] = (jax.vmap(test, (0, 0, None, None)), (shapes[0], self.seed_M, number, number))
    self.ways = neural_models.ways(config)
    self.cases: dict[str, common.Case] = {}

  def train(self, name: str, keep=lambda training: None):
    """(parameters, {'curve', 'train_s'}), which is given to `keep` now and then."""
    a, started, curve = self.a, time.perf_counter(), []
    params, moments = self.cases['start'].call(self.seed_M)
    for first in range(0, a.steps, a.per_call):
      params, moments, loss_M, right_M = self.cases['train'].call(params, moments, jnp.int32(first), self.rate_M, self.seed_M)
      curve.append({'step': first + a.per_call, 'loss': np.asarray(loss_M), 'right': np.asarray(right_M)})
      print(f'{name} step {first + a.per_call}: loss {np.array2string(curve[-1]["loss"], precision=3)} right '
            f'{np.array2string(curve[-1]["right"], precision=3)}, {time.perf_counter() - started:.0f} s', flush=True)
      training = {'curve': curve, 'train_s': time.perf_counter() - started}
      keep(training)
      if a.budget and time.perf_counter() - a.started > a.budget: break
    return params, training

  def test(self, params, way: str, length: int, batches: range) -> np.ndarray:
    """Accuracies [M, 3]; batches below 0 are for validation."""
    params = neural_models.held(params, way)
    calls = [self.cases['test'].call(params, self.seed_M, jnp.int32(n), jnp.int32(length // self.a.length)) for n in batches]
    return np.mean([np.asarray(call) for call in calls], 0)


def report_model(name: str, config: ModelConfig, run: Run, keep) -> None:
  """Trains a model, chooses its rate, and tests it at all lengths; `keep` is given what there is as it grows."""
  a, tests = run.a, []
  row = {'model': name, 'parameters': language_models.parameters(config), 'hidden': config.hidden, 'members': run.members, 'tests': tests,
         'compile_s': run.cases['train'].compile_s, 'temporary_mib': run.cases['train'].temporary_mib}
  params, training = run.train(name, lambda training: keep({**row, **training}))
  of_rate = {rate: [i for i, (r, _) in enumerate(run.members) if r == rate] for rate in a.rates}
  valid_M = run.test(params, 'on', a.length, range(-a.batches, 0)).mean(1)
  rate = max(of_rate, key=lambda r: valid_M[of_rate[r]].mean())
  row |= {'rate': rate, 'by_rate': {f'{r:g}': valid_M[of_rate[r]] for r in a.rates}, **training}
  for way in run.ways:
    for length in a.lengths if way == 'on' else a.lengths[::2]:
      started = time.perf_counter()
      found = run.test(params, way, length, range(a.batches))[of_rate[rate]]
      tests.append({'test_time': way, 'length': length, 'seconds': time.perf_counter() - started, 'accuracy': float(found.mean()),
                    'questions': a.batches * a.eval_batch // len(KINDS),
                    **{kind: float(found[:, n].mean()) for n, kind in enumerate(KINDS)}, 'seeds': found})
      print(f'{name} {way} {length}: ' + ', '.join(f'{kind} {tests[-1][kind]:.3f}' for kind in KINDS), flush=True)
      keep(row)


def arguments(argv):
  """The parsed command line."""
  make = common.parser('needle', __doc__)
  make.add_argument('--models', type=lambda text: text.split(';'), default=list(neural_models.NAMES),
                    help=f'separated by ;, some of {"; ".join(neural_models.NAMES)}')
  make.add_argument('--name', default='', help='of this process, for its file')
  make.add_argument('--lengths', type=common.numbers, default=[], help='of test rows, multiples of --length; default 1 to 64 times it')
  make.add_argument('--seeds', type=common.numbers, default=[0, 1, 2])
  make.add_argument('--rates', type=common.rates, default=(3e-3,), help='peak learning rates; validation chooses')
  sizes = dict(width=128, layers=2, heads=4, window=64, chunk=64, length=256, batch=32, steps=800, per_call=100, eval_batch=48, batches=2)
  for option, default in sizes.items(): make.add_argument(f'--{option}', type=int, default=default)
  make.add_argument('--base', type=float, default=16.0, help='gates.theta_base of deep memories')
  make.add_argument('--bias', type=float, default=-3.0, help='gates.theta_bias of deep memories')
  make.add_argument('--lookahead', action=argparse.BooleanOptionalAction, default=True,
                    help='neural memories store the value of a token under the key of the one before')
  make.add_argument('--fuse', default='double_sigmoid', help='how wirings of attention and a memory join them')
  make.add_argument('--unroll', type=int, default=0, help='chunks a step of the compiled loops; 0 = automatic')
  make.add_argument('--budget', type=float, default=0.0, help='seconds after which a training run ends early and is tested; 0 = no limit')
  make.add_argument('--dtype', default='', choices=('', 'float32', 'bfloat16'), help='of compute; default bfloat16 on a GPU')
  a = make.parse_args(argv)
  if a.small:                                    # other defaults; what the command line names still counts
    make.set_defaults(width=64, heads=2, layers=1, window=16, chunk=16, length=128, batch=24, steps=400, seeds=[0], eval_batch=24,
                      models=['LMM', 'window + linear exact', 'window'])
    a = make.parse_args(argv)
  a.lengths = a.lengths or [a.length * times for times in (1, 2, 4, 8, 16, 32, 64)]
  if any(length % a.length for length in a.lengths): make.error(f'--lengths must be multiples of --length {a.length}')
  a.dtype = a.dtype or ('bfloat16' if common.on_gpu() else 'float32')
  a.steps, a.started = max(a.steps // a.per_call, 1) * a.per_call, time.perf_counter()
  return a


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  avoid_crash()
  a = arguments(argv)
  sizes = dict(width=a.width, layers=a.layers, heads=a.heads, window=a.window, chunk=a.chunk, base=a.base, bias=a.bias,
               lookahead=a.lookahead, fuse=a.fuse, unroll=a.unroll, vocabulary=VOCABULARY, dtype=a.dtype,
               embedding=EmbeddingConfig(tie=False, std=0.5))
  count = language_models.parameters(neural_models.model_config(neural_models.NAMES[0], **sizes))
  configs = {name: language_models.matched(neural_models.model_config(name, **sizes), count) for name in a.models}
  runs = {name: Run(config, a) for name, config in configs.items()}
  rows: list[dict[str, Any]] = []
  result = {'options': {k: v for k, v in vars(a).items() if k not in ('output', 'commit', 'started')}, 'chance': CHANCE, 'seeds': a.seeds,
            'dtype': a.dtype, 'rows': rows}
  for name, run in runs.items():
    cases = common.compile_cases({(name, part): job for part, job in run.jobs.items()})
    run.cases = {part: case for (_, part), case in cases.items()}
    size = language_models.parameters(configs[name])
    print(f'{name}: {size:,} parameters, compiled after {time.perf_counter() - a.started:.0f} s', flush=True)
    def keep(row, number=len(rows)):
      rows[number:] = [row]
      common.save('needle' + (f'-{a.name}' if a.name else ''), a.output, result, commit=a.commit)
    report_model(name, configs[name], run, keep)
  flat = [{'model': row['model'], 'parameters': row['parameters'], 'rate': row['rate'], **test} for row in rows for test in row['tests']]
  columns = ('model', 'parameters', 'rate', 'test_time', 'length', *KINDS)
  common.show(f'Needles, trained at {a.length} tokens, {len(a.seeds)} seeds', flat, columns)
  return result


if __name__ == '__main__':
  main()
