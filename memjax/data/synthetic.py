"""Synthetic recall tasks, made on the device from a key; usable inside jit."""
import jax
import jax.numpy as jnp

from memjax.config.errors import UserError


def mqar(key: jax.Array, *, batch: int, length: int, pairs: int, vocabulary: int, power: float = 0.01,
         rewrite: int = 0) -> dict[str, jax.Array]:
  """{'token', 'target', 'position'} int32 and 'weight' bool, [B, L]: multi-query associative recall.

  A row begins with `pairs` (key, value) pairs, keys from the lower half of the vocabulary (never 0), values from the
  upper, none twice. Among the length - 2 pairs tokens that follow each key stands once at an even offset 2 g, its
  target there the value; the g are drawn without replacement with p(g) ~ (g + 1)^(power - 1). All other tokens are
  uniform over the vocabulary. `weight` marks the queries; target is 0 elsewhere. With `rewrite` = R the last R pairs
  repeat R earlier keys with other values, and the later value is the target; there are then pairs - R queries.

  Source: Arora et al. 2023 (arXiv 2312.04927), `multiquery_ar` of zoology; R > 0 is ours. UserError for sizes that do
  not fit.
  """
  keys, space = pairs - rewrite, (length - 2 * pairs) // 2
  if pairs < 1 or not 0 <= rewrite <= pairs // 2:
    raise UserError(f'recall needs pairs >= 1 and 0 <= rewrite <= pairs / 2, got {pairs} and {rewrite}')
  if space < keys:
    raise UserError(f'{pairs} pairs and {keys} queries need a length of {2 * (pairs + keys)}, got {length}')
  half = vocabulary // 2
  if half - 1 < keys or vocabulary - half < pairs:
    raise UserError(f'{pairs} pairs need a vocabulary of {2 * pairs + 2}, got {vocabulary}')
  key_keys, key_values, key_gaps, key_filler = jax.random.split(key, 4)
  keys_BxK = 1 + _choose(key_keys, jnp.zeros((half - 1,)), batch, keys)
  values_BxM = half + _choose(key_values, jnp.zeros((vocabulary - half,)), batch, pairs)
  gap_BxK = _choose(key_gaps, (power - 1) * jnp.log(jnp.arange(1., space + 1)), batch, keys)
  written_BxM = jnp.concatenate([keys_BxK, keys_BxK[:, :rewrite]], axis=1)
  latest_BxK = jnp.concatenate([values_BxM[:, keys:], values_BxM[:, rewrite:keys]], axis=1)
  at_BxK = 2 * pairs + 2 * gap_BxK
  row_Bx1 = jnp.arange(batch)[:, None]
  token_BxL = jax.random.randint(key_filler, (batch, length), 0, vocabulary, dtype=jnp.int32)
  token_BxL = token_BxL.at[:, 0:2 * pairs:2].set(written_BxM).at[:, 1:2 * pairs:2].set(values_BxM)
  return {'token': token_BxL.at[row_Bx1, at_BxK].set(keys_BxK),
          'target': jnp.zeros((batch, length), jnp.int32).at[row_Bx1, at_BxK].set(latest_BxK),
          'position': jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length)),
          'weight': jnp.zeros((batch, length), bool).at[row_Bx1, at_BxK].set(True)}


def _choose(key: jax.Array, logit_M: jax.Array, batch: int, count: int) -> jax.Array:
  """int32 [batch, count] indices, in random order and without replacement, ~ softmax(logit) (Gumbel top-k)."""
  noise_BxM = jax.random.gumbel(key, (batch, logit_M.shape[0]), logit_M.dtype)
  return jax.lax.top_k(logit_M[None, :] + noise_BxM, count)[1].astype(jnp.int32)
