"""Cutting, masking, resetting, leaking, spreading: properties 18 to 23, 30, 31, 33, 35, 36 and 38 of the specification."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.recurrence import slot_mix, slot_read, slot_states, slot_write
from tests.ops.inputs import cast, make, quick, truth
from tests.ops.oracle import relative


def mix(arguments, options, **more):
  """slot_mix in chunks of 3, compiled."""
  return quick(lambda a, o: slot_mix(*a, **o, **{'chunk': 3, 'floor': -1.0} | more))(arguments, options)


def between(arguments, options, start, stop, state):
  """The same inputs for tokens start to stop, from another state."""
  cut = {n: x if x is None or x.shape[1] == 1 else x[:, start:stop] for n, x in options.items()}
  return [state, *(x[:, start:stop] for x in arguments[1:])], cut


@pytest.mark.parametrize(('keep', 'cut'), [('slot', 1), ('static', 4)])
def test_split_anywhere(keep, cut):
  arguments, options = make(keep=keep, reset=True, mask=True)
  with jax.enable_x64():
    state, y = mix(arguments, options)
    first, left = mix(*between(arguments, options, 0, cut, arguments[0]))
    second, right = mix(*between(arguments, options, cut, 7, first))
  assert relative(second, state) <= 1e-12 and relative(np.concatenate([left, right], 1), y) <= 1e-12


def test_prefill_of_ragged_rows_then_steps():
  """A masked prefix in one pass, then single tokens, is what each row gives alone."""
  arguments, options = make(keep='head', L=6)
  lengths = (2, 4)
  options['mask_BxL'] = np.arange(4)[None] < np.array(lengths)[:, None]
  prefix, cut = between(arguments, {'log_keep': options['log_keep']}, 0, 4, arguments[0])
  with jax.enable_x64():
    state, _ = mix(prefix, {**cut, 'mask_BxL': options['mask_BxL']})
    for t in (4, 5):
      state = slot_write(state, arguments[1][:, t], arguments[2][:, t], options['log_keep'][:, t])
      y = slot_read(state, arguments[3][:, t])
  for row, length in enumerate(lengths):
    kept = np.r_[0:length, 4:6]
    alone = [arguments[0][row:row + 1], *(x[row:row + 1, kept] for x in arguments[1:])]
    want = truth(alone, {'log_keep': options['log_keep'][row:row + 1, kept], 'reset_BxL': None, 'mask_BxL': None})
    assert relative(state[row], want[0][0]) <= 1e-12 and relative(y[row], want[1][0, -1]) <= 1e-12


@pytest.mark.parametrize('order', ['after', 'before'])
def test_strictly_causal(order):
  """No gradient after t, across rows or across documents; some before t, and at t when the read comes after."""
  arguments, options = make(keep='slot', L=6, S=2, K=2)
  options['reset_BxL'] = np.array([[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]], bool)
  def reads(changing, rest):
    state, bound, address, pick, keep = *changing[:3], rest, changing[3]
    y = slot_mix(state, bound, address, pick, **{**options, 'log_keep': keep}, order=order, chunk=4, floor=-1.0)[1]
    return jnp.sum(y * jnp.arange(1.0, 3).reshape(1, 1, 1, 1, 2), (2, 3, 4))
  with jax.enable_x64():
    gradients = quick(jax.jacrev(reads))((*arguments[:3], options['log_keep']), arguments[3])
  segment = np.cumsum(options['reset_BxL'], 1)
  for name, g in zip(('bound', 'address', 'keep'), gradients[1:], strict=True):
    reach = np.abs(np.asarray(g)).sum(tuple(range(4, np.asarray(g).ndim)))
    for b, t, c, u in np.ndindex(2, 6, 2, 6):
      sees = b == c and segment[b, t] == segment[c, u] and (u < t or (u == t and order == 'after'))
      if not sees: assert reach[b, t, c, u] <= (1e-14 if name == 'keep' and u < t else 0)      # sums of keeps cancel to rounding
      elif name != 'keep': assert reach[b, t, c, u] > 0             # the keep of a document's first token has nothing to act on
  carried = np.abs(np.asarray(gradients[0])).sum((3, 4, 5))
  for b, t, c in np.ndindex(2, 6, 2): assert (carried[b, t, c] > 0) == (b == c and segment[b, t] == 0)


def test_plain_superposition():
  """keep 1, one slot, gate 1: the running sum; uniform addresses over S slots are one slot up to scale."""
  arguments, options = make(S=1)
  state, bound = arguments[0] * 0, arguments[1]
  ones = lambda S: np.ones((2, 7, 2, S))
  with jax.enable_x64():
    _, y = mix([state, bound, ones(1), ones(1)[:, :, None]], options)
    _, spread = mix([np.tile(state, (1, 1, 4, 1)), bound, ones(4), ones(4)[:, :, None]], options)
  assert relative(y[:, :, 0], np.cumsum(bound, 1)) <= 1e-12
  assert relative(spread, 4 * np.asarray(y)) <= 1e-12


def test_is_gated_linear_attention():
  """Without binding and with one keep per head: S_t = g_t S_{t-1} + k_t v_t^T, o_t = q_t S_t (Yang et al. 2024), written here again."""
  (state, v, k, q), options = make(keep='head')
  g = np.exp(options['log_keep'])
  with jax.enable_x64(): _, y = mix([state * 0, v, k, q], options)
  for b, h in np.ndindex(2, 2):
    S = np.zeros((4, 6))
    for t in range(7):
      S = g[b, t, h] * S + np.outer(k[b, t, h], v[b, t, h])
      assert np.allclose(y[b, t, 0, h], q[b, t, 0, h] @ S, atol=1e-12)


@pytest.mark.parametrize('carry', ['scan', 'matmul'])
def test_packed_documents_are_separate_runs(carry):
  """Resets leave nothing of the past: outputs of each document alone, and a state that is bit-equal whatever came before."""
  arguments, options = make(keep='slot', B=1)
  reset = np.array([[0, 0, 1, 0, 0, 1, 0]], bool)
  with jax.enable_x64():
    state, y = mix(arguments, options | {'reset_BxL': reset}, carry=carry)
    for start, stop in ((2, 5), (5, 7)):
      alone = mix(*between(arguments, options, start, stop, arguments[0] * 0), carry=carry)
      assert relative(y[:, start:stop], alone[1]) <= 1e-12
    assert relative(state, alone[0]) <= 1e-12
    other = [x + 1 for x in arguments]
    for x, past in zip(other[1:], arguments[1:], strict=True): x[:, 5:] = past[:, 5:]
    assert np.array_equal(state, mix(other, options | {'reset_BxL': reset}, carry=carry)[0])


@pytest.mark.parametrize('form', ['scan', 'associative', 'chunk'])
def test_masked_tokens_do_not_exist(form):
  """State bit-equal, reads zero, NaN harmless in values and gradients; padding left, right or between changes nothing."""
  arguments, options = make(keep='head', B=1, reset=True, L=5)
  with jax.enable_x64():
    want = mix(arguments, options, form=form)
    for kept in ([0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 2, 3, 5, 6]):
      mask = np.zeros((1, 7), bool)
      mask[:, kept] = True
      def pad(x, fill, kept=kept):
        wide = np.full((1, 7, *x.shape[2:]), fill, x.dtype)
        wide[:, kept] = x
        return wide
      padded = [arguments[0], *(pad(x, np.nan) for x in arguments[1:])]
      holes = {'log_keep': pad(options['log_keep'], np.nan), 'reset_BxL': pad(options['reset_BxL'], True), 'mask_BxL': mask}
      def both(a, o, form=form):
        loss = lambda a, l: sum(jnp.sum(x ** 2) for x in slot_mix(*a, **{**o, 'log_keep': l}, form=form, chunk=3))
        return slot_mix(*a, **o, form=form, chunk=3), jax.grad(loss, (0, 1))(a, o['log_keep'])
      (state, y), grads = quick(both)(padded, holes)
      assert relative(state, want[0]) <= 1e-12 and relative(y[:, kept], want[1]) <= 1e-12
      assert np.all(np.asarray(y)[:, ~mask[0]] == 0) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    holes['mask_BxL'] = np.zeros((1, 7), bool)
    assert np.array_equal(mix(padded, holes, form=form)[0], arguments[0])


def test_state_is_fp32_and_constant():
  for length in (1, 40):
    arguments, options = cast(make(keep='head', L=length), jnp.bfloat16)
    state, y = jax.eval_shape(lambda a, o: slot_mix(*a, **o), arguments, options)
    assert state.dtype == jnp.float32 and state.shape == (2, 2, 4, 6) and y.dtype == jnp.bfloat16


def _gradient(length, chunk):
  """A traced gradient of the chunked form at B 1, H 1, S 16, K 64."""
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 16, 64), (1, length, 1, 64), *[(1, length, 1, 16)] * 3)]
  def loss(state, bound, address, pick, log_keep):
    return jnp.sum(slot_mix(state, bound, address, pick[:, :, None], log_keep=log_keep, floor=-2.5, chunk=chunk)[1] ** 2)
  return jax.jit(jax.grad(loss, (1, 2, 3, 4))).trace(*shapes)


def _sizes(jaxpr):
  for equation in jaxpr.eqns:
    for value in equation.outvars: yield value.aval.size
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')):
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'): yield from _sizes(getattr(inner, 'jaxpr', inner))


def test_memory_grows_linearly_without_a_state_per_token():
  traced = _gradient(512, 32), _gradient(1024, 32)
  assert max(_sizes(traced[1].jaxpr)) < 1024 * 16 * 64 / 4
  small, large = (t.lower().compile().memory_analysis().temp_size_in_bytes for t in traced)
  assert large <= 2.2 * small and large < 4 * 1024 * 16 * 64
  every = max(_sizes(jax.make_jaxpr(lambda *x: slot_mix(*x, form='associative'))(*make(B=1, H=1, L=64, S=16, K=64)[0]).jaxpr))
  assert every >= 64 * 16 * 64


def test_two_passes_over_segments_are_one():
  """Segment states from zero, a prefix over them, then each segment from its right start: the plan of a fused kernel."""
  arguments, options = make(keep='slot', L=6)
  keep = options['log_keep']
  with jax.enable_x64():
    state, y = mix(arguments, options)
    starts, outputs = [arguments[0]], []
    for n in range(3):
      piece, cut = between(arguments, options, 2 * n, 2 * n + 2, arguments[0] * 0)
      starts.append(np.exp(keep[:, 2 * n:2 * n + 2].sum(1))[..., None] * starts[-1] + mix(piece, cut)[0])
    for n in range(3): outputs.append(mix(*between(arguments, options, 2 * n, 2 * n + 2, starts[n]))[1])
    inner = quick(lambda a, o: slot_states(*a[:3], **o, chunk=2))(arguments, options)
  assert relative(starts[-1], state) <= 1e-12 and relative(np.concatenate(outputs, 1), y) <= 1e-12
  assert relative(inner, np.stack(starts[1:], 1)) <= 1e-12


@pytest.mark.slow
def test_transforms_and_mesh():
  """vmap, remat, scan over layers and eight devices give what one plain call gives; nothing is traced twice."""
  arguments, options = cast(make(keep='head', B=8, reset=True, mask=True), np.float32)
  traces = []
  def plain(a, o):
    traces.append(0)
    return slot_mix(*a, **o, chunk=3)
  once = quick(plain)
  want = once(arguments, options)
  lift = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[:, None], tree)
  mapped = quick(lambda a, o: jax.vmap(lambda a, o: slot_mix(*a, **o, chunk=3))(a, o))(lift(arguments), lift(options))
  def layers(a, o):
    body = jax.checkpoint(lambda x, _: (slot_mix(a[0], x, *a[2:], **o, chunk=3)[1][:, :, 0], None))
    return jax.lax.scan(body, a[1], None, length=2)[0]
  twice = once([arguments[0], np.asarray(want[1][:, :, 0]), *arguments[2:]], options)[1][:, :, 0]
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put((arguments, options), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')))
  sharded = quick(lambda a, o: slot_mix(*a, **o, chunk=3))(*spread)
  for got in (jax.tree.map(lambda x: x[:, 0], mapped), sharded):
    for x, y in zip(got, want, strict=True): assert relative(x, y) <= 1e-6
  assert relative(quick(layers)(arguments, options), twice) <= 1e-6
  assert len(traces) == 1
