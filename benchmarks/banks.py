"""Memory banks against transformers without one, on plain text: equal parameters, equal operations, and what a router that
sees the future is worth once the future is taken away.

Training and scoring are those of `benchmarks.language` (all seeds at once, random windows, the best validation loss keeps its
parameters, every token scored once). The bank is shared by its layers, stands between attention and feed-forward network
(variant A) and is read by chapters. `bank, sequence` chooses chapters by the mean of the whole window, as published runs did: its
score as trained uses the future, its causal score is that of the same parameters routed by the mean of the past.

  python -m benchmarks.banks --train T --valid V --test X --name sotu
  python -m benchmarks.banks --tokens words --train wiki.train.tokens ... --name wikitext2
"""
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common, language, language_models
from memjax.config.banks import BankConfig, BankFormConfig, BankLossConfig, BankShapeConfig, RouterConfig, sees_future
from memjax.config.mixers import AttentionConfig
from memjax.config.schema import BlockConfig, ModelConfig
from memjax.models.decoder import build_decoder, param_shapes
from memjax.runtime.flops import count_flops

STRATEGIES = {'bank, token': 'token', 'bank, prefix-mean': 'prefix-mean', 'bank, chunk': 'chunk', 'bank, sequence': 'sequence'}
NAMES = ('bank, token', 'vanilla, equal parameters', 'vanilla, equal FLOPs', 'vanilla', 'bank, sequence', 'bank, prefix-mean',
         'bank, chunk', 'vanilla, equal FLOPs of one row')


def bank_config(strategy: str, a: Any) -> BankConfig:
  """The bank of the comparison, read by `top_k` of its chapters."""
  router = RouterConfig(strategy=strategy, top_k=a.top_k, allow_noncausal=strategy == 'sequence')
  shape = BankShapeConfig(entries=a.entries, chapters=a.chapters, share='bank')
  return BankConfig(heads=a.heads, shape=shape, router=router, loss=BankLossConfig(balance=0.01), form=BankFormConfig(kind='dense'))


def model_config(name: str, a: Any, vocabulary: int) -> ModelConfig:
  """One of NAMES, its feed-forward width not yet matched."""
  mixers: dict[str, Any] = {'attention': AttentionConfig(heads=a.heads)}
  layers = ('attention',) * a.layers
  if name in STRATEGIES:
    mixers['mem'] = bank_config(STRATEGIES[name], a)
    layers = tuple('attention>mem' if (i + 1) % a.every == 0 else 'attention' for i in range(a.layers))
  return ModelConfig(width=a.width, hidden=a.hidden, vocabulary=vocabulary, mixers=mixers, pattern=(), repeats=0, prefix=layers,
                     block=BlockConfig(dropout=a.dropout), dtype=a.dtype)


def counted(config: ModelConfig, length: int, batch: int) -> float:
  """Forward operations a token of `batch` rows, which share the keys and values of the bank; those of a bank as its routed reads
  need them, whatever the implementation."""
  routed = {name: dataclasses.replace(mixer, form=BankFormConfig(kind='gather')) if mixer.kind == 'bank' else mixer
            for name, mixer in config.mixers.items()}
  model = build_decoder(dataclasses.replace(config, mixers=routed))
  rows = jax.ShapeDtypeStruct((batch, length), 'int32')
  def call(params, token_BxL, position_BxL):
    return model.apply({'params': params}, token_BxL, model.init_state(batch), position_BxL=position_BxL)[0]
  return count_flops(call, param_shapes(model)[0], rows, rows) / (batch * length)


def with_flops(config: ModelConfig, target: float, length: int, batch: int) -> ModelConfig:
  """The config with the hidden width, a multiple of 8, that brings it nearest to so many operations a token."""
  low, high = (counted(dataclasses.replace(config, hidden=hidden), length, batch) for hidden in (8, 16))
  return dataclasses.replace(config, hidden=8 * max(1, round((target - low) / (high - low) + 1)))


def configs_of(a: Any, vocabulary: int) -> dict[str, ModelConfig]:
  """The models by name: banks as given, 'vanilla' their backbone, the other two with wider feed-forward networks."""
  bank = model_config('bank, token', a, vocabulary)
  count = language_models.parameters(bank)
  def make(name):
    config = model_config(name, a, vocabulary)
    if name == 'vanilla, equal parameters': return language_models.matched(config, count)
    if not name.startswith('vanilla, equal FLOPs'): return config
    batch = 1 if name.endswith('of one row') else a.batch
    return with_flops(config, counted(bank, a.length, batch), a.length, batch)
  return {name: make(name) for name in a.models}


class BankRun(language.Run):
  """A run that scores a model whose router sees the future also as the causal model of the same parameters."""

  def __init__(self, config, a, texts):
    super().__init__(config, a, texts)
    self.places.pop('carried', None)
    self.jobs.pop('carried', None)
    self.choices = ['sliding']
    if not any(map(sees_future, config.mixers.values())): return
    causal = dataclasses.replace(config, mixers={**config.mixers, 'mem': bank_config('prefix-mean', a)})
    mapped = jax.vmap(functools.partial(language.sliding, build_decoder(causal), a), (0, None, None, None))
    self.jobs['causal'], self.places['causal'] = (mapped, self.jobs['sliding'][1]), self.places['sliding']


def report(name: str, config: ModelConfig, run: BankRun, a: Any) -> dict[str, Any]:
  """The row of one model: scores as trained, causal scores where they differ, what it costs."""
  row = language.report_model(name, config, run)
  chosen = [i for i, (rate, _) in enumerate(run.members) if rate == row['rate']]
  row['flops_a_token'] = counted(config, a.length, a.batch)
  row['noncausal_routing'] = 'causal' in run.places
  if row['noncausal_routing']:
    nll_M, text = row['test_nll']['causal'][chosen], run.texts['test']
    row['causal_perplexity'], row['causal_bits_per_byte'] = np.exp(nll_M).mean(), (nll_M / np.log(2) * text.tokens / text.bytes).mean()
  return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  def more(make):
    sizes = dict(entries=2048, chapters=64, top_k=4, every=2)
    for option, default in sizes.items(): make.add_argument(f'--{option}', type=int, default=default)
    make.add_argument('--append', action='store_true', help='keep the other models of the output file')
    make.set_defaults(models=list(NAMES[:-1]))
  a = language.arguments(argv, more=more, name='banks', description=__doc__)
  texts, vocabulary = language.read_texts({s: getattr(a, s) for s in ('train', 'valid', 'test')}, a.tokens, a.length * (a.lanes + 2),
                                          tuple(a.room))
  name, configs = 'banks' + (f'-{a.name}' if a.name else ''), configs_of(a, vocabulary)
  print('parameters: ' + ', '.join(f'{model} {language_models.parameters(c):,}' for model, c in configs.items()), flush=True)
  options = {k: v for k, v in vars(a).items() if k not in ('train', 'valid', 'test', 'output', 'commit', 'started')}
  path = common.target_path(name, a.output)
  found = json.loads(path.read_text(encoding='utf-8'))['rows'] if a.append and path is not None and path.exists() else []
  rows: list[dict[str, Any]] = [row for row in found if row['model'] not in configs]
  result = {'options': options, 'vocabulary': vocabulary, 'tokens': {s: t.tokens for s, t in texts.items()}, 'rows': rows,
            'bytes': {s: t.bytes for s, t in texts.items()}}
  runs = {model: BankRun(config, a, texts) for model, config in configs.items()}
  cases = common.compile_cases({(model, part): job for model, run in runs.items() for part, job in run.jobs.items()})
  for (model, part), case in cases.items(): runs[model].cases[part] = case
  print(f'compiled after {time.perf_counter() - a.started:.0f} s', flush=True)
  for model, config in configs.items():
    rows.append(report(model, config, runs[model], a))
    rows.sort(key=lambda row: NAMES.index(row['model']))
    common.save(name, a.output, result, commit=a.commit)
  title = (f'{a.name or "Text"}: {a.tokens}, width {a.width}, {a.layers} layers, {a.entries} entries in {a.chapters} chapters, '
           f'top {a.top_k}, {a.batch} x {a.length} a step, {a.seeds} seeds, {a.dtype}')
  common.show(title, rows, ('model', 'parameters', 'flops_a_token', 'bits_per_byte', 'causal_bits_per_byte', 'spread', 'perplexity',
                            'causal_perplexity', 'steps', 'train_s', 'tokens_per_second'))
  figure = common.target_path(name, a.output, '.png')
  if figure is not None: language.draw(rows, figure, title)
  return result


if __name__ == '__main__':
  main()
