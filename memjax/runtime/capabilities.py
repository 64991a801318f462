"""What the devices of this machine can do, found by doing it: tiny jitted calls, then one step of training from end to end.

Run in a process of its own with a time limit: a plugin may abort or hang.
"""
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.codec import to_json
from memjax.config.mixers import FormConfig, HolographicConfig, WindowConfig
from memjax.config.schema import CheckpointConfig, Config, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from memjax.ops.binding import bind, multiply_complex, try_fft
from memjax.ops.top_k import pick_largest


def _complex() -> bool:
  x = np.linspace(-1, 1, 8, dtype=np.float32)[None]
  return bool(jnp.allclose(jax.jit(multiply_complex)(x, x + 1), bind('phasor', x, x + 1), atol=1e-5))


def _top_k() -> bool:
  x = np.array([[2.0, 3.0, 3.0, 1.0, 5.0]], np.float32)
  return bool(jnp.array_equal(jax.jit(lambda x: jax.lax.top_k(x, 3)[1])(x), pick_largest(jnp.asarray(x), 3)[1]))


def _round_trip(dtype: Any, values: list) -> bool:
  return jax.jit(lambda x: x.astype(dtype).astype(jnp.float32) * 2)(np.array(values, np.float32)).tolist() == [2 * v for v in values]


def _bf16() -> bool:
  x = np.arange(64, dtype=np.float32).reshape(8, 8) / 64
  product = jax.jit(lambda x: jnp.dot(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), preferred_element_type=jnp.float32))(x)
  return bool(np.abs(np.asarray(product) - x @ x).max() < 0.02)


def _pallas() -> bool:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  def kernel(x_ref, y_ref): y_ref[...] = 2 * x_ref[...]
  x = np.arange(128, dtype=np.float32)
  lowered = {'compiler_params': triton.CompilerParams(num_warps=4)} if jax.default_backend() == 'gpu' else {}
  return np.array_equal(jax.jit(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), **lowered))(x), 2 * x)


PROBES: dict[str, tuple[Callable[[], bool], str]] = {
    'fft': (try_fft, 'circular convolution is computed as a real DFT matmul, the default anyway'),
    'complex64': (_complex, 'nothing needs it: phasors are pairs of reals'),
    'top_k': (_top_k, 'routers and sampling choose without a sort, more slowly'),
    'int4': (lambda: _round_trip(jnp.int4, [-8, -1, 0, 7]), 'nothing needs it: four-bit codes are packed into bytes'),
    'fp8': (lambda: _round_trip(jnp.float8_e4m3fn, [-2, 0, 0.5, 448]), 'nothing needs it'),
    'bf16 matmul': (_bf16, "train in float32: --config.model.dtype=float32"),
    'pallas kernels': (_pallas, 'the XLA path computes the same'),
}


def probe() -> Iterator[dict[str, Any]]:
  """{'name', 'works', 'error', 'without'} of each capability as it is tried; 'without' says what happens instead."""
  for name, (attempt, without) in PROBES.items():
    try: found, error = bool(attempt()), ''
    except Exception as e:  # whatever a plugin raises means that it cannot
      found, error = False, (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
    yield {'name': name, 'works': found, 'error': error or ('' if found else 'the result is wrong'), 'without': without}


def devices() -> Iterator[dict[str, Any]]:
  """{'platform', 'kind', 'id', 'process', 'memory_bytes', 'default'} of the devices that programs run on, then those of the host."""
  for device in [*jax.devices(), *(jax.devices('cpu') if jax.default_backend() != 'cpu' and _has_cpu() else ())]:
    try: stats = device.memory_stats() or {}
    except Exception: stats = {}        # plugins need not know
    yield {'platform': device.platform, 'kind': device.device_kind, 'id': device.id, 'process': device.process_index,
           'memory_bytes': stats.get('bytes_limit', 0), 'default': device in jax.devices()}


def _has_cpu() -> bool:
  """Whether the CPU is among the platforms in force."""
  try: return bool(jax.devices('cpu'))
  except RuntimeError: return False


# One step of training, from end to end ----------------------------------------------------------------------------------------

def small_config(rows: int) -> Config:
  """A model of a window and a holographic layer that compiles in seconds: unrolled, without convolution and recomputation."""
  memory = HolographicConfig(heads=2, conv_width=0, form=FormConfig(remat=False))
  mixers = {'near': WindowConfig(heads=2, window=4), 'mem': memory}
  model = ModelConfig(width=16, hidden=16, vocabulary=16, mixers=mixers, pattern=(), repeats=0, prefix=('near', 'mem'))
  return Config(name='doctor', model=model, training=TrainingConfig(batch=rows, length=8, steps=1), mesh=MeshConfig(),
                optimizer=OptimizerConfig(), checkpoint=CheckpointConfig(asynchronous=False))


def self_test() -> Iterator[dict[str, Any]]:
  """{'name', 'works', 'error', 'seconds'} of: a training step, saving, inspecting, restoring, decoding; ends at the first that fails."""
  with tempfile.TemporaryDirectory() as folder:
    steps, made = {'training step': _train, 'saving': _save, 'inspecting': _inspect, 'restoring': _restore, 'decoding': _decode}, {}
    for name, step in steps.items():
      started, error = time.perf_counter(), ''
      try: step(folder, made)
      except Exception as e:  # the point is to say what fails
        error = f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:160]}'
      yield {'name': name, 'works': not error, 'error': error, 'seconds': round(time.perf_counter() - started, 2)}
      if error: return


def _require(condition: bool, what: str) -> None:
  if not condition: raise ValueError(what)


def _train(folder: str, made: dict[str, Any]) -> None:
  from memjax.models.decoder import build_decoder, param_shapes
  from memjax.runtime import sharding
  from memjax.runtime.optim import make_optimizer
  from memjax.runtime.state import abstract_state, init_state, make_train_step
  config = small_config(jax.device_count())
  mesh, model = sharding.make_mesh(config.mesh), build_decoder(config.model)
  shapes, axes = param_shapes(model)
  optimizer = make_optimizer(config.optimizer, shapes, 1, axes=axes)
  abstract = abstract_state(model, optimizer, config, mesh)
  token = np.arange(config.training.batch * 9).reshape(-1, 9) * 7 % 16
  batch = {'token': token[:, :-1].astype(np.int32), 'target': token[:, 1:].astype(np.int32), 'weight': np.ones((len(token), 8), bool),
           'position': np.tile(np.arange(8, dtype=np.int32), (len(token), 1))}
  with jax.set_mesh(mesh):
    before = init_state(model, optimizer, config, abstract)
    state, metrics = make_train_step(model, optimizer, config, abstract)(before, sharding.put_batch(batch, mesh))
  loss = float(metrics['loss'])
  _require(np.isfinite(loss) and 1 < loss < 5, f'the loss of a fresh model is {loss:g}, not near {np.log(16):.2f}')
  made |= {'config': config, 'model': model, 'abstract': abstract, 'state': state, 'batch': batch}


def _save(folder: str, made: dict[str, Any]) -> None:
  from memjax.runtime.checkpoint import Checkpoints
  checkpoints = Checkpoints(folder, made['config'].checkpoint)
  checkpoints.save(1, made['state'], {'data': {}, 'config': to_json(made['config']), 'early': {}})
  checkpoints.close()


def _inspect(folder: str, made: dict[str, Any]) -> None:
  from memjax.runtime import checkpoint, checksum
  verdict = checksum.inspect(os.path.join(folder, checkpoint.FOLDER, '1'), checksum.shapes(checkpoint.saved(made['abstract'])))
  _require(not verdict.fault and not verdict.mismatch, verdict.fault or verdict.mismatch)


def _restore(folder: str, made: dict[str, Any]) -> None:
  from memjax.runtime.checkpoint import restore
  made['restored'] = restore(folder, made['abstract'])[1]
  pairs = zip(jax.tree.leaves(made['restored']), jax.tree.leaves(made['state']), strict=True)
  _require(all(np.array_equal(a, b) for a, b in pairs), 'what was restored differs from what was saved')


def _decode(folder: str, made: dict[str, Any]) -> None:
  model, params = made['model'], jax.device_get(made['restored'].params)
  token, position = made['batch']['token'][:1], made['batch']['position'][:1]
  run = jax.jit(lambda token, state, position: model.apply({'params': params}, token, state, position_BxL=position)[:2])
  together, state, apart = run(token, model.init_state(1, 8), position)[0], model.init_state(1, 8), []
  for t in range(token.shape[1]):
    logits, state = run(token[:, t:t + 1], state, position[:, t:t + 1])
    apart.append(logits)
  error = float(jnp.abs(jnp.concatenate(apart, 1) - together).max() / jnp.abs(together).max())
  _require(error < 0.02, f'decoding differs from the parallel form by {error:.2g}')
