"""Multi-query associative recall (Arora et al. 2023) against bytes of state: every memory, equal state beside each other.

Two layers of mixing without feed-forward networks, AdamW one-cycle, clip 1, decay .01, batch 32 (64 for the large
setting, which trains on 4 to 64 pairs in turn, as zoology mixes sizes, and is tested on 64). Each row trains every
seed at every peak rate, all at once; the rate is chosen by mean accuracy on validation batches and the accuracy at the
queries of fresh test batches is reported. State is that of one layer: floats of the memory itself, and all bytes of a row
(short-convolution tail, cache and counters included).

  python -m benchmarks.recall --small                        two CPU cores, a few minutes
  python -m benchmarks.recall                                one H200, see --settings and --budget
"""
import functools
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, recall_rows
from memjax.data.synthetic import mqar
from memjax.models.decoder import build_decoder, init_params
from memjax.runtime.workarounds import avoid_crash


class Setting(NamedTuple):
  """A task, a model width and what is trained on it: N pairs, T tokens, V words; `mixture`: pairs trained on in turn, () = N alone."""
  width: int
  pairs: int
  length: int
  vocabulary: int
  steps: int
  rates: tuple[float, ...]
  rows: dict[str, recall_rows.Make]
  batch: int = 32
  mixture: tuple[int, ...] = ()


SETTINGS = {
  'equal': Setting(64, 16, 64, 128, 2000, (5e-3, 1e-2, 2e-2), recall_rows.EQUAL),
  'wide': Setting(256, 16, 64, 128, 3000, (2e-3, 5e-3), recall_rows.WIDE),
  'kinds': Setting(64, 8, 32, 128, 1600, (3e-3, 1e-2), recall_rows.KINDS),
  'curve': Setting(64, 16, 64, 128, 2000, (5e-3, 1e-2, 2e-2), recall_rows.CURVE),
  'preset': Setting(64, 16, 64, 128, 2000, (5e-3, 1e-2, 2e-2), recall_rows.PRESET),
  'neural': Setting(64, 16, 64, 128, 2000, (5e-3, 1e-2), recall_rows.NEURAL),
  'large': Setting(128, 64, 256, 8192, 6000, (1e-3, 3e-3), recall_rows.LARGE, batch=64, mixture=(4, 8, 16, 32, 64)),
}
CURVES = 'equal', 'curve', 'neural'         # settings of one task, which the figure shows


class Job(NamedTuple):
  """The compiled functions of one row and what it stores."""
  start: common.Case
  train: common.Case
  evaluate: common.Case
  about: dict[str, Any]


def plan(setting: Setting, make: recall_rows.Make, members: list[tuple[float, int]], per_call: int) -> dict[str, Any]:
  """{'start', 'train', 'evaluate'}: functions over all members (peak rate, seed) at once; 'about': sizes of the model."""
  model = build_decoder(recall_rows.model_config(make, width=setting.width, vocabulary=setting.vocabulary))
  rate_M, seed_M = jnp.array([r for r, _ in members]), jnp.array([s for _, s in members], jnp.int32)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01))
  schedule = optax.cosine_onecycle_schedule(setting.steps, 1.0, 0.1)
  task = dict(batch=setting.batch, length=setting.length, vocabulary=setting.vocabulary)
  kinds = [functools.partial(mqar, pairs=pairs, **task) for pairs in setting.mixture or (setting.pairs,)]

  def loss(params, data, key):
    logits_BxLxA, _, aux = model.apply({'params': params}, data['token'], model.init_state(setting.batch), position_BxL=data['position'],
                                       key=key)
    nll_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxA, data['target'])
    right_BxL = (jnp.argmax(logits_BxLxA, -1) == data['target']) & data['weight']
    count = data['weight'].sum()
    penalty = aux['penalty'] if key is not None else 0.0
    return jnp.where(data['weight'], nll_BxL, 0).sum() / count + penalty, right_BxL.sum() / count

  def start(seed):
    params = init_params(model, jax.random.fold_in(jax.random.key(1), seed))[0]
    return params, optimizer.init(params)

  def train(params, moments, first, rate, seed):
    def step(carry, number):
      params, moments = carry
      key, key_layers = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), number))
      data = jax.lax.switch(number % len(kinds), kinds, key)
      (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params, data, key_layers)
      updates, moments = optimizer.update(grads, moments, params)
      size = -rate * schedule(number)
      return (jax.tree.map(lambda p, u: p + size * u, params, updates), moments), (value, right)
    (params, moments), (value, right) = jax.lax.scan(step, (params, moments), first + jnp.arange(per_call))
    return params, moments, value.mean(), right.mean()

  def evaluate(params, seed, batches):
    def step(_, number):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), seed), number)
      return _, loss(params, kinds[-1](key), None)[1]
    return jax.lax.scan(step, None, batches)[1].mean()

  state = jax.eval_shape(lambda: model.init_state(1, setting.length))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  slots = [leaf.size for path, leaf in leaves if leaf.dtype == jnp.float32 and 'tail' not in jax.tree_util.keystr(path)]
  shapes = jax.eval_shape(jax.vmap(start), seed_M)
  batches = jax.ShapeDtypeStruct((64,), jnp.int32)
  return {'start': (jax.vmap(start), (seed_M,)), 'evaluate': (jax.vmap(evaluate, (0, 0, None)), (shapes[0], seed_M, batches)),
          'train': (jax.vmap(train, (0, 0, None, 0, 0)), (*shapes, jax.ShapeDtypeStruct((), jnp.int32), rate_M, seed_M)),
          'about': {'parameters': sum(p.size for p in jax.tree.leaves(shapes[0])) // len(members), 'state_floats': sum(slots) // 2,
                    'state_bytes': sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) // 2}}


def run_row(job: Job, setting: Setting, members: list[tuple[float, int]], per_call: int) -> dict[str, Any]:
  """Trains all members to the end; {'accuracy', 'seeds', 'rate', 'by_rate', 'steps_to_95', 'curve', 'train_s', ...}."""
  started = time.perf_counter()
  rate_M, seed_M = job.train.arguments[-2:]
  params, moments = job.start.call(seed_M)
  history = []
  for first in range(0, setting.steps, per_call):
    params, moments, _, right_M = job.train.call(params, moments, jnp.int32(first), rate_M, seed_M)
    history.append(right_M)
  validation, test = (np.asarray(job.evaluate.call(params, seed_M, jnp.arange(64) + offset)) for offset in (0, 64))
  rates = sorted({rate for rate, _ in members})
  of_rate = {rate: [i for i, (r, _) in enumerate(members) if r == rate] for rate in rates}
  best = max(rates, key=lambda rate: validation[of_rate[rate]].mean())
  chosen, curve_NxM = of_rate[best], np.stack([np.asarray(h) for h in history])
  mean_N = curve_NxM[:, chosen].mean(1)
  reached = np.flatnonzero(mean_N >= 0.95)
  return {'accuracy': float(test[chosen].mean()), 'seeds': test[chosen], 'worst': float(test[chosen].min()), 'rate': best,
          'by_rate': {f'{r:g}': test[of_rate[r]] for r in rates}, 'steps_to_95': int(reached[0] + 1) * per_call if len(reached) else None,
          'curve': mean_N[::max(1, len(mean_N) // 20)], 'train_s': time.perf_counter() - started,
          'compile_s': job.train.compile_s, **job.about}


def compile_rows(setting: Setting, rows: dict[str, recall_rows.Make], members, per_call: int) -> dict[str, Job]:
  """Every row compiled, on an accelerator several at a time."""
  plans = {name: plan(setting, make, members, per_call) for name, make in rows.items()}
  parts = ('start', 'train', 'evaluate')
  cases = common.compile_cases({f'{name}/{part}': p[part] for name, p in plans.items() for part in parts})
  return {name: Job(*(cases[f'{name}/{part}'] for part in parts), p['about']) for name, p in plans.items()}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """What the project promises of recall; None where this run lacks a row."""
  found = {(r['setting'], r['row']): r['accuracy'] for r in rows}
  peers = [a for (setting, row), a in found.items() if setting == 'equal' and row.startswith(('linear', 'delta', 'gated'))]
  out = [{'what': 'D 256, 16 pairs, length 64: default addresses', 'value': found.get(('wide', 'holographic')), 'target': 0.99}]
  for row, name in (('holographic', 'default addresses'), ('small_state', 'small_state')):
    value = found.get(('equal', row))
    out += [{'what': f'D 64, 16 pairs, length 64, 512 floats: {name}', 'value': value, 'target': 0.975},
            {'what': 'the same, above the best linear attention or delta rule by', 'target': 0.0,
             'value': value - max(peers) if value is not None and peers else None}]
  return out


def draw(rows: list[dict[str, Any]], path) -> None:
  """Accuracy over bytes of the memory and over all bytes carried, one line a family; settings of CURVES."""
  import matplotlib
  matplotlib.use('agg')
  import matplotlib.pyplot as plt
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
  families: dict[str, list] = {}
  for row in rows:
    if row['setting'] not in CURVES or 'norm' in row['row']: continue
    name, _, size = row['row'].partition(', ')
    name = 'window attention' if name.startswith('window') else name if size[:1].isdigit() else row['row']
    families.setdefault(name, []).append(row)
  for axes, bytes_of in zip(panels, (lambda r: 4 * r['state_floats'], lambda r: r['state_bytes']), strict=True):
    for name, members in families.items():
      members.sort(key=bytes_of)
      line, = axes.plot([bytes_of(r) for r in members], [r['accuracy'] for r in members], 'o-', label=name, markersize=4)
      for r in members: axes.plot([bytes_of(r)] * len(r['seeds']), r['seeds'], '.', color=line.get_color(), alpha=0.5, markersize=3)
    axes.set(xscale='log', ylim=(-0.02, 1.02))
  panels[0].set(xlabel='bytes of the memory, a layer and row', ylabel='accuracy at the queries', title='16 pairs in 64 tokens, width 64')
  panels[1].set(xlabel='all bytes carried, short-convolution tail included')
  panels[1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def run_setting(name: str, setting: Setting, a, save, done: list[dict[str, Any]]) -> None:
  """Trains the rows of one setting, adding each to `done` and saving after each; over budget, rows are left out and say so."""
  members = [(rate, seed) for rate in setting.rates for seed in range(a.seeds)]
  per_call = min(a.per_call, setting.steps)
  setting = setting._replace(steps=setting.steps // per_call * per_call)
  compiled, new = {} if a.lazy else compile_rows(setting, setting.rows, members, per_call), []
  for row, make in setting.rows.items():
    if a.budget and time.perf_counter() - a.started > a.budget:
      print(f'left out for lack of time: {name}/{row}', flush=True)
      continue
    job = compiled.pop(row, None) or compile_rows(setting, {row: make}, members, per_call)[row]
    new.append({'setting': name, 'row': row, **run_row(job, setting, members, per_call)})
    done.append(new[-1])
    print(f'{name}/{row}: {new[-1]["accuracy"]:.4f} in {new[-1]["train_s"]:.0f} s', flush=True)
    save(done)
  title = (f'{name}: width {setting.width}, {setting.pairs} pairs, length {setting.length}, vocabulary {setting.vocabulary}, '
           f'{setting.steps} steps, {a.seeds} seeds (guessing among the values in context: {1 / setting.pairs:.3f})')
  common.show(title, new,
              ('row', 'accuracy', 'worst', 'rate', 'steps_to_95', 'state_floats', 'state_bytes', 'parameters', 'train_s', 'compile_s'))


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the tables; returns the result."""
  avoid_crash()
  make = common.parser('recall', __doc__)
  make.add_argument('--settings', type=common.words, default=[], help=f'some of {",".join(SETTINGS)}; default all but preset')
  make.add_argument('--rows', type=lambda text: text.split(';'), default=[], help='names of rows, separated by ;')
  make.add_argument('--seeds', type=int, default=3)
  make.add_argument('--rates', type=common.rates, default=(), help='peak learning rates; default by setting')
  make.add_argument('--steps', type=int, default=0, help='default by setting')
  make.add_argument('--batch', type=int, default=0, help='default by setting')
  make.add_argument('--width', type=int, default=0, help='default by setting')
  make.add_argument('--per_call', type=int, default=200, help='steps a compiled call')
  make.add_argument('--budget', type=float, default=0, help='seconds after which no row is started; 0 = no limit')
  make.add_argument('--append', action='store_true', help='keep the other rows of the output file')
  make.add_argument('--lazy', action='store_true', help='compile each row when its turn comes, instead of all of a setting first')
  a = make.parse_args(argv)
  a.started = time.perf_counter()
  if a.small:
    a.settings, a.steps, a.rates, a.rows = a.settings or ['kinds'], a.steps or 1000, a.rates or (1e-2,), a.rows or ['small_state']
  rows: list[dict[str, Any]] = []
  path = common.target_path('recall', a.output)
  kept = json.loads(path.read_text(encoding='utf-8'))['rows'] if a.append and path is not None and path.exists() else []
  def save(new):
    made = {(row['setting'], row['row']) for row in new}
    rows = [row for row in kept if (row['setting'], row['row']) not in made] + new
    result = {'seeds': list(range(a.seeds)), 'settings': {n: [v for v in s if not isinstance(v, dict)] for n, s in SETTINGS.items()},
              'rows': rows, 'targets': targets(rows)}
    common.save('recall', a.output, result, commit=a.commit)
    return result
  for name in a.settings or [name for name in SETTINGS if name != 'preset']:
    setting = SETTINGS[name]
    chosen = {row: make for row, make in setting.rows.items() if not a.rows or row in a.rows}
    setting = setting._replace(rows=chosen, batch=a.batch or setting.batch, steps=a.steps or setting.steps, rates=a.rates or setting.rates,
                               width=a.width or setting.width)
    if chosen: run_setting(name, setting, a, save, rows)
  result = save(rows)
  common.judge(result['targets'])
  figure = common.target_path('recall', a.output, '.png')
  if figure is not None and any(row['setting'] in CURVES for row in result['rows']): draw(result['rows'], figure)
  return result


if __name__ == '__main__':
  main()
