"""Scores a trained model on a split of its corpus, or on a text file: loss, perplexity, bits per byte.

  python -m memjax.evaluate --workdir runs/default --split test
  python -m memjax.evaluate --workdir runs/default --text letter.txt --context 128

Every token is scored exactly once. The last line of stdout is one JSON object: loss (nats a token), perplexity,
bits_per_byte, accuracy, tokens, bytes, split, step, config (its hash), and how the text was cut. `--test_time frozen` and `off` score
the text a second time, as usual, and add what the choice changed: difference, its loss, bits_per_byte and accuracy minus those of on.
"""
import dataclasses
import json
import math
import pathlib
import sys

from memjax.config.errors import UserError
from memjax.config.flags import Flag, run

CHOICES = ('on', 'frozen', 'off')
COMPARED = ('loss', 'bits_per_byte', 'accuracy')
FLAGS = (
    Flag('workdir', str, None, 'folder of the training run'),
    Flag('step', int, 0, 'checkpoint; 0 = the best, else the newest', low=0),
    Flag('quantize', str, '', "int8, int4 or nf4: stores the tables of memories so ('/kv': their keys and values; '/host': kernels of "
                              "linear maps); '' = as trained"),
    Flag('split', str, 'test', 'split of the corpus', choices=('train', 'val', 'test')),
    Flag('text', str, '', 'UTF-8 file to score instead of a split'),
    Flag('context', int, -1, 'tokens of each row that only give context; -1 = that of the config', low=-1),
    Flag('stream', bool, '', 'carries the memory along the whole text; else as in the config (also --nostream)'),
    Flag('test_time', str, 'on', "what memories that learn from the text do: 'on' = learn, each document from the start, as in training; "
                                 "'frozen' = no token is written: all read the learned start of a neural memory, and other kinds empty; "
                                 "'off' = what they read is replaced by zeros. Attention and banks are left alone", choices=CHOICES),
    Flag('length', int, 0, 'tokens a row; 0 = that of the config', low=0),
    Flag('batch', int, 0, 'rows; 0 = that of the config', low=0),
    Flag('output', str, '', 'JSON file for the result'),
)
UNITS = {'bytes': 'byte', 'word': 'word'}


def evaluation_of(config, values):
  """The config's evaluation with what the command line changes. Raises UserError for a combination that cannot be."""
  e = config.evaluation
  changes = {'batch': values['batch'] or e.batch, 'length': values['length'] or e.length or config.training.length}
  changes['stream'] = e.stream if values['stream'] == '' else values['stream']
  changes['context'] = values['context'] if values['context'] >= 0 else 0 if changes['stream'] else e.context
  table = config.model.embedding.max_position
  if table and changes['length'] > table:
    raise UserError(f"--length={changes['length']} exceeds the {table} learned positions")
  if table and changes['stream']: raise UserError('--stream does not go with learned positions, which end')
  return dataclasses.replace(e, **changes)


def main(config, values) -> None:
  """Prints the scores as one JSON line; UserError for whatever is wrong with the text, the settings or the run."""
  from memjax.data.pipeline import eval_batches
  from memjax.generate import check_output
  from memjax.runtime.evaluation import evaluate_tokens
  from memjax.runtime.losses import scores
  from memjax.runtime.reading import open_run, read_tokens, read_workdir, run_tags
  check_output(values['output'])
  evaluation = evaluation_of(read_workdir(values['workdir']), values)
  found = open_run(values['workdir'], values['step'], values['quantize'])
  tokens = read_tokens(found, values['split'], values['text'])
  cut = {'context': evaluation.context, 'stream': evaluation.stream, 'length': evaluation.length, 'batch': evaluation.batch}
  def score(test_time):
    totals = evaluate_tokens(found.model, found.params, eval_batches(tokens, **cut), stream=evaluation.stream, test_time=test_time)
    return scores(totals, tokens.bytes_per_token)
  result = score(values['test_time'])
  told = {'test_time': values['test_time']}
  if values['test_time'] != 'on':
    usual = score('on')
    told['difference'] = {name: result[name] - usual[name] for name in COMPARED}
  result = {**result, **told, 'bytes': tokens.bytes, 'split': tokens.split, 'step': found.step,
            'config': found.name, 'name': found.config.name, 'corpus': tokens.name,
            'token': UNITS.get(found.tokenizer.name, 'subword'), 'workdir': found.workdir, **cut, **run_tags(found.model.config),
            **({'quantize': values['quantize']} if values['quantize'] else {})}
  finite = lambda value: not isinstance(value, float) or math.isfinite(value)
  line = json.dumps({key: value if finite(value) else None for key, value in result.items()})
  if values['output']: pathlib.Path(values['output']).write_text(line + '\n', encoding='utf-8')
  sys.stdout.write(line + '\n')


if __name__ == '__main__': run(main, flags=FLAGS, takes_config=False)
