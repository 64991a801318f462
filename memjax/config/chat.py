"""What is trained on in conversations."""
from typing import Any

from memjax.config.errors import refuse
from memjax.config.options import config, option


@config
class ChatConfig:
  """Which tokens of a conversation are targets (specification of pretrained models, section 14)."""
  train_on: str = option('assistant', 'all replies of the assistant, its last one, or every token',
                         choices=('assistant', 'last_assistant', 'all'))
  train_on_eot: bool = option(True, 'also on the token that ends a reply, without which a model never learns to stop')
  mask_reasoning: bool = option(False, 'leave out what stands between <think> and </think> in a reply')
  escape: bool = option(True, 'special tokens spelt out inside a message stay text; off: they are those tokens')

  def __post_init__(self):
    refuse(self.train_on == 'all' and not self.train_on_eot, "train_on_eot=False applies to replies; train_on is 'all'")


def check_mode(run: Any) -> None:
  """None; raises ConfigError where a Config holds what does not go with conversations, or with plain text."""
  data, mode = run.data, "training.mode='instruction'"
  if run.training.mode == 'pretraining': return refuse(data.chat != ChatConfig(), f'data.chat applies to {mode}')
  refuse(data.source == 'shakespeare', f"{mode} needs conversations; data.source='shakespeare' has none")
  refuse(data.order != 'packed', f"{mode} needs data.order='packed', not {data.order!r}")
  refuse(data.tokenizer.kind in ('bpe', 'word'), f'{mode} needs data.tokenizer.kind host, file or bytes, not {data.tokenizer.kind}')
  for name, default in (('column', 'text'), ('separator', '\n\n\n')):
    refuse(getattr(data, name) != default, f'data.{name} applies to plain text, not to {mode}')
  for name in ('context', 'stream'):
    refuse(bool(getattr(run.evaluation, name)), f'evaluation.{name} does not go with {mode}, which scores whole conversations')
