"""Continues text with a trained model: streamed to stdout, at constant memory where the memories are recurrent.

  python -m memjax.generate --workdir runs/default --prompt 'ROMEO:' --max_new_tokens 500 --temperature 0.8
  python -m memjax.generate --model MODEL.gguf --chat --prompt 'What is the capital of France?' --temperature 0

One prompt is printed with its text as that grows; several come as blocks, in order, once all are complete. With `--chat` each
prompt is a message, and only the reply to it is printed. `--chat` without a prompt is a conversation: messages are lines of the
standard input; /reset begins another one, /exit or the end of the input ends it.
"""
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

from memjax.config.errors import UserError
from memjax.config.flags import Flag, run

PIECE = 4      # tokens of a reply that are shown at once

FLAGS = (
    Flag('workdir', str, '', 'folder of the training run; this or --model'),
    Flag('model', str, '', 'a Llama, Mistral, Qwen2 or Qwen3: GGUF file, folder of config.json, safetensors and tokenizer.json, or name '
                           'on the hub, owner/name or owner/name:FILE.gguf'),
    Flag('adapter', str, doc='folder of low-rank changes (PEFT) or of memories on --model', repeated=True),
    Flag('chat', bool, False, "prompts are messages of a user, written as the chat template of the model says"),
    Flag('system', str, '', 'what the system says at the start of each conversation; with --chat'),
    Flag('routing', str, '', "how routers of memories choose chapters: token, prefix-mean, rolling or hybrid; '' = as configured"),
    Flag('step', int, 0, 'checkpoint; 0 = the best, else the newest', low=0),
    Flag('quantize', str, '', "int8, int4 or nf4: stores the tables of a run's memories so ('/kv': their keys and values; '/host': kernels "
                              "of linear maps), or the kernels of --model; '' = as they are"),
    Flag('prompt', str, doc='text to continue', repeated=True),
    Flag('prompt_file', str, '', 'UTF-8 file whose whole text is one more prompt'),
    Flag('max_new_tokens', int, 200, 'tokens drawn for each prompt', low=1),
    Flag('max_len', int, 0, 'tokens that a prompt and its continuation may have; 0 = as many as --model was made for', low=0),
    Flag('temperature', float, 1.0, 'below 1 safer, above 1 more varied; 0 = always the most likely token', low=0.0),
    Flag('top_k', int, 0, 'draw from the k most likely tokens only; 0 = off', low=0),
    Flag('top_p', float, 1.0, 'draw from the fewest tokens that hold this share of the probability; 1 = off', high=1.0),
    Flag('min_p', float, 0.0, 'draw from tokens at least this share as likely as the likeliest; 0 = off', low=0.0, high=1.0),
    Flag('seed', int, 0, 'of the draws', low=0, high=2 ** 32 - 1),
    Flag('stop', str, doc='text that ends a continuation (and is left out)', repeated=True),
    Flag('state', str, '', 'file of --keep_state: the prompt goes on where that text ended, with all that its memories hold'),
    Flag('keep_state', str, '', 'file for the state of the memories after the text; for models whose state does not grow with it'),
    Flag('output', str, '', 'JSON file for prompts, texts and settings'),
)


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
  """The prompts of the command line, then that of the file. Raises UserError where there is none, or not UTF-8."""
  from memjax.data.sources import read_text
  prompts = [*prompts, *([read_text(pathlib.Path(file))] if file else [])]
  if not prompts: raise UserError('nothing to continue; give --prompt or --prompt_file')
  return prompts


def check_output(path: str, flag: str = '--output') -> None:
  """Raises UserError if a file cannot be put there, before anything is computed for it."""
  folder = os.path.dirname(os.path.abspath(path))
  if path and os.path.isdir(path): raise UserError(f'{flag} {path} is a folder')
  if path and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
    raise UserError(f'{flag} {path}: {folder} is not a folder that can be written to')


def ends_of(tokenizer) -> tuple[int, ...]:
  """Tokens after which a text is over: the document border of subword tokenizers. Bytes and words have none."""
  return (tokenizer.bos,) if tokenizer.name in ('bpe', 'file') else ()


def check_choice(values: dict) -> None:
  """Raises UserError unless there is one model, and no flag that belongs to the other kind."""
  if bool(values['workdir']) == bool(values['model']):
    raise UserError('give either --workdir, the folder of a training run, or --model, a GGUF file or a folder of a checkpoint')
  if values['workdir'] and values['adapter']: raise UserError('--adapter goes with --model, not with --workdir')
  if values['state'] or values['keep_state']:
    if values['chat'] or len(values['prompt']) + bool(values['prompt_file']) > 1:
      raise UserError('--state and --keep_state are for one prompt, without --chat')
    if values['stop'] and values['keep_state']: raise UserError('--keep_state does not go with --stop: more was read than the text shows')
  if values['system'] and not values['chat']: raise UserError('--system goes with --chat')
  if values['model'] and values['step']: raise UserError('--step goes with --workdir, not with --model')


def stream(writer, prompts: Sequence[str], max_new_tokens: int, *, is_chat: bool = False) -> list:
  """Prints the texts as they come, one prompt live, several as blocks; returns the continuations. Of a chat: replies alone."""
  rows = []
  pieces = writer.stream(prompts, max_new_tokens, into=rows)
  alone = len(prompts) == 1
  if alone and not is_chat: sys.stdout.write(prompts[0])
  for _, piece in pieces:
    if alone:
      sys.stdout.write(piece)
      sys.stdout.flush()
  for number, row in enumerate(rows, 1):
    if not alone: sys.stdout.write(f'--- {number} of {len(rows)} ---\n{"" if is_chat else row.prompt}{row.text}\n')
  if alone: sys.stdout.write('\n')
  return rows


def open_model(values: dict) -> tuple:
  """(Run or Host, its model with the routing asked for, what the report says of it)."""
  if values['workdir']:
    from memjax.runtime.reading import open_run
    found = open_run(values['workdir'], values['step'], values['quantize'])
    source = {'workdir': found.workdir, 'step': found.step, 'config': found.name}
  else:
    from memjax.data.hub import local_model
    from memjax.runtime.host import open_host
    found = open_host(local_model(values['model']), quantize=values['quantize'], adapters=values['adapter'])
    source = {'model': values['model'], 'chat': values['chat']} | ({'adapter': list(values['adapter'])} if values['adapter'] else {})
  if not values['routing']: return found, found.model, source
  from memjax.models.decoder import inference_model
  from memjax.models.routing import rerouted
  return found, inference_model(rerouted(found.model.config, values['routing'])), source | {'routing': values['routing']}


def open_speaker(values: dict, found):
  """The Speaker of conversations with a Run or a Host. Raises UserError for one that knows none."""
  from memjax.runtime.talk import Speaker
  if not values['workdir']: return Speaker(found.params, found.tokenizer, found.ends, found.encode_messages)
  from memjax.runtime.workdir import open_chat
  labels = open_chat(found.config, found.tokenizer, found.workdir)
  return Speaker(found.params, found.tokenizer, labels.end_tokens, labels.opening)


def open_writer(values: dict, found, sampler):
  """The Writer of a Run or a Host; with a saved memory, or for one, the Resumed."""
  from memjax.runtime.text import Writer
  if values['chat']:
    speaker, system = open_speaker(values, found), opening(values['system'])
    ends, enter = speaker.ends, lambda prompt: speaker.encode([*system, {'role': 'user', 'content': prompt}])
  else: ends, enter = (ends_of(found.tokenizer), None) if values['workdir'] else (found.ends, found.encode)
  is_resumed = values['state'] or values['keep_state']
  ends = ends or ((-1,) if is_resumed else ())         # without any, drawing still stops at the token that was asked for
  writer = Writer(sampler, found.params, found.tokenizer, stops=values['stop'], ends=ends, enter=enter, limit=limit_of(values, found))
  if not is_resumed: return writer
  from memjax.runtime.memory_state import Resumed
  return Resumed(writer, values['state'])


def opening(system: str) -> list[dict]:
  """The messages that every conversation begins with."""
  return [{'role': 'system', 'content': system}] if system else []


def limit_of(values: dict, found) -> int:
  """Tokens that a text may have; 0 = any number."""
  return values['max_len'] or (0 if values['workdir'] else found.context)


def read_messages(is_terminal: bool) -> Iterator[str]:
  """Lines of the standard input, without their ends, until /exit or its end. Raises UserError for what is not UTF-8."""
  while True:
    try:
      line = input('> ' if is_terminal else '')
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise UserError(f'the standard input is not UTF-8 at byte {error.start}') from None
    if line.strip() == '/exit': return
    yield line


def converse(conversation, max_new_tokens: int) -> None:
  """Replies to each line of the standard input on the standard output.

  On a terminal a message that is refused is answered by why, and ctrl-C breaks a reply off; else both end the command.
  """
  is_terminal = sys.stdin.isatty()
  for line in read_messages(is_terminal):
    if line.strip() == '/reset': conversation.reset()
    elif line.strip():
      try:
        for piece in conversation.say(line, max_new_tokens):
          sys.stdout.write(piece)
          sys.stdout.flush()
        sys.stdout.write('\n')
      except UserError as error:
        if not is_terminal: raise
        sys.stderr.write(f'memjax: {error}\n')
      except KeyboardInterrupt:
        if not is_terminal: raise
        sys.stdout.write('\n')


def main(config, values) -> None:
  """Continues the prompts, or holds a conversation; UserError for whatever is wrong with them, the settings, the run or the model."""
  del config
  check_choice(values)
  from memjax.runtime.sampling import Sampler, Sampling
  check_output(values['output'])
  check_output(values['keep_state'], '--keep_state')
  sampling = Sampling(**{name: values[name] for name in ('temperature', 'top_k', 'top_p', 'min_p', 'seed')})
  talks = values['chat'] and not values['prompt'] and not values['prompt_file']
  prompts = [] if talks else read_prompts(values['prompt'], values['prompt_file'])
  found, model, source = open_model(values)
  started, report = time.perf_counter(), {}
  if talks:
    from memjax.runtime.talk import Conversation
    conversation = Conversation(open_speaker(values, found), Sampler(model, sampling, chunk=PIECE), stops=values['stop'],
                                opening=opening(values['system']), limit=limit_of(values, found))
    converse(conversation, values['max_new_tokens'])
    report['messages'] = conversation.messages
  else:
    writer = open_writer(values, found, Sampler(model, sampling))
    rows = stream(writer, prompts, values['max_new_tokens'], is_chat=values['chat'])
    if values['keep_state']: writer.keep(values['keep_state'])
    report['continuations'] = [dataclasses.asdict(row) for row in rows]
  if not values['output']: return
  report = {**source, **dataclasses.asdict(sampling), 'max_new_tokens': values['max_new_tokens'], 'stop': list(values['stop']),
            'seconds': round(time.perf_counter() - started, 3), **report}
  pathlib.Path(values['output']).write_text(json.dumps(report, ensure_ascii=False, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__': run(main, flags=FLAGS, takes_config=False)
