"""Memory banks: learned entries read by cross-attention, in chapters chosen by a router, and the product-key table."""
import dataclasses
from typing import Any

from memjax.config.errors import refuse
from memjax.config.mixers import mixer
from memjax.config.options import config, option

CAUSAL = ('token', 'prefix-mean', 'rolling', 'chunk')
NONCAUSAL = ('sequence', 'sequence-rolling')
BANKS = ('bank', 'product_key')         # kinds with a table of learned entries
INFERENCE = ('token', 'prefix-mean', 'rolling', 'hybrid')


def _unused(part, defaults: dict, reason: str) -> None:
  """Refuses the first of some fields that is away from its default where it cannot apply."""
  for name, default in defaults.items():
    refuse(getattr(part, name) != default, f'{name}={getattr(part, name)!r} {reason}')


@config
class BankShapeConfig:
  """The table of learned entries (specification section 1)."""
  entries: int = option(1024, 'M, entries in all chapters together', low=1)
  width: int = option(0, 'channels of an entry; 0 = those of the model', low=0)
  chapters: int = option(0, 'P, equal parts of the table of which a token reads a few; 0 = every token reads all entries', low=0)
  share: str = option('', "name under which layers (and mixers) share one table; '' = each layer has its own")
  low_rank: str = option('', 'factorized: A B^T; reduced: attention wholly in the rank', choices=('', 'factorized', 'reduced'))
  rank: int = option(64, 'R of low_rank', low=1)
  std: float = option(0.02, 'standard deviation of the entries at initialisation', low=0.0)

  def __post_init__(self):
    refuse(self.chapters > 0 and self.entries % self.chapters != 0,
           f'entries={self.entries} is not a multiple of chapters={self.chapters}')
    refuse(self.low_rank == 'reduced' and self.width > 0, f"width={self.width} does not apply to low_rank='reduced', whose width is rank")
    if not self.low_rank: _unused(self, {'rank': 64}, "applies to low_rank; low_rank is ''")
    refuse(bool(self.share) and not self.share.isidentifier(), f'share={self.share!r} is not a name of letters, digits and underscores')


@config
class RouterConfig:
  """Which chapters a token reads (specification section 4)."""
  strategy: str = option('token', 'what the choice depends on; sequence and sequence-rolling see the future',
                         choices=CAUSAL + NONCAUSAL + ('hybrid',))
  inference: str = option('', "strategy of evaluation and generation; '' = the same", choices=('', *INFERENCE))
  top_k: int = option(4, 'J, routed chapters a token reads', low=1)
  window: int = option(128, 'tokens averaged by rolling and hybrid', low=1)
  block: int = option(64, 'tokens of a block of chunk', low=1)
  input: str = option('normed', 'the normalised input, or the residual stream at the entry of the layer', choices=('normed', 'stream'))
  kind: str = option('linear', 'one logit row a chapter, or sums of two half-keys', choices=('linear', 'product_key'))
  weight_norm: str = option('topk', 'weights sum to one over the chosen chapters, or over all', choices=('topk', 'full'))
  allow_noncausal: bool = option(False, 'allow a strategy that sees the future; results carry the tag noncausal_routing')

  def __post_init__(self):
    refuse(self.strategy == 'hybrid' and self.inference != 'hybrid',
           "strategy='hybrid' knows the length of a prompt and is for inference alone; set inference='hybrid'")
    refuse(self.strategy == 'chunk' and self.inference != '',
           "strategy='chunk' has a learned start that other strategies lack; leave inference ''")
    refuse(self.strategy in NONCAUSAL and not self.allow_noncausal,
           f'strategy={self.strategy!r} lets a token see the future; set allow_noncausal=true to train with it all the same')
    used = (self.strategy, self.inference)
    if not {'rolling', 'hybrid', 'sequence-rolling'} & set(used):
      _unused(self, {'window': 128}, 'applies to rolling, hybrid and sequence-rolling')
    if self.strategy != 'chunk': _unused(self, {'block': 64}, f'applies to strategy chunk, not to {self.strategy}')
    if self.strategy not in NONCAUSAL: _unused(self, {'allow_noncausal': False}, f'is not needed by strategy {self.strategy}')


@config
class MixingConfig:
  """How the reads of several chapters become one (specification sections 4.4, 4.5 and 5.2)."""
  combine: str = option('mixture', 'a softmax in each chapter, or one over all', choices=('mixture', 'joint', 'joint_bias', 'legacy_scale'))
  shared: int = option(0, 'first chapters that every token reads', low=0)
  scale: float = option(1.0, 'of the routed chapters beside the shared ones', low=0.0)
  norm: str = option('', 'of the entries before keys and values, where both groups exist', choices=('', 'rms', 'layernorm'))
  norm_epsilon: float = option(1e-6, 'inside the square root of that norm', low=1e-12)

  def __post_init__(self):
    refuse(bool(self.norm) and not self.shared, f'norm={self.norm!r} needs shared chapters beside the routed ones')
    if not self.norm: _unused(self, {'norm_epsilon': 1e-6}, "applies to norm; norm is ''")


@config
class BankLossConfig:
  """Weights of the router losses; 0 = off (specification section 6)."""
  balance: float = option(0.01, 'load balance (Fedus et al. 2021)', low=0.0)
  auxiliary: float = option(0.0, 'importance', low=0.0)
  z: float = option(0.0, 'squared log-sum-exp of the logits (Zoph et al. 2022)', low=0.0)
  balance_form: str = option('normalized', '1 when balanced, or scaled by top_k', choices=('normalized', 'legacy'))
  auxiliary_form: str = option('kl', 'log P - entropy, squared variation, or the original', choices=('kl', 'cv2', 'legacy_mse'))
  bias_rate: float = option(0.0, 'step of the loss-free selection bias (DeepSeek-AI 2024); 0 = off', low=0.0)

  def __post_init__(self):
    if not self.balance: _unused(self, {'balance_form': 'normalized'}, 'applies to the balance loss, which is 0')
    if not self.auxiliary: _unused(self, {'auxiliary_form': 'kl'}, 'applies to the auxiliary loss, which is 0')


@config
class BankQuantConfig:
  """Integer storage of the table, or of its keys and values (specification section 7)."""
  bits: int = option(0, 'bits a number; 0 = off', choices=(0, 4, 8))
  scheme: str = option('absmax', 'code book', choices=('absmax', 'absmax7', 'nf4'))
  group: int = option(32, 'numbers that share a scale; 0 = a whole row', low=0)
  target: str = option('bank', 'the stored entries, or the keys and values made of them', choices=('bank', 'kv'))
  train: str = option('', "'' = read-only; straight: train through rounding; learned: with a learned step (Esser et al. 2020)",
                      choices=('', 'straight', 'learned'))

  def __post_init__(self):
    if not self.bits:
      _unused(self, {'scheme': 'absmax', 'group': 32, 'target': 'bank', 'train': ''}, 'applies to quantised banks; bits is 0')
    refuse(self.scheme != 'absmax' and self.bits == 8, f'scheme={self.scheme!r} needs bits=4')
    refuse(self.train != '' and self.target == 'kv', f"train={self.train!r} applies to target 'bank'")
    refuse(self.train == 'learned' and (self.scheme != 'absmax' or self.group != 0),
           "train='learned' has one step a row: scheme absmax, group 0")


@config
class BankFormConfig:
  """How routed attention is computed; every form gives the same result (specification section 5)."""
  kind: str = option('auto', 'implementation', choices=('auto', 'gather', 'scan', 'tiles', 'capacity', 'cudnn', 'dense'))
  block: int = option(0, 'rows of a tile; 0 = automatic', low=0)
  token_chunk: int = option(0, 'tokens computed at a time; 0 = from a limit of bytes', low=0)
  gather_limit_mb: int = option(1024, 'auto gathers keys and values below it', low=0)
  remat: bool = option(True, 'recompute queries and scores in the backward pass')
  axis: str = option('', "mesh axis over which the chapters are split; '' = none", choices=('', 'model', 'fsdp'))

  def __post_init__(self):
    if self.kind not in ('auto', 'tiles'): _unused(self, {'block': 0}, f'applies to tiles, not to {self.kind}')
    if self.kind != 'auto': _unused(self, {'gather_limit_mb': 1024}, f'applies to kind auto, not to {self.kind}')
    if self.kind == 'dense': _unused(self, {'token_chunk': 0, 'remat': True}, 'does not apply to kind dense')


@mixer('bank')
class BankConfig:
  """Learned entries read by cross-attention (Memory-Augmented Transformer; Mixture of Chapters, 2026)."""
  heads: int = option(8, 'query heads', low=1)
  kv_heads: int = option(0, 'key and value heads; 0 = heads', low=0)
  head_width: int = option(0, 'channels per head; 0 = width / heads (rank / heads for low_rank reduced)', low=0)
  projection_rank: int = option(0, 'rank of the four projections; 0 = full', low=0)
  dropout: float = option(-1.0, 'of the output; -1 = that of the block', low=-1.0, high=0.999)
  zero_out: bool = option(True, 'the output projection starts at zero')
  shape: BankShapeConfig = option(BankShapeConfig(), 'the table')
  router: RouterConfig = option(RouterConfig(), 'choice of chapters')
  mixing: MixingConfig = option(MixingConfig(), 'from chapters to one read')
  loss: BankLossConfig = option(BankLossConfig(), 'router losses')
  quant: BankQuantConfig = option(BankQuantConfig(), 'integers')
  form: BankFormConfig = option(BankFormConfig(), 'how it is computed')

  def __post_init__(self):
    shape, router, mixing, loss = self.shape, self.router, self.mixing, self.loss
    refuse(bool(self.kv_heads) and self.heads % self.kv_heads != 0, f'kv_heads={self.kv_heads} does not divide heads={self.heads}')
    refuse(-1 < self.dropout < 0, f'dropout={self.dropout} is neither -1 (inherit) nor a share')
    reduced = shape.low_rank == 'reduced'
    refuse(reduced and self.head_width == 0 and shape.rank % self.heads != 0,
           f'shape.rank={shape.rank} is not a multiple of heads={self.heads}')
    refuse(reduced and self.projection_rank > 0, "projection_rank does not go with shape.low_rank='reduced'")
    if not shape.chapters: self._unrouted()
    routed = shape.chapters - mixing.shared
    refuse(bool(shape.chapters) and router.top_k > routed,
           f'router.top_k={router.top_k} exceeds the {routed} routed of {shape.chapters} chapters')
    refuse(router.kind == 'product_key' and bool(shape.chapters) and round(shape.chapters ** 0.5) ** 2 != shape.chapters,
           f"router.kind='product_key' needs a square number of chapters, not {shape.chapters}")
    unpaid = mixing.combine == 'joint' or (router.top_k == 1 and router.weight_norm == 'topk')
    refuse(bool(shape.chapters) and unpaid and not (loss.balance or loss.auxiliary or loss.z),
           'the router gets no gradient: use mixing.combine mixture with router.weight_norm=full, or a router loss')
    refuse(self.form.kind == 'dense' and mixing.combine == 'legacy_scale',
           "form.kind='dense' does not go with mixing.combine='legacy_scale'")
    refuse(bool(self.form.axis) and not shape.chapters, f'form.axis={self.form.axis!r} splits chapters; shape.chapters is 0')
    refuse(bool(self.form.axis) and mixing.combine == 'legacy_scale', "form.axis does not go with mixing.combine='legacy_scale'")

  def _unrouted(self):
    for part, name in ((self.router, 'router'), (self.mixing, 'mixing'), (self.loss, 'loss')):
      refuse(part != type(part)(), f'{name} applies to chapters; shape.chapters is 0')


@mixer('product_key')
class ProductKeyConfig:
  """A table of N^2 values addressed by pairs of half-keys (Lample et al. 2019; Berges et al. 2024)."""
  heads: int = option(4, 'queries a token', low=1)
  keys: int = option(128, 'N, half-keys on each side; the table holds N^2 values', low=2)
  top_k: int = option(32, 'J, values a head reads', low=1)
  key_width: int = option(128, 'channels of a query, split in two halves', low=2)
  value_width: int = option(0, 'channels of a value; 0 = those of the model', low=0)
  share: str = option('', "name under which layers share one table of values; '' = each layer has its own")
  query_norm: bool = option(True, 'RMS norm of the queries, per head')
  gate: bool = option(True, 'the read times silu(W x)')
  dropout: float = option(-1.0, 'of the output; -1 = that of the block', low=-1.0, high=0.999)
  zero_out: bool = option(True, 'the output projection starts at zero')

  def __post_init__(self):
    refuse(self.key_width % 2 == 1, f'key_width={self.key_width} is odd; a query has two halves')
    refuse(self.top_k > self.keys ** 2, f'top_k={self.top_k} exceeds the {self.keys ** 2} values')
    refuse(-1 < self.dropout < 0, f'dropout={self.dropout} is neither -1 (inherit) nor a share')
    refuse(bool(self.share) and not self.share.isidentifier(), f'share={self.share!r} is not a name of letters, digits and underscores')


def shared_table(mixer_config: Any) -> str:
  """The name of the table that a mixer shares with others, '' for none."""
  return getattr(getattr(mixer_config, 'shape', mixer_config), 'share', '')


def table_of(mixer_config: Any) -> Any:
  """All that decides the parameters of a mixer's table; equal for mixers that may share one."""
  if mixer_config.kind == 'product_key': return mixer_config.keys, mixer_config.value_width
  stored = mixer_config.quant if mixer_config.quant.target == 'bank' else BankQuantConfig()
  return dataclasses.replace(mixer_config.shape, chapters=0), stored


def check_bank_width(path: str, mixer_config: Any, width: int) -> bool:
  """Whether this is a bank; ConfigError where it does not go with the width of the model."""
  if mixer_config.kind == 'product_key': return True
  if mixer_config.kind != 'bank': return False
  shape, quant, heads = mixer_config.shape, mixer_config.quant, mixer_config.heads
  reduced = shape.low_rank == 'reduced'
  refuse(not mixer_config.head_width and not reduced and width % heads != 0, f'{path}.heads={heads} does not divide width={width}')
  if not quant.bits: return True
  head_width = mixer_config.head_width or (shape.rank if reduced else width) // heads
  row = head_width if quant.target == 'kv' else shape.rank if shape.low_rank else shape.width or width
  refuse(bool(quant.group) and row % quant.group != 0, f'{path}.quant.group={quant.group} does not divide the {row} numbers of a row')
  refuse(quant.bits == 4 and row % 2 == 1, f'{path}.quant.bits=4 packs pairs; a row has {row} numbers')
  return True


def own_dropout(mixer_config: Any) -> float:
  """The dropout that a bank sets for its output, -1 where it is that of the block (and for other kinds)."""
  return mixer_config.dropout if mixer_config.kind in BANKS else -1.0


def sees_future(mixer_config: Any) -> bool:
  """Whether a mixer's router looks at later tokens: such a model can be trained and scored, not streamed."""
  return getattr(getattr(mixer_config, 'router', None), 'strategy', '') in NONCAUSAL


def for_inference(mixers: dict[str, Any]) -> dict[str, Any]:
  """The mixers of evaluation and generation: routers use their `inference` strategy where one is given, and calls may begin inside
  a chunk of a neural memory."""
  def one(mixer_config):
    if mixer_config.kind == 'neural': return dataclasses.replace(mixer_config, exec=dataclasses.replace(mixer_config.exec, aligned=False))
    router = getattr(mixer_config, 'router', None)
    if router is None or not router.inference: return mixer_config
    causal = dataclasses.replace(router, strategy=router.inference, allow_noncausal=False)
    return dataclasses.replace(mixer_config, router=causal)
  return {name: one(mixer_config) for name, mixer_config in mixers.items()}


def has_chapters(mixer_config: Any) -> bool:
  """Whether a mixer is a bank whose chapters can lie on different devices."""
  return mixer_config.kind == 'bank' and mixer_config.shape.chapters > 0 and mixer_config.mixing.combine != 'legacy_scale'


def split_chapters(mixers: dict[str, Any], axis: str) -> dict[str, Any]:
  """The mixers with the chapters of banks split over an axis of the mesh, where their config does not name one."""
  def one(mixer_config):
    if not has_chapters(mixer_config) or mixer_config.form.axis: return mixer_config
    return dataclasses.replace(mixer_config, form=dataclasses.replace(mixer_config.form, axis=axis))
  return {name: one(mixer_config) for name, mixer_config in mixers.items()}


def read_only_banks(model_config: Any) -> str:
  """The name of a mixer whose table is stored as integers, '' for none."""
  stored = (name for name, mixer_config in model_config.mixers.items()
            if mixer_config.kind == 'bank' and mixer_config.quant.bits and not mixer_config.quant.train)
  return next(stored, '')
