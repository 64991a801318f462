"""How much of a machine training uses: operations a second over what its devices could do."""
from collections.abc import Sequence
from typing import Any

# Dense bf16 operations a second by the makers' data sheets; the first name found in a device's kind counts.
PEAKS = {'H200': 989e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12, 'TPU v6': 918e12,
         'TPU v5p': 459e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v4': 275e12, 'TPU v3': 123e12}


def peak_flops(devices: Sequence[Any]) -> float:
  """Operations a second of the devices together, as matrices in bf16; 0 where the kind of one is not known."""
  each = [next((peak for name, peak in PEAKS.items() if name in device.device_kind), 0.0) for device in devices]
  return sum(each) if all(each) else 0.0


def step_share(flops_per_token: float, devices: Sequence[Any]) -> float:
  """The share of a second of these devices that training on one token is worth; 0 where their speed is not known.

  A token costs its forward operations three times (forward, and two for the gradient): what is computed again to save memory does
  not count. Times tokens a second this is the model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, appendix B).
  """
  peak = peak_flops(devices)
  return 3 * flops_per_token / peak if peak else 0.0
