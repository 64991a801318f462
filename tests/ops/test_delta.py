"""The slot delta rule: property 26 of the specification."""
import jax
import numpy as np
import pytest

from memjax.config.errors import UserError
from memjax.ops.delta import slot_delta
from tests.ops import oracle
from tests.ops.inputs import cast, make, quick
from tests.ops.oracle import relative
from tests.ops.test_recurrence import forms


def inputs(**options):
  """Inputs of `make` with unit addresses, and beta."""
  arguments, options = make(**options)
  arguments[2] /= np.linalg.norm(arguments[2], axis=-1, keepdims=True)
  options['beta_BxLxH'] = np.random.default_rng(5).random(arguments[2].shape[:3])
  return arguments, options


def truth(arguments, options, order):
  """The oracle on these inputs."""
  return oracle.mix(*arguments, log_keep=options['log_keep'], order=order, beta=options['beta_BxLxH'],
                    reset=options['reset_BxL'], mask=options['mask_BxL'])


@pytest.mark.parametrize(('keep', 'order', 'decay', 'holes'), [
    ('none', 'after', 'auto', False), ('head', 'before', 'auto', True), ('slot', 'after', 'factored', True),
    ('slot', 'before', 'exact', False)])
def test_chunked_delta_equals_the_loop(keep, order, decay, holes):
  arguments, options = inputs(keep=keep, reset=holes, mask=holes)
  want = truth(arguments, options, order)
  with jax.enable_x64():
    ways = [{'form': 'scan', 'order': order}, {'chunk': 3, 'decay': decay, 'floor': -1.0, 'order': order}]
    results = forms(slot_delta, arguments, options, ways)
  for outputs, grads in results:
    for got, right in zip(outputs, want, strict=True): assert relative(got, right) <= 1e-12
    for got, right in zip(grads, results[0][1], strict=True): assert relative(got, right) <= 1e-10


def test_chunked_delta_in_fp32():
  arguments, options = cast(inputs(keep='slot', L=40), np.float32)
  want = truth(*cast((arguments, options), np.float64), 'after')
  for got, right in zip(jax.jit(slot_delta)(*arguments, **options), want, strict=True): assert relative(got, right) <= 1e-5


def test_one_shot_recall():
  """beta 1 and orthonormal addresses: each slot holds the newest value written to it, exactly."""
  address = np.eye(4)[[0, 1, 2, 3, 1, 0]][None, :, None]
  value = np.random.default_rng(0).normal(size=(1, 6, 1, 5))
  with jax.enable_x64():
    state, y = quick(slot_delta)(np.zeros((1, 1, 4, 5)), value, address, address[:, :, None], beta_BxLxH=np.ones((1, 6, 1)))
  assert relative(y[:, :, 0], value) <= 1e-12
  assert relative(state[0, 0], value[0, [5, 4, 2, 3], 0]) <= 1e-12


def test_channel_keep_is_refused():
  arguments, options = inputs(keep='channel')
  with pytest.raises(UserError): slot_delta(*arguments, **options)
