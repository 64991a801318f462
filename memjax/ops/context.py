"""The dynamic context bank (MAT's inference-time memory): fixed slots that are pooled, merged, aged, clustered and read.

Functions of one row; a batch or users come by `jax.vmap`. All zeros is the empty bank. Nothing here is learned, and no
gradient passes through what a bank holds: slots, masses and pooled inputs are constants to whoever reads them.
"""
import dataclasses

import jax
import jax.numpy as jnp

from memjax.config.context import ContextConfig
from memjax.ops.top_k import largest

EXACT = jax.lax.Precision.HIGHEST
SAME = 1e-5            # squared distances below this share of |x|^2 + |y|^2 are rounding: equal slots must tie, not race


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
  """Slots [S, D] with importance, refs (tokens that read them), age (slots made since), valid (1 = in use), cluster + 1
  (`assign`), each [S]; centroids [N, D]; the number of slots ever made (`clock`); sum [D] and count of the unfinished pool.

  Real numbers float32 at least, the others int32. Every leaf may lead with a batch.
  """
  slots: jax.Array
  importance: jax.Array
  refs: jax.Array
  age: jax.Array
  valid: jax.Array
  assign: jax.Array
  centroids: jax.Array
  clock: jax.Array
  total: jax.Array
  pending: jax.Array


def empty_bank(config: ContextConfig, width: int, *, batch: tuple[int, ...] = (), dtype=jnp.float32) -> Bank:
  """A bank without slots, its leaves leading with `batch`."""
  S, N = config.slots, config.clusters
  real = lambda *shape: jnp.zeros((*batch, *shape), dtype)
  whole = lambda *shape: jnp.zeros((*batch, *shape), jnp.int32)
  return Bank(slots=real(S, width), importance=real(S), refs=real(S), age=whole(S), valid=whole(S), assign=whole(S),
              centroids=real(N, width), clock=whole(), total=real(width), pending=whole())


# Reading ----------------------------------------------------------------------------------------------------------------------

def read_slots(query_LxHxD: jax.Array, bank: Bank, see_LxS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum_s p_s slot_s [L, H, D], mass [L, S]): p = softmax(query . slot) over the visible slots, mass its mean over heads.

  A query that sees nothing reads 0 and gives no mass. A dense softmax under a mask also serves clusters: theirs are ragged,
  differ by row and change with every slot, so that chapters of a fixed length would cost more than the S slots they spare.
  """
  slots = jax.lax.stop_gradient(bank.slots).astype(query_LxHxD.dtype)
  wide = jnp.promote_types(jnp.float32, slots.dtype)
  logits = jnp.einsum('lhd,sd->hls', query_LxHxD, slots, preferred_element_type=wide)
  see = see_LxS[None]
  top = jax.lax.stop_gradient(jnp.max(jnp.where(see, logits, -jnp.inf), -1, keepdims=True, initial=-1e30))
  weight = jnp.exp(jnp.where(see, logits - top, -jnp.inf))
  total = jnp.sum(weight, -1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1)
  mixed = jnp.einsum('hls,sd->hld', weight.astype(slots.dtype), slots, preferred_element_type=wide).swapaxes(0, 1)
  return mixed.astype(query_LxHxD.dtype), jax.lax.stop_gradient(weight.mean(0))


def route(query_LxHxD: jax.Array, bank: Bank, top_k: int) -> jax.Array:
  """Visible slots [L, S] bool: all valid ones without clusters, else those of the `top_k` clusters nearest in dot product.

  A token has one choice: the queries of its heads are summed. Clusters without slots come last and show nothing.
  """
  valid_LxS = jnp.broadcast_to(bank.valid[None] > 0, (query_LxHxD.shape[0], bank.valid.shape[0]))
  N = bank.centroids.shape[0]
  if not N: return valid_LxS
  member_SxN = _members(bank)
  alive_LxN = jnp.broadcast_to(jnp.any(member_SxN, 0)[None], (query_LxHxD.shape[0], N))
  query_LxD = jax.lax.stop_gradient(query_LxHxD).sum(1).astype(bank.centroids.dtype)
  score_LxN = jnp.where(alive_LxN, jnp.einsum('ld,nd->ln', query_LxD, bank.centroids, precision=EXACT), -jnp.inf)
  chosen_LxN = jnp.any(jax.nn.one_hot(largest(score_LxN, top_k)[1], N, dtype=bool), 1)
  return valid_LxS & (chosen_LxN.astype(jnp.int32) @ member_SxN.T.astype(jnp.int32) > 0)


def account(bank: Bank, mass_LxS: jax.Array, *, threshold: float) -> Bank:
  """The bank after tokens read it: importance + the mass they gave, refs + the tokens that gave more than `threshold`."""
  mass_LxS = mass_LxS.astype(bank.importance.dtype)
  return dataclasses.replace(bank, importance=bank.importance + mass_LxS.sum(0),
                             refs=bank.refs + jnp.sum(mass_LxS > threshold, 0).astype(bank.refs.dtype))


# Writing ----------------------------------------------------------------------------------------------------------------------

def pool(bank: Bank, x_LxD: jax.Array, take_L: jax.Array) -> Bank:
  """The bank with the taken tokens in its unfinished pool; no gradient."""
  x_LxD = jax.lax.stop_gradient(x_LxD).astype(bank.total.dtype)
  total = bank.total + jnp.einsum('l,ld->d', take_L.astype(x_LxD.dtype), x_LxD, precision=EXACT)
  return dataclasses.replace(bank, total=total, pending=bank.pending + take_L.sum(dtype=jnp.int32))


def append(bank: Bank, config: ContextConfig) -> Bank:
  """The bank one update later: all slots a step older, the mean of the pool a new slot, the pool empty."""
  new = bank.total / jnp.maximum(bank.pending, 1).astype(bank.total.dtype)
  bank = dataclasses.replace(bank, age=bank.age + bank.valid, clock=bank.clock + 1, total=jnp.zeros_like(bank.total),
                             pending=jnp.zeros_like(bank.pending))
  importance = jnp.asarray(config.new_importance, bank.importance.dtype)
  return insert(bank, config, new, importance=importance, refs=jnp.zeros_like(importance), age=jnp.zeros_like(bank.pending))


def insert(bank: Bank, config: ContextConfig, slot_D: jax.Array, *, importance: jax.Array, refs: jax.Array, age: jax.Array) -> Bank:
  """The bank with one more slot in its first free place; a full bank makes room by `config.merge` first."""
  full = jnp.all(bank.valid > 0)
  roomy, freed = (_evict if config.merge == 'evict' else _merge)(bank, config)
  bank = jax.tree.map(lambda a, b: jnp.where(full, a, b), roomy, bank)
  at = jnp.where(full, freed, jnp.argmin(bank.valid))
  bank = dataclasses.replace(
      bank, slots=bank.slots.at[at].set(slot_D), importance=bank.importance.at[at].set(importance), refs=bank.refs.at[at].set(refs),
      age=bank.age.at[at].set(age), valid=bank.valid.at[at].set(1), assign=bank.assign.at[at].set(0))
  if not config.clusters: return bank
  return cluster(bank, config.iterations) if config.iterations else join(bank, at)


def strength(bank: Bank, decay: float) -> jax.Array:
  """omega = importance * decay^age [S], 0 where there is no slot."""
  return jnp.where(bank.valid > 0, bank.importance * jnp.asarray(decay, bank.importance.dtype) ** bank.age, 0)


def merge_cost(bank: Bank, decay: float) -> jax.Array:
  """Ward's increase in squared error, omega_i omega_j / (omega_i + omega_j) |x_i - x_j|^2 [S, S]; inf unless i < j, both valid.

  Near, unimportant and old pairs are cheap.
  """
  S, omega, size = bank.slots.shape[0], strength(bank, decay), jnp.sum(bank.slots ** 2, -1)
  sizes = size[:, None] + size[None]
  far = sizes - 2 * jnp.einsum('sd,td->st', bank.slots, bank.slots, precision=EXACT)
  far = jnp.where(far > SAME * sizes, far, 0)
  both = omega[:, None] + omega[None]
  cost = omega[:, None] * omega[None] / jnp.where(both > 0, both, 1) * far
  pair = (jnp.arange(S)[:, None] < jnp.arange(S)[None]) & (bank.valid[:, None] > 0) & (bank.valid[None] > 0)
  return jnp.where(pair, cost, jnp.inf)


def _merge(bank, config):
  """(bank with its cheapest pair in the place and cluster of the stronger of the two, the place that this frees)."""
  cost, omega = merge_cost(bank, config.decay), strength(bank, config.decay)
  i, j = jnp.divmod(jnp.argmin(cost), cost.shape[0])
  keep, drop = jnp.where(omega[i] >= omega[j], i, j), jnp.where(omega[i] >= omega[j], j, i)
  both = omega[keep] + omega[drop]
  share = jnp.where(both > 0, omega[drop] / jnp.where(both > 0, both, 1), 0.5)    # omega of very old slots underflows to 0
  x, y = bank.slots[keep], bank.slots[drop]
  merged = x + y if config.merge == 'sum' else x + share * (y - x)
  add = lambda a: a.at[keep].add(a[drop])
  bank = dataclasses.replace(bank, slots=bank.slots.at[keep].set(merged), importance=add(bank.importance), refs=add(bank.refs),
                             age=bank.age.at[keep].min(bank.age[drop]))
  return _free(bank, drop), drop


def _evict(bank, config):
  """(bank without its weakest slot, the place that this frees)."""
  weakest = jnp.argmin(jnp.where(bank.valid > 0, strength(bank, config.decay), jnp.inf))
  return _free(bank, weakest), weakest


def _free(bank, at):
  clear = lambda a: a.at[at].set(0)
  return dataclasses.replace(bank, **{n: clear(getattr(bank, n)) for n in ('slots', 'importance', 'refs', 'age', 'valid', 'assign')})


# Clusters ---------------------------------------------------------------------------------------------------------------------

def _members(bank):
  """Whether slot s is of cluster n, [S, N] bool."""
  return (bank.assign[:, None] == 1 + jnp.arange(bank.centroids.shape[0])[None]) & (bank.valid[:, None] > 0)


def _with_means(bank):
  """Centroids at the means of their slots; those without slots are zero."""
  member_SxN = _members(bank).astype(bank.slots.dtype)
  count_N = jnp.maximum(member_SxN.sum(0), 1)
  return dataclasses.replace(bank, centroids=jnp.einsum('sn,sd->nd', member_SxN, bank.slots, precision=EXACT) / count_N[:, None])


def _distances(slots_SxD, centroids_NxD):
  """Squared distances [S, N], equal points at exactly 0."""
  sizes = jnp.sum(slots_SxD ** 2, -1)[:, None] + jnp.sum(centroids_NxD ** 2, -1)[None]
  far = sizes - 2 * jnp.einsum('sd,nd->sn', slots_SxD, centroids_NxD, precision=EXACT)
  return jnp.where(far > SAME * sizes, far, 0)


def join(bank: Bank, at: jax.Array) -> Bank:
  """One online step: the slot at a place opens an empty cluster if there is one, else joins the nearest; its centroid follows."""
  empty_N = ~jnp.any(_members(bank), 0)
  far_N = _distances(bank.slots[at][None], bank.centroids)[0]
  choice = jnp.where(jnp.any(empty_N), jnp.argmax(empty_N), jnp.argmin(far_N))
  return _with_means(dataclasses.replace(bank, assign=bank.assign.at[at].set(1 + choice.astype(jnp.int32))))


def cluster(bank: Bank, iterations: int) -> Bank:
  """Lloyd's algorithm on the valid slots from a deterministic farthest-point start.

  The first valid slot is the first centroid, then always the slot farthest from those chosen. With fewer distinct slots
  than clusters some clusters stay empty.
  """
  def start(n, found):
    bank, far_S = found
    pick = jnp.argmax(far_S)
    own = jnp.where(far_S[pick] > 0, n + 1, bank.assign[pick]).astype(jnp.int32)
    bank = dataclasses.replace(bank, centroids=bank.centroids.at[n].set(bank.slots[pick]), assign=bank.assign.at[pick].set(own))
    return bank, jnp.minimum(far_S, _distances(bank.slots, bank.slots[pick][None])[:, 0])
  far_S = jnp.where(bank.valid > 0, jnp.inf, 0).astype(bank.slots.dtype)
  bank = dataclasses.replace(bank, assign=jnp.zeros_like(bank.assign))
  bank, _ = jax.lax.fori_loop(0, bank.centroids.shape[0], start, (bank, far_S))
  return jax.lax.fori_loop(0, iterations, lambda _, bank: lloyd_step(bank), bank)


def lloyd_step(bank: Bank) -> Bank:
  """Every valid slot joins the nearest centroid of a cluster that has slots; centroids move to the means.

  The first cluster without slots, if there is one, takes the slot that is farthest from its centroid.
  """
  valid_S, alive_N = bank.valid > 0, jnp.any(_members(bank), 0)
  far_SxN = jnp.where(alive_N[None], _distances(bank.slots, bank.centroids), jnp.inf)
  joined = dataclasses.replace(bank, assign=jnp.where(valid_S, 1 + jnp.argmin(far_SxN, 1).astype(jnp.int32), 0))
  own_S = jnp.where(valid_S, far_SxN.min(1), -1)
  empty_N, stray = ~jnp.any(_members(joined), 0), jnp.argmax(own_S)
  seed = jnp.where(jnp.any(empty_N) & (own_S[stray] > 0), 1 + jnp.argmax(empty_N), joined.assign[stray])
  return _with_means(dataclasses.replace(joined, assign=joined.assign.at[stray].set(seed.astype(jnp.int32))))


# Tokens in windows, banks as wholes -------------------------------------------------------------------------------------------

def past_border(pending: jax.Array, wrote_L: jax.Array, reset_L: jax.Array, ratio: int) -> jax.Array:
  """Whether a slot was completed before each token, [L] bool, in a window of at most `ratio` tokens: then by one token at most.

  A slot is completed by the token that makes `ratio` written ones since the last slot or reset; `pending` came before. After
  a reset inside of the window only its last token can do so, and no token comes later.
  """
  done = (wrote_L & (pending + jnp.cumsum(wrote_L.astype(jnp.int32)) == ratio) & (jnp.cumsum(reset_L) == 0)).astype(jnp.int32)
  return jnp.cumsum(done) - done > 0


def merge_banks(bank: Bank, other: Bank, config: ContextConfig) -> Bank:
  """One bank of the slots of two, by `config.merge` within the capacity; the unfinished pool is that of the first."""
  def one(bank, entry):
    slot, importance, refs, age, valid = entry
    more = insert(bank, config, slot, importance=importance, refs=refs, age=age)
    return jax.tree.map(lambda a, b: jnp.where(valid > 0, a, b), more, bank), None
  bank, _ = jax.lax.scan(one, bank, (other.slots, other.importance, other.refs, other.age, other.valid))
  return dataclasses.replace(bank, clock=bank.clock + other.clock)


def clear_bank(bank: Bank) -> Bank:
  """An empty bank of the same shape."""
  return jax.tree.map(jnp.zeros_like, bank)
