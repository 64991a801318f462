"""Writes a run or a pretrained model for others, reads it back, and compares before it takes its name.

  python -m memjax.export --to hf --workdir runs/w --output merged           a folder that transformers loads
  python -m memjax.export --to gguf --type Q8_0 --model HOST --output m.gguf
  python -m memjax.export --to peft --workdir runs/w --output changes        low-rank changes alone
  python -m memjax.export --to memory --workdir runs/w --output memory       memories alone
  python -m memjax.export --to quantized --quantize nf4 --model HOST --output small

hf, gguf and quantized hold the host with its low-rank changes merged; memories go into files of their own. What differs after
writing is kept as OUTPUT.failed, and the status is 2. The last line of stdout is the path of what was written.
"""
import os
import sys

from memjax.config.errors import UserError
from memjax.config.flags import Flag, run

TARGETS = ('hf', 'gguf', 'peft', 'memory', 'quantized')
FLAGS = (
    Flag('to', str, None, 'what is written', choices=TARGETS),
    Flag('output', str, None, 'folder or, for gguf, file, which must not be there yet'),
    Flag('workdir', str, '', 'folder of the training run; this or --model'),
    Flag('model', str, '', 'GGUF file, or folder of config.json, safetensors and tokenizer.json: a Llama, Mistral, Qwen2 or Qwen3'),
    Flag('adapter', str, doc='folder of PEFT or of memories that is put onto --model', repeated=True),
    Flag('step', int, 0, 'checkpoint; 0 = the best, else the newest', low=0),
    Flag('host', str, '', "where the pretrained model of the run is now; '' = where it was"),
    Flag('dtype', str, '', "of hf; '' = as the tensors of the pretrained model are stored, else float32",
         choices=('', 'float32', 'float16', 'bfloat16')),
    Flag('shard_bytes', int, 0, 'of hf: most bytes of one file; 0 = 5 GB', low=0),
    Flag('type', str, '', "of gguf: how matrices are stored; '' = F16",
         choices=('', 'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1')),
    Flag('quantize', str, '', "of quantized: how kernels and tables of banks are stored, '' = int8; of memory: of banks, '' = as they are",
         choices=('', 'int8', 'int4', 'nf4')),
    Flag('report', str, '', "footprint of the model: a JSON file, or '-' for a table on stderr"),
    Flag('batch', int, 1, 'rows that the footprint counts', low=1),
    Flag('length', int, 0, 'tokens a row that the footprint counts; 0 = as many as the model was made for', low=0),
)
OWN = {'dtype': ('hf',), 'shard_bytes': ('hf',), 'type': ('gguf',), 'quantize': ('quantized', 'memory')}
OF_RUN, OF_MODEL = ('step', 'host'), ('adapter',)


def check(values: dict) -> None:
  """Raises UserError unless there is one source, and no flag that belongs to another source or target."""
  if bool(values['workdir']) == bool(values['model']):
    raise UserError('give either --workdir, the folder of a training run, or --model, a GGUF file or a folder of a checkpoint')
  source, others = ('--workdir', OF_RUN) if values['model'] else ('--model', OF_MODEL)
  for name in others:
    if values[name]: raise UserError(f'--{name} goes with {source}')
  for name, targets in OWN.items():
    if values[name] and values['to'] not in targets: raise UserError(f'--{name} goes with --to {" or ".join(targets)}')
  for name in ('batch', 'length'):
    if values[name] > (name == 'batch') and not values['report']: raise UserError(f'--{name} goes with --report')
  if os.path.exists(values['output']): raise UserError(f'--output {values["output"]} exists; name a new place')


def report(values: dict, model, config, params) -> None:
  """Writes the footprint of parameters, or prints its table."""
  import json
  import pathlib

  from memjax.models.decoder import build_decoder
  from memjax.runtime.footprint import footprint, footprint_table
  length = values['length'] or model.texts.context or 1
  optimizer = model.optimizer if params is model.params else None
  found = footprint(build_decoder(config), params, batch=values['batch'], length=length, optimizer=optimizer)
  if values['report'] == '-': sys.stderr.write(f'{footprint_table(found)}\n')
  else: pathlib.Path(values['report']).write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')


def main(config, values) -> None:
  """Writes the target; UserError for whatever is wrong with the source, the settings or what was written."""
  del config
  check(values)
  from memjax.generate import check_output
  from memjax.runtime import exporting, targets
  if values['report'] != '-': check_output(values['report'])
  if values['model']: model = exporting.open_model(values['model'], values['adapter'])
  else: model = exporting.open_trained(values['workdir'], values['step'], values['host'])
  kind, output, small = values['to'], values['output'], values['quantize']
  told = model.config, model.params
  if kind == 'hf': targets.to_hf(model, output, dtype=values['dtype'], limit=values['shard_bytes'] or targets.SHARD)
  elif kind == 'gguf': targets.to_gguf(model, output, kind=values['type'] or 'F16')
  elif kind == 'peft': targets.to_peft(model, output)
  elif kind == 'memory': targets.to_memory(model, output, storage=small)
  else: told = targets.to_quantized(model, output, storage=small or 'int8')
  if values['report']: report(values, model, *told)
  sys.stdout.write(f'{os.path.abspath(output)}\n')


if __name__ == '__main__': run(main, flags=FLAGS, takes_config=False)
