"""Writes titans_pytorch.npz: outputs of titans-pytorch in float64 for the parity test.

  pip install torch titans-pytorch==0.5.5 && python tests/ops/make_titans_reference.py
"""
from pathlib import Path

import numpy as np
import torch
from titans_pytorch import NeuralMemory

WIDTH, HEADS, CHUNK, LENGTHS = 8, 2, 4, (3, 12, 13, 15, 16)
MORE = {'second': {'momentum_order': 2, 'batch_size': CHUNK}, 'spectral': {'spectral_norm_surprises': True},
        'mixed': {'momentum_order': 2, 'learned_momentum_combine': True, 'learned_combine_include_zeroth': True}}
CASES = {'default': {}, 'plain': {'momentum': False}, 'refresh-1': {'batch_size': CHUNK}, 'refresh-2': {'batch_size': 2 * CHUNK}}


def main():
  """Random parameters shared by all cases, one input, and each case's outputs for texts of several lengths."""
  torch.manual_seed(0)
  torch.set_default_dtype(torch.float64)
  x, out, shared = torch.randn(2, max(LENGTHS), WIDTH), {}, None
  for case, options in CASES.items():
    memory = NeuralMemory(WIDTH, chunk_size=CHUNK, dim_head=WIDTH // HEADS, heads=HEADS, **options)
    found = dict(memory.named_parameters())
    shared = shared or {name: value.data + .3 * torch.randn(value.shape) for name, value in found.items()}
    for name, value in found.items(): value.data = shared[name].clone()
    for length in LENGTHS: out[f'{case}/{length}'] = memory(x[:, :length])[0].detach().numpy()
  weights = {f'parameters/{name}': value.numpy() for name, value in shared.items()}
  for case, options in MORE.items():                                        # one length; parameters that are new or of other shapes
    memory = NeuralMemory(WIDTH, chunk_size=CHUNK, dim_head=WIDTH // HEADS, heads=HEADS, **options)
    for name, value in memory.named_parameters():
      if name in shared and shared[name].shape == value.shape: value.data = shared[name].clone()
      else:
        value.data += .3 * torch.randn(value.shape)
        weights[f'{case}/parameters/{name}'] = value.data.numpy()
    out[f'{case}/{max(LENGTHS) - 1}'] = memory(x[:, :max(LENGTHS) - 1])[0].detach().numpy()
  np.savez_compressed(Path(__file__).parent / 'titans_pytorch.npz', x=x.numpy(), **weights, **out)


if __name__ == '__main__': main()
