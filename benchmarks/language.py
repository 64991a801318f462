"""Language modelling on plain text: bits per byte or word perplexity of models with equal parameters, several seeds.

Every seed at every peak rate trains at once, on random windows gathered on the device. AdamW, warm-up and cosine; the best
validation loss keeps its parameters, and training ends when no member has improved for --patience evaluations. The rate is
chosen by validation. Every token is scored exactly once: in windows that overlap by --context, of which only the new part
counts, or, for memories of fixed size, along contiguous lanes with the state carried; validation chooses between the two.
Models of `neural_models` are scored along lanes also frozen (their memories do not learn) and off (what they read is zeros).

  python -m benchmarks.language --train T --valid V --test X                       bytes
  python -m benchmarks.language --tokens words --train wiki.train.tokens ...       words and <eos>
  python -m benchmarks.language ... --models "MAC;MAG" --like MAC                  two of neural_models
"""
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, language_models, neural_models
from memjax.data.tokenizers import ByteTokenizer, WordTokenizer
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.workarounds import avoid_crash


class Text(NamedTuple):
  """A split on the device: bos, its tokens, padding; how many tokens; bytes of the text."""
  stream: jax.Array
  tokens: int
  bytes: int


def read_texts(paths: dict[str, str], kind: str, spare: int, room: tuple[int, int] = (0, 0)) -> tuple[dict[str, Text], int]:
  """({split: Text}, vocabulary); the words are those of the training text. Held-out streams are padded to one length.

  `room`: tokens to which training and held-out streams are padded at least, so that several texts share compiled programs.
  """
  raw = {}
  for split, path in paths.items():
    with open(path, encoding='utf-8', newline='') as file: raw[split] = file.read()
  tokenizer = ByteTokenizer() if kind == 'bytes' else WordTokenizer.train([raw['train']])
  ids = {split: tokenizer.encode(text) for split, text in raw.items()}
  longest = max(len(ids['valid']), len(ids['test']), room[1])
  def place(split):
    size = max(len(ids['train']), room[0]) if split == 'train' else longest
    stream = np.zeros(size + 1 + spare, np.int32)
    stream[0], stream[1:len(ids[split]) + 1] = tokenizer.bos, ids[split]
    return Text(jnp.asarray(stream), len(ids[split]), len(raw[split].encode()))
  return {split: place(split) for split in raw}, tokenizer.vocabulary


def window(stream: jax.Array, start_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """(inputs, targets) [B, L] from each start; target i is token start + i, its input the one before."""
  rows = jax.vmap(lambda start: jax.lax.dynamic_slice(stream, (start,), (length + 1,)))(start_B)
  return rows[:, :-1], rows[:, 1:]


def losses(model, params, state, tokens, **context):
  """(nll [B, L], state, penalty)."""
  logits, state, aux = model.apply({'params': params}, tokens[0], state, **context)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1]), state, aux['penalty']


def sliding(model, a, params, stream, tokens, starts_NxB):
  """Sums of (nll, tokens scored) of each batch of windows; only the first window scores its first `context` positions."""
  position = jnp.broadcast_to(jnp.arange(a.length)[None], (starts_NxB.shape[1], a.length))
  def batch(carry, start_B):
    nll = losses(model, params, model.init_state(len(start_B)), window(stream, start_B, a.length), position_BxL=position)[0]
    counts = (start_B[:, None] + position < tokens) & ((position >= a.context) | (start_B[:, None] == 0))
    return carry, (jnp.where(counts, nll, 0).sum(), counts.sum())
  return jax.lax.scan(batch, None, starts_NxB)[1]


def carried(model, a, params, stream, tokens, segments_N):
  """The same along `lanes` contiguous parts of the text, each starting from an empty memory that is then carried to its end."""
  count = -(-tokens // (a.lanes * a.length))
  first_B = jnp.arange(a.lanes) * (count * a.length)
  def segment(number, carry):
    state, *sums = carry
    start_B = first_B + number * a.length
    position = jnp.broadcast_to(number * a.length + jnp.arange(a.length)[None], (a.lanes, a.length))
    nll, state, _ = losses(model, params, state, window(stream, start_B, a.length), position_BxL=position)
    counts = start_B[:, None] + jnp.arange(a.length)[None] < tokens
    return state, *(old.at[number].set(new) for old, new in zip(sums, (jnp.where(counts, nll, 0).sum(), counts.sum()), strict=True))
  empty = jnp.zeros(len(segments_N)), jnp.zeros(len(segments_N), jnp.int32)
  return jax.lax.fori_loop(0, count, segment, (model.init_state(a.lanes), *empty))[1:]


def make_optimizer(a, params):
  """AdamW of peak rate 1; the rate of a member multiplies its updates."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, a.warmup, a.steps, 0.1)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95),
                     optax.add_decayed_weights(a.weight_decay, language_models.decays(params)), optax.scale_by_schedule(schedule))


def train_steps(model, optimizer, a, params, moments, stream, tokens, first, rate, seed):
  """(params, moments, mean loss) after `per_call` steps of one member."""
  position = jnp.broadcast_to(jnp.arange(a.length)[None], (a.batch, a.length))
  def step(carry, number):
    params, moments = carry
    key, key_layers = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), number))
    start_B = jax.random.randint(key, (a.batch,), 0, tokens - a.length + 1)
    def loss(params):
      nll, _, penalty = losses(model, params, model.init_state(a.batch), window(stream, start_B, a.length), position_BxL=position,
                               key=key_layers)
      return nll.mean() + penalty, nll.mean()
    (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments, params)
    return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), value
  (params, moments), value = jax.lax.scan(step, (params, moments), first + jnp.arange(a.per_call))
  return params, moments, value.mean()


@jax.jit
def choose_rows(which_M, new, old):
  """`new` in the members that `which` marks, `old` in the others."""
  return jax.tree.map(lambda n, o: jnp.where(which_M.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old)


class Run:
  """One model, all its members: functions to be compiled (`jobs`, then `cases`), training, evaluation."""

  def __init__(self, config, a, texts: dict[str, Text]):
    self.model, self.a, self.texts = build_decoder(config), a, texts
    self.members = [(rate, seed) for rate in a.rates for seed in range(a.seeds)]
    self.rate_M, self.seed_M = jnp.array([r for r, _ in self.members]), jnp.array([s for _, s in self.members], jnp.int32)
    init = lambda seed: init_params(self.model, jax.random.fold_in(jax.random.key(1), seed))[0]
    optimizer = make_optimizer(a, jax.eval_shape(init, 0))
    start = jax.vmap(lambda seed: (lambda params: (params, optimizer.init(params)))(init(seed)))
    shapes, number, split = jax.eval_shape(start, self.seed_M), jax.ShapeDtypeStruct((), jnp.int32), texts['valid']
    train = jax.vmap(functools.partial(train_steps, self.model, optimizer, a), (0, 0, None, None, None, 0, 0))
    self.jobs = {'start': (start, (self.seed_M,)),
                 'train': (train, (*shapes, texts['train'].stream, number, number, self.rate_M, self.seed_M))}
    recurrent = not any(mixer.kind == 'attention' for mixer in config.mixers.values())
    self.places = {} if a.carried and recurrent else {'sliding': self._windows()}
    if recurrent: self.places['carried'] = self._segments()
    for name, function in {'sliding': sliding, 'carried': carried}.items():
      if name not in self.places: continue
      mapped = jax.vmap(functools.partial(function, self.model, a), (0, None, None, None))
      self.jobs[name] = (mapped, (shapes[0], split.stream, number, self.places[name]))
    self.choices = list(self.places)               # ways of evaluation that validation chooses between
    self.held = neural_models.ways(config)[1:]
    self.cases: dict[str, common.Case] = {}

  def _longest(self) -> int:
    return max(self.texts['valid'].tokens, self.texts['test'].tokens, self.a.room[1])

  def _windows(self):
    """Starts [N, B] of the windows; those that fill the last batch begin behind the text and score nothing."""
    starts = np.arange(0, max(self._longest() - self.a.context, 1), self.a.length - self.a.context)
    rows = -(-len(starts) // self.a.eval_batch) * self.a.eval_batch
    return jnp.asarray(np.pad(starts, (0, rows - len(starts)), constant_values=self._longest()).reshape(-1, self.a.eval_batch), jnp.int32)

  def _segments(self):
    return jnp.arange(-(-self._longest() // (self.a.lanes * self.a.length)), dtype=jnp.int32)

  def evaluate(self, params, split: str, how: str) -> np.ndarray:
    """nll per token of each member, float64; ValueError should a token be missed or scored twice."""
    text = self.texts[split]
    sums = self.cases[how].call(params, text.stream, jnp.int32(text.tokens), self.places[how])
    nll, count = (np.asarray(x, np.float64).sum(1) for x in sums)
    if not (count == text.tokens).all(): raise ValueError(f'{split} scores {count} of {text.tokens} tokens')
    return nll / text.tokens

  def train(self, name: str, keep=lambda training: None):
    """(best parameters, {'best_step', 'curve', 'tokens_per_second', ...}), which is given to `keep` after each evaluation."""
    a, text, started, spent = self.a, self.texts['train'], time.perf_counter(), 0.0
    params, moments = self.cases['start'].call(self.seed_M)
    best, best_M, step_M = params, np.full(len(self.members), np.inf), np.zeros(len(self.members), int)
    curve, first = [], 0
    while first < a.steps:
      begun = time.perf_counter()
      for _ in range(a.eval_every // a.per_call):
        params, moments, value_M = self.cases['train'].call(params, moments, text.stream, jnp.int32(text.tokens), jnp.int32(first),
                                                            self.rate_M, self.seed_M)
        first += a.per_call
      value_M = np.asarray(value_M)
      spent += time.perf_counter() - begun
      valid_M = self.evaluate(params, 'valid', self.choices[0])
      better = valid_M < best_M
      best, best_M, step_M = choose_rows(jnp.asarray(better), params, best), np.minimum(valid_M, best_M), np.where(better, first, step_M)
      curve.append({'step': first, 'train': value_M, 'valid': valid_M})
      print(f'{name} step {first}: train {value_M.mean():.4f} valid {np.array2string(valid_M, precision=4)}', flush=True)
      training = {'best_step': step_M, 'steps': first, 'curve': curve, 'train_s': time.perf_counter() - started,
                  'tokens_per_second': first * a.batch * a.length * len(self.members) / spent}
      keep(training)
      if a.patience and (first - step_M >= a.patience * a.eval_every).all(): break
      if a.budget and time.perf_counter() - a.started > a.budget: break
    return best, training


def report_model(name: str, config, run: Run, keep=lambda row: None) -> dict[str, Any]:
  """Trains a model and scores the test text: rate and way of evaluation by validation, every member's figures kept.

  `keep` is given what there is after each evaluation, should the run be cut short.
  """
  about = {'model': name, 'parameters': language_models.parameters(config), 'hidden': config.hidden, 'members': run.members,
           'compile_s': run.cases['train'].compile_s, 'temporary_mib': run.cases['train'].temporary_mib}
  best, training = run.train(name, lambda training: keep({**about, **training}))
  valid = {how: run.evaluate(best, 'valid', how) for how in run.places}
  of_rate = {rate: [i for i, (r, _) in enumerate(run.members) if r == rate] for rate in run.a.rates}
  rate, how = min(((r, h) for r in of_rate for h in run.choices), key=lambda rh: valid[rh[1]][of_rate[rh[0]]].mean())
  test = {h: run.evaluate(best, 'test', h) for h in run.places}
  chosen, text = of_rate[rate], run.texts['test']
  nll_M = test[how][chosen]
  bits = nll_M / math.log(2) * text.tokens / text.bytes
  row = {**about, 'rate': rate, 'evaluation': how, 'bits_per_byte': bits.mean(), 'bits_per_byte_seeds': bits,
         'spread': bits.max() - bits.min(), 'perplexity': np.exp(nll_M).mean(), 'perplexity_seeds': np.exp(nll_M), 'valid_nll': valid,
         'test_nll': test, **training}
  for way in run.held:
    keep(row)
    test[way] = run.evaluate(neural_models.held(best, way), 'test', 'carried')
  return row


def draw(rows: list[dict[str, Any]], path, title: str) -> None:
  """Validation loss over steps, mean of the seeds at the chosen rate."""
  import matplotlib
  matplotlib.use('agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(figsize=(7, 4.5))
  for row in rows:
    chosen = [i for i, (rate, _) in enumerate(row['members']) if rate == row['rate']]
    axes.plot([p['step'] for p in row['curve']], [np.asarray(p['valid'])[chosen].mean() for p in row['curve']],
              label=f'{row["model"]} (test {row["bits_per_byte"]:.3f} bits per byte)')
  axes.set(xlabel='step', ylabel='validation loss, nats per token', title=title)
  axes.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def arguments(argv, *, more=None, name: str = 'language', description: str = __doc__):
  """The parsed command line, with the automatic values filled in; `more` adds options to the parser of another benchmark."""
  make = common.parser(name, description)
  for split in ('train', 'valid', 'test'): make.add_argument(f'--{split}', required=True, help='a UTF-8 text file')
  make.add_argument('--name', default='', help='of the text, for the table and the file')
  make.add_argument('--tokens', choices=('bytes', 'words'), default='bytes')
  make.add_argument('--models', type=lambda text: text.split(';'), default=list(language_models.NAMES[:4]),
                    help=f'separated by ;, some of {"; ".join((*language_models.NAMES, *neural_models.NAMES))}')
  make.add_argument('--carried', action='store_true', help='score memories of fixed size along lanes alone')
  make.add_argument('--like', default='', help='model that sets the number of parameters; default the first')
  sizes = dict(width=256, layers=4, heads=4, hidden=0, window=64, batch=32, length=256, context=-1, steps=2000, warmup=100, eval_every=200,
               per_call=50, patience=0, seeds=3, eval_batch=32, lanes=4)
  for option, default in sizes.items(): make.add_argument(f'--{option}', type=int, default=default)
  make.add_argument('--rates', type=common.rates, default=(2e-3,), help='peak learning rates; validation chooses')
  make.add_argument('--dropout', type=float, default=0.0)
  make.add_argument('--weight_decay', type=float, default=0.1)
  for option, default in dict(chunk=64, base=1.0, bias=0.0, fuse='double_sigmoid', unroll=0).items():
    make.add_argument(f'--{option}', type=type(default), default=default, help='of neural_models')
  make.add_argument('--room', type=common.numbers, default=[0, 0], help='tokens to which training and held-out text are padded at least, '
                    'so that runs on several texts can share compiled programs')
  make.add_argument('--budget', type=float, default=0.0, help='seconds after which a training run ends early and is scored; 0 = no limit')
  make.add_argument('--dtype', default='', choices=('', 'float32', 'bfloat16'), help='of compute; default bfloat16 on a GPU')
  if more: more(make)
  a = make.parse_args(argv)
  if a.small:                                    # other defaults; what the command line names still counts
    make.set_defaults(width=64, layers=2, steps=400, seeds=1, batch=16, length=128)
    a = make.parse_args(argv)
  a.like, a.started = a.like or a.models[0], time.perf_counter()
  a.context = a.length // 2 if a.context < 0 else a.context
  a.dtype = a.dtype or ('bfloat16' if common.on_gpu() else 'float32')
  a.eval_every = max(a.per_call, a.eval_every // a.per_call * a.per_call)
  if not 0 <= a.context < a.length: make.error(f'--context {a.context} must be below --length {a.length}')
  return a


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  avoid_crash()
  a = arguments(argv)
  paths = {split: getattr(a, split) for split in ('train', 'valid', 'test')}
  texts, vocabulary = read_texts(paths, a.tokens, a.length * (a.lanes + 2), tuple(a.room))
  name = 'language' + (f'-{a.name}' if a.name else '')
  sizes = dict(width=a.width, layers=a.layers, heads=a.heads, window=a.window, vocabulary=vocabulary, dropout=a.dropout, dtype=a.dtype)
  def config_of(model):
    if model in language_models.NAMES: return language_models.model_config(model, hidden=a.hidden, **sizes)
    return neural_models.model_config(model, hidden=a.hidden, chunk=a.chunk, base=a.base, bias=a.bias, fuse=a.fuse,
                                      unroll=a.unroll, **sizes)
  count = language_models.parameters(config_of(a.like))
  configs = {model: config_of(model) if model == a.like else language_models.matched(config_of(model), count) for model in a.models}
  print('parameters: ' + ', '.join(f'{model} {language_models.parameters(c):,}' for model, c in configs.items()), flush=True)
  rows, options = [], {k: v for k, v in vars(a).items() if k not in ('train', 'valid', 'test', 'output', 'commit', 'started')}
  result = {'options': options, 'vocabulary': vocabulary, 'tokens': {s: t.tokens for s, t in texts.items()}, 'rows': rows,
            'bytes': {s: t.bytes for s, t in texts.items()}}
  runs = {model: Run(config, a, texts) for model, config in configs.items()}
  cases = common.compile_cases({(model, part): job for model, run in runs.items() for part, job in run.jobs.items()})
  for (model, part), case in cases.items(): runs[model].cases[part] = case
  print(f'compiled after {time.perf_counter() - a.started:.0f} s', flush=True)
  for number, (model, config) in enumerate(configs.items()):
    def keep(row, number=number):
      rows[number:] = [row]
      common.save(name, a.output, result, commit=a.commit)
    keep(report_model(model, config, runs[model], keep))
  title = f'{a.name or "Text"}: {a.tokens}, width {a.width}, {a.layers} layers, {a.batch} x {a.length} a step, {a.seeds} seeds, {a.dtype}'
  common.show(title, rows, ('model', 'parameters', 'bits_per_byte', 'spread', 'perplexity', 'rate', 'evaluation', 'steps', 'train_s',
                            'tokens_per_second', 'compile_s'))
  figure = common.target_path(name, a.output, '.png')
  if figure is not None: draw(rows, figure, title)
  return result


if __name__ == '__main__':
  main()
