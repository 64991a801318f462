"""From a bank's config to the op that reads it."""
from typing import Any

import jax

from memjax.memory.table import as_float
from memjax.ops.routed_attention import routed_attend
from memjax.ops.routed_dense import attend_all_chapters
from memjax.ops.routed_legacy import attend_scaled_entries
from memjax.ops.routed_sharded import routed_attend_sharded

TOKENS = 'data'                        # mesh axis that holds the rows where chapters are split over another


def read_chapters(config: Any, q_ZxHxK: jax.Array, choice: tuple, kv: tuple) -> jax.Array:
  """y [Z, E]: queries against the chosen (and shared) chapters in the config's form; choice = (ids, log weights) [Z, J].

  With `form.axis` and a mesh in force that splits it, each device reads its own chapters.
  """
  c, (ids_ZxJ, log_weight_ZxJ), (k, v) = config, choice, kv
  mixing, form, shared = c.mixing, c.form, shared_entries(kv, config.mixing.shared, q_ZxHxK.dtype)
  mode = mixing.combine if c.shape.chapters else 'joint'
  given = dict(log_weight_ZxJ=log_weight_ZxJ)
  options = dict(impl=form.kind, block=form.block, token_chunk=form.token_chunk, gather_limit=form.gather_limit_mb << 20, remat=form.remat)
  if mode == 'legacy_scale':
    y = attend_scaled_entries(q_ZxHxK, k, v, ids_ZxJ, shared=mixing.shared, scale=mixing.scale, **given, **options)
    return y.reshape(y.shape[0], -1)
  given |= dict(mode=mode, routed_scale=mixing.scale, shared_kv=shared)
  mesh = jax.sharding.get_abstract_mesh()
  if form.kind == 'dense':
    y = attend_all_chapters(q_ZxHxK, as_float(k, q_ZxHxK.dtype), as_float(v, q_ZxHxK.dtype), ids_ZxJ, **given)
  elif form.axis and dict(mesh.shape).get(form.axis, 1) > 1:
    rows = TOKENS if q_ZxHxK.shape[0] % dict(mesh.shape).get(TOKENS, 1) == 0 else ''
    y = routed_attend_sharded(q_ZxHxK, k, v, ids_ZxJ, mesh=mesh, axis=form.axis, token_axis=rows, **given, **options)
  else: y = routed_attend(q_ZxHxK, k, v, ids_ZxJ, **given, **options)
  return y.reshape(y.shape[0], -1)


def shared_entries(kv: tuple, shared: int, dtype: Any) -> tuple | None:
  """Keys and values [M, G, K] of the first chapters, which everybody reads; None without."""
  if not shared: return None
  def flat(a):
    first = as_float(jax.tree.map(lambda x: x[:shared], a), dtype)
    return first.reshape(-1, *first.shape[2:])
  return tuple(flat(a) for a in kv)
