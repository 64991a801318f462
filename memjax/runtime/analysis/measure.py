"""Measurements: what a memory costs beside attention of its width, and how many pairs its trained addresses hold."""
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.banks import sees_future
from memjax.config.layout import mixer_names
from memjax.config.mixers import AttentionConfig
from memjax.config.schema import Config
from memjax.layers.tree import nbytes
from memjax.memory.registry import make_memory
from memjax.models.block import compute_dtype
from memjax.ops.binding import bind, key_map, unbind
from memjax.ops.holographic import recall_probability
from memjax.runtime.analysis.plain import round_list
from memjax.runtime.footprint import unshared

ITEMS = 512            # codebook of the capacity measurement
SECONDS = 0.2          # time spent on each timing


def measure_cost(config: Config, lengths: list[int], *, rows: int = 1) -> dict[str, Any]:
  """{'lengths', 'rows', 'device', 'width', 'memories': {name: {'kind', 'ms', 'temporary_bytes', 'state_bytes'}}}.

  One layer (projections included) of each memory of the model, and of full attention with as many heads, at each
  length: median milliseconds of forward and the gradient of all inputs and parameters (not of integers); bytes of temporaries
  that this needs; bytes of the state that decoding carries for a row of that length. A shared table counts as the layer's own.
  """
  model = config.model
  named = {name for layer in model.layers for name in mixer_names(layer)}
  used = {name: mixer for name, mixer in model.mixers.items() if name in named}
  heads = [getattr(mixer, 'heads', 0) for mixer in used.values()]
  count = next((h for h in heads if h and model.width % h == 0 and (model.width // h) % 2 == 0), 1)
  if not any(mixer.kind == 'attention' for mixer in used.values()):
    used['full attention'] = AttentionConfig(heads=count, rotary=(model.width // count) % 2 == 0)
  result = {'lengths': lengths, 'rows': rows, 'device': jax.devices()[0].device_kind, 'width': model.width, 'memories': {}}
  for name, mixer in used.items():
    memory = make_memory(unshared(mixer), model.width, dtype=compute_dtype(model), parent=None)
    columns = _costs_of(memory, lengths, rows)
    result['memories'][name] = {'kind': mixer.kind, **{key: [column[key] for column in columns] for key in columns[0]}}
  return result


def _costs_of(memory: Any, lengths: list[int], rows: int) -> list[dict[str, float]]:
  def text(length):
    x_BxLxD = jax.random.normal(jax.random.key(0), (rows, length, memory.width), memory.dtype)
    return x_BxLxD, jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
  def loss(learned, x_BxLxD, position_BxL):
    leaves = [learned.get(n, leaf) for n, leaf in enumerate(fixed)]
    y_BxLxD = memory.apply(jax.tree.unflatten(tree, leaves), x_BxLxD, memory.init_state(rows), position_BxL=position_BxL)[0]
    return jnp.sum(y_BxLxD.astype(jnp.float32) ** 2)
  def init(key, x_BxLxD, position_BxL): return memory.init(key, x_BxLxD, memory.init_state(rows), position_BxL=position_BxL)
  fixed, tree = jax.tree.flatten(jax.jit(init)(jax.random.key(1), *text(lengths[0])))
  params, columns = {n: leaf for n, leaf in enumerate(fixed) if jnp.issubdtype(leaf.dtype, jnp.floating)}, []
  for length in lengths:
    call = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, *text(length)).compile()
    state = jax.eval_shape(lambda length=length: memory.init_state(1, 0 if sees_future(memory.config) else length))
    columns.append({'ms': median_ms(call, params, *text(length)), 'state_bytes': nbytes(state),
                    'temporary_bytes': int(getattr(call.memory_analysis(), 'temp_size_in_bytes', 0))})
  return columns


def median_ms(call: Any, *args: Any) -> float:
  """Median wall milliseconds of a compiled call, the first one left out; at least three, for about SECONDS."""
  jax.block_until_ready(call(*args))
  times, started = [], time.perf_counter()
  while len(times) < 3 or time.perf_counter() - started < SECONDS:
    begin = time.perf_counter()
    jax.block_until_ready(call(*args))
    times.append(time.perf_counter() - begin)
  return float(f'{1000 * float(np.median(times)):.4g}')


@functools.partial(jax.jit, static_argnames='kind')
def _recall(key_NxHxK, address_NxHxS, loads_T, *, kind: str, seed):
  """Share of pairs recalled at each load: the first N pairs superposed, values from a codebook, nearest item wins."""
  pairs, (H, K) = key_NxHxK.shape[0], key_NxHxK.shape[1:]
  book_key, choice_key = jax.random.split(seed)
  codebook_MxHxK = jax.random.normal(book_key, (ITEMS, H, K))
  item_N = jax.random.randint(choice_key, (pairs,), 0, ITEMS)
  bound_NxHxK = bind(kind, key_NxHxK, codebook_MxHxK[item_N])
  def at_load(load):
    stored_N = jnp.arange(pairs) < load
    m_HxSxK = jnp.einsum('nhs,nhk->hsk', jnp.where(stored_N[:, None, None], address_NxHxS, 0), bound_NxHxK)
    read = unbind(kind, key_NxHxK, jnp.einsum('nhs,hsk->nhk', address_NxHxS, m_HxSxK))
    hit_N = jnp.argmax(jnp.einsum('nhk,mhk->nm', read, codebook_MxHxK), -1) == item_N
    return jnp.sum(hit_N & stored_N) / load
  return jax.lax.map(at_load, loads_T)


def measure_capacity(kind: str, arrays: dict[str, np.ndarray], *, effective: float, trials: int = 4, most: int = 1024) -> dict[str, Any]:
  """{'pairs', 'trained', 'random', 'theory', 'theory_ideal', 'floats', 'items'}: recall of N pairs in one layer's memory.

  'trained' superposes random values under the keys and addresses that the layer gave to N random tokens of a text,
  'random' under random keys of the same kind and random unit addresses; neither forgets. The theory is
  `recall_probability` with H K S_eff floats, ideal with all S slots decorrelated.
  """
  key, address = (np.asarray(arrays[n], np.float32) for n in ('key_BxLxHxK', 'address_BxLxHxS'))
  key, address = (a.reshape(-1, *a.shape[2:]) for a in (key, address))
  (pool, H, K), S = key.shape, address.shape[-1]
  ideal, floats = H * K * S, H * K * effective
  top = min(pool, most, max(8, int(0.6 * ideal)))
  loads = np.unique(np.round(np.geomspace(min(8, top), top, 9)).astype(int))
  generator, trained, control = np.random.default_rng(0), [], []
  for trial in range(trials):
    chosen = generator.permutation(pool)[:top]
    raw = generator.standard_normal((top, H, K)).astype(np.float32)
    plain = generator.standard_normal((top, H, S)).astype(np.float32)
    pairs = [(key[chosen], address[chosen]), (key_map(kind, jnp.asarray(raw)), plain / np.linalg.norm(plain, axis=-1, keepdims=True))]
    for out, (k, a) in zip((trained, control), pairs, strict=True):
      out.append(np.asarray(_recall(jnp.asarray(k), jnp.asarray(a), jnp.asarray(loads), kind=kind, seed=jax.random.key(trial))))
  theory = lambda n: round_list([recall_probability(int(load), floats=n, items=ITEMS) for load in loads])
  return {'pairs': loads.tolist(), 'trained': round_list(np.mean(trained, 0)), 'random': round_list(np.mean(control, 0)),
          'theory': theory(floats), 'theory_ideal': theory(ideal), 'floats': round(floats), 'state_floats': ideal, 'items': ITEMS}
