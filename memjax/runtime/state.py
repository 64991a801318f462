"""The training state and the one compiled step: gradient by micro-batches and segments, update, guard against NaN."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from memjax.config.banks import sees_future
from memjax.config.errors import UserError
from memjax.config.layout import mixer_names
from memjax.config.schema import Config, ModelConfig
from memjax.layers.tree import named, unnamed
from memjax.models.decoder import init_params, noise, param_shapes
from memjax.runtime import optim, sharding
from memjax.runtime.balance import LOAD, move_biases
from memjax.runtime.losses import Totals
from memjax.runtime.scoring import score


class TrainState(NamedTuple):
  """Everything a step depends on and changes; saved whole, so that a resumed run is the same run."""
  step: Any                            # int32, steps done
  params: Any                          # float32, nested dict
  opt_state: Any                       # of the trainable parameters only
  key: Any                             # uint32 key data; step n uses fold_in(key, n)
  memory: Any                          # memory carried from step to step; () unless training.carry
  skipped: Any                         # int32, non-finite steps in a row up to now


def check_carry(config: ModelConfig, field: str) -> None:
  """Raises UserError if a layer holds full attention, whose state cannot be carried without end, or a router that sees the future."""
  for name in sorted({name for layer in config.layers for name in mixer_names(layer)}):
    if config.mixers[name].kind == 'attention':
      raise UserError(f"{field} does not go with full attention (model.mixers.{name}): its state would grow without "
                      "end; use kind 'window'")
    if sees_future(config.mixers[name]):
      raise UserError(f'{field} does not go with model.mixers.{name}.router.strategy={config.mixers[name].router.strategy!r}, '
                      'which needs the whole text at once')


def make_init(model: Any, optimizer: optim.Optimizer, config: Config) -> Callable[[], TrainState]:
  """A function without arguments whose result is the state before the first step; traceable."""
  if config.training.carry: check_carry(config.model, 'training.carry')
  def init():
    key = jax.random.key(config.seed)
    params = init_params(model, jax.random.fold_in(key, 0))[0]
    memory = model.init_state(config.training.batch) if config.training.carry else ()
    zero = jnp.zeros((), jnp.int32)
    later = jax.random.key_data(jax.random.fold_in(key, 1))
    return TrainState(zero, params, optimizer.init(params), later, memory, zero)
  return init


def abstract_state(model: Any, optimizer: optim.Optimizer, config: Config, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state on a mesh, computing nothing.

  Parameters follow their axis names, optimiser moments their parameter, carried memory the rows of the batch; all else
  is replicated.
  """
  shapes = jax.eval_shape(make_init(model, optimizer, config))
  params = sharding.shardings_for(param_shapes(model)[1], mesh, shapes.params)
  by_path = {path: (s, leaf.shape) for (path, s), leaf in
             zip(named(params).items(), jax.tree.leaves(shapes.params), strict=True)}
  whole = sharding.replicated(mesh)
  def moment(path, leaf):
    owner, shape = by_path.get(getattr(path[-1], 'key', None), (whole, leaf.shape))
    return owner if shape == leaf.shape else whole
  places = TrainState(whole, params, jax.tree_util.tree_map_with_path(moment, shapes.opt_state), whole,
                      sharding.batch_shardings(shapes.memory, mesh), whole)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def init_state(model: Any, optimizer: optim.Optimizer, config: Config, abstract: TrainState, *,
               given: Mapping[str, jax.Array] | None = None) -> TrainState:
  """The state before the first step, made in place by the shardings of `abstract`.

  `given`, {path: array}, are parameters that exist already: they are used, moved to their sharding, and none is made for them.
  """
  init, given = make_init(model, optimizer, config), given or {}
  others = lambda params: {path: x for path, x in named(params).items() if path not in given}
  def make():
    state = init()
    return state._replace(params=others(state.params))
  places = jax.tree.map(lambda x: x.sharding, abstract)
  state = jax.jit(make, out_shardings=places._replace(params=others(places.params)))()
  moved = {path: jax.device_put(x, place) for path, place in named(places.params).items() if (x := given.get(path)) is not None}
  return state._replace(params=unnamed({**state.params, **moved}, abstract.params))


def make_forward(model: Any, config: Config) -> Callable:
  """forward(params, memory, batch, key) -> (Totals, aux, memory) of one micro-batch, cut into segments by bptt.

  With bptt the state crosses segments behind a stop of the gradient and each segment is recomputed in the backward
  pass; values are those of the uncut row. aux is averaged over segments by their scored tokens.
  """
  training = config.training
  def call(params, memory, batch, key):
    return score(model, params, memory, batch, key=key, remat=training.remat, unroll=training.unroll,
                 rngs=noise(config.model, key))

  def segments(params, memory, batch, key):
    number = training.length // training.bptt
    cut = {k: jnp.moveaxis(x.reshape(x.shape[0], number, training.bptt), 1, 0) for k, x in batch.items()}
    def body(memory, segment):
      index, part = segment
      totals, aux, memory = jax.checkpoint(call)(params, memory, part, jax.random.fold_in(key, index))
      return jax.lax.stop_gradient(memory), (totals, aux)
    memory, (totals, aux) = jax.lax.scan(body, memory, (jnp.arange(number), cut))
    share = totals.tokens / jnp.maximum(jnp.sum(totals.tokens), 1)
    return jax.tree.map(lambda x: jnp.sum(x, 0), totals), _of_parts(aux, share), memory

  def forward(params, memory, batch, key):
    if not training.carry: memory = model.init_state(batch['token'].shape[0], training.length if training.bptt else 0)
    memory = jax.lax.stop_gradient(memory)
    totals, aux, memory = (segments if training.bptt else call)(params, memory, batch, key)
    return totals, aux, jax.lax.stop_gradient(memory) if training.carry else ()
  return forward


def _of_parts(aux: dict, share_N: jax.Array) -> dict:
  """aux of parts [N, ..] as one: the use of chapters added up, all else averaged by the share of each part."""
  mean = lambda x: jnp.tensordot(share_N, x, 1)
  return {name: jax.tree.map(lambda x: x.sum(0), value) if name == LOAD else mean(value) for name, value in aux.items()}


def make_gradient(model: Any, optimizer: optim.Optimizer, config: Config) -> Callable:
  """gradient(params, memory, batch, key) -> (gradients of the trainable parameters, Totals, aux, memory).

  The objective is sum of nats / scored tokens of the whole batch + penalty. Micro-batches (training.accumulate) are
  scanned, and each adds its share, so that the sum equals one big batch; row b is in micro-batch b % accumulate, which
  leaves every row on its device.
  """
  number, forward = config.training.accumulate, make_forward(model, config)
  cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

  def gradient(params, memory, batch, key):
    trainable, frozen = optimizer.split(params)
    total = jnp.maximum(jnp.sum(batch['weight'], dtype=jnp.int32), 1)
    def objective(trainable, memory, part, key):
      totals, aux, memory = forward(unnamed({**trainable, **frozen}, params), memory, part, key)
      aux = {name: value if name == LOAD else value * (totals.tokens / total) for name, value in aux.items()}
      return totals.nats / total + aux['penalty'], (totals, aux, memory)
    grad = jax.grad(objective, has_aux=True)
    if number == 1:
      grads, (totals, aux, memory) = grad(trainable, memory, batch, key)
      return grads, totals, aux, memory
    def body(so_far, micro):
      index, part, memory = micro
      grads, out = grad(trainable, memory, part, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, so_far, grads), out
    parts = jnp.arange(number), jax.tree.map(cut, batch), jax.tree.map(cut, memory)
    grads, (totals, aux, memory) = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trainable), parts)
    totals, aux = jax.tree.map(lambda x: jnp.sum(x, 0), (totals, aux))
    return grads, totals, aux, jax.tree.map(join, memory)
  return gradient


def make_train_step(model: Any, optimizer: optim.Optimizer, config: Config,
                    abstract: TrainState | None = None) -> Callable:
  """step(state, batch) -> (state, metrics), compiled once; the old state's buffers are given away.

  The new state is placed by the shardings of `abstract`; None leaves that to the compiler.

  metrics: float32 device scalars `loss` (nats a scored token, without penalty), `accuracy`, `tokens`, `grad_norm`,
  `skipped`, `learning_rate/<group>` and what the model reports. If loss or gradient is not finite, parameters,
  optimiser state and memory stay as they are and `skipped` counts up
  (optax.apply_if_finite would let the fourth one through).
  """
  gradient = make_gradient(model, optimizer, config)
  def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, totals, aux, memory = gradient(state.params, state.memory, batch, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(totals.nats + aux['penalty'])
    params, opt_state = optim.apply(optimizer, grads, state.opt_state, state.params)
    params = move_biases(config.model, params, aux.pop(LOAD, {}))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    new = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), state.key,
                     keep(memory, state.memory), skipped)
    return new, {**aux, **optim.rates(opt_state), **_train_scores(totals), 'grad_norm': norm, 'skipped': skipped}
  if abstract is None: return jax.jit(step, donate_argnums=0)
  places = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(places.step.mesh)))


def _train_scores(totals: Totals) -> dict[str, jax.Array]:
  tokens = jnp.maximum(totals.tokens, 1)
  return {'loss': totals.nats / tokens, 'accuracy': totals.correct / tokens, 'tokens': totals.tokens}
