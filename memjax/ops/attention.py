"""Softmax attention over an explicit set of visible keys: dense, block-local for windows, one token against a ring."""
import jax
import jax.numpy as jnp

BLOCK = 1024  # queries scored at once by the dense form, so that its logits stay [B, H, BLOCK, M]


Always = tuple[jax.Array, jax.Array] | None   # keys and values [G, N, K] that every query of every row sees


def _attend(q_BxLxHxK: jax.Array, k_BxGxMxK: jax.Array, v_BxGxMxK: jax.Array, see_BxLxM: jax.Array, *,
            always: Always = None) -> jax.Array:
  """Both products are plain batched ones, of rows [h L, K] and [M, K]: other orders make XLA turn the scores around in memory."""
  B, L, H, K = q_BxLxHxK.shape
  if always is not None:
    k_BxGxMxK, v_BxGxMxK = (jnp.concatenate([jnp.broadcast_to(one[None].astype(a.dtype), (B, *one.shape)), a], 2)
                            for one, a in zip(always, (k_BxGxMxK, v_BxGxMxK), strict=True))
    see_BxLxM = jnp.pad(see_BxLxM, ((0, 0), (0, 0), (always[0].shape[1], 0)), constant_values=True)
  G, M = k_BxGxMxK.shape[1:3]
  wide = jnp.promote_types(jnp.float32, q_BxLxHxK.dtype)
  q = q_BxLxHxK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
  logits = jnp.einsum('bgnk,bgmk->bgnm', q, k_BxGxMxK.astype(q.dtype), preferred_element_type=wide) * K ** -0.5
  logits, see = logits.reshape(B, G, H // G, L, M), see_BxLxM[:, None, None]
  top = jax.lax.stop_gradient(jnp.max(jnp.where(see, logits, -jnp.inf), -1, keepdims=True, initial=-1e30))
  weight = jnp.exp(jnp.where(see, logits - top, -jnp.inf))
  total = jnp.sum(weight, -1, keepdims=True)                              # 0 where nothing is visible: the read is 0
  rows = weight.astype(q.dtype).reshape(B, G, -1, M)
  if rows.shape[2] == 1 and jax.default_backend() == 'cpu':               # a CPU multiplies one row slower than two
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 0)))
  y = jnp.einsum('bgnm,bgmk->bgnk', rows, v_BxGxMxK.astype(q.dtype), preferred_element_type=wide)
  y = y[:, :, :H // G * L].reshape(B, G, H // G, L, K)
  y = y / jnp.where(total > 0, total, 1)
  return y.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K).astype(q_BxLxHxK.dtype)


def attend(q_BxLxHxK: jax.Array, k_BxGxMxK: jax.Array, v_BxGxMxK: jax.Array, *, see, always: Always = None) -> jax.Array:
  """softmax(q k / sqrt(K)) v over the visible keys, [B, L, H, K]; a query that sees nothing reads 0.

  G key heads serve H query heads in equal groups. `see(start, size)` returns the visibility [B, size, M] of queries
  [start, start + size), so that no mask of the whole call exists; logits and softmax are float32. `always`: keys and values that
  all see besides.
  """
  L = q_BxLxHxK.shape[1]
  if L <= BLOCK: return _attend(q_BxLxHxK, k_BxGxMxK, v_BxGxMxK, see(0, L), always=always)
  blocks = -(-L // BLOCK)
  q = jnp.pad(q_BxLxHxK, ((0, 0), (0, blocks * BLOCK - L), (0, 0), (0, 0)))
  def block(start):
    return _attend(jax.lax.dynamic_slice_in_dim(q, start, BLOCK, 1), k_BxGxMxK, v_BxGxMxK, see(start, BLOCK), always=always)
  y_NxBxCxHxK = jax.lax.map(jax.checkpoint(block), BLOCK * jnp.arange(blocks))
  return jnp.moveaxis(y_NxBxCxHxK, 0, 1).reshape(q.shape)[:, :L]


def attend_window(q_BxLxHxK: jax.Array, k_BxGxMxK: jax.Array, v_BxGxMxK: jax.Array, *, window: int,
                  see_key_BxM: jax.Array, segment_BxM: jax.Array, always: Always = None) -> jax.Array:
  """Window attention by blocks of `window` queries against two blocks of keys, [B, L, H, K]: 2 L W scores instead of L^2.

  The M = window + L keys are `window` past ones, oldest first, then one per query. `see_key_BxM` says which keys exist;
  a query sees the last `window` keys up to its own that exist and have its own `segment`, and those of `always`.
  """
  B, L, H, K = q_BxLxHxK.shape
  W, N = window, -(-L // window)
  def pad(a, axis=1): return jnp.pad(a, [(0, N * W - L) if number == axis else (0, 0) for number in range(a.ndim)])
  def pairs(a):                                                           # [B, (N + 1) W] -> [B N, 2 W]
    a = pad(a).reshape(B, N + 1, W)
    return jnp.concatenate([a[:, :-1], a[:, 1:]], 2).reshape(B * N, 2 * W)
  def key_pairs(a):                                                       # [B, G, (N + 1) W, K] -> [B N, G, 2 W, K]
    a = jnp.moveaxis(pad(a, 2).reshape(B, -1, N + 1, W, K), 2, 1)
    return jnp.concatenate([a[:, :-1], a[:, 1:]], 3).reshape(B * N, -1, 2 * W, K)
  q = pad(q_BxLxHxK).reshape(B * N, W, H, K)
  own = pad(segment_BxM[:, W:]).reshape(B * N, W, 1)
  i, j = jnp.arange(W)[:, None], jnp.arange(2 * W)[None, :]
  near = (j <= i + W) & (j > i)
  see = near[None] & pairs(see_key_BxM)[:, None, :] & (pairs(segment_BxM)[:, None, :] == own)
  return _attend(q, key_pairs(k_BxGxMxK), key_pairs(v_BxGxMxK), see, always=always).reshape(B, N * W, H, K)[:, :L]


def attend_ring(q_BxHxK: jax.Array, k_BxGxMxK: jax.Array, v_BxGxMxK: jax.Array, count_B: jax.Array, *,
                always: Always = None) -> jax.Array:
  """One query against a ring of M slots of which min(count, M) hold a token, and against `always`, [B, H, K]."""
  filled_BxM = jnp.arange(k_BxGxMxK.shape[2])[None] < count_B[:, None]
  return _attend(q_BxHxK[:, None], k_BxGxMxK, v_BxGxMxK, filled_BxM[:, None], always=always)[:, 0]
