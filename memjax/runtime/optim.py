"""AdamW per group of parameters: ordered rules on paths, a schedule, clipping and weight decay inside each group."""
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.config.errors import UserError
from memjax.config.schema import GroupConfig, OptimizerConfig
from memjax.layers.axes import FIXED
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import stored_kernels
from memjax.runtime.balance import is_bias

Flat = dict[str, jax.Array]


class Optimizer(NamedTuple):
  """What trains the parameters: `tx` sees only the trainable ones, as a flat dict path -> array."""
  tx: optax.GradientTransformation
  groups: dict[str, str]               # path -> group, every parameter
  frozen: frozenset[str]               # paths whose group has rate 0

  def split(self, params: Any) -> tuple[Flat, Flat]:
    """(trainable, frozen) parameters, flat: only the first are differentiated and hold optimiser state."""
    flat = named(params)
    frozen = {k: v for k, v in flat.items() if k in self.frozen}
    return {k: v for k, v in flat.items() if k not in frozen}, frozen

  def init(self, params: Any) -> Any:
    """Optimiser state of the trainable parameters of a nested tree."""
    return self.tx.init(self.split(params)[0])


def schedule(group: GroupConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Learning rate of update `count` = 0 .. steps - 1 (held at its end value afterwards).

  Warm-up rises linearly, (count + 1) / warmup, so that the first update is not lost. Then, with p going from 0 to 1
  over the rest: cosine end + (1 - end) (1 + cos pi p) / 2, linear 1 - (1 - end) p, constant 1, wsd (Hu et al. 2024) 1,
  falling to end over the last `decay_share` of all steps, 1 - (1 - end) f(p) with f = p, the cosine's (1 - cos pi p) / 2,
  or sqrt p (Haegele et al. 2024).
  """
  warmup, last = group.warmup, max(steps - 1, 1)
  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    p = jnp.clip((count - warmup) / max(last - warmup, 1), 0.0, 1.0)
    if group.schedule == 'wsd':
      span = max(group.decay_share * steps, 1.0)
      p = jnp.clip((count - (last - span)) / span, 0.0, 1.0)
    shape = group.decay_shape if group.schedule == 'wsd' else group.schedule
    fall = 0.5 * (1.0 - jnp.cos(jnp.pi * p)) if shape == 'cosine' else jnp.sqrt(p) if shape == 'one_minus_sqrt' else p
    share = jnp.ones(()) if group.schedule == 'constant' else 1.0 - (1.0 - group.end) * fall
    return group.rate * share * jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
  return rate


def assign_groups(config: OptimizerConfig, paths: list[str]) -> dict[str, str]:
  """{path: group} by the first rule whose regex is found in the path.

  Raises UserError for a parameter that no rule matches, and for a group without parameters.
  """
  rules = [rule.rpartition('=') for rule in config.rules]
  groups = {}
  for path in paths:
    groups[path] = next((group for pattern, _, group in rules if re.search(pattern, path)), '')
    if not groups[path]: raise UserError(f"optimizer.rules: no rule matches parameter {path}; end them with '.*=GROUP'")
  for group in config.groups:
    if group not in groups.values(): raise UserError(f'optimizer.groups.{group} has no parameter; mend its rule')
  return groups


def make_optimizer(config: OptimizerConfig, params: Any, steps: int, *, axes: Any = None,
                   sweep: Callable | None = None) -> Optimizer:
  """The optimiser of parameters (arrays or shapes). `sweep`, a function of the count, replaces every schedule.

  `axes`, the tree of axis names, tells vectors stacked over layers from matrices: vectors never decay, nor what is `FIXED`.

  Groups with rate 0 are frozen: split off before the gradient, no optimiser state, not counted by any clip.
  Raises UserError as `assign_groups` does, for kernels in fewer bits that are to be trained, and if nothing is left to train.
  """
  flat = named(params)
  groups = assign_groups(config, list(flat))
  _check_stored(config, groups, flat)
  frozen = frozenset(path for path, group in groups.items() if config.groups[group].rate == 0 or is_bias(path))
  if len(frozen) == len(flat): raise UserError('optimizer.groups: every rate is 0, there is nothing to train')
  live = {path: group for path, group in groups.items() if path not in frozen}
  decayed = _decayed(config, flat, axes)
  transforms = {}
  for name in sorted(set(live.values())):
    group = config.groups[name]
    adam = optax.inject_hyperparams(optax.adamw, static_args=('b1', 'b2', 'eps', 'weight_decay', 'mask'))(
        learning_rate=sweep or schedule(group, steps), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=group.weight_decay, mask=lambda tree: {path: path in decayed for path in tree})
    clip = [optax.clip_by_global_norm(group.clip)] if group.clip else []
    transforms[name] = optax.chain(*clip, _used_rows(adam) if group.sparse else adam)
  return Optimizer(optax.partition(transforms, live), groups, frozen)


def _check_stored(config: OptimizerConfig, groups: Mapping[str, str], flat: Flat) -> None:
  """Raises UserError for a group with a rate that holds a kernel in fewer bits, which is read alone."""
  for path in stored_kernels(flat):
    for leaf in (path, f'{path}_codes', f'{path}_scale'):
      if leaf in groups and config.groups[groups[leaf]].rate:
        raise UserError(f'optimizer.groups.{groups[leaf]} trains {path}, which model.block.quant stores in fewer bits and which cannot be '
                        'trained; set its rate to 0')


def _used_rows(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` whose updates are zero for rows (of the last axis) whose gradient is all zero: neither decay nor momentum
  moves the entries of chapters that a step did not use."""
  def update(grads, state, params=None):
    updates, state = inner.update(grads, state, params)
    used = lambda u, g: jnp.where(jnp.any(g != 0, -1, keepdims=True), u, 0)
    return jax.tree.map(used, updates, grads), state
  return optax.GradientTransformation(inner.init, update)


def _decayed(config: OptimizerConfig, flat: Flat, axes: Any) -> frozenset[str]:
  """Paths with weight decay: matrices (vectors and scalars never decay) that `no_decay` does not name and that are not fixed."""
  keep_out, names = re.compile(config.no_decay or r'(?!)'), named(axes, is_leaf=lambda x: isinstance(x, tuple))
  stacked, fixed = ({path for path, axis in names.items() if name in axis} for name in ('layers', FIXED))
  return frozenset(path for path, x in flat.items()
                   if len(x.shape) - (path in stacked) > 1 and path not in fixed and not keep_out.search(path))


def rates(opt_state: Any) -> dict[str, jax.Array]:
  """{'learning_rate/<group>': the rate that the last update used}."""
  return {f'learning_rate/{name}': optax.tree.get(inner, 'hyperparams')['learning_rate']
          for name, inner in sorted(opt_state.inner_states.items())}


def apply(optimizer: Optimizer, grads: Flat, opt_state: Any, params: Any) -> tuple[Any, Any]:
  """(params, opt_state) after one update with the gradients of the trainable parameters; frozen ones pass through."""
  trainable, frozen = optimizer.split(params)
  updates, opt_state = optimizer.tx.update(grads, opt_state, trainable)
  return unnamed({**optax.apply_updates(trainable, updates), **frozen}, params), opt_state


def group_table(optimizer: Optimizer, config: OptimizerConfig, params: Any) -> list[dict[str, Any]]:
  """One row a group: its name, peak rate, number of arrays and of parameters, whether it is frozen."""
  flat, rows = named(params), []
  for name, group in config.groups.items():
    paths = [p for p, g in optimizer.groups.items() if g == name]
    rows.append({'group': name, 'rate': group.rate, 'frozen': group.rate == 0, 'arrays': len(paths),
                 'parameters': sum(math.prod(flat[p].shape) for p in paths)})
  return rows
