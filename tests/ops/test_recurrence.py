"""The slot recurrence in all its forms against loops: properties 16 to 18, 24, 25, 27 to 29 and 32 of the specification."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops import chunked
from memjax.ops.recurrence import slot_copies, slot_mix, slot_scores, slot_states
from tests.ops import oracle
from tests.ops.inputs import cast, make, quick, truth
from tests.ops.oracle import relative, rms

SCAN, ASSOCIATIVE = {'form': 'scan'}, {'form': 'associative'}
CASES = [          # keep, order, G, S, reset, mask, options of the chunked form (None: associative)
    ('none', 'after', 1, 1, False, False, {'chunk': 4}),
    ('none', 'before', 3, 8, True, True, {'chunk': 2, 'carry': 'matmul'}),
    ('head', 'after', 3, 4, True, False, {'chunk': 3, 'carry': 'matmul'}),
    ('head', 'before', 1, 16, True, True, {'chunk': 3}),
    ('head', 'after', 1, 1, False, True, {'chunk': 2, 'carry': 'associative'}),
    ('slot', 'after', 1, 16, False, False, {'chunk': 3, 'decay': 'exact'}),
    ('slot', 'before', 3, 8, True, True, {'chunk': 3, 'decay': 'exact', 'carry': 'matmul'}),
    ('slot', 'after', 1, 8, True, True, {'chunk': 3, 'decay': 'factored'}),
    ('slot', 'before', 1, 4, False, False, {'chunk': 0, 'decay': 'factored'}),
    ('static', 'after', 1, 4, False, False, {'chunk': 3}),
    ('static', 'before', 1, 4, True, True, {'chunk': 3, 'decay': 'exact'}),
    ('static_head', 'after', 1, 4, False, False, {'chunk': 7}),
    ('none', 'after', 1, 4, False, False, None),
    ('slot', 'before', 1, 4, True, True, None),
    ('channel', 'after', 3, 4, True, True, None),
]
NAMES = [f'{keep}-{order}-{G}-{S}{"-reset" * r}{"-mask" * m}' for keep, order, G, S, r, m, _ in CASES]


def forms(op, arguments, options, ways, compiled=quick):
  """(outputs, gradients of a random functional of them by every floating input) of each way to run the op, in one compilation."""
  def all_of(arguments, options):
    def loss(arguments, log_keep, way):
      state, y = op(*arguments, **{**options, 'log_keep': log_keep}, **way)
      weigh = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
      return weigh(state) + weigh(y), (state, y)
    log_keep = options['log_keep']
    wanted = (0, 1) if log_keep is not None else 0
    return [jax.value_and_grad(loss, wanted, has_aux=True)(arguments, log_keep, way) for way in ways]
  return [(aux, jax.tree.leaves(grads)) for (_, aux), grads in compiled(all_of)(arguments, options)]


@pytest.mark.parametrize('case', CASES, ids=NAMES)
def test_forms_equal_the_loop(case):
  """Outputs, final state and all gradients: fp64 to rounding, against the loop and the scan."""
  keep, order, G, S, reset, mask, chunk = case
  arguments, options = make(keep=keep, G=G, S=S, reset=reset, mask=mask)
  want = truth(arguments, options, order=order)
  ways = [SCAN, ASSOCIATIVE if chunk is None else chunk | {'floor': -1.0}]
  with jax.enable_x64():
    results = forms(slot_mix, arguments, options, [way | {'order': order} for way in ways])
  for outputs, grads in results:
    for got, right in zip(outputs, want, strict=True): assert relative(got, right) <= 1e-12
    for got, right in zip(grads, results[0][1], strict=True): assert relative(got, right) <= 1e-10


@pytest.mark.parametrize('case', [CASES[n] for n in (2, 7)], ids=[NAMES[n] for n in (2, 7)])
def test_forms_equal_the_loop_in_fp32(case):
  keep, order, G, S, reset, mask, chunk = case
  arguments, options = cast(make(keep=keep, G=G, S=S, reset=reset, mask=mask), np.float32)
  want = truth(*cast((arguments, options), np.float64), order=order)
  ways = [way | {'order': order} for way in (SCAN, chunk | {'floor': -1.0})]
  results = forms(slot_mix, arguments, options, ways, compiled=jax.jit)
  for outputs, grads in results:
    assert outputs[0].dtype == outputs[1].dtype == jnp.float32
    for got, right in zip(outputs, want, strict=True): assert relative(got, right) <= 1e-6
    for got, right in zip(grads, results[0][1], strict=True): assert relative(got, right) <= 1e-5


def test_any_chunk():
  """C from 1 to L, beyond L, not a divisor of L, and L = 1."""
  arguments, options = make(keep='head', mask=True, reset=True)
  want = truth(arguments, options)
  single = [arguments[0], *(x[:, :1] for x in arguments[1:])]
  with jax.enable_x64():
    all_of = quick(lambda a, o: [slot_mix(*a, **o, chunk=C) for C in (1, 2, 5, 9)])
    for result in all_of(arguments, options):
      for got, right in zip(result, want, strict=True): assert relative(got, right) <= 1e-12
    for got, right in zip(quick(slot_mix)(*single), oracle.mix(*single), strict=True): assert relative(got, right) <= 1e-12


def test_automatic_chunk(monkeypatch):
  choose = lambda length, **more: chunked.choose_chunk(length, 0, **{'is_slot': False, 'floor': -20.0} | more)
  assert choose(1000) == 32 and choose(5) == 5 and choose(1000, is_slot=True) == 16
  assert choose(1000, is_slot=True, floor=-2.5) == 32 and chunked.choose_chunk(100, 48, is_slot=True, floor=-2.5) == 48
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert [choose(length) for length in (2048, 8192, 32_768, 10 ** 6)] == [64, 128, 256, 256]
  assert choose(32_768, is_slot=True, floor=-2.5) == 64


def test_decay_at_the_bound():
  """All log keeps at -2.5 and C = 64: finite, factored equals exact; beyond the bound it is refused."""
  arguments, options = cast(make(keep='slot', B=1, H=1, L=128, S=3), np.float32)
  options['log_keep'] = np.full_like(options['log_keep'], -2.5)
  ways = [{'decay': how, 'chunk': 64, 'floor': -2.5} for how in ('factored', 'exact')]
  factored, exact = forms(slot_mix, arguments, options, ways)
  for got, right in zip(jax.tree.leaves(factored), jax.tree.leaves(exact), strict=True):
    assert np.all(np.isfinite(got)) and relative(got, right) <= 1e-5
  with pytest.raises(UserError, match='160'): slot_mix(*arguments, **options, decay='factored', chunk=64, floor=-2.6)


def test_extreme_forgetting_is_finite():
  for keep in ('head', 'slot'):
    arguments, options = cast(make(keep=keep, B=1, H=1, L=16, S=3), np.float32)
    options['log_keep'] = np.full_like(options['log_keep'], -20.0)
    for result in forms(slot_mix, arguments, options, [{'chunk': 16, 'decay': 'exact'}]):
      assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result))


@pytest.mark.parametrize(('keep', 'order'), [('slot', 'after'), ('head', 'after'), ('slot', 'before')])
def test_gradient_of_keep_without_differences(keep, order):
  """d log keep = reversed cumulative sum of P dP - A dA, plus <m, dm> at the end (section 4.6)."""
  arguments, options = make(keep=keep)
  with jax.enable_x64():
    ((state, _), grads), = forms(slot_mix, arguments, options, [{'order': order, 'chunk': 4}])
  _, _, da, dp, dlog = (np.asarray(g) for g in grads)
  from_pick = np.sum(arguments[3] * dp, 2)
  if order == 'before': from_pick = np.concatenate([from_pick[:, 1:], np.zeros_like(from_pick[:, :1])], 1)
  d_total = from_pick - arguments[2] * da
  functional = np.cos(np.arange(state.size)).reshape(state.shape)
  d_total[:, -1] += np.sum(np.asarray(state) * functional, -1)
  want = np.cumsum(d_total[:, ::-1], 1)[:, ::-1]
  assert relative(dlog, want if keep == 'slot' else want.sum(-1, keepdims=True)) <= 1e-10


@pytest.mark.parametrize('keep', ['none', 'head', 'slot'])
def test_scores_equal_the_loop(keep):
  """<probe, m_s> per slot without a state per token, for content reads."""
  order, decay = {'slot': ('before', 'factored'), 'head': ('after', 'auto'), 'none': ('before', 'auto')}[keep]
  arguments, options = make(keep=keep, reset=True, mask=True)
  probe = np.random.default_rng(9).normal(size=(2, 7, 3, 2, 6))
  want = truth(arguments, options, order=order, probe=probe)[1]
  with jax.enable_x64():
    ways = (SCAN, ASSOCIATIVE, {'chunk': 3, 'decay': decay, 'floor': -1.0})
    scores = lambda a, o, probe: [slot_scores(*a[:3], probe, **o, order=order, **way) for way in ways]
    for got in quick(scores)(arguments, options, probe): assert relative(got, want) <= 1e-12


@pytest.mark.parametrize('keep', ['head', 'channel'])
def test_copies_equal_the_loop(keep):
  """Each copy is a one-slot memory of its own bound values."""
  _, options = make(keep=keep, S=1, reset=True, mask=True)
  rng = np.random.default_rng(3)
  state, bound, gate = rng.normal(size=(2, 2, 3, 6)), rng.normal(size=(2, 7, 2, 3, 6)), rng.random((2, 7, 2))
  one = np.ones((2, 7, 1, 2, 1))
  with jax.enable_x64():
    ways = (SCAN, ASSOCIATIVE if keep == 'channel' else {'chunk': 3})
    all_of = lambda s, b, g, o: [slot_copies(s, b, gate_BxLxH=g, **o, **way) for way in ways]
    results = quick(all_of)(state, bound, gate, options)
  for s in range(3):
    want = truth([state[:, :, s:s + 1], bound[:, :, :, s], gate[..., None], one], options)
    for got_state, got_y in results:
      assert relative(got_state[:, :, s:s + 1], want[0]) <= 1e-12
      assert relative(got_y[:, :, None, :, s], want[1]) <= 1e-12


def test_states_after_each_chunk():
  arguments, options = make(keep='head', reset=True, mask=True)
  with jax.enable_x64(): states = quick(lambda a, o: slot_states(*a[:3], **o, chunk=3))(arguments, options)
  for n, end in enumerate((3, 6, 7)):
    cut = [arguments[0], *(x[:, :end] for x in arguments[1:])]
    want = truth(cut, {name: None if x is None else x[:, :end] for name, x in options.items()})[0]
    assert relative(states[:, n], want) <= 1e-12


def test_bf16_with_fp32_state():
  arguments, options = cast(make(keep='head', L=512, S=8, K=16, B=1, decay=0.1), np.float32)
  inputs = [arguments[0] * 0, *(x.astype(jnp.bfloat16) for x in arguments[1:])]
  want = jax.jit(slot_mix)(arguments[0] * 0, *arguments[1:], **options)
  state, y = jax.jit(slot_mix)(*inputs, **options)
  assert state.dtype == jnp.float32 and y.dtype == jnp.bfloat16
  exact = jax.jit(slot_mix)(arguments[0] * 0, *(x.astype(np.float32) for x in inputs[1:]), **options)
  assert rms(y, exact[1]) <= 5e-3 and rms(state, exact[0]) <= 5e-3
  assert rms(y, want[1]) <= 1e-2


def test_bad_arguments_are_refused():
  arguments, options = cast(make(keep='channel'), np.float32)
  for wrong in (options, {'form': 'fft'}, {'order': 'during'}, {'carry': 'magic'}):
    with pytest.raises(UserError): jax.eval_shape(lambda a, wrong=wrong: slot_mix(*a, **wrong), arguments)
  state, bound, keep = np.zeros((1, 1, 2, 4)), np.zeros((1, 3, 1, 2, 4)), np.zeros((1, 3, 1, 2))
  with pytest.raises(UserError): jax.eval_shape(lambda *x: slot_copies(*x[:2], log_keep=x[2]), state, bound, keep)
