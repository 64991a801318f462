"""A run or a pretrained model, opened and its low-rank changes merged; and files that are checked before they take their name."""
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from memjax.adapters import graft
from memjax.adapters.lora import extract, insert, merge, with_lora
from memjax.adapters.peft import load_peft
from memjax.adapters.pretrained import load_params
from memjax.adapters.safetensors import Checkpoint
from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig, rank_of
from memjax.config.schema import ModelConfig
from memjax.data.hub import local_model
from memjax.layers.tree import named
from memjax.models.quantized import dequantize_host
from memjax.runtime.host import sort_adapters
from memjax.runtime.optim import make_optimizer
from memjax.runtime.reading import open_run
from memjax.runtime.selfcheck import check_merged
from memjax.runtime.texts import Texts, open_texts, own_texts
from memjax.runtime.words import SETTINGS, saved_words
from memjax.runtime.workdir import TOKENIZER


class Model(NamedTuple):
  """What is exported: a decoder with whatever was added to it, and its texts."""
  source: str                      # the file or folder it came from
  base: str                        # the pretrained model, '' = none
  config: ModelConfig
  params: Any
  texts: Texts
  stored: dict[str, str]           # type of each tensor of the checkpoint that it came from; {} where those were not floats as they are
  record: dict[str, Any]           # of a run: its config hash and step
  optimizer: Any = None            # of a run


class Merged(NamedTuple):
  """The same without low-rank changes: they are in the kernels."""
  host_config: ModelConfig
  host: Any                        # parameters without memories
  config: ModelConfig              # with memories
  params: Any
  maps: int                        # linear maps that were merged

  @property
  def has_memory(self) -> bool:
    """Whether memories are grafted beside the host."""
    return self.config != self.host_config


def open_model(path: str, adapters: Sequence[str] = ()) -> Model:
  """A pretrained model, with adapters of at most one folder of PEFT and one of memories put onto it.

  Raises UserError for what cannot be read, more adapters, and those of another model.
  """
  path = local_model(path)
  config, tensors = graft.open_host(path)
  params = load_params(config, tensors)
  memories, changes = sort_adapters(adapters)
  if len(changes) > 1: raise UserError(f'--adapter names {len(changes)} folders of low-rank changes; a model takes one')
  for folder in memories: config, params = graft.load_adapter(folder, config, params)
  for folder in changes:
    config, adapter = load_peft(folder, config)
    params = insert(params, adapter, config.block.quant)
  return Model(path, path, config, params, open_texts(path), _stored(tensors), {})


def _stored(tensors: Any) -> dict[str, str]:
  """The float type of each tensor of a folder; nothing of what may be in fewer bits, a GGUF file or a quantised folder."""
  return {name: tensors.read(name).dtype.name for name in tensors.names} if isinstance(tensors, Checkpoint) else {}


def open_trained(workdir: str, step: int = 0, host: str = '') -> Model:
  """The best checkpoint of a run, else the newest, or that of `step`; `host` is where its pretrained model is now ('' = as it says).

  The chat template and the ends that the run was trained with go before those of its pretrained model.

  Raises UserError for what `open_run` refuses, a pretrained model that is gone, and one with another tokenizer.
  """
  run = open_run(workdir, step)
  path, record = local_model(host or run.config.training.host), {'config': run.name, 'step': run.step}
  optimizer = make_optimizer(run.config.optimizer, run.params, run.config.training.steps)
  if host and not run.config.training.host: raise UserError(f'--host {host}: the run {workdir} began without a pretrained model')
  model = Model(workdir, path, run.config.model, run.params, None, {}, record, optimizer)
  kept = os.path.join(workdir, TOKENIZER)
  words = saved_words(kept, run.tokenizer) if os.path.isfile(os.path.join(kept, SETTINGS)) else None       # of conversations
  if not path: return model._replace(texts=own_texts(run.tokenizer, run.config.training.length, words))
  if not os.path.exists(path): raise UserError(f'{path}, which the run began with, is gone; --host says where it is now')
  texts, inner = open_texts(path), getattr(run.tokenizer, 'inner', None)
  if inner is None or inner.get_vocab(True) != texts.words.tokenizer.inner.get_vocab(True):
    raise UserError(f'the tokenizer of the run {workdir} is not that of {path}')
  if words: texts = texts._replace(words=texts.words._replace(template=words.template, ends=words.ends))
  return model._replace(texts=texts, stored=_stored(graft.open_host(path)[1]))


def merge_model(model: Model) -> Merged:
  """The model with its low-rank changes merged, memories and host apart; kernels in fewer bits are written out first.

  Raises UserError unless all changes that are configured were merged.
  """
  lora, count = model.config.block.lora, 0
  config, params = dequantize_host(with_lora(model.config, LoraConfig()), model.params)
  if lora.rank:
    changes = extract(params, lora)
    before = {path: x for path, x in named(params).items() if path.endswith('/kernel') and rank_of(lora, path)}
    params = merge(params, [changes])
    count = check_merged(before, named(params), before, changes)
  if graft.host_of(config) == config: return Merged(config, params, config, params, count)
  return Merged(graft.host_of(config), graft.split_adapter(params, config)[0], config, params, count)


def publish(output: str, write: Callable[[str], None], check: Callable[[str], Any]) -> Any:
  """What `check` gave for what `write` left; only then it takes the name `output`, a file or a folder.

  Both get the path of a place beside it. Raises UserError where `output` exists, the machine refuses, or something differs;
  then what was written is kept as `output`.failed.
  """
  output = os.path.abspath(output)
  if os.path.exists(output): raise UserError(f'{output} exists; name a new place')
  beside = f'{output}.{uuid.uuid4().hex[:8]}.tmp'
  wrong = [f'{beside}.failed']                 # where `write_gguf` leaves what it finds to be wrong
  try:
    os.makedirs(os.path.dirname(output), exist_ok=True)
    write(beside)
    wrong.append(beside)
    found = check(beside)
    os.replace(beside, output)
    return found
  except UserError as error:
    raise _kept(error, wrong, output) from None
  except OSError as error:
    raise UserError(f'{output} cannot be written: {error.strerror or error}') from None
  finally:
    if os.path.isdir(beside): shutil.rmtree(beside, ignore_errors=True)
    elif os.path.exists(beside): os.remove(beside)


def _kept(error: UserError, wrong: Sequence[str], output: str) -> UserError:
  """The error, after what was written wrongly was kept under a name that says so."""
  left = next((path for path in wrong if os.path.exists(path)), '')
  if not left: return error
  failed = next(name for name in (f'{output}.failed{number or ""}' for number in range(10 ** 6)) if not os.path.exists(name))
  os.replace(left, failed)
  text = str(error)
  for path in wrong: text = text.replace(path, failed)
  return UserError(f'the export is wrong: {text}; it is kept as {failed}')
