"""Two memories that a wiring joins, as one memory that the laws can call."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from memjax.config.layout import stages
from memjax.config.schema import BlockConfig, ModelConfig
from memjax.config.titans import TitansConfig
from memjax.models.block import Flow, empty_memories, make_stage


@dataclasses.dataclass(frozen=True)
class Wiring:
  """Mixers `a` and `b` joined as 'mag' or 'mac'."""
  kind: str
  a: Any
  b: Any
  titans: TitansConfig = dataclasses.field(default_factory=TitansConfig)

  def model(self, width, grafted=False, dtype=jnp.float32):
    """A model of one such layer."""
    return ModelConfig(width=width, mixers={'a': self.a, 'b': self.b}, pattern=(f'a+b:{self.kind}',), grafted=('b',) if grafted else (),
                       block=BlockConfig(titans=self.titans), dtype=jnp.dtype(dtype).name)


class Stage(nn.Module):
  """The stage of a model with one layer, called like a memory."""
  config: ModelConfig

  reaches_back = True

  def init_state(self, batch, max_len=0): return empty_memories(self.config, self.config.pattern[0], batch, max_len)

  @nn.compact
  def __call__(self, x_BxLxD, state, *, key=None, **flow):
    y, state, aux = make_stage(self.config, *stages(self.config.pattern[0])[0], name='stage')(
        x_BxLxD, state, Flow(**flow), stream_BxLxD=x_BxLxD, key=key, prepared={}, collect=False)
    return y, state, {name: value for told in aux.values() for name, value in told.items()}


class ByToken:
  """The specification of a stage: a scan of calls of one token."""

  def __init__(self, stage): self.stage = stage

  def apply(self, params, x_BxLxD, state, **flow):
    flow = {name: a for name, a in flow.items() if a is not None}
    def body(state, token):
      x, flow = jax.tree.map(lambda a: a[:, None], token)
      y, state, _ = self.stage.apply(params, x, state, **flow)
      return state, y[:, 0]
    state, y = jax.lax.scan(body, state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x_BxLxD, flow)))
    return jnp.swapaxes(y, 0, 1), state, {}
