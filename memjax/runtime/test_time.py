"""What a trained model does with what it reads: its memories learn, stay as they are, or are not read at all."""
from memjax.config.errors import UserError
from memjax.config.layout import mixer_names
from memjax.config.schema import ModelConfig

LEARNING = ('context', 'holographic', 'holographic_seed', 'neural')      # kinds that take up more of a text than a window of it


def learners(config: ModelConfig) -> tuple[str, ...]:
  """Names of the mixers in use that learn at test time, sorted."""
  used = {name for layer in config.layers for name in mixer_names(layer)}
  return tuple(sorted(name for name in used if config.mixers[name].kind in LEARNING))


def held(config: ModelConfig, choice: str) -> dict[str, tuple[str, ...]]:
  """The keywords of a decoder: 'on' none; 'frozen' writes nothing into the learners, so that all read what they
  began with; 'off' also replaces what they read by zeros.

  Raises UserError where there is something to hold but no learner.
  """
  if choice == 'on': return {}
  names = learners(config)
  if not names: raise UserError(f"--test_time={choice} needs a memory that learns at test time; no layer has one ({', '.join(LEARNING)})")
  return {'frozen': names} if choice == 'frozen' else {'frozen': names, 'silent': names}
