"""Attention through cuDNN, for which `jax.nn.dot_product_attention` in XLA stands in on a CPU: its arguments, and when it is chosen."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.flash import both_ways, reference
from memjax.config.errors import UserError
from memjax.config.mixers import AttentionConfig, WindowConfig
from memjax.memory.attention import Attention, AttentionState, Window, is_whole
from memjax.ops import flash as ops

B, L, H, K, W = 2, 9, 4, 8, 3
POSITION_BxL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
INSIDE = POSITION_BxL == 4


def draw(*shape): return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 1), (0, 4), (1, 2), (L - 1, 2), (L, 4), (L + 5, 4))]


@pytest.mark.parametrize(('window', 'groups'), [(W, 2), *SLOW])
def test_equals_the_form_in_xla(window, groups):
  """Values and gradients of q, k and v: at most `window` keys, the own one included, and query heads in groups of neighbours."""
  given = draw(B, L, H, K), draw(B, L, groups, K), 2 * draw(B, L, groups, K)[:, ::-1], draw(B, L, H, K)[::-1]
  both = jax.jit(lambda *given: [both_ways(functools.partial(form, window=window), *given) for form in (ops.flash, reference)])
  found, wanted = both(*given)
  for a, b in zip(found, wanted, strict=True): np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def make(kind, backend):
  """A window, or full attention with grouped heads."""
  config = WindowConfig(heads=2, window=W) if kind is Window else AttentionConfig(heads=2, kv_heads=1)
  return kind(dataclasses.replace(config, backend=backend), 16)


# What a call brings, and whether each row is one text from its first token on, padded at its end if at all.
CALLS = {'whole': ({}, True), 'begun anew': ({'reset_BxL': POSITION_BxL == 0, 'count_B': 5}, True),
         'padded behind': ({'mask_BxL': POSITION_BxL < jnp.array([[L], [5]])}, True),
         'padded before': ({'mask_BxL': POSITION_BxL > jnp.array([[-1], [2]])}, False),
         'a hole': ({'mask_BxL': ~INSIDE}, False), 'a text inside': ({'reset_BxL': INSIDE}, False), 'gone on': ({'count_B': 1}, False)}


@pytest.mark.parametrize('name', CALLS)
def test_chosen_where_rows_are_whole(name):
  given, wanted = CALLS[name]
  ring = jnp.zeros((B, 1, W, K))
  state = AttentionState(ring, ring, jnp.full((B,), given.get('count_B', 0), jnp.int32))
  segment_BxL = jnp.cumsum(given.get('reset_BxL', jnp.zeros((B, L), bool)).astype(jnp.int32), 1)
  assert bool(is_whole(state, given.get('mask_BxL'), segment_BxL)) == wanted


@pytest.mark.parametrize('kind', [Window, pytest.param(Attention, marks=pytest.mark.slow)])
def test_rows_are_promised(kind):
  """cudnn_rows equals xla where every row is one text, and reads NaN where one begins inside."""
  ways = [make(kind, backend) for backend in ('xla', 'cudnn_rows')]
  @jax.jit
  def reads(position_BxL):
    params = ways[0].init(jax.random.key(0), draw(B, L, 16), ways[0].init_state(B), position_BxL=POSITION_BxL)
    return [way.apply(params, draw(B, L, 16), way.init_state(B), position_BxL=position_BxL)[0] for way in ways]
  np.testing.assert_allclose(*reads(POSITION_BxL), rtol=2e-5, atol=2e-6)
  wanted, found = reads(jnp.where(INSIDE, 0, POSITION_BxL))
  assert bool(jnp.all(jnp.isfinite(wanted))) and bool(jnp.all(jnp.isnan(found)))


def test_where_it_cannot_be_had(monkeypatch):
  q = jnp.zeros((B, L, H, K), jnp.bfloat16)
  assert not ops.is_flash('auto', q) and not ops.is_flash('xla', q) and ops.is_flash('cudnn', q)
  with pytest.raises(UserError, match='unknown backend'): ops.is_flash('flash', q)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  for version, bad, text in (((7, 5), q, 'compute capability 8.0'), ((9, 0), q.astype(jnp.float32), 'bfloat16 or float16'),
                             ((8, 0), jnp.zeros((1, 1, 1, 136), jnp.bfloat16), 'multiples of 8 up to 128')):
    monkeypatch.setattr(ops, 'capability', lambda version=version: version)
    assert not ops.is_flash('auto', bad)
    with pytest.raises(UserError, match=text): ops.is_flash('cudnn_rows', bad)
  monkeypatch.setattr(ops, 'capability', lambda: (9, 0))
  assert ops.is_flash('auto', q) and not ops.is_flash('auto', q, persistent=2)
