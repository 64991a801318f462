"""Another way for the routers of a trained model to choose chapters."""
import dataclasses

from memjax.config.banks import INFERENCE
from memjax.config.errors import ConfigError, UserError, nearest
from memjax.config.schema import ModelConfig


def rerouted(config: ModelConfig, strategy: str) -> ModelConfig:
  """The config whose routers use `strategy` in `inference_model`: 'token', 'prefix-mean', 'rolling' or 'hybrid'.

  Raises UserError for another name, a model without routers of chapters, and a router that cannot choose so.
  """
  if strategy not in INFERENCE:
    raise UserError(f'routing {strategy!r} is not one of {", ".join(INFERENCE)}{nearest(strategy, INFERENCE)}')
  routed = {name: mixer for name, mixer in config.mixers.items() if hasattr(getattr(mixer, 'router', None), 'inference')}
  if not routed: raise UserError(f'routing {strategy!r} chooses nothing: the model has no router of chapters')
  try:
    changed = {name: dataclasses.replace(mixer, router=dataclasses.replace(mixer.router, inference=strategy))
               for name, mixer in routed.items()}
    return dataclasses.replace(config, mixers={**config.mixers, **changed})
  except ConfigError as error:
    raise UserError(f'routing {strategy!r}: {error}') from None
