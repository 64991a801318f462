"""YAML files of the Memory-Augmented Transformer and Mixture of Chapters: read strictly, then mapped onto our Config."""
import logging
import math
import pathlib
import re
from types import SimpleNamespace
from typing import Any

import yaml

from memjax.config.banks import sees_future
from memjax.config.errors import ConfigError, UserError, nearest, refuse, shown
from memjax.config.options import check
from memjax.config.placement import parameter_rules
from memjax.config.schema import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  GroupConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
)
from memjax.config.seed_model import build_model
from memjax.config.seed_options import SECTIONS, Option

logger = logging.getLogger(__name__)

NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?')     # YAML 1.1 reads 1e-4 as text
SPLITS = {'train': 'train', 'test': 'test'} | dict.fromkeys(('val', 'valid', 'validation', 'dev', 'eval'), 'val')
KINDS = ('bytes', 'word', 'bpe')
BUNDLED = 'shakespeare'
Tree = dict[str, dict[str, Any]]


def load_seed(path: str) -> Config:
  """The Config of a YAML file; one warning in the log for each key that has no effect. UserError begins with the path."""
  try:
    given = check_tree(read_yaml(path))
    config = to_config(given, name=pathlib.Path(path).stem)
    for line in warnings(given, config): logger.warning('%s: %s', path, line)
    return config
  except ConfigError as error:
    raise UserError(f'{path}: {error}') from None


class _Loader(yaml.SafeLoader):
  """Safe, and a key that stands twice in a group is an error: YAML would let the last one win in silence."""

  def construct_mapping(self, node, deep=False):
    keys = [key.value for key, _ in node.value]
    for key in keys:
      if keys.count(key) > 1: raise yaml.constructor.ConstructorError(None, None, f'{key!r} stands twice', node.start_mark)
    return super().construct_mapping(node, deep)


def read_yaml(path: str) -> Any:
  """What the file holds, plain Python. UserError for a file that is missing, not YAML, or repeats a key."""
  try:
    return yaml.load(pathlib.Path(path).read_text(encoding='utf-8'), _Loader)
  except FileNotFoundError:
    raise UserError(f'no such file: {path}') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    mark = getattr(error, 'problem_mark', None)
    problem = ' '.join(str(getattr(error, 'problem', None) or error).split())[:160]
    raise UserError(f'{path}{f" line {mark.line + 1}" if mark else ""} is not a file of options: {problem}') from None


def check_tree(tree: Any) -> Tree:
  """The keys that a tree gives, by section, of the right type. ConfigError for an unknown section or key, or a wrong value."""
  if tree is None: tree = {}
  if not isinstance(tree, dict): raise ConfigError(f'the file holds {shown(tree)}, not the sections {", ".join(SECTIONS)}')
  for name in tree:
    if name not in SECTIONS: raise ConfigError(f'unknown section {name!r}{_near(name, SECTIONS)}')
  found: Tree = {}
  for name, options in SECTIONS.items():
    section = tree.get(name)
    if section is None: section = {}
    if not isinstance(section, dict): raise ConfigError(f'{name} is a section of keys, not {shown(section)}')
    for key in section:
      if key not in options: raise ConfigError(f'unknown key {name}.{key}{_elsewhere(name, key)}')
    found[name] = {key: _check_value(f'{name}.{key}', value, options[key]) for key, value in section.items()}
  return found


def _near(word: Any, names: Any) -> str:
  return nearest(word, names) or f'; there are {", ".join(names)}'


def _elsewhere(section: str, key: Any) -> str:
  home = next((other for other, options in SECTIONS.items() if key in options), '')
  return f'; it belongs to {home}' if home else nearest(key, SECTIONS[section]) or f'; no key of {section} is like it'


def _check_value(name: str, value: Any, option: Option) -> Any:
  if value is None:
    refuse(not option.null, f'{name} is null, which has no meaning here')
    return None
  if option.type is str and isinstance(value, list) and len(value) == 1: value = value[0]       # text_field: [text]
  if option.type is float and isinstance(value, str) and NUMBER.fullmatch(value): value = float(value)
  if isinstance(value, str): value = next((c for c in option.choices if isinstance(c, str) and c.lower() == value.lower()), value)
  return check(name, value, option.type, option.limits)


def fill(given: Tree) -> Tree:
  """All keys: those given, and the defaults of the others."""
  return {name: {key: option.default for key, option in options.items()} | given.get(name, {}) for name, options in SECTIONS.items()}


def warnings(given: Tree, config: Config) -> list[str]:
  """One line for each key whose value is lost: it cannot be honoured, or changes nothing beside the others."""
  lines, full = [], fill(given)
  if 'training_mode' not in given.get('training', {}): lines += _lost('training.training_mode', full)
  for section, keys in given.items():
    for key, value in keys.items():
      path, option = f'{section}.{key}', SECTIONS[section][key]
      said = _lost(path, full)
      is_mended = option.default in option.only and value != option.default         # it avoids what is lost by default
      is_idle = value != option.default and not said and not is_mended and not _matters(given, config, section, key)
      lines += [f'{path} has no effect here'] if is_idle else said
  return lines


def _lost(path: str, full: Tree) -> list[str]:
  """The warning for a value that is known to be lost, or honoured otherwise than it says."""
  section, key = path.split('.')
  option, value = SECTIONS[section][key], full[section][key]
  bpe = f'a BPE of {full["model"]["vocab_size"]} pieces is trained on the text'
  if path == 'model.tokenizer_name': reason = bpe if _is_remote(value) else ''
  elif path == 'training.eval_split': reason = '' if value in SPLITS else 'the split test is read'
  else: reason = option.lost if (value in option.only if option.only else value != option.default) else ''
  return [f'{path}={value!r} is not honoured as it stands: {reason}'] if reason else []


def _matters(given: Tree, config: Config, section: str, key: str) -> bool:
  """Whether the file would mean something else (or nothing) without the key, or with another value of it."""
  without = {k: v for k, v in given[section].items() if k != key}
  for keys in (without, *({**without, key: other} for other in _others(given[section][key], SECTIONS[section][key]))):
    try:
      if to_config({**given, section: keys}, name=config.name) != config: return True
    except ConfigError:
      return True
  return False


def _others(value: Any, option: Option) -> tuple:
  """Other values that a key could have."""
  if option.choices: return tuple(choice for choice in option.choices if choice != value)
  if isinstance(value, bool): return (not value,)
  if isinstance(value, int): return value + 1, value - 1
  if isinstance(value, float): return (value / 2 or 0.5,)
  if isinstance(value, str): return (f'{value}x',)
  return () if value is None else (value[:-1],)


def to_config(given: Tree, *, name: str = '') -> Config:
  """The Config of checked keys; the others have the defaults of their section. ConfigError for combinations that cannot be."""
  full = fill(given)
  memory, model, training, context = (SimpleNamespace(**full[section]) for section in SECTIONS)
  data = _part('training', lambda: _data(training, model))
  known = 'vocab_size' in given.get('model', {}) or data.tokenizer.kind == 'bpe'
  refuse(data.tokenizer.kind == 'bytes' and known and model.vocab_size != 256, f'model.vocab_size={model.vocab_size}: there are 256 bytes')
  decoder = _part('memory and model', lambda: build_model(
      memory, model, context, vocabulary=model.vocab_size if known else 0, precision=training.mixed_precision))
  sample = 0 if any(map(sees_future, decoder.mixers.values())) else 200
  return _part('training', lambda: Config(
      name=training.wandb_run_name or name, seed=training.seed, model=decoder, data=data,
      training=_loop(training, _row_length(given, training, model)), optimizer=_optimizer(training, decoder),
      evaluation=_evaluation(training, data, sample), checkpoint=_checkpoint(training), mesh=_mesh(training)))


def _part(section: str, build) -> Any:
  try:
    return build()
  except ConfigError as error:
    raise ConfigError(f'{section}: {error}') from None


def _row_length(given: Tree, training, model) -> int:
  """Tokens a row: max_length, which the longest position limits."""
  longest = model.max_position_embeddings or model.max_seq_len
  is_too_long = 'max_length' in given.get('training', {}) and training.max_length > longest
  refuse(is_too_long, f'max_length={training.max_length} exceeds the {longest} positions of the model')
  return min(training.max_length, longest)


def _data(training, model) -> DataConfig:
  name, path = training.dataset_name, pathlib.Path(training.dataset_name).expanduser()
  column = {} if training.text_field in ('messages', 'text') else {'column': training.text_field}
  tokenizer = _tokenizer(model)
  if name == BUNDLED: return DataConfig(tokenizer=tokenizer, **column)
  if path.exists() or name.startswith(('.', '/', '~')) or path.suffix in ('.txt', '.jsonl', '.md'):
    return DataConfig(source='path', path=name, tokenizer=tokenizer, **column)
  subset = f':{training.dataset_subset}' if training.dataset_subset else ''
  return DataConfig(source='hub', hub=name + subset, tokenizer=tokenizer, **column)


def _is_remote(name: str | None) -> bool:
  return bool(name) and name not in KINDS and not pathlib.Path(name).expanduser().exists()


def _tokenizer(model) -> TokenizerConfig:
  """A tokenizer.json (or its folder), one of our kinds by name, else a BPE of the size of the vocabulary."""
  name = model.tokenizer_name
  if name in ('bytes', 'word'): return TokenizerConfig(kind=name)
  if not name or name == 'bpe' or _is_remote(name): return TokenizerConfig(kind='bpe', size=model.vocab_size)
  path = pathlib.Path(name).expanduser()
  return TokenizerConfig(kind='file', path=str(path / 'tokenizer.json' if path.is_dir() else path))


def _loop(training, length: int) -> TrainingConfig:
  """Rows of all devices: batch_size is that of one device and micro-batch."""
  pieces = training.gradient_accumulation_steps
  return TrainingConfig(steps=training.max_steps, batch=training.batch_size * pieces * training.num_gpus, accumulate=pieces, length=length,
                        remat=training.gradient_checkpointing, log_every=training.logging_steps)


def _optimizer(training, model: ModelConfig) -> OptimizerConfig:
  rules = parameter_rules(model)
  rates = {'memory_bank': training.memory_lr if training.memory_bank_lr is None else training.memory_bank_lr,
           'memory': training.memory_lr, 'base': training.base_model_lr}
  decay = 0.0 if training.optimizer == 'adam' else training.weight_decay
  common = dict(clip=training.max_grad_norm, weight_decay=decay, **_schedule(training))
  groups = {name: GroupConfig(rate=rate, sparse=name == 'memory_bank' and training.bank_sparse_update, **common)
            for name, rate in rates.items() if any(rule.endswith(f'={name}') for rule in rules)}
  more = {'no_decay': ''} if training.weight_decay_mask == 'all' else {}
  return OptimizerConfig(rules=rules, groups=groups, b1=training.adam_beta1, b2=training.adam_beta2, eps=training.adam_epsilon, **more)


def _schedule(training) -> dict[str, Any]:
  """Fields of GroupConfig. A decay that starts late is `wsd` of the decay's shape, whatever the name of the schedule."""
  steps, shape = training.max_steps, training.scheduler
  at = lambda step, ratio: step if step is not None else None if ratio is None else math.floor(ratio * steps)
  warmup = training.warmup_steps if training.warmup_ratio is None else math.floor(training.warmup_ratio * steps)
  if shape == 'constant': return {'schedule': shape, 'warmup': warmup}
  start = at(training.decay_start_step, training.decay_start_ratio)
  if shape == 'wsd':
    stable = at(training.wsd_stable_steps, training.wsd_stable_ratio)
    start, shape = warmup + stable if start is None else start, training.wsd_decay_shape
  common = {'warmup': warmup, 'end': training.min_lr_ratio}
  if start is None: return {'schedule': shape, **common}
  return {'schedule': 'wsd', 'decay_shape': shape, 'decay_share': max(steps - start, 0) / steps, **common}


def _split(name: str) -> str:
  return SPLITS.get(name, 'test')


def _evaluation(training, data: DataConfig, sample: int) -> EvaluationConfig:
  stop = {'patience': training.early_stopping_patience, 'min_delta': training.early_stopping_threshold} if training.early_stopping else {}
  return EvaluationConfig(every=training.eval_steps, split=_split(training.eval_split), batch=training.batch_size * training.num_gpus,
                          sample=sample, prompt='ROMEO:' if data.source == BUNDLED else 'The', **stop)


def _checkpoint(training) -> CheckpointConfig:
  kept = training.save_total_limit or training.max_steps        # null: all of them
  return CheckpointConfig(every=training.save_steps, keep=kept, best=int(training.save_best_model))


def _mesh(training) -> MeshConfig:
  """Replicas on num_gpus devices, or parameters split over them."""
  split = training.distributed_strategy == 'fsdp' and training.fsdp_sharding_strategy == 'FULL_SHARD'
  return MeshConfig(data=1, fsdp=training.num_gpus) if split else MeshConfig(data=training.num_gpus)
