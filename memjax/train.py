"""Trains a model, resumes by itself, and ends with the test loss, a sample of text and figures.

  python -m memjax.train --config configs/default.py --workdir runs/default [--config.training.steps=500 ...]

The same command continues an interrupted run: only steps, the mesh and the intervals of logging, evaluation and saving may change.
SIGTERM saves and ends with status 75 ("saved, not finished"). Several processes train together where MEMJAX_COORDINATOR,
MEMJAX_NUM_PROCESSES and MEMJAX_PROCESS_ID say so, or where jax detects them (Slurm, Open MPI, TPU; see docs/scale.md).
"""
import contextlib
import dataclasses
import logging
import os
from typing import Any

from memjax.config.errors import UserError
from memjax.config.flags import Flag, run

logger = logging.getLogger('memjax.train')
FLAGS = (
    Flag('workdir', str, '', 'folder of the run; wanted except with --dry_run'),
    Flag('resume_from', str, '', 'another run, whose whole state a new workdir continues'),
    Flag('init_from', str, '', 'another run, whose parameters a new workdir starts from'),
    Flag('dry_run', bool, False, 'prints the configuration, parameters by group, state bytes and FLOPs, and trains nothing'),
    Flag('find_lr', bool, False, 'sweeps the learning rate over 100 steps and suggests one'),
    Flag('figures', bool, True, 'looks into the memory at the end, as memjax.analyze does; --nofigures leaves it out'))


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a config and its tokenizer determine."""
  config: Any
  tokenizer: Any
  model: Any
  mesh: Any
  optimizer: Any
  abstract: Any                        # the training state as shapes with shardings


def build(config, tokenizer, sweep=None) -> Parts:
  """The parts of a run; UserError for groups, meshes and batches that do not fit."""
  from memjax.config.banks import read_only_banks
  from memjax.models.decoder import build_decoder, param_shapes
  from memjax.runtime import sharding
  from memjax.runtime.distributed import check_rows
  from memjax.runtime.optim import make_optimizer
  from memjax.runtime.state import abstract_state
  if frozen := read_only_banks(config.model):
    raise UserError(f"model.mixers.{frozen}.quant.bits stores integers, which cannot be trained; set its quant.train='straight' "
                    'or quantise when reading the run (--quantize)')
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(mesh, config.training)
  check_rows(mesh, config.evaluation.batch, 'evaluation.batch')
  model = build_decoder(sharding.placed(config))
  shapes, axes = param_shapes(model)
  optimizer = make_optimizer(config.optimizer, shapes, config.training.steps, axes=axes, sweep=sweep)
  return Parts(config, tokenizer, model, mesh, optimizer, abstract_state(model, optimizer, config, mesh))


def batches_from(parts: Parts, tokens, step: int):
  """This process's training batches from a step on."""
  from memjax.data.pipeline import train_batches
  from memjax.runtime.distributed import data_shard
  index, count = data_shard(parts.mesh)
  return train_batches(tokens, parts.config, step, process_index=index, process_count=count)


def start(parts: Parts, workdir: str, values: dict, identity: dict):
  """(state, early-stopping counters): of the workdir's newest checkpoint, of another run, or new."""
  from memjax.layers.tree import named
  from memjax.runtime.checkpoint import restore
  from memjax.runtime.loop import Early
  from memjax.runtime.seeded import check_keys
  from memjax.runtime.state import init_state
  found = restore(workdir, parts.abstract)
  if found:
    step, state, record = found
    check_keys(parts.config, record)
    if changed := [k for k in identity if record['data'].get(k) != identity[k]]:
      raise UserError(f'the training text is not that of checkpoint {step} in {workdir}: its {changed[0]} has changed')
    logger.info('resumed %s at step %d', workdir, step)
    return state, Early.from_json(record['early'])
  if values['resume_from']: return _continue(parts, values['resume_from'], identity), Early()
  if not values['init_from']: return first_state(parts), Early()
  given = named(_read(parts, values['init_from']))
  return init_state(parts.model, parts.optimizer, parts.config, parts.abstract, given=given), Early()


def first_state(parts: Parts):
  """The state of a run that starts from nothing, or from the pretrained checkpoint in training.host."""
  from memjax.adapters.graft import load_host
  from memjax.data.hub import local_model
  from memjax.layers.tree import named
  from memjax.runtime.state import init_state
  config, abstract, host = parts.config, parts.abstract, {}
  if config.training.host:
    host = named(load_host(config.model, local_model(config.training.host), mesh=parts.mesh))
    fresh = len(named(abstract.params)) - len(host)
    logger.info('parameters of %s; %d arrays of memories and low-rank changes are new', config.training.host, fresh)
  return init_state(parts.model, parts.optimizer, config, abstract, given=host)


def _continue(parts: Parts, source: str, identity: dict):
  from memjax.runtime.checkpoint import restore
  from memjax.runtime.seeded import check_keys
  found = restore(source, parts.abstract, put_aside=False)
  if not found: raise UserError(f'--resume_from {source} holds no checkpoint')
  step, state, record = found
  check_keys(parts.config, record)
  if record['data']['fingerprint'] != identity['fingerprint']: raise UserError(f'the tokenizer of {source} is another one')
  logger.info('continuing %s from step %d', source, step)
  return state


def _read(parts: Parts, workdir: str):
  """The parameters of the best checkpoint of a run, on the mesh."""
  import jax
  place = lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda piece: x[piece])
  return jax.tree.map(place, _saved(parts, workdir), parts.abstract.params)


def _saved(parts: Parts, workdir: str):
  """The parameters of the best checkpoint of a run, as numpy arrays; the tokenizer must be the same."""
  from memjax.runtime.checkpoint import restore_for_reading
  from memjax.runtime.seeded import check_keys
  step, params, record = restore_for_reading(workdir, parts.abstract.params)
  check_keys(parts.config, record)
  if record['data']['fingerprint'] != parts.tokenizer.fingerprint: raise UserError(f'the tokenizer of {workdir} is another one')
  logger.info('parameters of checkpoint %d in %s', step, workdir)
  return params


def train(parts: Parts, workdir: str, values: dict) -> int:
  """Exit status of a whole run: training, then `finish`."""
  from memjax.models.decoder import inference_model
  from memjax.runtime.checkpoint import Checkpoints
  from memjax.runtime.distributed import alone, is_leader, leader_first
  from memjax.runtime.evaluation import make_scorer
  from memjax.runtime.loop import DIVERGED, DONE, Trainer
  from memjax.runtime.metrics import MetricsLog
  from memjax.runtime.reading import config_hash, run_tags
  from memjax.runtime.seeded import key_fingerprints
  from memjax.runtime.state import make_train_step
  from memjax.runtime.workdir import open_labels, read_split
  config, labels = parts.config, open_labels(parts.config, parts.tokenizer, workdir)
  with leader_first('tokens'):
    splits = {s: read_split(config, parts.tokenizer, s, labels) for s in ('train', config.evaluation.split, 'test')}
  state, early = start(parts, workdir, values, splits['train'].identity)
  score = make_scorer(inference_model(parts.model.config), config, parts.mesh)
  watch = lambda params: score(params, splits[config.evaluation.split], config.evaluation.batches)
  step = make_train_step(parts.model, parts.optimizer, config, parts.abstract)
  with contextlib.ExitStack() as stack:
    told = config_hash(config), int(state.step), run_tags(config.model)
    log = stack.enter_context(MetricsLog(workdir, *told)) if is_leader() else None
    checkpoints = Checkpoints(workdir, config.checkpoint)
    stack.callback(checkpoints.close)
    data = {**splits['train'].identity, 'keys': key_fingerprints(config)}
    trainer = Trainer(config, parts.mesh, step, watch, checkpoints, log, data, early, share_of(parts))
    state, status = trainer.run(state, batches_from(parts, splits['train'], int(state.step)))
    if status == DIVERGED: logger.error('lower the learning rate or clip harder; the last good state is checkpoint %d', int(state.step))
    if status != DONE: return status
    params = _read(parts, workdir)
    scores = score(params, splits['test'])
    if not is_leader(): return status
    with alone():
      finish(parts, workdir, params, scores, log=log, labels=labels)
      keep_adapter(parts, workdir)
      print(figures(workdir, splits[config.evaluation.split]) if values['figures'] else os.path.abspath(workdir))
  return status


def share_of(parts: Parts) -> float:
  """The share of a second of the mesh that a token costs; nothing is counted where the speed of its devices is not known."""
  from memjax.runtime.flops import forward_flops
  from memjax.runtime.utilisation import peak_flops, step_share
  devices = parts.mesh.devices.flatten()
  return step_share(forward_flops(parts.model, parts.config.training.length), devices) if peak_flops(devices) else 0.0


def finish(parts: Parts, workdir: str, params, scores: dict, *, log, labels=None) -> None:
  """Tells the scores of the best checkpoint on the test split and samples a text, or with `labels` the reply to a message."""
  import jax

  from memjax.models.decoder import inference_model
  from memjax.runtime.sampling import Sampler, Sampling
  from memjax.runtime.text import Writer
  e = parts.config.evaluation
  log.write(parts.config.training.steps, {f'test/{name}': value for name, value in scores.items()})
  print(f"test: {scores['bits_per_byte']:.4f} bits per byte, loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.3f}")
  if jax.process_count() > 1: params = _saved(parts, workdir)
  if e.sample and e.prompt:
    rows = []
    sampler = Sampler(inference_model(parts.config.model), Sampling(temperature=0.8, seed=parts.config.seed))
    chat = {'enter': labels.prompt, 'ends': labels.end_tokens} if labels else {}
    writer = Writer(sampler, params, parts.tokenizer, **chat)
    text = e.prompt + ('\n' if labels else '') + ''.join(piece for _, piece in writer.stream([e.prompt], e.sample, into=rows))
    log.text(parts.config.training.steps, 'sample', text)
    print(f'sample:\n{text}')


def keep_adapter(parts: Parts, workdir: str) -> None:
  """Leaves W/adapter, the memories of the best checkpoint alone, where the pretrained host was frozen and has no LoRA."""
  from memjax.adapters.graft import adapter_of, save_adapter
  config, memories = parts.config, adapter_of(parts.abstract.params, parts.config.model)
  if not (config.training.host and memories and set(parts.optimizer.groups) <= {*memories, *parts.optimizer.frozen}): return
  if config.model.block.lora.rank: return
  folder = os.path.join(workdir, 'adapter')
  save_adapter(folder, config.model, _saved(parts, workdir))
  logger.info('the memories without their host are in %s', folder)


def figures(workdir: str, tokens) -> str:
  """Path of W/analysis with the figures of the best checkpoint; the cost of attention is left to memjax.analyze."""
  from memjax.runtime.analysis.report import write_analysis
  from memjax.runtime.reading import open_run
  return os.path.abspath(write_analysis(open_run(workdir), tokens, lengths=())[0])


def find_rate(config, tokenizer, workdir: str) -> None:
  """Sweeps the learning rate of all groups that are trained and prints the suggestion; W holds only its results."""
  from memjax.runtime import lr_finder
  from memjax.runtime.state import make_train_step
  from memjax.runtime.workdir import open_labels, read_split
  parts = build(config, tokenizer, lr_finder.sweep)
  tokens = read_split(config, tokenizer, 'train', open_labels(config, tokenizer, workdir))
  state = first_state(parts)
  step = make_train_step(parts.model, parts.optimizer, config, parts.abstract)
  result = lr_finder.find_rate(step, state, batches_from(parts, tokens, 0), parts.mesh)
  os.makedirs(workdir, exist_ok=True)
  path = lr_finder.write(workdir, result)
  print(f"suggested learning rate: {result['suggestion']:.2e} (--config.optimizer.groups.NAME.rate)\n{path}")


def main(config, values) -> int:
  """Exit status: 0 done, 1 diverged, 75 stopped by SIGTERM after saving. UserError for bad input."""
  from memjax.runtime import distributed
  if not values['workdir'] and not values['dry_run']: raise UserError('--workdir is required: folder of the run')
  distributed.maybe_initialize()
  with distributed.ends_together(): return begin(config, values)


def begin(config, values) -> int:
  """Exit status of a run by one of its processes."""
  import json

  import jax

  from memjax.config.codec import to_json
  from memjax.runtime import workdir as folder
  from memjax.runtime.distributed import is_leader, leader_first
  from memjax.runtime.workarounds import avoid_crash
  workdir, dry, find = values['workdir'], values['dry_run'], values['find_lr']
  if find and jax.process_count() > 1: raise UserError('--find_lr is for a single process')
  if workdir and is_leader(): folder.check_workdir(workdir, {flag: values[flag] for flag in ('resume_from', 'init_from')})
  if any(mixer.kind == 'neural' for mixer in config.model.mixers.values()): avoid_crash()
  if config.model.dtype == 'float64': jax.config.update('jax_enable_x64', True)
  source = values['resume_from'] or values['init_from']
  with leader_first('workdir'):
    tokenizer = folder.open_tokenizer(config, workdir, source)
    config = folder.fill_vocabulary(config, tokenizer)
    if find: return find_rate(config, tokenizer, workdir)
    parts = build(config, tokenizer)
    if is_leader() and not dry:
      folder.claim(workdir, config)
      folder.save_tokenizer(config, tokenizer, workdir, source)
  if dry:
    from memjax.runtime.flops import cost_table
    print(f'{json.dumps(to_json(config), indent=2)}\n\n{cost_table(parts.model, parts.optimizer, config)}')
    return 0
  with jax.set_mesh(parts.mesh): return train(parts, workdir, values)


if __name__ == '__main__': run(main, flags=FLAGS)
