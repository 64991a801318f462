"""The process in which a chat template runs: requests and answers are lines of JSON on its standard input and output.

Templates come with the weights of strangers. jinja2's sandbox keeps them from Python's insides; this process, which knows nothing
and is stopped from outside, keeps them from endless loops and from the memory. Started by `memjax.data.chat`, by its path.
"""
import contextlib
import datetime
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

OPEN, CLOSE = '\U0010fffe', '\U0010ffff'       # no characters of any text, by Unicode


class Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`, which marks what an assistant wrote: rendered as its content, between OPEN and CLOSE
  where the request asks for marks."""
  tags = {'generation'}      # noqa: RUF012 (the library's own form)

  def __init__(self, made: jinja2.Environment):
    super().__init__(made)
    made.extend(marks=False)

  def parse(self, parser: Any) -> Any:
    """A call of `_mark` with what is between the two tags."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return f'{OPEN}{caller()}{CLOSE}' if self.environment.marks else caller()


def refuse(message: str) -> None:
  """What templates call `raise_exception`."""
  raise jinja2.TemplateError(message)


def to_json(value: Any, *, ensure_ascii: bool = False, indent: int | None = None, separators: tuple | None = None,
            sort_keys: bool = False) -> str:
  """The filter `tojson` without HTML escapes, as tools are written into prompts."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
  """The sandbox: no loader, no files, and of jinja2's globals those without side effects."""
  made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                      extensions=[Generation, jinja2.ext.loopcontrols])
  made.globals.pop('lipsum')
  made.globals['raise_exception'] = refuse
  made.filters['tojson'] = to_json
  return made


def render(template: jinja2.Template, request: dict, longest: int) -> str:
  """The text of a request; raises ValueError once it is longer than allowed."""
  now = datetime.datetime.fromisoformat(request['now'])
  pieces, size = [], 0
  for piece in template.generate(strftime_now=now.strftime, **request['variables']):
    size += len(piece)
    if size > longest: raise ValueError(f'the text is longer than {longest} characters')
    pieces.append(piece)
  return ''.join(pieces)


def answer(line: bytes, made: jinja2.Environment, state: dict) -> dict:
  """{'text': ...} or {'error': kind, 'message': ...} for one line; the first one holds the template and the limits."""
  try:
    request = json.loads(line)
    if 'source' in request:
      state['longest'] = request['longest']
      state['template'] = made.from_string(request['source'])
      return {'text': ''}
    made.marks = request['marks']
    return {'text': render(state['template'], request, state['longest'])}
  except Exception as error:              # whatever a template does wrong is said to the one who asked
    return {'error': type(error).__name__, 'message': str(error)[:500]}


def limit_memory(size: int) -> None:
  """None; larger allocations raise MemoryError, where the system can do that."""
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
  """Says that it is ready, then answers line by line until its input ends."""
  limit_memory(int(sys.argv[1]))
  made, state = environment(), {}
  sys.stdout.write('ready\n')
  sys.stdout.flush()
  for line in sys.stdin.buffer:
    sys.stdout.write(json.dumps(answer(line, made, state)) + '\n')
    sys.stdout.flush()


if __name__ == '__main__': main()
