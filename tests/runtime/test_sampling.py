"""Sampling: filters against numpy, generation against full forwards, streams against wholes, memory that does not grow."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, HolographicConfig, WindowConfig
from memjax.config.schema import EmbeddingConfig, MeshConfig, ModelConfig
from memjax.data.tokenizers import ByteTokenizer
from memjax.models.decoder import build_decoder, init_params, param_shapes
from memjax.runtime.sampling import Sampler, Sampling, draw, generate, keep_min_p, keep_top_k, keep_top_p, pad_left, shape_logits
from memjax.runtime.sharding import make_mesh, shardings_for
from memjax.runtime.text import StopText, Writer

MIXERS = {'full': AttentionConfig(heads=2), 'window': WindowConfig(heads=2, window=8), 'mem': HolographicConfig(heads=2)}
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7] * 5]


def make(pattern, **options):
  config = ModelConfig(width=16, hidden=16, vocabulary=256, mixers=MIXERS, pattern=pattern, repeats=1, **options)
  model = build_decoder(config)
  init = jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, init_params(model, key)[0]))     # logits far enough apart
  return model, init(jax.random.key(0))


@pytest.fixture(scope='module')
def everything():
  return make(('full', 'window+mem'))


@pytest.fixture(scope='module')
def greedy(everything):
  return Sampler(everything[0], Sampling(temperature=0.0))


@pytest.fixture(scope='module')
def random(everything):
  return Sampler(everything[0], Sampling(top_k=40, seed=3))


def tokens_of(sampler, params, prompts, new):
  return np.concatenate(list(sampler.stream(params, prompts, new)), 1)


@pytest.fixture(scope='module')
def logits():
  return np.random.default_rng(0).normal(0, 2, (6, 50)).astype(np.float32)


def softmax(x): return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def kept(logits): return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


def test_top_k_keeps_the_k_largest(logits):
  for k in (1, 3, 50):
    assert kept(keep_top_k(logits, k)) == [set(np.argsort(-row)[:k]) for row in logits]
  assert kept(keep_top_k(jnp.zeros((1, 5)), 2)) == [{0, 1}]       # ties: exactly k


def test_top_p_keeps_the_fewest_that_hold_p(logits):
  for p in (0.01, 0.5, 0.9, 0.999):
    want = []
    for row in softmax(logits.astype(np.float64)):
      order, total, keep = np.argsort(-row), 0.0, set()
      for token in order:
        if total >= p: break
        keep.add(token)
        total += row[token]
      want.append(keep)
    assert kept(keep_top_p(logits, p)) == want


def test_min_p_keeps_what_is_likely_enough(logits):
  for p in (0.02, 0.3, 1.0):
    assert kept(keep_min_p(logits, p)) == [set(np.flatnonzero(row >= p * row.max() * (1 - 1e-5))) for row in softmax(logits)]


def test_filters_act_in_order_and_after_the_temperature(logits):
  shaped = shape_logits(logits, Sampling(temperature=0.5, top_k=20, top_p=0.8, min_p=0.1))
  np.testing.assert_array_equal(shaped, keep_min_p(keep_top_p(keep_top_k(logits / 0.5, 20), 0.8), 0.1))
  np.testing.assert_array_equal(shape_logits(logits, Sampling()), logits)
  finite = np.isfinite(np.asarray(shaped))
  np.testing.assert_array_equal(np.asarray(shaped)[finite], (logits / 0.5)[finite])


def test_draws_follow_the_probabilities():
  row = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
  rows, many = jnp.arange(10_000), jnp.broadcast_to(row, (10_000, 4))
  drawn = jax.jit(lambda l: draw(l, Sampling(seed=1), rows, jnp.int32(5)))(many)
  wanted = 10_000 * np.exp(row)
  assert np.sum((np.bincount(drawn, minlength=4) - wanted) ** 2 / wanted) < 16.3           # chi^2 of 3 degrees beyond this: 1 in 1000
  again = draw(many, Sampling(seed=1), rows, jnp.int32(6))
  assert np.mean(np.asarray(drawn) == np.asarray(again)) < 0.5     # another token number is another draw


def test_temperature_zero_is_greedy(logits, everything, greedy):
  assert draw(logits, Sampling(temperature=0.0, top_k=3), jnp.arange(6), jnp.int32(0)).tolist() == logits.argmax(-1).tolist()
  one = Sampler(everything[0], Sampling(temperature=0.7, top_k=1), chunk=8)
  np.testing.assert_array_equal(tokens_of(one, everything[1], PROMPTS, 8), tokens_of(greedy, everything[1], PROMPTS, 8))


def test_generation_is_the_argmax_of_full_forwards(everything, greedy):
  model, params = everything
  out = tokens_of(greedy, params, PROMPTS, 64)
  assert out.shape == (3, 64) and out.dtype == np.int32
  assert len(set(out[0].tolist())) > 4                             # no degenerate loop that hides errors
  full = jax.jit(lambda p, t: model.apply({'params': p}, t, model.init_state(1), position_BxL=jnp.arange(80)[None])[0])
  for prompt, new in zip(PROMPTS, out, strict=True):
    whole = jnp.asarray([[*prompt, *new, *[0] * (80 - len(prompt) - 64)]])
    logits = full(params, whole)
    np.testing.assert_array_equal(jnp.argmax(logits[0], -1)[len(prompt) - 1:len(prompt) + 63], new)


def test_left_padding_changes_nothing(everything, greedy):
  model, params = everything
  together = greedy.start(params, [np.asarray(p, np.int32) for p in PROMPTS], 64).carry.logits_BxA
  for row, prompt in enumerate(PROMPTS):
    position = jnp.arange(len(prompt))[None]
    alone, _, _ = jax.jit(lambda t, p: model.apply({'params': params}, t, model.init_state(1, 15), position_BxL=p))(
        jnp.asarray([prompt]), position)
    np.testing.assert_allclose(together[row], alone[0, -1], atol=1e-5 * float(jnp.abs(alone[0, -1]).max()))


def test_pad_left_counts_real_tokens():
  token, position, mask = pad_left([np.asarray([4, 5, 6, 7, 8]), np.asarray([9])], 64)
  assert token.shape == (2, 8) and token[0].tolist() == [0, 0, 0, 4, 5, 6, 7, 8]
  assert position[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4] and mask[1].tolist() == [False] * 7 + [True]
  token, position, mask = pad_left([np.arange(1, 11), np.arange(1, 5), np.arange(1, 9)], 4)
  assert token.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 9, 10], [0] * 8 + [1, 2, 3, 4], [0] * 4 + [1, 2, 3, 4, 5, 6, 7, 8]]
  assert position[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9] and (mask == (token > 0)).all()
  lengths = [pad_left([np.ones(n, np.int32)], 512)[0].shape[1] for n in (1, 3, 9, 16, 17, 37, 64, 65, 100, 129, 400, 512, 513)]
  assert lengths == [1, 4, 16, 16, 32, 48, 64, 96, 128, 192, 512, 512, 1024]


def test_rows_do_not_see_each_other(everything, random):
  first = tokens_of(random, everything[1], [PROMPTS[0], [200, 201], PROMPTS[2]], 32)
  second = tokens_of(random, everything[1], [PROMPTS[0], [3] * 11, [5] * 9], 32)
  np.testing.assert_array_equal(first[0], second[0])
  assert (first[1] != second[1]).any()
  same = tokens_of(random, everything[1], [PROMPTS[0]] * 3, 32)
  assert (same[0] != same[1]).any()                                # equal prompts in one batch draw apart


def test_the_seed_decides(everything, random):
  again = Sampler(everything[0], Sampling(top_k=40, seed=3))
  other = generate(everything[0], everything[1], PROMPTS, max_new_tokens=16, top_k=40, seed=4)
  first = tokens_of(random, everything[1], PROMPTS, 16)
  np.testing.assert_array_equal(first, tokens_of(again, everything[1], PROMPTS, 16))
  assert (first != np.concatenate(list(other), 1)).any()


def test_rows_end_each_for_itself_and_drawing_with_the_last(everything, greedy):
  """A row that drew an end is filled up; no token is drawn after the last row's end; the texts are those without ends."""
  whole = tokens_of(greedy, everything[1], PROMPTS, 40)
  ends = (int(whole[0, 3]), int(whole[1, 9]), int(whole[2, 6]))
  first = [min(list(row).index(end) for end in ends if end in row) for row in whole]
  sampler = greedy.within(256, ends)
  assert sampler is greedy.within(256, ends) and sampler is not greedy and greedy.within(256) is greedy
  found = tokens_of(sampler, everything[1], PROMPTS, 40)
  assert found.shape == (3, max(first) + 1)
  for row, full, at in zip(found, whole, first, strict=True):
    assert row[:at + 1].tolist() == full[:at + 1].tolist() and set(row[at + 1:].tolist()) <= {ends[0]}
  assert tokens_of(sampler, everything[1], PROMPTS, 2).shape == (3, 2)


@pytest.mark.slow
def test_going_on_is_one_text(everything, greedy):
  """Prompts given in two parts, with the room grown between them, leave what the whole leaves."""
  _, params = everything
  whole = greedy.start(params, [np.asarray(p, np.int32) for p in ([1, 2, 3, 4, 5], [9, 8, 7])], 64)
  session = greedy.start(params, [np.asarray(p, np.int32) for p in ([1, 2], [9])], 16)
  session = greedy.extend(params, greedy.grow(session, 64), [np.asarray(p, np.int32) for p in ([3, 4, 5], [8, 7])])
  np.testing.assert_allclose(session.carry.logits_BxA, whole.carry.logits_BxA, atol=1e-5)
  assert session.carry.position_B.tolist() == [5, 3] and session.length == 5 and session.room == 64
  assert jax.tree.map(jnp.shape, session.carry.state) == jax.tree.map(jnp.shape, whole.carry.state)
  with pytest.raises(UserError, match='a text of 65 tokens does not fit into a memory of 64'):
    greedy.extend(params, session, [np.ones(60, np.int32)] * 2)


@pytest.mark.slow
def test_chunks_do_not_change_the_text(everything, random):
  whole = tokens_of(random, everything[1], PROMPTS, 37)
  for chunk in (5, 64):
    pieces = list(Sampler(everything[0], random.sampling, chunk=chunk).stream(everything[1], PROMPTS, 37))
    assert [p.shape[1] for p in pieces] == ([5] * 7 + [2] if chunk == 5 else [37])
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)


@pytest.mark.slow
def test_long_prompts_enter_in_segments(everything, greedy):
  prompts = [np.random.default_rng(1).integers(0, 256, n).astype(np.int32) for n in (41, 9, 26)]
  cut = Sampler(everything[0], greedy.sampling, segment=8)
  a, b = (s.start(everything[1], prompts, 64).carry.logits_BxA for s in (cut, greedy))
  np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
  assert cut.prefill._cache_size() == 2                            # with and without padding, whatever the length


@pytest.mark.slow
def test_parameters_may_lie_on_many_devices(everything, greedy):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  params = jax.device_put(everything[1], shardings_for(param_shapes(everything[0])[1], mesh, everything[1]))
  with jax.set_mesh(mesh): spread = tokens_of(Sampler(everything[0], greedy.sampling, segment=8), params, PROMPTS, 16)
  np.testing.assert_array_equal(spread, tokens_of(greedy, everything[1], PROMPTS, 16))


def test_generation_feeds_tokens_once(everything, greedy):
  _, params = everything
  session = greedy.start(params, [np.asarray(p, np.int32) for p in PROMPTS], 64)
  for calls in range(3):
    count = session.carry.state['repeats']['layer_0']['full'].count_B[:, 0]
    assert count.tolist() == [len(p) + greedy.chunk * calls for p in PROMPTS] == session.carry.position_B.tolist()
    session, _ = greedy.advance(params, session, jnp.arange(3))


def test_compiled_once_per_shape(everything, greedy):
  before = greedy.decode._cache_size(), greedy.prefill._cache_size()
  for prompts in (PROMPTS, [[1] * 14, [2] * 3, [3]], [[1] * 9, [2] * 3, [3]]): tokens_of(greedy, everything[1], prompts, 33)
  assert greedy.decode._cache_size() <= before[0] + 1 and greedy.prefill._cache_size() <= before[1] + 1


@pytest.mark.parametrize(('prompts', 'new', 'message'), [
    ([[]], 4, 'prompt 1 has no tokens'), ([], 4, 'no prompt'), ([[1], [256]], 4, 'prompt 2 holds token 256; tokens are 0 to 255'),
    ([[-1]], 4, 'token -1'), ([[0.5]], 4, 'not a list of token numbers'), ([[1]], 0, 'max_new_tokens must be at least 1, not 0')])
def test_bad_prompts_are_one_line(everything, greedy, prompts, new, message):
  with pytest.raises(UserError, match=message): greedy.stream(everything[1], prompts, new)


@pytest.mark.parametrize('field', [
    {'temperature': -1.0}, {'temperature': float('nan')}, {'top_p': 0.0}, {'top_p': 1.5}, {'top_k': -1}, {'min_p': -0.1}, {'min_p': 2.0},
    {'seed': -1}, {'top_k': 1.5}])
def test_bad_sampling_is_one_line(field):
  with pytest.raises(UserError, match=next(iter(field))): Sampling(**field)


def test_learned_positions_end():
  model, params = make(('window',), embedding=EmbeddingConfig(position='learned', max_position=16))
  sampler = Sampler(model, Sampling(temperature=0.0), chunk=4)
  with pytest.raises(UserError, match='17 tokens, exceed the 16 learned positions'): sampler.stream(params, [[1] * 5], 12)
  assert tokens_of(sampler, params, [[1] * 5], 11).shape == (1, 11)


def test_stop_text_across_pieces():
  def run(stops, pieces):
    stop = StopText(stops)
    return [stop.push(p) for p in pieces], stop.flush(), stop.stop
  assert run(['END'], ['abE', 'N', 'Dxyz', 'more']) == (['ab', '', '', ''], '', 'END')
  assert run(['END'], ['abE', 'N', 'E', 'NX']) == (['ab', '', 'EN', 'ENX'], '', '')
  assert run(['END'], ['abEN']) == (['ab'], 'EN', '')
  assert run(['aab'], ['aaab']) == (['a'], '', 'aab')
  assert run(['cd', 'abcdef'], ['xab', 'cd', 'ef']) == (['x', 'ab', ''], '', 'cd')
  assert run(['b', 'abc'], ['xabc']) == (['x'], '', 'abc')         # the earliest in the text, not in the list
  assert run([], ['abc', '']) == (['abc', ''], '', '')
  with pytest.raises(UserError, match='must not be empty'): StopText([''])


class Script:
  """Stands for a sampler: 'draws' given rows of tokens, three at a time, and counts how many were asked for."""

  def __init__(self, texts):
    self.rows, self.asked = np.stack([np.frombuffer(t, np.uint8) for t in texts]), 0

  def within(self, vocabulary, ends=()): return self

  def stream(self, params, prompts, new):
    for at in range(0, new, 3):
      self.asked += 3
      yield self.rows[:, at:at + 3]


def test_rows_of_text_end_each_for_itself():
  script = Script([b'one. two and much more!', b'abcd\x00efghijklmnopqrst..', b'\xc3\xa9t\xc3\xa9 ..............\xc3  '])
  writer, rows = Writer(script, None, ByteTokenizer(), stops=['. t', 'zzz'], ends=[0]), []
  pieces = list(writer.stream(['a', 'b', 'c'], 21, into=rows))
  assert [(r.text, r.tokens, r.ended) for r in rows] == [
      ('one', 6, 'stop'), ('abcd', 5, 'end'), ('été ' + '.' * 14 + '\ufffd', 21, 'length')]
  for number, row in enumerate(rows): assert ''.join(p for n, p in pieces if n == number) == row.text


def test_generation_stops_when_all_rows_have():
  script = Script([b'one. two and much more!', b'. two and much more one'])
  assert [r.text for r in Writer(script, None, ByteTokenizer(), stops=['. t']).write(['a', 'b'], 21)] == ['one', '']
  assert script.asked == 6


def test_text_streams_like_the_whole(everything, random):
  writer = Writer(random, everything[1], ByteTokenizer(), stops=['\x01\x02'])
  rows = []
  pieces = list(writer.stream(['ROMEO:', 'a', 'é'], 40, into=rows))
  whole = writer.write(['ROMEO:', 'a', 'é'], 40)
  assert [r.text for r in rows] == [r.text for r in whole] == [''.join(p for n, p in pieces if n == i) for i in range(3)]
  begun = [10, *b'ROMEO:']
  assert whole[0].text == ByteTokenizer().decode(tokens_of(random, everything[1], [begun, [10, 97], [10, 195, 169]], 40)[0])
  with pytest.raises(UserError, match='prompt 2 has no tokens'): writer.stream(['a', ''], 4)


def stream_bytes(new, chunk):
  """Bytes of all arrays alive after each chunk of `new` tokens of a recurrent model, after a prompt of a third of that."""
  model, params = make(('window+mem',))
  sampler = Sampler(model, Sampling(seed=1), chunk=chunk, segment=chunk)
  prompt, seen, count = np.arange(new // 3) % 256, [], 0
  for token_BxN in sampler.stream(params, [prompt], new):
    assert token_BxN.min() >= 0 and token_BxN.max() < 256
    count += token_BxN.shape[1]
    seen.append(sum(a.nbytes for a in jax.live_arrays()))
  assert count == new
  return seen


@pytest.mark.slow
def test_memory_does_not_grow():
  seen = stream_bytes(15_000, 1000)
  assert len(set(seen)) == 1


@pytest.mark.slow
def test_a_million_tokens_at_constant_memory():
  assert len(set(stream_bytes(1_000_000, 4000))) == 1


def test_tokens_beyond_the_tokenizer_are_never_drawn(everything):
  small = Sampler(everything[0], Sampling(), chunk=64).within(10)
  assert tokens_of(small, everything[1], [[1]] * 4, 64).max() == 9
  with pytest.raises(UserError, match='token 10; tokens are 0 to 9'): small.stream(everything[1], [[10]], 4)
  assert small.within(10) is small is small.within(99)


def test_sampling_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError): Sampling().seed = 2
