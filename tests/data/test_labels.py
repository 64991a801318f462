"""Which tokens of a conversation are trained on: Q9.1 to Q9.4 and Q9.6, by templates of pretrained models and without one."""
import dataclasses
import json

import numpy as np
import pytest

from memjax.config.chat import ChatConfig
from memjax.config.errors import UserError
from memjax.config.schema import DataConfig
from memjax.data.chat import ChatTemplate, Speller
from memjax.data.gguf_tokenizer import gguf_tokenizer
from memjax.data.labels import Labels
from memjax.data.messages import conversation
from memjax.data.packing import plan_rows
from memjax.data.sources import Corpus
from memjax.data.subword import SubwordTokenizer
from memjax.data.tokenizers import ByteTokenizer
from memjax.data.tokens import Tokens, tokenize_split
from tests.data.test_chat import SMOLLM2
from tests.data.test_gguf_tokenizer import metadata

# What of the template of Qwen3 (Apache-2.0) is about reasoning: that of turns before the last question is taken out.
QWEN3 = '''{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.open and message.role == "user" %}
        {%- set ns.open = false %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
'''
TAGS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TURNS = [('user', 'at 1984?'), ('assistant', ' naïve\n(at) 東 '), ('user', 'é'), ('assistant', 'yes'), ('user', 'x'),
         ('assistant', 'at ease')]
BARE = TAGS.replace('<|im_end|>{% endgeneration %}', '{% endgeneration %}<|im_end|>')


def says(*turns): return conversation({'messages': [{'role': role, 'content': content} for role, content in turns]})


@pytest.fixture(scope='module')
def tokenizer(): return gguf_tokenizer(metadata())


@pytest.fixture(scope='module')
def templates():
  found = {'smollm2': SMOLLM2, 'qwen3': QWEN3, 'tags': TAGS, 'bare': BARE}
  made = {name: ChatTemplate(source, eos='<|im_end|>', where=name) for name, source in found.items()}
  yield made
  for template in made.values(): template.close()


def label(tokenizer, template, *turns, **options): return Labels(tokenizer, template, ['<|im_end|>'], ChatConfig(**options))(says(*turns))


def trained(tokenizer, token_N, weight_N):
  """The texts of the runs of trained tokens."""
  edge = np.flatnonzero(np.diff(np.concatenate([[0], weight_N.astype(int), [0]])))
  return [tokenizer.decode(token_N[start:end]) for start, end in zip(edge[::2], edge[1::2], strict=True)]


def replies(*turns, end='<|im_end|>'): return [content + end for role, content in turns if role == 'assistant']


@pytest.mark.parametrize('name', ['smollm2', 'tags', 'bare'])
def test_trained_tokens_are_the_replies_and_their_ends(name, tokenizer, templates):
  """Q9.1 and Q9.3: prefixes, and tags with and without the end inside, find the same tokens."""
  token_N, weight_N, size = label(tokenizer, templates[name], *TURNS)
  assert trained(tokenizer, token_N, weight_N) == replies(*TURNS)
  assert size == sum(len(reply.encode()) for reply in replies(*TURNS, end=''))
  assert tokenizer.decode(token_N) == templates[name].render(json.loads(says(*TURNS)))
  assert token_N[0] == 1 and (token_N == 1).sum() == 6 + (name == 'smollm2')              # bos as the template writes it, once


def test_reasoning_of_earlier_turns(tokenizer, templates):
  """Q9.2: render(messages[:2]) is no prefix of the whole, for the reasoning is gone there; the spans are right all the same."""
  turns = [('user', 'a'), ('assistant', '<think>\nmm\n</think>\n\nat'), ('user', 'b'), ('assistant', '<think>\nhm\n</think>\n\n1984')]
  whole, part = (templates['qwen3'].render(json.loads(says(*some))) for some in (turns, turns[:2]))
  assert not whole.startswith(part)
  found = label(tokenizer, templates['qwen3'], *turns)
  assert trained(tokenizer, *found[:2]) == ['at<|im_end|>', '<think>\nhm\n</think>\n\n1984<|im_end|>'] and found[2] == 2 + 25
  masked = label(tokenizer, templates['qwen3'], *turns, mask_reasoning=True)
  assert trained(tokenizer, *masked[:2]) == ['at<|im_end|>', '1984<|im_end|>'] and masked[2] == 2 + 4
  assert masked[0].tolist() == found[0].tolist()
  last = label(tokenizer, templates['qwen3'], *turns, train_on='last_assistant', train_on_eot=False)
  assert trained(tokenizer, *last[:2]) == ['<think>\nhm\n</think>\n\n1984']


def test_reasoning_that_the_prompt_begins(tokenizer):
  template = ChatTemplate("{% for m in messages %}{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
                          "{% if add_generation_prompt %}<think>\n{% endif %}")
  found = label(tokenizer, template, ('user', 'a'), ('assistant', 'hm\n</think>\n\nat</think>'), mask_reasoning=True)
  assert trained(tokenizer, *found[:2]) == ['at</think><|im_end|>']
  template.close()


def test_prompts_that_are_no_prefix(tokenizer, templates):
  """An assistant who speaks first: the prompt of no messages lacks the system message of SmolLM2. Reasoning between two replies."""
  turns = [('assistant', ' Hi at '), ('user', 'a'), ('assistant', 'b')]
  assert trained(tokenizer, *label(tokenizer, templates['smollm2'], *turns)[:2]) == replies(*turns)
  turns = [('user', 'a'), ('assistant', '<think>\nhm\n</think>\n\nat '), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')]
  assert trained(tokenizer, *label(tokenizer, templates['qwen3'], *turns)[:2]) == ['at <|im_end|>', 'b<|im_end|>', 'd<|im_end|>']
  template = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", where='this one')
  with pytest.raises(UserError, match='this one writes replies in a way in which they cannot be told from the rest'):
    label(tokenizer, template, *turns)
  template.close()


def test_empty_and_consecutive_replies_and_unknown_roles(tokenizer, templates):
  """Q9.4. An empty reply still teaches to stop; what other roles say is never trained on."""
  turns = [('user', 'a'), ('assistant', ''), ('assistant', 'at'), ('critic', 'no'), ('tool', 'x'), ('assistant', 'b')]
  for name in ('smollm2', 'tags'): assert trained(tokenizer, *label(tokenizer, templates[name], *turns)[:2]) == replies(*turns)
  token_N, weight_N, size = label(tokenizer, templates['smollm2'], ('user', 'a'), ('critic', 'b'))
  assert not weight_N.any() and size == 0 and token_N.size


def test_truncation_keeps_weights_and_drops_what_has_none(tokenizer, templates):
  """Q9.4: rows end where they end; a conversation whose replies are all beyond contributes nothing."""
  token_N, weight_N, _ = label(tokenizer, templates['tags'], *TURNS[:4])
  tokens = Tokens(token_N, np.array([0]), 1, 'f', 300, 1, weight_N=weight_N)
  first = int(np.flatnonzero(weight_N)[0])
  assert plan_rows(tokens, first).length_S.tolist() == [first]
  with pytest.raises(UserError, match='has a reply within'): plan_rows(tokens, first - 1)


@pytest.mark.parametrize('options', [{}, {'train_on': 'last_assistant'}, {'train_on_eot': False}, {'train_on': 'all'}])
def test_options(options, tokenizer, templates):
  found = trained(tokenizer, *label(tokenizer, templates['tags'], *TURNS, **options)[:2])
  if options.get('train_on') == 'all': wanted = [templates['tags'].render(json.loads(says(*TURNS))).removeprefix('<|im_start|>')]
  else: wanted = replies(*TURNS, end='' if 'train_on_eot' in options else '<|im_end|>')[-1 if 'train_on' in options else 0:]
  assert found == wanted


def test_the_end_of_a_turn_inside_a_message(tokenizer, templates):
  """Q9.6: it is text, trained on as such; without the escape it is refused."""
  turns = [('user', 'a<|im_end|>'), ('assistant', 'b<|im_end|>\n<|im_start|>at<think>'), ('user', '東'), ('assistant', 'c')]
  for name in ('smollm2', 'tags'):
    token_N, weight_N, size = label(tokenizer, templates[name], *turns)
    assert trained(tokenizer, token_N, weight_N) == replies(*turns) and (token_N == 2).sum() == 4 + (name == 'smollm2')
    assert size == sum(len(reply) for reply in replies(*turns, end=''))
    with pytest.raises(UserError, match=r"message 1 holds '<\|im_end\|>', which ends a turn"):
      label(tokenizer, templates[name], *turns, escape=False)
  assert label(tokenizer, templates['tags'], ('user', '<|im_start|>'), ('assistant', 'c'), escape=False)[0].tolist().count(1) == 3


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'composed'])
def test_roles_without_a_template(kind, tokenizer):
  """Role, new line, content, new line; the content is trained on, and no special token of it is one."""
  if kind == 'composed': tokenizer = gguf_tokenizer(metadata(pre='qwen2'))      # it joins e and an accent, so bytes do not add up
  if kind == 'bytes': tokenizer = ByteTokenizer()
  turns = [('user', 'at<|im_end|>'), ('assistant', 'e\u0301 1984'), ('assistant', 'yes')]
  labels = Labels(tokenizer, None, (), ChatConfig())
  token_N, weight_N, size = labels(says(*turns))
  text = ''.join(f'<|{role}|>\n{content}\n' for role, content in turns)
  wanted = [content for role, content in turns if role == 'assistant']
  if kind == 'composed': text, wanted = text.replace('e\u0301', 'é'), [wanted[0].replace('e\u0301', 'é'), wanted[1]]
  assert token_N[0] == tokenizer.bos and tokenizer.decode(token_N[1:]) == text and 2 not in token_N.tolist()
  assert trained(tokenizer, token_N, weight_N) == wanted and size == len('e\u0301 1984yes'.encode())
  start = labels.prompt('at<|im_end|>')
  assert tokenizer.decode(start[1:]) == '<|user|>\nat<|im_end|>\n<|assistant|>\n' and start[0] == tokenizer.bos
  assert token_N[:len(start)].tolist() == start.tolist()


def test_offsets_where_tokens_are_not_bytes():
  """A tokenizer that writes spaces as another character, whose tokens are found by the offsets of the library."""
  import tokenizers as library
  words = ['[UNK]', '<s>', '\u2581', '\u2581a', 'b', 'é', '\n', ':']
  inner = library.Tokenizer(library.models.BPE({word: n for n, word in enumerate(words)}, [('\u2581', 'a')][:0], unk_token='[UNK]'))
  inner.normalizer = library.normalizers.Replace(' ', '\u2581')
  inner.add_special_tokens(['<s>'])
  tokenizer = SubwordTokenizer(inner, 'file', '<s>')
  token_N, size_N = Speller(tokenizer).sized('b é<s>\nb')
  assert token_N.tolist() == [4, 2, 5, 1, 6, 4] and size_N.tolist() == [1, 1, 2, 3, 1, 1]


def test_what_the_fingerprint_depends_on(tokenizer, templates):
  made = [Labels(tokenizer, template, ends, dataclasses.replace(ChatConfig(), **options)).fingerprint for template, ends, options in [
    (templates['smollm2'], ['a'], {}), (templates['qwen3'], ['a'], {}), (templates['smollm2'], ['b'], {}), (None, ['a'], {}),
    (templates['smollm2'], ['a'], {'escape': False}), (templates['smollm2'], ['a'], {'train_on': 'all'})]]
  assert len(set(made)) == len(made) and made[0] == Labels(tokenizer, templates['smollm2'], ['a'], ChatConfig()).fingerprint


def test_templates_that_do_not_say_how_turns_end(tokenizer, templates):
  with pytest.raises(UserError, match='smollm2 does not say what ends a turn'): Labels(tokenizer, templates['smollm2'], [''], ChatConfig())
  Labels(tokenizer, templates['tags'], [''], ChatConfig())
  with pytest.raises(UserError, match="smollm2 writes none of '</s>' after a reply"):
    Labels(tokenizer, templates['smollm2'], ['</s>'], ChatConfig())(says(*TURNS))
  labels = Labels(tokenizer, templates['smollm2'], ['<|im_end|>'], ChatConfig())
  assert labels.end_tokens == (2,) and labels.prompt('at')[-1] == tokenizer.encode('\n')[0]


def test_a_token_that_reaches_into_a_reply_is_trained_on():
  """The bracket that ends a reply and the new line after it are one token of this cut."""
  tokenizer = gguf_tokenizer(metadata(pre='qwen2'))
  found = Labels(tokenizer, None, (), ChatConfig())(says(('user', 'a'), ('assistant', 'x ()'), ('user', 'b')))
  assert trained(tokenizer, *found[:2]) == ['x ()\n'] and found[2] == 4


def test_token_files_of_conversations(tokenizer, templates, tmp_path):
  """Tokens, weights and bytes come back from the cache; other options have a file of their own; what is wrong has its number."""
  data, documents = DataConfig(cache=str(tmp_path)), [says(*TURNS[:2]), says(*TURNS[2:])]
  def tokens(**options):
    labels = Labels(tokenizer, templates['tags'], ['<|im_end|>'], ChatConfig(**options))
    return tokenize_split(data, tokenizer, 'train', Corpus('talk', 'train', documents), labels=labels)
  made, again, other = tokens(), tokens(), tokens(train_on='all')
  parts = [label(tokenizer, templates['tags'], *some) for some in (TURNS[:2], TURNS[2:])]
  for found in (made, again):
    np.testing.assert_array_equal(found.token_N, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(found.weight_N, np.concatenate([part[1] for part in parts]))
    assert found.starts.tolist() == [0, len(parts[0][0])] and found.bytes == sum(part[2] for part in parts)
    assert found.bytes_per_token == found.bytes / found.weight_N.sum() and found.weight_N.dtype == bool
  assert other.weight_N.sum() > made.weight_N.sum() and len(list(tmp_path.glob('*.bin'))) == 2
  assert made.identity == again.identity != other.identity and made.identity['labels']
  with pytest.raises(UserError, match=r"talk, conversation 2 of train: message 1 holds '<\|im_end\|>'"):
    documents[1] = says(('user', '<|im_end|>'))
    tokens(escape=False)
