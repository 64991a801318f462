"""Finetuning SmolLM2-135M-Instruct: its conversations' targets (Q9.1), and ten steps on one batch for a memory, LoRA and both (Q5.7)."""
import dataclasses

import jax
import numpy as np
import pytest

from memjax import train
from memjax.config.chat import ChatConfig
from memjax.config.flags import load
from memjax.data.labels import Labels
from memjax.data.messages import conversation
from memjax.data.tokens import Tokens
from memjax.layers.tree import named
from memjax.runtime.state import make_train_step
from memjax.runtime.words import open_words
from tests.golden import CONFIGS
from tests.test_real_model import ASKED, MODEL

TURNS = [('user', 'What is the capital of France?'), ('assistant', 'The capital of France is Paris.'), ('user', '<|im_end|> naïve?'),
         ('assistant', ' In 1984, 日本語\n\n  2025. '), ('user', 'Bye'), ('assistant', 'Goodbye!')]

if MODEL:
  pytestmark = pytest.mark.slow

  @pytest.fixture(scope='module')
  def found():
    """(words, labels, what they say of the conversation)."""
    words = open_words(str(MODEL))
    labels = Labels(words.tokenizer, words.template, words.end_texts, ChatConfig())
    yield words, labels, labels(conversation({'messages': [{'from': role, 'value': text} for role, text in TURNS]}))
    words.template.close()

  def test_trained_tokens_are_the_replies_and_their_ends(found):
    words, _, (token_N, weight_N, size) = found
    replies = [text for role, text in TURNS if role == 'assistant']
    assert words.tokenizer.decode(token_N[weight_N]) == ''.join(f'{reply}<|im_end|>' for reply in replies)
    assert size == sum(len(reply.encode()) for reply in replies) and words.end_texts == ('<|im_end|>',)
    assert token_N[0] == 1 and (token_N == 1).sum() == 7 and (token_N == 2).sum() == 7
    assert token_N[:37].tolist() == ASKED and (token_N[37:44] == [504, 3575, 282, 4649, 314, 7042, 30]).all()

  @pytest.mark.parametrize('name', ['adapter_smollm2_135m', 'lora_only', 'memory_lora_combined'])
  def test_ten_steps_lower_the_loss(name, found):
    words, labels, (token_N, weight_N, _) = found
    config = load(f'{CONFIGS / name}.py:{MODEL}', 'training.mode=instruction', 'data.order=packed', 'data.source=path', 'data.path=none',
                  'training.batch=1', 'training.length=128', 'training.steps=10', 'mesh.data=1')
    groups = {group: dataclasses.replace(own, rate=own.rate and 1e-3, warmup=0) for group, own in config.optimizer.groups.items()}
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))
    tokens = Tokens(token_N, np.array([0]), 1, labels.fingerprint, words.tokenizer.vocabulary, 1, 'talk', 'train', weight_N=weight_N)
    parts, losses = train.build(config, words.tokenizer), []
    with jax.set_mesh(parts.mesh):
      state = train.first_state(parts)
      before = {path: np.array(x) for path, x in named(state.params).items() if path in ('embed/table', 'norm/scale')}
      step, batch = make_train_step(parts.model, parts.optimizer, config, parts.abstract), next(train.batches_from(parts, tokens, 0))
      for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss']))
    assert losses[-1] < losses[0] - 0.01 and int(metrics['tokens']) == weight_N.sum()
    for path, x in before.items(): np.testing.assert_array_equal(named(state.params)[path], x)
