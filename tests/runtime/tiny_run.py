"""Config of the training tests: a run of twelve steps on a few kilobytes; the argument is the folder of the text."""
from memjax.config.codec import thaw
from memjax.config.mixers import WindowConfig
from memjax.config.schema import (
  BlockConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  GroupConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)


def get_config(arg=''):
  """A window decoder with dropout, carried memory, segments and micro-batches, so that a resume has much to restore."""
  return thaw(Config(
      model=ModelConfig(width=8, hidden=16, mixers={'near': WindowConfig(heads=2, window=4)}, pattern=('near',), repeats=1,
                        block=BlockConfig(dropout=0.1)),
      data=DataConfig(source='path', path=arg, order='lanes', cache=f'{arg}/cache'),
      training=TrainingConfig(steps=12, batch=8, length=8, accumulate=2, bptt=4, carry=True, log_every=2),
      optimizer=OptimizerConfig(groups={'main': GroupConfig(rate=1e-2, warmup=3)}),
      evaluation=EvaluationConfig(every=4, batch=8, length=16, batches=2, sample=0),
      checkpoint=CheckpointConfig(every=4), mesh=MeshConfig(data=1)))
