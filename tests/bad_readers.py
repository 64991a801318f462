"""Rows of the table of bad input for evaluate, generate and analyze: (id, act, what the line must contain)."""
import functools
import json
import shutil

from memjax import analyze, evaluate, generate
from memjax.config.flags import call
from memjax.config.mixers import AttentionConfig
from memjax.data.tokenizers import ByteTokenizer, WordTokenizer
from tests.pieces import make_workdir, small_config, write_plays


def act(command, *words):
  """The command on words in which PLACE is the row's folder; RUN is a run there, made once per folder."""
  def run(place):
    argv = [word.replace('PLACE', str(place)) for word in words]
    if any('RUN' in word for word in argv): argv = [word.replace('RUN', str(sound(place))) for word in argv]
    return call(command.main, flags=command.FLAGS, takes_config=False, argv=argv)
  return run


@functools.cache
def master(root):
  """The run that the others are copies of."""
  return make_workdir(root / 'master', small_config(write_plays(root / 'plays')))


def sound(place):
  """A copy of a sound run in the row's folder."""
  return shutil.copytree(master(place.parent), place / 'sound', dirs_exist_ok=True)


def spoilt(command, spoil, *words):
  """The command on a run to which `spoil` was done."""
  def run(place):
    spoil(sound(place))
    return act(command, f'--workdir={place}/sound', *words)(place)
  return run


def lose_checkpoints(run): shutil.rmtree(run / 'checkpoints')


def swap_tokenizer(run): WordTokenizer(['<eos>', 'a']).save(run / 'tokenizer')


def break_tokenizer(run): (run / 'tokenizer' / 'meta.json').write_text('{"name": "bytes"')


def grow_tokenizer(run): WordTokenizer(['<eos>', *map(str, range(300))]).save(run / 'tokenizer')


def lose_text(run):
  config = json.loads((run / 'config.json').read_text())
  config['data']['path'] = '/no/such/text'
  (run / 'config.json').write_text(json.dumps(config))


def make_full(run):
  shutil.rmtree(run)
  make_workdir(run, small_config(write_plays(run.parent / 'plays'), mixers={'full': AttentionConfig(heads=1)}, pattern=('full',)),
               ByteTokenizer())


def empty_file(run): (run.parent / 'nothing.txt').write_text('')


GENERATE = ('--workdir=RUN', '--prompt=a')
READERS = [
  ('generate: no workdir', act(generate, '--prompt=a'), 'give either --workdir, the folder of a training run, or --model'),
  ('generate: missing workdir', act(generate, '--workdir=PLACE/no', '--prompt=a'), 'no such workdir: PLACE/no'),
  ('generate: file as workdir', act(generate, '--workdir=PLACE/base.py', '--prompt=a'), 'PLACE/base.py is a file, not a workdir'),
  ('generate: foreign workdir', act(generate, '--workdir=PLACE', '--prompt=a'), 'PLACE is not the workdir of a run: it holds no config'),
  ('generate: no checkpoint', spoilt(generate, lose_checkpoints, '--prompt=a'), 'holds no checkpoint'),
  ('generate: no such step', act(generate, *GENERATE, '--step=3'), 'holds no checkpoint 3; there are [7]'),
  ('generate: another tokenizer', spoilt(generate, swap_tokenizer, '--prompt=a'), 'does not match checkpoint 7'),
  ('generate: a larger tokenizer', spoilt(generate, grow_tokenizer, '--prompt=a'), 'vocabulary=256 is below the 301 tokens'),
  ('generate: damaged tokenizer', spoilt(generate, break_tokenizer, '--prompt=a'), 'is damaged'),
  ('generate: no prompt', act(generate, '--workdir=RUN'), 'give --prompt or --prompt_file'),
  ('generate: empty prompt', act(generate, *GENERATE, '--prompt='), 'prompt 2 has no tokens'),
  ('generate: prompt file missing', act(generate, '--workdir=RUN', '--prompt_file=PLACE/no.txt'), 'cannot read PLACE/no.txt'),
  ('generate: prompt not utf-8', act(generate, '--workdir=RUN', '--prompt_file=PLACE/latin.py'), 'PLACE/latin.py is not UTF-8'),
  ('generate: temperature', act(generate, *GENERATE, '--temperature=-1'), '--temperature must be at least 0.0, not -1.0'),
  ('generate: top_p of 0', act(generate, *GENERATE, '--top_p=0'), 'top_p must be above 0'),
  ('generate: top_p of 1.5', act(generate, *GENERATE, '--top_p=1.5'), '--top_p must be at most 1.0, not 1.5'),
  ('generate: min_p', act(generate, *GENERATE, '--min_p=-0.1'), '--min_p must be at least 0.0'),
  ('generate: top_k', act(generate, *GENERATE, '--top_k=-1'), '--top_k must be at least 0, not -1'),
  ('generate: seed', act(generate, *GENERATE, '--seed=-1'), '--seed must be at least 0'),
  ('generate: no tokens wanted', act(generate, *GENERATE, '--max_new_tokens=0'), '--max_new_tokens must be at least 1, not 0'),
  ('generate: empty stop', act(generate, *GENERATE, '--stop='), 'a stop string must not be empty'),
  ('generate: output', act(generate, *GENERATE, '--output=PLACE/no/o.json'), 'PLACE/no is not a folder'),
  ('generate: config', act(generate, *GENERATE, '--config.seed=1'), '--config.seed does not apply'),
  ('evaluate: missing workdir', act(evaluate, '--workdir=PLACE/no'), 'no such workdir: PLACE/no'),
  ('evaluate: split', act(evaluate, '--workdir=RUN', '--split=dev'), "--split must be one of 'train', 'val', 'test', not 'dev'"),
  ('evaluate: text missing', act(evaluate, '--workdir=RUN', '--text=PLACE/no.txt'), 'PLACE/no.txt'),
  ('evaluate: text empty', spoilt(evaluate, empty_file, '--text=PLACE/nothing.txt'), 'PLACE/nothing.txt is empty'),
  ('evaluate: text a folder', act(evaluate, '--workdir=RUN', '--text=PLACE'), 'PLACE'),
  ('evaluate: corpus gone', spoilt(evaluate, lose_text), '/no/such/text'),
  ('evaluate: context', act(evaluate, '--workdir=RUN', '--context=16'), 'context=16 must be below length=16'),
  ('evaluate: context of a stream', act(evaluate, '--workdir=RUN', '--stream', '--context=4'), 'context does not apply to stream'),
  ('evaluate: stream and attention', spoilt(evaluate, make_full, '--stream'), 'does not go with full attention'),
  ('evaluate: output a folder', act(evaluate, '--workdir=RUN', '--output=PLACE'), '--output PLACE is a folder'),
  ('analyze: foreign workdir', act(analyze, '--workdir=PLACE'), 'PLACE is not the workdir of a run'),
  ('analyze: lengths', act(analyze, '--workdir=RUN', '--lengths=128,x'), "--lengths wants int, got 'x'"),
  ('analyze: length of 1', act(analyze, '--workdir=RUN', '--lengths=1'), 'must be at least 2, not 1'),
]
