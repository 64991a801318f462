"""The truth in numpy, float64: loops over rows, heads, tokens and slots; circular convolution as a direct sum."""
import numpy as np


def convolve(x, y):
  """(x * y)_j = sum_i x_i y_{j - i mod K}, by the definition."""
  K = x.shape[-1]
  return np.stack([sum(x[..., i] * y[..., (j - i) % K] for i in range(K)) for j in range(K)], -1)


def correlate(x, y):
  """(x # y)_j = sum_i x_i y_{i + j mod K}, by the definition."""
  K = x.shape[-1]
  return np.stack([sum(x[..., i] * y[..., (i + j) % K] for i in range(K)) for j in range(K)], -1)


def mix(state, bound, address, pick, *, log_keep=None, order='after', reset=None, mask=None, beta=None, probe=None):
  """(state, reads [B, L, G, H, K]) token by token; the slot delta rule with beta [B, L, H], scores [B, L, G, H, S] with a probe."""
  B, L, H, K = bound.shape
  S, G = address.shape[-1], (pick if probe is None else probe).shape[2]
  m, y = state.copy(), np.zeros((B, L, G, H, K if probe is None else S))
  for b in range(B):
    for t in range(L):
      if mask is not None and not mask[b, t]: continue
      for h in range(H):
        if reset is not None and reset[b, t]: m[b, h] = 0
        if order == 'before': y[b, t, :, h] = _read(m[b, h], pick, probe, (b, t, slice(None), h))
        for s in range(S):
          if log_keep is not None:
            l = log_keep[b % log_keep.shape[0], t % log_keep.shape[1], h]
            m[b, h, s] *= np.exp(l[0] if l.ndim == 2 else l[s % len(l)])
        u = bound[b, t, h]
        if beta is not None: u = beta[b, t, h] * (u - sum(address[b, t, h, s] * m[b, h, s] for s in range(S)))
        for s in range(S): m[b, h, s] += address[b, t, h, s] * u
        if order == 'after': y[b, t, :, h] = _read(m[b, h], pick, probe, (b, t, slice(None), h))
  return m, y


def _read(m, pick, probe, at):
  return pick[at] @ m if probe is None else probe[at] @ m.T


def relative(got, want):
  """The largest difference over the largest entry of `want`."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30)


def rms(got, want):
  """Root mean square of the difference over that of `want`."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.sqrt(np.mean((got - want) ** 2) / np.mean(want ** 2))
