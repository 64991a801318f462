"""Conversations: what is in the state is what a fresh start would compute, whatever the template does to what was said."""
import io
import json

import numpy as np
import pytest

from memjax import generate
from memjax.config.errors import UserError
from memjax.config.flags import call
from memjax.runtime.host import open_host
from memjax.runtime.sampling import Sampler, Sampling
from memjax.runtime.talk import Conversation, Speaker
from tests.adapters.gguf_files import write_case

NEW = 6
SHORT = "{% for m in messages[-1:] %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}{% endfor %}"


@pytest.fixture(scope='module')
def path(tmp_path_factory): return write_case(tmp_path_factory.mktemp('talk') / 'm.gguf', 'llama_plain')


@pytest.fixture(scope='module')
def host(path): return open_host(path)


@pytest.fixture(scope='module')
def sampler(host): return Sampler(host.model, Sampling(temperature=0.0), chunk=4)


def begin(host, sampler, **options):
  return Conversation(Speaker(host.params, host.tokenizer, host.ends, host.encode_messages), sampler, **options)


def say(conversation, text): return ''.join(conversation.say(text, NEW))


def afresh(host, sampler, messages):
  """The reply of a conversation that enters the model whole."""
  other = begin(host, sampler)
  other.messages = list(messages)
  return say(other, 'er')


@pytest.mark.slow
def test_replies_go_on_from_the_state(host, sampler, monkeypatch):
  entered, extend = [], Sampler.extend
  def spy(self, params, session, prompts):
    entered.append((session.length, prompts[0].size))
    return extend(self, params, session, prompts)
  monkeypatch.setattr(Sampler, 'extend', spy)
  talk = begin(host, sampler, opening=[{'role': 'system', 'content': 'at'}])
  first = say(talk, 'the bat')
  before, known = list(talk.messages), talk.entered
  assert [m['role'] for m in before] == ['system', 'user', 'assistant'] and before[-1]['content'] == first
  second = say(talk, 'er')
  assert entered[0][0] == 0 and entered[1] == (known, host.encode_messages([*before, {'role': 'user', 'content': 'er'}]).size - known)
  assert second == afresh(host, sampler, before) and entered[-1][0] == 0
  talk.reset()
  assert talk.messages == before[:1] and talk.entered == 0 and say(talk, 'the bat') == first


def test_a_template_that_rewrites_what_was_said_enters_anew(host, sampler):
  template = type(host.template)(SHORT)
  talk = begin(host._replace(template=template), sampler)
  assert say(talk, 'the bat') == say(talk, 'the bat')
  assert talk.entered == host._replace(template=template).encode_messages(talk.messages[:1]).size + NEW
  template.close()


@pytest.mark.slow
def test_room_grows_with_the_conversation(host, sampler, monkeypatch):
  monkeypatch.setattr('memjax.runtime.talk.LEAST_ROOM', 32)
  talk = begin(host, sampler)
  texts = [say(talk, 'the bat'), say(talk, 'er'), say(talk, 'the')]
  monkeypatch.undo()
  other = begin(host, sampler)
  assert texts == [say(other, 'the bat'), say(other, 'er'), say(other, 'the')]


@pytest.mark.slow
def test_limits(host, sampler):
  talk = begin(host, sampler, limit=70)
  say(talk, 'the bat')
  before = list(talk.messages)
  with pytest.raises(UserError, match=r'the conversation and max_new_tokens, \d+ tokens, exceed the limit of 70'): say(talk, 'the bat ' * 9)
  assert talk.messages == before and say(talk, 'a') is not None
  session = sampler.start(host.params, [np.array([5, 6, 7], np.int32)], 8)
  session, _ = sampler.advance(host.params, session, np.zeros((1,), np.int32), 4)
  with pytest.raises(UserError, match='11 tokens does not fit into a memory of 8'):             # and never over the oldest
    sampler.advance(host.params, session, np.zeros((1,), np.int32), 4)


def test_the_command_holds_a_conversation(path, capsys, monkeypatch, tmp_path):
  def run(text, *words):
    monkeypatch.setattr('sys.stdin', io.StringIO(text))
    status = call(generate.main, flags=generate.FLAGS, takes_config=False,
                  argv=[f'--model={path}', '--chat', f'--max_new_tokens={NEW}', '--temperature=0', *words])
    return status, *capsys.readouterr()
  status, out, err = run('the bat\n\ner\n/reset\nthe bat\n/exit\nat\n', '--system=at', f'--output={tmp_path}/o.json')
  messages = json.loads((tmp_path / 'o.json').read_text())['messages']
  assert not status and not err and [m['role'] for m in messages] == ['system', 'user', 'assistant']
  one = messages[-1]['content']
  assert out.startswith(f'{one}\n') and out.endswith(f'{one}\n') and out.count('\n') >= 3
  assert run('the bat', '--system=at')[1] == f'{one}\n' == run('', '--system=at', '--prompt=the bat')[1]
  status, out, err = run('the ' * 200)
  assert status == 2 and err.count('\n') == 1 and 'exceed the limit of 128' in err and not out
