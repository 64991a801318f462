"""Finetuning a host: the loss counts real targets alone (Q9.5), the host stays bit-equal (Q5.2), dropout gets its key, losses fall."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from memjax import train
from memjax.adapters.gguf_model import load_gguf
from memjax.config.flags import load
from memjax.config.lora import LoraConfig
from memjax.config.schema import BlockConfig
from memjax.layers.tree import named
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime import state as module
from memjax.runtime.optim import make_optimizer
from memjax.runtime.state import TrainState, make_gradient, make_train_step
from memjax.runtime.workdir import open_labels, open_tokenizer, read_split
from tests.adapters.gguf_files import write_case
from tests.golden import CONFIGS
from tests.runtime import toy


def targets(rows, length, *, seed=0):
  """A batch of short documents, some tokens scored, none after a row's end."""
  batch, draw = toy.batch(seed, rows, length), np.random.default_rng(seed)
  mask = np.arange(length) < draw.integers(1, length, (rows, 1))
  return {**batch, 'mask': mask, 'weight': batch['weight'] & mask}


def padded(batch, rows, length):
  """The batch with empty rows and columns, which hold anything."""
  draw, out = np.random.default_rng(9), {}
  for name, x in batch.items():
    wider = np.zeros((x.shape[0] + rows, x.shape[1] + length), x.dtype)
    if name in ('token', 'target'): wider[:] = draw.integers(0, toy.VOCABULARY, wider.shape)
    wider[:x.shape[0], :x.shape[1]] = x
    out[name] = wider
  return out


SAME = {'both': (2, True), 'padding': (1, True), 'micro-batches': (2, False)}


@pytest.mark.parametrize('change', [pytest.param(name, marks=pytest.mark.slow) if name != 'both' else name for name in SAME])
def test_loss_and_gradient_do_not_depend_on_padding_nor_on_micro_batches(change):
  """Q9.5: sums over the targets of the whole batch, divided once by their number; rows with few targets count as little."""
  model = build_decoder(toy.MODEL)
  params, optimizer = init_params(model, jax.random.key(0))[0], make_optimizer(toy.OPTIMIZER, param_shapes(model)[0], 6)
  batch, (number, is_padded) = targets(4, 8), SAME[change]
  assert len({int(row.sum()) for row in batch['weight']}) > 2
  def compute(accumulate, given):
    config = toy.tiny(batch=len(given['token']), length=given['token'].shape[1], accumulate=accumulate)
    grads, totals, _, _ = jax.jit(make_gradient(model, optimizer, config))(params, (), given, jax.random.key(1))
    return grads, int(totals.tokens), float(totals.nats) / int(totals.tokens)
  (wanted, tokens, loss), (grads, *found) = compute(1, batch), compute(number, padded(batch, 2, 4) if is_padded else batch)
  assert found == [tokens, pytest.approx(loss, rel=0, abs=1e-6)] and tokens == batch['weight'].sum()
  for path, x in grads.items(): np.testing.assert_allclose(x, wanted[path], atol=1e-6, err_msg=path)


class Noisy(toy.Recurrent):
  """Logits times the random numbers that low-rank changes would drop by."""

  def apply(self, variables, token, state, *, rngs=None, **given):
    logits, state, aux = super().apply(variables, token, state, **given)
    return logits * (jax.random.uniform(rngs['lora']) if rngs else 1), state, aux


@pytest.mark.parametrize('rate', [0.5, 0.0])
def test_dropout_of_low_rank_changes_gets_the_key_of_the_step(rate):
  """Another key gives another loss where there is dropout; without any the key changes nothing."""
  lora = LoraConfig(rank=2, dropout=rate)
  config = dataclasses.replace(toy.CONFIG, model=dataclasses.replace(toy.MODEL, block=BlockConfig(lora=lora)))
  model, zero, losses = Noisy(), np.zeros((), np.int32), []
  optimizer = make_optimizer(config.optimizer, model.params(), 6)
  step = make_train_step(model, optimizer, config)
  for key, done in ((1, 0), (2, 0), (1, 0), (1, 1)):
    params, own = model.params(), jax.random.key_data(jax.random.key(key))
    state = TrainState(zero + np.int32(done), params, optimizer.init(params), own, (), zero)
    losses.append(float(step(state, toy.batch())[1]['loss']))
  assert losses[0] == losses[2] and len(set(losses)) == (3 if rate else 1)


@pytest.fixture(scope='module')
def host(tmp_path_factory):
  """A GGUF file of a tiny Llama, with a chat template, and conversations beside it."""
  root = tmp_path_factory.mktemp('host')
  write_chats(root / 'chats')
  return write_case(root / 'host.gguf', 'llama_plain')


def write_chats(folder):
  """A folder of conversations about the and that."""
  folder.mkdir()
  words = ['the bat', 'that hat', 'a cat', 'her mother', 'the father', 'at']
  for split, count in (('train', 24), ('val', 4), ('test', 4)):
    rows = [[('user', f'{words[n % 6]}?'), ('assistant', f'{words[(n + 1) % 6]}. {words[n % 6]}!')] * (1 + n % 3) for n in range(count)]
    lines = [json.dumps({'messages': [{'role': role, 'content': text} for role, text in row]}) for row in rows]
    (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return folder


def config_on(name, host, *overrides):
  """A shipped config on the tiny host, to train on its conversations."""
  root = host.rpartition('/')[0]
  data = ('data.order=packed', 'data.source=path', f'data.path={root}/chats', f'data.cache={root}/cache')
  return load(f'{CONFIGS / name}.py:{host}', 'training.mode=instruction', *data, 'training.batch=4', 'training.length=64',
              'training.steps=10', 'mesh.data=1', *overrides)


RATES = {'adapter_smollm2_135m': ('memory', 'memory_bank'), 'lora_only': ('lora',),
         'memory_lora_combined': ('memory', 'memory_bank', 'lora')}


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow) if name != 'lora_only' else name for name in RATES])
def test_ten_steps_on_conversations_lower_the_loss_and_leave_the_host_alone(name, host):
  """Q5.2 and Q5.7 on a tiny host: with weight decay, only what is new moves, and all of that; the host is bit-equal."""
  groups = [f'optimizer.groups.{group}.{field}' for group in RATES[name] for field in ('rate=1e-2', 'warmup=0', 'weight_decay=0.1')]
  extra = ['model.mixers.memory.form.kind=gather'] if 'memory' in RATES[name] else []
  config = config_on(name, host, *groups, *extra)
  tokenizer = open_tokenizer(config, '')
  parts = train.build(config, tokenizer)
  tokens = read_split(config, tokenizer, 'train', open_labels(config, tokenizer))
  with jax.set_mesh(parts.mesh):
    state = train.first_state(parts)
    before = {path: np.array(x) for path, x in named(state.params).items()}
    step, losses = make_train_step(parts.model, parts.optimizer, config, parts.abstract), []
    batch = next(train.batches_from(parts, tokens, 0))
    for _ in range(10):
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
  assert int(metrics['tokens']) == batch['weight'].sum() < batch['mask'].sum() and losses[-1] < losses[0] - 0.05
  after = named(state.params)
  moved = {path for path, x in after.items() if not np.array_equal(x, before[path])}
  assert moved == set(before) - set(parts.optimizer.frozen) and set(parts.optimizer.groups.values()) == {*RATES[name], 'base'}
  host_params = named(load_gguf(host)[1])
  assert {path for path in host_params if path in after and 'layer' not in path} >= {'embed/table', 'norm/scale'}
  for path in set(host_params) & set(after): np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_only_what_is_new_is_made(host, monkeypatch):
  """The state of a run on a host: its parameters are those of the host, and the program that makes the others gives nothing else."""
  config = config_on('lora_only', host)
  parts, made = train.build(config, None), []
  jit = jax.jit
  def watched(make, **options):
    if make.__name__ == 'make': made.append(jax.eval_shape(make).params)
    return jit(make, **options)
  monkeypatch.setattr(module.jax, 'jit', watched)
  with jax.set_mesh(parts.mesh): state = train.first_state(parts)
  [fresh] = made
  assert fresh and all('/lora_' in path for path in fresh)
  assert set(fresh) == {path for path, group in parts.optimizer.groups.items() if group == 'lora'}
  assert jax.tree.structure(state.params) == jax.tree.structure(parts.abstract.params)
