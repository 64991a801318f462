"""What an export leaves, one function a target: a Hugging Face folder, a GGUF file, the folder of PEFT, that of memories alone."""
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from memjax.adapters import graft
from memjax.adapters.export_config import config_json, difference, plain_config, without_windows
from memjax.adapters.export_gguf import gguf_metadata, gguf_name, gguf_tensors
from memjax.adapters.export_hf import SHARD, hf_rows, nbytes_of, write_weights
from memjax.adapters.families import EMBED
from memjax.adapters.gguf_model import GgufModel
from memjax.adapters.gguf_write import write_gguf
from memjax.adapters.lora import extract, merge, with_lora
from memjax.adapters.peft import load_peft, save_peft
from memjax.adapters.pretrained import load_params, open_pretrained
from memjax.adapters.quantized import load_quantized, save_quantized
from memjax.adapters.safetensors import write_json
from memjax.config.errors import UserError
from memjax.config.lora import LoraConfig
from memjax.config.quant import PACKED, QuantConfig
from memjax.config.schema import ModelConfig
from memjax.layers.tree import named
from memjax.models.quantized import parse_quantization, quantize_banks, quantize_host, with_quant
from memjax.runtime.exporting import Merged, Model, merge_model, publish
from memjax.runtime.selfcheck import (
  EXACT,
  MERGED,
  ROUNDED,
  Agreement,
  Rounded,
  agreement,
  check_logits,
  check_rows,
  check_texts,
  forward_of,
  prompt_tokens,
)
from memjax.runtime.texts import gguf_texts, open_texts, token_ids, write_texts

logger = logging.getLogger(__name__)
USUAL_CONTEXT = 2048               # tokens, where the model does not say for how many it was made
FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
README = """---
{licence}library_name: transformers
---
Written by memjax from {source}: {facts}.

{terms}
"""


def to_hf(model: Model, output: str, *, dtype: str = '', limit: int = SHARD) -> None:
  """Leaves a folder that transformers loads: the host with its low-rank changes merged; memories beside it, in files of their own.

  Tensors are stored as `dtype`, '' = as the checkpoint that they came from (float32 where that was not in floats), in files of at
  most `limit` bytes. Raises UserError for a model that no such checkpoint can hold, and where what was written differs.
  """
  merged = merge_model(model)
  usual = dtype or model.stored.get(EMBED, 'float32')
  tree = config_json(merged.host_config, context=model.texts.context or USUAL_CONTEXT, dtype=usual, given=model.texts.tree,
                     more=token_ids(model.texts))
  rows = hf_rows(merged.host_config, merged.host, {})
  rows = hf_rows(merged.host_config, merged.host, {name: dtype or model.stored.get(name, usual) for name in rows})

  def write(folder: str) -> None:
    os.makedirs(folder)
    files = write_weights(folder, rows, limit=limit)
    where = files[0] if len(files) == 1 else f'{len(files) - 1} shards'
    write_json(os.path.join(folder, 'config.json'), tree)
    write_texts(folder, model.texts)
    _write_readme(folder, model, merged)
    logger.info('%d tensors, %s bytes, in %s', len(rows), f'{nbytes_of(rows):,}', where)

  def check(folder: str) -> None:
    config, tensors = open_pretrained(folder)
    check_rows(rows, tensors)
    check_texts(model.texts, open_texts(folder))
    params = load_params(config, tensors)
    found = _compare(model, merged, (config, params), Rounded(rows))
    _warn(found, max((row.dtype.name for row in rows.values()), key=ROUNDED.get))
    if merged.has_memory: _write_memory(folder, merged, params)
  publish(output, write, check)
  if merged.has_memory: logger.info('the memories are beside the host, in %s', os.path.join(output, graft.FILE))


def to_gguf(model: Model, output: str, *, kind: str = 'F16') -> None:
  """Leaves a GGUF file of the host with its low-rank changes merged; memories, which GGUF cannot hold, in a folder beside it.

  Matrices are stored as `kind`. Raises UserError for another suffix than .gguf, what GGUF has no words for, and where what was
  written differs.
  """
  if not output.endswith('.gguf'): raise UserError(f'--output {output}: the name of a GGUF file ends in .gguf')
  sidecar, merged = f'{output.removesuffix(".gguf")}-memory', merge_model(model)
  if merged.has_memory and os.path.exists(sidecar): raise UserError(f'{sidecar} exists; the memories go there')
  wide = without_windows(merged.host_config)
  if wide != merged.host_config: logger.warning('GGUF does not keep the sliding windows: texts longer than the window come out differently')
  config = plain_config(wide)
  tree = config_json(config, context=model.texts.context or USUAL_CONTEXT, dtype='float32', given=model.texts.tree)
  general = {'general.name': os.path.basename(os.path.abspath(model.source)), 'general.license': model.texts.licence}
  metadata = gguf_metadata(tree, config, kind) | {key: value for key, value in general.items() if value}
  metadata |= gguf_texts(model.texts, config.vocabulary)
  rows = hf_rows(merged.host_config, merged.host, {})
  tensors = gguf_tensors(tree, config, rows, kind)

  def check(path: str) -> Any:
    file = GgufModel(path)
    check_texts(model.texts, open_texts(path))
    params = load_params(file.config(), file)
    meant = Rounded(rows, {name: tensors[gguf_name(name)].type for name in rows})
    beside = model._replace(config=without_windows(model.config)), merged._replace(host_config=wide)
    found = _compare(*beside, (file.config(), params), meant)
    if kind in FLOATS: _warn(found, FLOATS[kind])
    return params
  params = publish(output, lambda path: _write_gguf(path, metadata, tensors), check)
  if not merged.has_memory: return
  publish(sidecar, lambda folder: _write_memory(folder, merged, params), lambda folder: None)
  logger.info('GGUF cannot hold the memories: %s is the host alone, they are in %s', output, sidecar)


def _write_gguf(path: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
  errors = write_gguf(path, metadata, tensors)
  worst = f', off by {max(errors.values()):.2%} at most (relative RMS of a tensor)' if errors else ''
  logger.info('%d tensors, %s bytes%s', len(tensors), f'{os.path.getsize(path):,}', worst)


def to_peft(model: Model, output: str) -> None:
  """Leaves the low-rank changes alone, as PEFT writes them. Raises UserError as `save_peft` does."""
  bare = with_lora(model.config, LoraConfig())
  def check(folder: str) -> None:
    wanted, found = extract(model.params, model.config.block.lora, bare.block.quant), load_peft(folder, bare)[1]
    same = set(wanted) == set(found) and all(_equal(wanted[path], found[path]) for path in wanted)
    if not same: raise UserError('the low-rank changes differ from what was meant')
  publish(output, lambda folder: save_peft(folder, model.config, model.params, base=model.base), check)
  if graft.host_of(bare) != bare: logger.info('the memories are not in it; --to memory writes them')


def to_memory(model: Model, output: str, *, storage: str = '') -> None:
  """Leaves the memories alone, with the low-rank changes of their own maps merged, for the host without low-rank changes.

  `storage`, int8, int4 or nf4, packs the tables of banks. Raises UserError for a model without memories, or without banks to pack.
  """
  config, lora = with_lora(model.config, LoraConfig()), model.config.block.lora
  changes = extract(model.params, lora, config.block.quant) if lora.rank else {}
  own = {path: change for path, change in changes.items() if path in graft.adapter_of(model.params, config)}
  params = merge(model.params, [own])
  if storage: config, params = quantize_banks(config, params, parse_quantization(storage))
  def check(folder: str) -> None: _check_memory(folder, config, params)
  publish(output, lambda folder: graft.save_adapter(folder, config, params), check)
  if len(own) < len(changes): logger.info('the low-rank changes of the host are not in it; --to peft writes them')


def to_quantized(model: Model, output: str, *, storage: str = 'int8') -> tuple[ModelConfig, Any]:
  """(config, parameters) of what was left: a folder with the host in fewer bits, low-rank changes merged before, and its memories.

  Kernels and tables of banks are stored as `storage`, int8, int4 or nf4; loading never makes floats of them. Raises UserError for what
  cannot be packed so, and where what was written differs.
  """
  merged = merge_model(model)
  config, params, told = model.config, model.params, None
  if config.block.lora.rank or config.block.quant.storage != storage:
    config, params, told = quantize_host(merged.config, merged.params, _storage(merged.params, storage))
  if any(mixer.kind == 'bank' and not mixer.quant.bits for mixer in config.mixers.values()):
    config, params = quantize_banks(config, params, parse_quantization(storage))
  host_config, host = graft.host_of(config), graft.split_adapter(params, config)[0]
  tree = config_json(merged.host_config, context=model.texts.context or USUAL_CONTEXT, dtype='float32', given=model.texts.tree,
                     more=token_ids(model.texts))

  def write(folder: str) -> None:
    save_quantized(folder, host_config, host)
    write_json(os.path.join(folder, 'config.json'), tree)
    write_texts(folder, model.texts)
    _write_readme(folder, model, merged, f'kernels as {storage}, which memjax reads')
    if merged.has_memory: graft.save_adapter(folder, config, params)

  def check(folder: str) -> None:
    found, again = load_quantized(folder)
    if not _equal(host, again): raise UserError('the packed tensors differ from what was meant')
    check_texts(model.texts, open_texts(folder))
    _compare(model, merged, (found, again))
    if merged.has_memory: _check_memory(folder, config, params)
  publish(output, write, check)
  logger.info('%s', told.line() if told else f'the kernels were stored as {storage} already')
  return config, params


def _storage(params: Any, storage: str) -> QuantConfig:
  """All kernels but those whose rows the groups do not divide, which stay as they are."""
  group = PACKED[storage][2]
  left = [path for path, x in named(params).items() if path.endswith('/kernel') and group and x.shape[-2] % group]
  if left: logger.info('%d kernels stay float32: groups of %d do not divide their rows', len(left), group)
  return QuantConfig(storage=storage, exclude=tuple(f'^{re.escape(path)}$' for path in left))


def _compare(model: Model, merged: Merged, have: tuple[ModelConfig, Any], meant: Rounded | None = None) -> Agreement:
  """How close the model that was read back is to the one in memory.

  Raises UserError if its config is another, its logits are not those of the numbers in `meant`, or low-rank changes beside their
  kernels do not compute the same as merged.
  """
  config, params = have
  path = difference(with_quant(config, QuantConfig()), plain_config(merged.host_config))
  if path: raise UserError(f'what was written is another model: its {path} differs')
  token_BxL = prompt_tokens(model.texts.words.tokenizer, merged.host_config.vocabulary)
  forward = forward_of(config)
  is_alike = all(getattr(config, name) == getattr(merged.host_config, name) for name in (*graft.LAYOUT, 'mixers', 'block'))
  want, got = (forward if is_alike else forward_of(merged.host_config))(merged.host, token_BxL), forward(params, token_BxL)
  if merged.maps:
    beside, changed = graft.host_of(model.config), graft.split_adapter(model.params, model.config)[0]
    check_logits(forward_of(beside)(changed, token_BxL), want, MERGED, 'the merged model')
  if meant is not None: check_logits(forward(load_params(config, meant), token_BxL), got, EXACT)
  found = agreement(want, got)
  logger.info('read back: %s; %d linear maps merged', found, merged.maps)
  return found


def _warn(found: Agreement, dtype: str) -> None:
  """Says so where rounding alone moves the logits further than it usually does."""
  if found.difference > ROUNDED[dtype]:
    logger.warning('%s moves the logits by %.1e of the largest, usually %g at most', dtype, found.difference, ROUNDED[dtype])


def _write_memory(folder: str, merged: Merged, host: Any) -> None:
  """The memories for the host as it was read back, whose numbers may have been rounded."""
  params = graft.join_adapter(host, graft.adapter_of(merged.params, merged.config), merged.config)
  graft.save_adapter(folder, merged.config, params)
  _check_memory(folder, merged.config, params)


def _check_memory(folder: str, config: ModelConfig, params: Any) -> None:
  """Raises UserError unless the memories of a folder load onto their host and are those that were meant."""
  found, again = graft.load_adapter(folder, graft.host_of(config), graft.split_adapter(params, config)[0])
  if found != config or not _equal(again, params): raise UserError('the memories differ from what was meant')


def _equal(one: Any, other: Any) -> bool:
  """Whether two trees hold the same arrays, bit for bit."""
  one, other = named(one), named(other)
  return set(one) == set(other) and all(np.array_equal(x, other[path]) for path, x in one.items())


def _write_readme(folder: str, model: Model, merged: Merged, how: str = '') -> None:
  facts = [f'{merged.maps} low-rank changes merged'] if merged.maps else ['weights as they were']
  if how: facts.append(how)
  if merged.has_memory: facts.append(f'memories in {graft.FILE}, which memjax puts onto the host')
  facts += [f'{name} {value}' for name, value in model.record.items()]
  licence = model.texts.licence
  terms = f'The licence is that of the base model{f": {licence}" if licence else ", which does not name it"}.'
  text = README.format(licence=f'license: {licence}\n' if licence else '', source=os.path.basename(os.path.abspath(model.source)),
                       facts='; '.join(facts), terms=terms)
  with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file: file.write(text)
