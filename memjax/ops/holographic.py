"""What is known and asked of a holographic memory: effective slots, capacity, cleanup, and the losses that teach it to keep."""
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_ndtr

from memjax.ops.binding import bind, unbind
from memjax.ops.recurrence import slot_read, slot_write


def _wide(x):
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _unit(x, eps=1e-12):
  x = _wide(x)
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)


def weighted_mean(x, weight):
  """sum x * weight / sum weight, and 0 where all weights are 0; equal ranks."""
  return jnp.sum(x * weight) / jnp.maximum(jnp.sum(jnp.broadcast_to(weight, x.shape)), 1e-9)


# Slots ------------------------------------------------------------------------------------------------------------------------

def _gram(address_BxLxHxS, mask_BxL):
  """The mean of address address^T over valid tokens, [H, S, S], up to a factor that cancels in both uses."""
  a = _wide(address_BxLxHxS)
  if mask_BxL is not None: a = jnp.where(mask_BxL[..., None, None], a, 0)
  return jnp.einsum('blhs,blhz->hsz', a, a)


def _participation(gram_HxSxS):
  """(tr G)^2 / tr(G^2) per head, [H]; 0 for an all-zero G."""
  trace = jnp.trace(gram_HxSxS, axis1=1, axis2=2)
  return trace ** 2 / jnp.maximum(jnp.sum(gram_HxSxS ** 2, (1, 2)), 1e-18)


def effective_slots(address_BxLxHxS, mask_BxL=None):
  """S_eff per head, fp32 [H]: 1 where all addresses are alike, S where they are decorrelated.

  S_eff = (tr G)^2 / tr(G^2), G = mean of a a^T over L2-normalised addresses. K * S_eff floats decide capacity.
  """
  return _participation(_gram(_unit(address_BxLxHxS), mask_BxL))


def balance_loss(address_BxLxHxS, mask_BxL=None):
  """S tr(G^2) / tr(G)^2 - 1 with G = mean address address^T, averaged over heads: 0 iff isotropic, S - 1 at collapse."""
  share = _participation(_gram(address_BxLxHxS, mask_BxL)) / address_BxLxHxS.shape[-1]
  return jnp.mean(1 / jnp.maximum(share, 1 / address_BxLxHxS.shape[-1] ** 2) - 1)


# Capacity ---------------------------------------------------------------------------------------------------------------------

def recall_probability(pairs: float, *, floats: float, items: int) -> float:
  """The chance that the nearest of `items` codewords is the stored one, with `pairs` superposed in `floats` state floats.

  P = integral phi(x) Phi((1 + s_t x) / s)^(m - 1) dx, s^2 = N / n, s_t^2 = (N - 1) / n: unit signal, Gaussian crosstalk
  (same form as Frady, Kleyko and Sommer 2018). Every token that writes counts as a pair. The binding does not matter.
  """
  x = np.linspace(-8, 8, 4001)
  noise, own = np.sqrt(pairs / floats), np.sqrt(max(pairs - 1, 0) / floats)
  log_p = -x * x / 2 - np.log(2 * np.pi) / 2 + (items - 1) * log_ndtr((1 + own * x) / noise)
  return float(np.trapezoid(np.exp(log_p), x))


def recall_capacity(probability: float, *, floats: float, items: int) -> float:
  """The number of pairs that `recall_probability` recalls with this probability, by bisection; at least 1."""
  low, high = 1.0, 64.0 * floats
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if recall_probability(middle, floats=floats, items=items) > probability else (low, middle)
  return low


def plate_bound(floats: float, *, items: int, error: float) -> float:
  """Plate's bound on the number of pairs, N = n / (4.5 ln(m / (30 q^4))) - .7 (Plate 1995, appendix; constants not verified).

  It asks all N pairs to pass one fixed threshold with error q, and is about three times below what decoding achieves.
  """
  return floats / (4.5 * np.log(items / (30 * error ** 4))) - 0.7


# Cleanup ----------------------------------------------------------------------------------------------------------------------

def cleanup(x, codebook_MxK, beta: float):
  """softmax(beta x . codebook^T) codebook: the modern Hopfield read (Ramsauer et al. 2021); large beta gives the nearest item."""
  score = jnp.einsum('...k,mk->...m', x, codebook_MxK)
  return jnp.einsum('...m,mk->...k', jax.nn.softmax(beta * score, -1), codebook_MxK)


def cleanup_erase(kind: str, state_BxHxSxK, key_BxHxK, address_BxHxS, *, codebook_MxK, threshold: float = 0.6):
  """The state without the item bound to `key` at `address`, where one is recognised; for the step before a rewrite.

  Reads with the key, snaps to the codebook item of the largest cosine, and subtracts its bound form where the read holds
  more than `threshold` of it: the projection is 1 where the item is stored, 0 where not, at any load (a cosine would fall
  with the load). It needs the codebook (in the spectrum for hrr and unitary) and unit addresses, and is not linear: step
  API and inference only.
  """
  held = unbind(kind, key_BxHxK.astype(state_BxHxSxK.dtype), slot_read(state_BxHxSxK, address_BxHxS[:, None])[:, 0])
  score = jnp.einsum('bhk,mk->bhm', held, _unit(codebook_MxK))
  item = jnp.take(codebook_MxK, jnp.argmax(score, -1), axis=0)
  share = jnp.max(score, -1, keepdims=True) / jnp.maximum(jnp.linalg.norm(item, axis=-1, keepdims=True), 1e-12)
  item = jnp.where(share > threshold, item, 0)
  return slot_write(state_BxHxSxK, -bind(kind, key_BxHxK, item.astype(key_BxHxK.dtype)), address_BxHxS)


# Losses -----------------------------------------------------------------------------------------------------------------------

def gather_tokens(x, index_BxL):
  """x [B, L, ..] at token index_BxL of each row."""
  return jax.vmap(lambda row, index: jnp.take(row, index, axis=0))(x, index_BxL)


def sample_replay(key, shape: tuple[int, int], *, window: int, mask_BxL=None, reset_BxL=None):
  """(index_BxL, valid_BxL): for each valid token t one valid token i <= t of its document, uniform among the last `window` of them.

  Tokens that do not exist are never drawn; their own entry is not valid.
  """
  mask = jnp.ones(shape, bool) if mask_BxL is None else mask_BxL
  rank = jnp.cumsum(mask.astype(jnp.int32), 1) - 1
  first = jnp.zeros_like(rank)
  if reset_BxL is not None: first = jax.lax.cummax(jnp.where(reset_BxL & mask, rank, 0), axis=1)
  low = jnp.maximum(first, rank - window + 1)
  drawn = low + jnp.floor(jax.random.uniform(key, shape) * (rank - low + 1)).astype(jnp.int32)
  order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)           # the index of the n-th valid token
  return jnp.take_along_axis(order, jnp.clip(drawn, 0, jnp.maximum(rank, 0)), 1), mask


def replay_loss(read_BxLxHxK, value_BxLxHxK, weight_BxLxH):
  """Weighted mean of 1 - cos(read, value): what was written should be readable later, whatever its scale.

  `read` is the memory after token t under the key and pick of token i, `value` the value of i (`sample_replay`), `weight` its
  write gate, 0 where not valid; no gradient enters value and weight.
  """
  value, weight = jax.lax.stop_gradient((_unit(value_BxLxHxK), _wide(weight_BxLxH)))
  return weighted_mean(1 - jnp.sum(_unit(read_BxLxHxK) * value, -1), weight)


def sample_candidates(key, mask_BxL, *, count: int = 64):
  """(index_BxJ, valid_BxJ): up to count - 1 different valid tokens of each row, in random order."""
  priority = jnp.where(mask_BxL, jax.random.uniform(key, mask_BxL.shape), 2.0)
  index = jnp.argsort(priority, axis=1)[:, :count - 1].astype(jnp.int32)
  return index, jnp.take_along_axis(mask_BxL, index, 1)


def contrastive_loss(read_BxLxE, value_BxLxE, *, target_BxL, candidate_BxJ, allowed_BxLxJ, weight_BxL, temperature: float = 0.1):
  """Weighted mean of -log softmax of <norm read, norm value> / temperature at the target, against the row's candidates.

  `allowed` leaves out candidates that do not exist or are the target's equals (see `distinct`); no gradient enters values.
  """
  value = jax.lax.stop_gradient(_unit(value_BxLxE))
  read = _unit(read_BxLxE)
  own = jnp.sum(read * gather_tokens(value, target_BxL), -1, keepdims=True)
  others = jnp.einsum('ble,bje->blj', read, gather_tokens(value, candidate_BxJ))
  logits = jnp.concatenate([own, jnp.where(allowed_BxLxJ, others, -jnp.inf)], -1) / temperature
  return weighted_mean(jax.nn.logsumexp(logits, -1) - logits[..., 0], jax.lax.stop_gradient(_wide(weight_BxL)))


def distinct(target_BxL, candidate_BxJ, valid_BxJ, token_BxL=None):
  """allowed_BxLxJ: candidates that exist and differ from the target, by token id where ids are given, else by position."""
  if token_BxL is None: token_BxL = jax.lax.broadcasted_iota(jnp.int32, target_BxL.shape, 1)
  target, candidate = (jnp.take_along_axis(token_BxL, index, 1) for index in (target_BxL, candidate_BxJ))
  return (target[:, :, None] != candidate[:, None, :]) & valid_BxJ[:, None, :]
