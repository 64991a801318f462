"""The configuration of a run as frozen dataclasses. Never None: 0, '' or () is off or automatic."""
import memjax.config.context
import memjax.config.neural  # noqa: F401  these register their kinds
from memjax.config.banks import check_bank_width, has_chapters, own_dropout, sees_future, shared_table, table_of
from memjax.config.chat import ChatConfig, check_mode
from memjax.config.errors import check_pattern, refuse
from memjax.config.layout import BARE, GATE, mixer_names, stages
from memjax.config.lora import LoraConfig
from memjax.config.mesh import MeshConfig
from memjax.config.mixers import MIXERS, SEEDS, AttentionConfig
from memjax.config.options import config, option
from memjax.config.quant import QuantConfig
from memjax.config.titans import TitansConfig, check_titans

ACTIVATIONS = ('swiglu', 'silu', 'relu', 'gelu', 'sigmoid', 'tanh')


@config
class BlockConfig:
  """The residual block around a mixer."""
  norm: str = option('rmsnorm', 'normalisation', choices=('rmsnorm', 'layernorm'))
  placement: str = option('pre', 'norm before the mixer (pre) or after the residual (post)', choices=('pre', 'post'))
  activation: str = option('swiglu', 'of the feed-forward network; swiglu multiplies by a gate, the others have none', choices=ACTIVATIONS)
  bias: bool = option(False, 'biases in the feed-forward network')
  norm_epsilon: float = option(1e-6, 'inside the square root of the norms', low=1e-12)
  dropout: float = option(0.0, 'of embeddings and of residual branches', low=0.0, high=0.999)
  init_std: float = option(0.0, 'standard deviation of all matrices; 0 = 1 / sqrt(fan-in)', low=0.0)
  mixer_out_std: float = option(0.0, 'that of the output projection of attention and window; 0 = init_std', low=0.0)
  mlp_out_std: float = option(0.0, 'that of the last matrix of the feed-forward network; 0 = init_std', low=0.0)
  lora: LoraConfig = option(LoraConfig(), 'low-rank changes of kernels, also of the head')
  quant: QuantConfig = option(QuantConfig(), 'kernels stored in fewer bits, which are not trained')
  titans: TitansConfig = option(TitansConfig(), "how ':mag' and ':mac' join attention and memory")


@config
class EmbeddingConfig:
  """Token and position embeddings, and the output head."""
  tie: bool = option(True, 'the output head is the token table')
  position: str = option('', 'learned absolute positions', choices=('', 'learned'))
  max_position: int = option(0, 'rows of the learned position table', low=0)
  std: float = option(0.02, 'standard deviation of the tables at initialisation', low=0.0)

  def __post_init__(self):
    refuse((self.position == 'learned') != (self.max_position > 0),
            "max_position > 0 goes with position='learned', and only with it")


@config
class ModelConfig:
  """A decoder: named mixers in a pattern that repeats."""
  width: int = option(256, 'D, channels of the residual stream', low=1)
  hidden: int = option(0, 'F, channels of the feed-forward network; 0 = automatic, -1 = no such network', low=-1)
  vocabulary: int = option(0, 'A, tokens; 0 = that of the tokenizer', low=0)
  mixers: dict[str, object] = option({'attention': AttentionConfig()}, 'name -> memory')
  pattern: tuple[str, ...] = option(('attention',), "layers that repeat; 'a+b' adds, 'a+b:gate' mixes by a gate, 'a+b:mag' and 'a+b:mac' "
                                    "as in Titans, 'a>b' does b after a, 'a:bare' has no feed-forward network")
  repeats: int = option(4, 'I, how often the pattern repeats', low=0)
  prefix: tuple[str, ...] = option((), 'layers before the repeats')
  suffix: tuple[str, ...] = option((), 'layers after the repeats')
  block: BlockConfig = option(BlockConfig(), 'residual block')
  embedding: EmbeddingConfig = option(EmbeddingConfig(), 'embeddings and head')
  grafted: tuple[str, ...] = option((), 'mixers whose output starts at zero, so that the other parts begin undisturbed')
  dtype: str = option('float32', 'compute dtype; parameters and state stay float32',
                      choices=('float32', 'bfloat16', 'float64'))

  def __post_init__(self):
    known = f'which is not one of mixers {sorted(self.mixers)}'
    for name, mixer in self.mixers.items():
      refuse(not isinstance(mixer, tuple(MIXERS.values())), f'mixers.{name} is not the config of a memory')
    for where in ('prefix', 'pattern', 'suffix'):
      for layer in getattr(self, where):
        names = mixer_names(layer)
        for name in names: refuse(name not in self.mixers, f'{where} names {name!r}, {known}')
        refuse(len(set(names)) != len(names), f'{where} layer {layer!r} names a mixer twice')
        refuse(layer.endswith(BARE) and self.hidden < 0, f'{where} layer {layer!r} leaves out a feed-forward network; hidden is -1')
        for some, wiring in stages(layer):
          refuse(wiring == GATE and len(some) != 2, f'{where} layer {layer!r} gates {len(some)} mixers; a gate needs two')
          for name in some if len(some) > 1 else ():
            refuse(own_dropout(self.mixers[name]) >= 0, f"mixers.{name}.dropout goes with a stage of its own, not with {layer!r}")
    for name in self.grafted: refuse(name not in self.mixers, f'grafted names {name!r}, {known}')
    refuse(not self.depth, 'pattern, prefix and suffix together hold no layers')
    attends = any(isinstance(mixer, AttentionConfig) for mixer in self.mixers.values())
    refuse(self.block.mixer_out_std > 0 and not attends, 'block.mixer_out_std applies to attention and window; mixers holds neither')
    refuse(self.block.mlp_out_std > 0 and self.hidden < 0, 'block.mlp_out_std applies to a feed-forward network; hidden is -1')
    for name, mixer in self.mixers.items(): self._check_width(f'mixers.{name}', mixer)
    self._check_shared()
    check_titans(self)

  def _check_shared(self):
    """Mixers that share a table must agree on it."""
    first: dict[str, str] = {}
    for name, mixer in self.mixers.items():
      share = shared_table(mixer)
      if not share: continue
      other = first.setdefault(share, name)
      refuse(table_of(mixer) != table_of(self.mixers[other]),
             f'mixers.{name} and mixers.{other} share the bank {share!r}, but describe it differently')

  def _check_width(self, path, mixer):
    """What a mixer derives from the width of the model must come out even."""
    if check_bank_width(path, mixer, self.width): return
    heads = getattr(mixer, 'heads', 1) or max(self.width // 64, 1)                  # of kind neural, 0 = 64 channels each
    given = getattr(mixer, 'head_width', 0) or getattr(mixer, 'key_width', 0)
    refuse(not given and self.width % heads != 0, f'{path}.heads={heads} does not divide width={self.width}')
    derived = given or self.width // heads
    paired = getattr(mixer, 'rotary', False) or getattr(getattr(mixer, 'binding', None), 'kind', '') == 'phasor'
    paired = paired or getattr(getattr(mixer, 'proj', None), 'rope', '')
    refuse(bool(derived % 2 and paired), f'{path}.heads={heads} leaves {derived} channels a head, an odd number')
    refuse(mixer.kind == 'holographic_seed' and derived < self.width,
            f'{path}.key_width={derived} is below width={self.width}')
    address = getattr(mixer, 'address', None)
    if address is None: return
    slots, top = mixer.slots or derived, address.top_k or 2
    refuse(address.rotary and slots % 2 == 1, f'{path}.address.rotary needs an even number of slots, not {slots}')
    refuse(address.source == 'key' and slots != derived,
            f"{path}.address.source='key' needs slots == key_width, not {slots} and {derived}")
    refuse(address.kind == 'topk' and top > slots, f'{path}.address.top_k={top} exceeds slots={slots}')

  @property
  def layers(self) -> tuple[str, ...]:
    """All layers in order, the pattern written out."""
    return self.prefix + self.pattern * self.repeats + self.suffix

  @property
  def depth(self) -> int:
    """Number of layers."""
    return len(self.layers)


@config
class TokenizerConfig:
  """How text becomes tokens."""
  kind: str = option('bytes', 'bytes, a BPE trained on the corpus, a tokenizer.json, white-space words, or that of training.host',
                     choices=('bytes', 'bpe', 'file', 'word', 'host'))
  size: int = option(0, 'vocabulary of bpe; 0 = 4096', low=0)
  path: str = option('', "tokenizer.json of kind 'file'")

  def __post_init__(self):
    refuse((self.kind == 'file') != bool(self.path), "path goes with kind 'file', and only with it")
    refuse(self.size > 0 and self.kind != 'bpe', f'size applies to kind bpe, not to {self.kind}')


@config
class DataConfig:
  """Where the text comes from and in which order it is read."""
  source: str = option('shakespeare', 'bundled corpus, local path, or hub', choices=('shakespeare', 'path', 'hub'))
  path: str = option('', 'file or folder of source path')
  hub: str = option('', "dataset of source hub, as 'owner/name[:configuration]'")
  column: str = option('text', 'text column of source hub and of .jsonl files')
  separator: str = option('\n\n\n', "border between documents; '' = one document a file; 'wikitext' = article headings")
  order: str = option('shuffle', 'shuffled windows, one contiguous lane per row, or whole documents packed into rows',
                      choices=('shuffle', 'lanes', 'packed'))
  tokenizer: TokenizerConfig = option(TokenizerConfig(), 'tokens')
  chat: ChatConfig = option(ChatConfig(), "what is trained on in conversations, with training.mode='instruction'")
  cache: str = option('', "folder of token files; '' = the user's cache folder")

  def __post_init__(self):
    for name in ('path', 'hub'):
      refuse((self.source == name) != bool(getattr(self, name)), f"{name} goes with source '{name}', and only with it")
    refuse(self.column != 'text' and self.source == 'shakespeare', 'column applies to tables; the bundled corpus has none')


@config
class TrainingConfig:
  """The training loop."""
  mode: str = option('pretraining', 'plain text, or the replies in conversations', choices=('pretraining', 'instruction'))
  steps: int = option(1000, 'optimiser steps', low=1)
  batch: int = option(16, 'B, rows a step over all devices', low=1)
  length: int = option(256, 'L, tokens a row', low=1)
  accumulate: int = option(1, 'micro-batches a step', low=1)
  bptt: int = option(0, 'tokens between stops of the gradient; 0 = the whole row', low=0)
  carry: bool = option(False, "carry the memory from step to step; needs data.order='lanes'")
  remat: bool = option(False, 'recompute each layer in the backward pass')
  unroll: bool = option(False, 'write the repeats of the pattern out in the compiled step: faster on a GPU, slower to compile')
  log_every: int = option(10, 'steps between rows of metrics.jsonl', low=1)
  nan_limit: int = option(3, 'non-finite steps in a row before stopping', low=1)
  host: str = option('', "checkpoint (folder, GGUF or name on the hub) that a new run starts from; memories start afresh; '' = none")

  def __post_init__(self):
    refuse(self.batch % self.accumulate != 0, f'batch={self.batch} is not a multiple of accumulate={self.accumulate}')
    refuse(self.length % (self.bptt or 1) != 0, f'length={self.length} is not a multiple of bptt={self.bptt}')


@config
class GroupConfig:
  """Learning rate, schedule and regularisation of one group of parameters."""
  rate: float = option(1e-3, 'peak learning rate; 0 = frozen', low=0.0)
  schedule: str = option('cosine', 'after warm-up', choices=('cosine', 'linear', 'constant', 'wsd'))
  warmup: int = option(0, 'steps of linear warm-up', low=0)
  end: float = option(0.1, 'last rate as a share of the peak', low=0.0, high=1.0)
  decay_share: float = option(0.2, 'share of all steps that wsd spends decaying', low=0.0, high=1.0)
  decay_shape: str = option('linear', 'fall of wsd', choices=('linear', 'cosine', 'one_minus_sqrt'))
  weight_decay: float = option(0.1, 'decoupled weight decay', low=0.0)
  clip: float = option(1.0, "largest global norm of the group's gradient; 0 = off", low=0.0)
  sparse: bool = option(False, 'leave rows alone whose gradient is zero: no decay, no momentum (banks)')

  def __post_init__(self):
    refuse(self.decay_share != 0.2 and self.schedule != 'wsd',
            f'decay_share applies to schedule wsd, not to {self.schedule}')
    refuse(self.decay_shape != 'linear' and self.schedule != 'wsd', f'decay_shape applies to schedule wsd, not to {self.schedule}')
    refuse(self.end != 0.1 and self.schedule == 'constant', 'end does not apply to schedule constant')


@config
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter 2019) per group of parameters."""
  rules: tuple[str, ...] = option(('.*=main',), "ordered 'regex=group' rules on parameter paths; the first match wins")
  groups: dict[str, GroupConfig] = option({'main': GroupConfig()}, 'name -> settings')
  b1: float = option(0.9, 'decay of the first moment', low=0.0, high=0.9999)
  b2: float = option(0.95, 'decay of the second moment', low=0.0, high=0.99999)
  eps: float = option(1e-8, 'added to the root of the second moment', low=0.0)
  no_decay: str = option('(^|[/_])(bias|scale|taps|table|position)$',
                         "regex of parameters without weight decay; '' = none")

  def __post_init__(self):
    for rule in self.rules:
      pattern, equals, group = rule.rpartition('=')
      refuse(not (equals and pattern), f"rules holds {rule!r}, which is not of the form 'regex=group'")
      refuse(group not in self.groups,
              f'rules holds {rule!r}, whose group {group!r} is not one of {sorted(self.groups)}')
      check_pattern('rules', pattern)
    check_pattern('no_decay', self.no_decay)


@config
class EvaluationConfig:
  """Held-out evaluation during and after training."""
  every: int = option(0, 'steps between evaluations; 0 = only at the end', low=0)
  split: str = option('val', 'split watched during training', choices=('train', 'val', 'test'))
  batches: int = option(0, 'batches an evaluation during training; 0 = all', low=0)
  batch: int = option(16, 'rows', low=1)
  length: int = option(0, 'tokens a row; 0 = training.length', low=0)
  context: int = option(0, 'tokens of each row that only give context (sliding)', low=0)
  stream: bool = option(False, 'carry the memory along the whole split instead of restarting every row')
  patience: int = option(0, 'evaluations without improvement before stopping; 0 = off', low=0)
  min_delta: float = option(0.0, 'smallest improvement that counts', low=0.0)
  sample: int = option(200, 'tokens of text sampled after training; 0 = none', low=0)
  prompt: str = option('ROMEO:', 'prompt of that sample')

  def __post_init__(self):
    refuse(0 < self.length <= self.context, f'context={self.context} must be below length={self.length}')
    refuse(self.stream and self.context > 0, 'context does not apply to stream, which carries the memory instead')
    refuse(self.patience > 0 and not self.every, 'patience counts evaluations during training; it needs every > 0')
    refuse(self.min_delta > 0 and not self.patience, 'min_delta applies to early stopping; it needs patience > 0')


@config
class CheckpointConfig:
  """What is saved and kept."""
  every: int = option(0, 'steps between checkpoints; 0 = only at the end', low=0)
  keep: int = option(3, 'newest checkpoints kept', low=1)
  best: int = option(1, 'best checkpoints kept besides', low=0)
  asynchronous: bool = option(True, 'write in the background')


@config
class Config:
  """Everything a run depends on."""
  name: str = option('', 'shown in figures and tables')
  seed: int = option(0, 'of parameters, data order and dropout', low=0, high=SEEDS)
  model: ModelConfig = option(ModelConfig(), 'decoder')
  data: DataConfig = option(DataConfig(), 'text')
  training: TrainingConfig = option(TrainingConfig(), 'loop')
  optimizer: OptimizerConfig = option(OptimizerConfig(), 'AdamW by group')
  evaluation: EvaluationConfig = option(EvaluationConfig(), 'held-out loss')
  checkpoint: CheckpointConfig = option(CheckpointConfig(), 'saving')
  mesh: MeshConfig = option(MeshConfig(), 'devices')

  def __post_init__(self):
    lanes, table = self.data.order == 'lanes', self.model.embedding.max_position
    refuse(self.data.tokenizer.kind == 'host' and not self.training.host, "data.tokenizer.kind='host' needs training.host")
    refuse(self.training.carry and not lanes, "training.carry needs data.order='lanes'")
    length, context = self.evaluation.length or self.training.length, self.evaluation.context
    refuse(context >= length, f'evaluation.context={context} must be below its length {length}')
    longest = max(self.training.length, length)
    refuse(0 < table < longest, f'model.embedding.max_position={table} is below rows of {longest} tokens')
    refuse(table > 0 and lanes, "data.order='lanes' has no longest row; it needs model.embedding.position=''")
    ahead = next((name for name, mixer in self.model.mixers.items() if sees_future(mixer)), '')
    refuse(bool(ahead) and self.evaluation.sample > 0 and not self.model.mixers[ahead].router.inference,
           f'model.mixers.{ahead}.router.strategy sees the future and cannot generate; set evaluation.sample=0 or its inference')
    refuse(table > 0 and self.evaluation.stream, "evaluation.stream has no end; it needs model.embedding.position=''")
    check_mode(self)
    refuse(self.mesh.preset == 'bank_parallel' and not any(map(has_chapters, self.model.mixers.values())),
           "mesh.preset='bank_parallel' splits the chapters of banks; model.mixers holds none")
