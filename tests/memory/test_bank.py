"""The kinds `bank` and `product_key` against loops in numpy: tables, attention, routers, losses (P1, P2, P4, P6, P7)."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memjax.config.banks import (
  BankConfig,
  BankLossConfig,
  BankQuantConfig,
  BankShapeConfig,
  MixingConfig,
  ProductKeyConfig,
  RouterConfig,
)
from memjax.config.errors import UserError
from memjax.layers.tree import named
from memjax.memory.registry import make_memory, make_table
from memjax.ops.quantize import dequantize, quantize
from tests.laws.test_laws import parameters
from tests.memory.bank_oracle import (
  FACTORIZED,
  NONCAUSAL,
  ORACLE,
  STRATEGIES,
  B,
  D,
  H,
  L,
  entries,
  inputs,
  matrix,
  oracle,
  routed,
  setting,
  softmax,
)


@pytest.fixture(scope='module')
def computed():
  """{name: (params, output)} of all ORACLE configs in float64, from one program."""
  with jax.enable_x64():
    x, cases = inputs(jnp.float64), {}
    for name, config in ORACLE.items():
      memory, params, state = setting(config, x, dtype=jnp.float64)
      if name == 'hybrid': state = state.replace(prompt_length_B=jnp.full((B,), 4, jnp.int32))
      cases[name] = memory, params, state
    position = 1 + jnp.broadcast_to(jnp.arange(L)[None], (B, L))                       # nothing starts here: hybrid keeps its prompt
    call = jax.jit(lambda params: {name: memory.apply(params[name], x, state, position_BxL=position)[0]
                                   for name, (memory, _, state) in cases.items()})
    params = {name: params for name, (_, params, _) in cases.items()}
    out = jax.device_get(call(params))
    return {name: (jax.device_get(params[name]), out[name]) for name in cases}, np.asarray(x)


@pytest.mark.parametrize('name', ORACLE)
def test_bank_equals_a_loop_over_tokens_heads_and_chapters(name, computed):
  """P2.1, P4.8 and sections 2, 4 and 5.2 for every combination, strategy and variant, in float64."""
  (cases, x), config = computed, ORACLE[name]
  params, y = cases[name]
  want, ids = oracle(config, params, x, prompt=4)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-11 * np.abs(want).max())
  chapters = config.shape.chapters or 1
  assert np.abs(want).max() > .01 and all(len(row) == min(chapters, config.mixing.shared + config.router.top_k) for row in ids.values())
  if config.shape.chapters and name not in NONCAUSAL: assert len({frozenset(row) for row in ids.values()}) > 1       # the tokens disagree


# Tables ------------------------------------------------------------------------------------------------------------------------

def test_entries_start_with_the_same_spread_in_every_variant():
  """P1.1: within 3 % of std, also of A B^T and of stored integers."""
  variants = {'': {}, 'factorized': {'low_rank': 'factorized', 'rank': 64}, 'reduced': {'low_rank': 'reduced', 'rank': 64}}
  configs = [BankConfig(shape=BankShapeConfig(entries=4096, std=.05, **options)) for options in variants.values()]
  configs.append(dataclasses.replace(configs[0], quant=BankQuantConfig(bits=8)))
  @jax.jit
  def spread(key):
    tables = [make_table(config, 64) for config in configs]
    return [jnp.std(table.apply(table.init(key)).tokens()) for table in tables]
  np.testing.assert_allclose(np.asarray(spread(jax.random.key(0))), .05, rtol=.03)


def test_projections_start_with_the_same_spread_at_any_rank():
  """Q, K, V of N(0, 1 / fan-in), W = down up alike; the output at zero, of which with a rank `up` alone."""
  wide, x = 128, jnp.zeros((1, 2, 128))
  for rank in (0, 64):
    memory = make_memory(BankConfig(shape=BankShapeConfig(entries=8), projection_rank=rank), wide)
    start = lambda key, memory=memory: nn.unbox(memory.init(key, x, memory.init_state(1), position_BxL=jnp.zeros((1, 2), jnp.int32)))
    params = jax.jit(start)(jax.random.key(0))['params']
    for name in ('query', 'key', 'value'): assert np.std(matrix(params[name])) == pytest.approx(wide ** -.5, rel=.03)
    assert not matrix(params['out']).any() and (not rank or params['out']['down'].any())


def sizes(config, width=D):
  """{path: number of parameters}."""
  memory, x = make_memory(config, width), jnp.zeros((1, 2, width))
  made = jax.eval_shape(lambda: memory.init(jax.random.key(0), x, memory.init_state(1), position_BxL=jnp.zeros((1, 2), jnp.int32)))
  return {path: leaf.size for path, leaf in named(nn.unbox(made)['params']).items()}


def test_parameters_are_as_many_as_specified():
  """P1.2."""
  total = lambda config, part='': sum(size for path, size in sizes(config, 24).items() if path.startswith(part))
  bank = lambda **shape: BankConfig(heads=4, shape=BankShapeConfig(entries=60, **shape))
  assert total(bank(), 'bank') == 60 * 24 and total(bank(width=10), 'bank') == 60 * 10
  assert total(bank(low_rank='factorized', rank=8), 'bank') == 8 * (60 + 24)
  assert total(bank(low_rank='factorized', rank=8, width=10), 'bank') == 8 * (60 + 10)
  assert total(bank(low_rank='reduced', rank=8), 'bank') == 60 * 8
  assert total(bank()) == 60 * 24 + 4 * 24 ** 2 and total(bank(width=10)) == 60 * 10 + 2 * 24 ** 2 + 2 * 10 * 24
  assert total(bank(low_rank='reduced', rank=8)) == 60 * 8 + 2 * 24 * 8 + 2 * 8 * 8
  assert total(dataclasses.replace(bank(), kv_heads=1)) == 60 * 24 + 2 * 24 ** 2 + 2 * 24 * 6
  assert total(dataclasses.replace(bank(), projection_rank=5)) == 60 * 24 + 4 * 2 * 24 * 5
  assert total(bank(chapters=10), 'router') == 24 * 10 + 10 and total(bank(chapters=10), 'bank') == 60 * 24
  nine = dataclasses.replace(bank(chapters=4), router=RouterConfig(kind='product_key'), loss=BankLossConfig(bias_rate=.1))
  assert total(nine, 'router') == 2 * 24 * 2 + 4 + 4
  key = ProductKeyConfig(heads=2, keys=6, top_k=3, key_width=8, value_width=10)
  assert total(key, 'bank') == 36 * 10 and total(key) == 360 + 24 * 16 + 2 * 6 * 8 + 8 + 24 * 10 + 10 * 24


def prepared(config, params):
  """Keys and values of a memory."""
  memory = make_memory(config, D)
  return memory, functools.partial(memory.apply, params, method='prepare')


def test_chapters_are_equal_parts_of_the_flat_table():
  """P1.5, bitwise: entries of a chapter, and keys and values of chapters laid end to end."""
  flat = BankConfig(heads=H, shape=BankShapeConfig(entries=20))
  params = setting(routed(), inputs())[1]
  own = {'params': {name: leaf for name, leaf in params['params'].items() if name != 'router'}}
  a, b = (jax.jit(prepared(config, p)[1])() for config, p in ((flat, own), (routed(), params)))
  assert b.k_PxTxGxK.shape == (5, 4, H, D // H)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_array_equal(x[0], y.reshape(20, H, -1))
  table = make_table(flat, D, parent=None).apply({'params': params['params']['bank']})
  np.testing.assert_array_equal(np.concatenate([table.tokens(c, chapters=5) for c in range(5)]), table.tokens())


def test_factors_fold_into_the_projections():
  """P1.4: A (B^T W) is (A B^T) W, and the table of all entries is never made."""
  config = routed(shape=dataclasses.replace(FACTORIZED, entries=40))
  params = setting(config, inputs())[1]
  _, prepare = prepared(config, params)
  table, p = entries(config, jax.tree.map(np.asarray, params['params'])), params['params']
  for made, name in zip(jax.tree.leaves(prepare()), ('key', 'value'), strict=True):
    np.testing.assert_allclose(made.reshape(5, 8, D), table @ np.asarray(p[name]['kernel']), rtol=0, atol=1e-5)
  assert [eqn.outvars[0].aval.shape for eqn in jax.make_jaxpr(prepare)().eqns if eqn.primitive.name == 'dot_general'] == [
      (4, 8), (4, 8), (40, 8), (40, 8)]


def test_entries_of_a_chapter_may_come_in_any_order():
  """P2.4."""
  config, x = routed(mixing=MixingConfig(shared=1)), inputs()
  memory, params, state = setting(config, x)
  order = np.concatenate([4 * c + np.random.default_rng(c).permutation(4) for c in range(5)])
  run = jax.jit(lambda params: memory.apply(params, x, state, position_BxL=jnp.ones((B, L), jnp.int32))[0])
  moved = {'params': {**params['params'], 'bank': {'entries': params['params']['bank']['entries'][order]}}}
  np.testing.assert_allclose(run(moved), run(params), rtol=0, atol=1e-5)
  other = {'params': {**params['params'], 'bank': {'entries': jnp.roll(params['params']['bank']['entries'], 4, 0)}}}
  assert np.abs(run(other) - run(params)).max() > 1e-2


# Padding, the future ---------------------------------------------------------------------------------------------------------

def test_padding_changes_neither_reads_nor_losses():
  """P4.4 and P6.3: pads on the left, on the right or inside, of any content, give the reads, losses and use of the bare row."""
  loss = BankLossConfig(balance=1.0, auxiliary=1.0, z=1.0, bias_rate=.1)
  x, n = np.asarray(inputs(rows=1)), 6
  cases = {name: setting(routed(loss=loss, **options), x) for name, options in STRATEGIES.items()}
  @jax.jit
  def run(x, position, mask):
    flow = dict(position_BxL=position, mask_BxL=mask)
    return {name: memory.apply(params, x, state, **flow)[::2] for name, (memory, params, state) in cases.items()}
  places = {'right': range(n), 'left': range(L - n, L), 'some': (1, 2, 4, 5, 6, 8), 'two': (0, 3, 4, 5, 6, 7)}
  found = {}
  for where, columns in places.items():
    columns = list(columns)
    row, position, mask = np.full((1, L, D), np.nan, np.float32), np.zeros((1, L), np.int32), np.zeros((1, L), bool)
    row[:, columns], position[:, columns], mask[:, columns] = x[:, :n], 1 + np.arange(n), True
    found[where] = jax.tree.map(np.asarray, run(row, position, mask))
    for name, (y, aux) in found[where].items(): found[where][name] = y[:, columns], {k: v for k, v in aux.items() if k != 'confidence'}
  for where in places:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), found[where], found['right'])
  aux = found['right']['token'][1]
  assert set(aux) >= {'router_balance', 'router_auxiliary', 'router_z', 'penalty', 'load', 'router_entropy'} and aux['load'].sum() == 2 * n
  assert float(aux['penalty']) == pytest.approx(sum(float(aux[f'router_{k}']) for k in ('balance', 'auxiliary', 'z')), rel=1e-6)


@pytest.mark.parametrize('name', NONCAUSAL)
def test_a_strategy_that_sees_the_future_has_no_step_and_carries_no_state(name):
  memory, x = make_memory(routed(**STRATEGIES[name]), D), inputs(length=1)
  with pytest.raises(UserError, match=rf"^router\.strategy='{name}' sees the future: it cannot stream"): memory.init_state(B, 5)
  with pytest.raises(UserError, match=rf"^router\.strategy='{name}' sees the future: it has no step of one token"):
    jax.eval_shape(lambda: memory.init(jax.random.key(0), x, memory.init_state(B), position_BxL=jnp.zeros((B, 1), jnp.int32)))


def test_the_arrays_of_an_empty_state_are_distinct():
  """Evaluation and generation donate the state: one array twice would be an error there."""
  for name, options in STRATEGIES.items():
    leaves = jax.tree.leaves(make_memory(routed(**options), D).init_state(B))
    assert len({id(leaf) for leaf in leaves}) == len(leaves) == {'prefix-mean': 2, 'rolling': 2, 'chunk': 3, 'hybrid': 4}.get(name, 0), name


# Gradients of the router -----------------------------------------------------------------------------------------------------

def test_each_loss_and_each_combination_reaches_the_router_or_not():
  """P6.6 and P5.8: from each loss that is on, from no loss that is off; through attention in all modes but joint."""
  x, position, off = inputs(), jnp.ones((B, L), jnp.int32), BankLossConfig(balance=0)
  losses = {name: dataclasses.replace(off, **{name: 1.0}) for name in ('balance', 'auxiliary', 'z')} | {'off': off}
  modes = ('mixture', 'joint', 'joint_bias', 'legacy_scale')
  penalty = {name: routed(loss=loss) for name, loss in losses.items()}
  read = {mode: routed(mixing=MixingConfig(combine=mode)) for mode in modes}
  read |= {'k=1': routed(top_k=1), 'k=1, full': routed(top_k=1, weight_norm='full')}
  _, params, state = setting(routed(), x)
  def gradient(config, part):
    def value(router):
      y, _, aux = make_memory(config, D).apply({'params': {**params['params'], 'router': router}}, x, state, position_BxL=position)
      return aux['penalty'] if part == 'penalty' else jnp.sum(jnp.sin(y))
    return jax.grad(value)(params['params']['router'])
  out = jax.jit(lambda: ({n: gradient(c, 'penalty') for n, c in penalty.items()}, {n: gradient(c, 'read') for n, c in read.items()}))()
  from_penalty, from_read = ({name: max(float(jnp.abs(leaf).max()) for leaf in g.values()) for name, g in part.items()} for part in out)
  assert from_penalty['off'] == 0 < 1e-4 < min(from_penalty[name] for name in ('balance', 'auxiliary', 'z'))
  assert from_read.pop('joint') == 0 == from_read.pop('k=1') and min(from_read.values()) > 1e-4


# Stored integers ---------------------------------------------------------------------------------------------------------------

def test_a_bank_of_integers_reads_like_the_bank_it_was_made_of():
  """P7.7: entries or keys and values in 8 bits change the read by 1 % at most, in 4 bits by 20 %; exactly that of the rounded table."""
  wide, x = 32, jax.random.normal(jax.random.key(1), (1, L, 32))
  position, plain = jnp.ones((1, L), jnp.int32), routed()
  memory = make_memory(plain, wide)
  params = parameters(memory, x, memory.init_state(1), position)['params']
  read = lambda config, p: make_memory(config, wide).apply({'params': p}, x, memory.init_state(1), position_BxL=position, method='mix')[0]
  stored = {f'{bits}/{group}': BankQuantConfig(bits=bits, group=group) for bits in (8, 4) for group in (0, 16)}
  def reads():
    out = {('', 'plain'): read(plain, params)}
    for key, quant in stored.items():
      q = quantize(params['bank']['entries'], bits=quant.bits, scheme=quant.scheme, group=quant.group)
      codes = {'entries_codes': q.codes, 'entries_scale': q.scale}
      out[key, 'bank'] = read(dataclasses.replace(plain, quant=quant), {**params, 'bank': codes})
      out[key, 'rounded'] = read(plain, {**params, 'bank': {'entries': dequantize(q)}})
      out[key, 'kv'] = read(dataclasses.replace(plain, quant=dataclasses.replace(quant, target='kv')), params)
    return out
  out = jax.jit(reads)()
  plain_y = out['', 'plain']
  rms = lambda a: float(jnp.sqrt(jnp.mean(a ** 2)))
  for key in stored:
    for target in ('bank', 'kv'):
      error = rms(out[key, target] - plain_y) / rms(plain_y)
      assert 1e-4 < error < {'8': .01, '4': .2}[key[0]], (key, target, error)
    np.testing.assert_allclose(out[key, 'bank'], out[key, 'rounded'], rtol=0, atol=1e-5 * rms(plain_y))


def test_rounding_that_is_trained_gives_gradients_and_stored_integers_none():
  x, position = inputs(), jnp.ones((B, L), jnp.int32)
  def gradient(**quant):
    config = routed(quant=BankQuantConfig(bits=4, group=0, **quant))
    memory, params, state = setting(config, x)
    return jax.eval_shape(jax.grad(lambda p: jnp.sum(memory.apply(p, x, state, position_BxL=position)[0])), params)
  assert set(gradient(train='learned')['params']['bank']) == {'entries', 'entries_step'}
  with pytest.raises(TypeError, match='grad requires real- or complex-valued inputs'): gradient()


# Product keys ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [{}, {'query_norm': False, 'gate': False, 'value_width': 5}], ids=['gated', 'plain'])
def test_product_keys_equal_a_search_of_all_pairs(options):
  """P8.1 in place: every pair of half-keys is scored, the best are read."""
  config, x = ProductKeyConfig(heads=2, keys=4, top_k=3, key_width=6, **options), inputs()
  memory, params, state = setting(config, x)
  y = jax.jit(lambda: memory.apply(params, x, state, position_BxL=jnp.ones((B, L), jnp.int32))[0])()
  p, x = jax.tree.map(np.float64, params['params']), np.float64(x)
  q = (x @ p['query']['kernel']).reshape(B, L, 2, 6)
  if config.query_norm: q = q / np.sqrt((q ** 2).mean(-1, keepdims=True) + 1e-6) * p['query_norm']['scale']
  read = np.zeros((B, L, p['bank']['values'].shape[1]))
  for b, t, h in np.ndindex(B, L, 2):
    score = ((p['keys'][h, 0] @ q[b, t, h, :3])[:, None] + (p['keys'][h, 1] @ q[b, t, h, 3:])[None]).ravel()
    best = np.argsort(-score)[:3]
    read[b, t] += softmax(score[best]) @ p['bank']['values'][best]
  if config.gate: read *= (g := x @ p['gate']['kernel']) / (1 + np.exp(-g))
  np.testing.assert_allclose(y, read @ p['out']['kernel'], rtol=0, atol=2e-5 * np.abs(read).max())
