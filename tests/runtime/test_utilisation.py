"""The share of a machine that training uses."""
import types

import pytest

from memjax.config.flags import load
from memjax.runtime.flops import countable
from memjax.runtime.utilisation import peak_flops, step_share


def devices(*kinds):
  return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


def test_the_peak_is_that_of_all_devices():
  assert peak_flops(devices('NVIDIA H200', 'NVIDIA H200')) == 2 * 989e12
  assert peak_flops(devices('TPU v5 lite')) == 197e12 and peak_flops(devices('TPU v5p')) == 459e12
  assert peak_flops(devices('NVIDIA H200', 'cpu')) == 0 == peak_flops(devices('cpu'))


def test_kernels_are_counted_as_the_forms_that_they_equal():
  """What a kernel computes cannot be read off its call."""
  found = countable(load('configs/hybrid_150m.py', 'model.mixers.near.backend=cudnn_rows', 'model.mixers.slots.form.backend=pallas',
                         'model.mixers.learns.exec.backend=pallas').model)
  near, slots, learns = (found.mixers[name] for name in ('near', 'slots', 'learns'))
  assert near.backend == slots.form.backend == learns.exec.backend == 'xla' and learns.exec.aligned


def test_a_token_costs_three_forward_passes():
  assert step_share(1e9, devices('NVIDIA H100 80GB HBM3')) * 300_000 == pytest.approx(3e9 * 300_000 / 989e12)
  assert step_share(1e9, devices('cpu')) == 0
