"""A pretrained host as it is, with a memory bank, with LoRA, and with both: equal numbers of trained parameters on a frozen host.

Each is trained on one text and scored on the held-out part of that and of a second text, before and after: what was learned, and
what was forgotten. Configurations are those that ship (`adapter_smollm2_135m`, `lora_only`); `both` has half of each: the bank after
half as many layers, LoRA of half the rank. The rates of a row are those of its config times a factor that the validation loss of
the first seed chooses; then all seeds train with it.

  python -m benchmarks.adapters --host MODEL.gguf --target FOLDER --other FOLDER
"""
import concurrent.futures
import dataclasses
import math
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common
from memjax.adapters.graft import graft, host_of
from memjax.adapters.lora import with_lora
from memjax.config.files import load_file
from memjax.config.placement import train_only
from memjax.config.schema import Config, DataConfig, ModelConfig
from memjax.data.pipeline import train_batches
from memjax.data.tokens import tokenize_split
from memjax.layers.tree import named
from memjax.models.decoder import inference_model
from memjax.runtime import sharding
from memjax.runtime.evaluation import make_scorer
from memjax.runtime.state import make_train_step
from memjax.runtime.words import open_words
from memjax.train import Parts, build, first_state

ROWS = ('memory', 'lora', 'both')
CONFIGS = 'configs'


def model_of(row: str, host: str) -> tuple[ModelConfig, dict[str, Any]]:
  """(the model of a row, the groups of its optimiser that are trained)."""
  bank = load_file(os.path.join(CONFIGS, f'adapter_smollm2_135m.py:{host}'))
  lora = load_file(os.path.join(CONFIGS, f'lora_only.py:{host}'))
  trained = {name: group for config in (bank, lora) for name, group in config.optimizer.groups.items() if group.rate}
  if row == 'memory': return bank.model, {name: trained[name] for name in ('memory', 'memory_bank')}
  if row == 'lora': return lora.model, {'lora': trained['lora']}
  plain = host_of(bank.model)
  where = range(plain.depth)[9::10] or (plain.depth - 1,)
  model = graft(plain, bank.model.mixers['memory'], where=where, sharing='shared')
  change = lora.model.block.lora
  return with_lora(model, dataclasses.replace(change, rank=change.rank // 2, alpha=change.alpha / 2)), trained


def config_of(row: str, factor: float, a: Any) -> Config:
  """The configuration of a run; every rate multiplied by `factor`."""
  base = load_file(os.path.join(CONFIGS, f'adapter_smollm2_135m.py:{a.host}'))
  model, groups = model_of(row, a.host)
  model = dataclasses.replace(model, dtype=a.dtype)
  groups = {name: dataclasses.replace(group, rate=group.rate * factor, warmup=a.warmup) for name, group in groups.items()}
  optimizer = dataclasses.replace(base.optimizer, **train_only(model, groups))
  training = dataclasses.replace(base.training, steps=a.steps, batch=a.batch, length=a.length)
  evaluation = dataclasses.replace(base.evaluation, batch=a.batch, sample=0)
  return dataclasses.replace(base, model=model, data=text_of(a.target, base.data), training=training, optimizer=optimizer,
                             evaluation=evaluation)


def text_of(folder: str, data: DataConfig) -> DataConfig:
  """The text in a folder; articles of WikiText are told by their headings."""
  rule = 'wikitext' if 'wikitext' in os.path.basename(folder.rstrip('/')) else '\n\n\n'
  return dataclasses.replace(data, source='path', path=folder, separator=rule)


def compile_step(parts: Parts, batch: dict) -> Any:
  """The compiled training step of a run, for states of every seed."""
  with jax.set_mesh(parts.mesh):
    step = make_train_step(parts.model, parts.optimizer, parts.config, parts.abstract)
    return step.lower(parts.abstract, sharding.put_batch(batch, parts.mesh)).compile()


class Row:
  """The runs of one row: scores by text and split, steps compiled for each factor."""

  def __init__(self, name: str, a: Any, words: Any, texts: dict[str, Any]):
    self.name, self.a, self.words, self.texts = name, a, words, texts
    self.parts = {factor: build(config_of(name, factor, a), words) for factor in a.factors}
    one = self.parts[a.factors[0]]
    self.score = make_scorer(inference_model(one.config.model), one.config, one.mesh)
    flat, frozen = named(one.abstract.params), one.optimizer.frozen
    self.trained = sum(math.prod(x.shape) for path, x in flat.items() if path not in frozen)
    self.steps: dict[float, Any] = {}

  def batches(self, factor: float, seed: int) -> Any:
    """The training batches of a seed."""
    return train_batches(self.texts['train'], dataclasses.replace(self.parts[factor].config, seed=seed), 0)

  def run(self, factor: float, seed: int) -> dict[str, Any]:
    """One run: scores before and after it on each held-out text, its last training loss, tokens a second."""
    parts = self.parts[factor]
    parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, seed=seed))
    with jax.set_mesh(parts.mesh):
      state = first_state(parts)
      before = {text: self.score(state.params, tokens) for text, tokens in self.texts.items() if text != 'train'} if not seed else {}
      batches, losses, started = self.batches(factor, seed), [], time.perf_counter()
      for number in range(self.a.steps):
        state, metrics = self.steps[factor](state, sharding.put_batch(next(batches), parts.mesh))
        losses.append(metrics['loss'])
        if not number: jax.block_until_ready(losses)
        if number == self.a.steps // 10: early = jax.block_until_ready(losses[-1]), time.perf_counter()
      jax.block_until_ready(losses)
      speed = (self.a.steps - 1 - self.a.steps // 10) * self.a.batch * self.a.length / (time.perf_counter() - early[1])
      after = {text: self.score(state.params, tokens) for text, tokens in self.texts.items() if text != 'train'}
    kept = lambda scores: {text: {name: found[name] for name in ('loss', 'perplexity', 'bits_per_byte')} for text, found in scores.items()}
    row = {'model': self.name, 'factor': factor, 'seed': seed, 'before': kept(before), 'after': kept(after), 'tokens_per_second': speed,
           'train_loss': float(np.mean(jax.device_get(losses[-10:]))), 'seconds': time.perf_counter() - started, 'trained': self.trained}
    print(f"{self.name} x{factor:g} seed {seed}: " + ', '.join(f"{text} {score['perplexity']:.3f}" for text, score in row['after'].items())
          + f", {row['seconds']:.0f} s", flush=True)
    return row


def summary(runs: list[dict], chosen: float) -> dict[str, Any]:
  """The row of the table: mean and spread over seeds of the chosen factor."""
  rows = [run for run in runs if run['factor'] == chosen]
  out = {'model': rows[0]['model'], 'trained': rows[0]['trained'], 'factor': chosen, 'seeds': len(rows)}
  for text in rows[0]['after']:
    values = [run['after'][text]['perplexity'] for run in rows]
    out[text], out[f'{text}_spread'] = float(np.mean(values)), float(np.ptp(values))
  return out | {'tokens_per_second': float(np.mean([run['tokens_per_second'] for run in rows]))}


def arguments(argv: list[str] | None) -> Any:
  """The options of the command line."""
  make = common.parser('adapters', __doc__)
  for name in ('host', 'target', 'other'): make.add_argument(f'--{name}', required=True)
  for name, default in dict(steps=300, batch=16, length=512, warmup=30, seeds=3).items():
    make.add_argument(f'--{name}', type=int, default=default)
  make.add_argument('--factors', type=common.rates, default=(3.0, 10.0), help='of the rates of the configs')
  make.add_argument('--dtype', default='bfloat16')
  make.add_argument('--models', type=common.words, default=list(ROWS))
  return make.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  a = arguments(argv)
  words = open_words(a.host).tokenizer
  data = config_of('lora', 1.0, a).data
  split = lambda folder, name: tokenize_split(text_of(folder, data), words, name)
  texts = {'train': split(a.target, 'train'), 'valid': split(a.target, 'val'), 'target': split(a.target, 'test'),
           'other': split(a.other, 'test')}
  rows = {name: Row(name, a, words, texts) for name in a.models}
  jobs = [(name, factor) for name in a.models for factor in a.factors]
  sample = next(rows[a.models[0]].batches(a.factors[0], 0))
  with concurrent.futures.ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1) if common.on_gpu() else 1) as pool:
    for (name, factor), step in zip(jobs, pool.map(lambda job: compile_step(rows[job[0]].parts[job[1]], sample), jobs), strict=True):
      rows[name].steps[factor] = step
  options = {k: v for k, v in vars(a).items() if k not in ('host', 'target', 'other', 'output', 'commit')}
  result = {'options': options, 'host': os.path.basename(a.host), 'rows': [], 'runs': [],
            'texts': [os.path.basename(folder.rstrip('/')) for folder in (a.target, a.other)]}
  for row in rows.values():
    runs = [row.run(factor, 0) for factor in a.factors]
    best = min(runs, key=lambda run: run['after']['valid']['loss'])
    if not result['rows']:
      before = {text: score['perplexity'] for text, score in best['before'].items()}
      result['rows'].append({'model': 'host', 'trained': 0, **before})
    runs += [row.run(best['factor'], seed) for seed in range(1, a.seeds)]
    result['runs'] += runs
    result['rows'].append(summary(runs, best['factor']))
    common.save('adapters', a.output, result, commit=a.commit)
  common.show(f"{result['host']}: perplexity on {' and '.join(result['texts'])} after {a.steps} steps of {a.batch} x {a.length}",
              result['rows'], ('model', 'trained', 'factor', 'valid', 'target', 'target_spread', 'other', 'other_spread',
                               'tokens_per_second'))
  return result


if __name__ == '__main__':
  main()
