"""One frozen dataclass per memory kind. The codec writes and reads the tag `kind`; 0 and '' mean off or automatic."""
from typing import TypeVar

from memjax.config.attention import RopeConfig
from memjax.config.errors import refuse
from memjax.config.options import config, option

MIXERS: dict[str, type] = {}
SEEDS = 2**31 - 1
T = TypeVar('T')


def mixer(kind: str):
  """Registers a config dataclass under `kind`, the tag that selects it in `model.mixers`."""
  def register(cls: type[T]) -> type[T]:
    cls = config(cls)
    cls.kind = kind
    MIXERS[kind] = cls
    return cls
  return register


@mixer('attention')
class AttentionConfig:
  """Full causal softmax attention (Vaswani et al. 2017) with grouped heads (Ainslie et al. 2023)."""
  heads: int = option(8, 'query heads', low=1)
  kv_heads: int = option(0, 'key and value heads; 0 = heads', low=0)
  head_width: int = option(0, 'channels per head; 0 = width / heads', low=0)
  rotary: bool = option(True, 'rotary position embedding (Su et al. 2021)')
  rotary_base: float = option(10_000.0, 'longest rotary wavelength / 2 pi', low=1.0)
  rope: RopeConfig = option(RopeConfig(), 'rotary frequencies for longer texts')
  qk_norm: float = option(0.0, 'number inside the square root of an RMS norm of queries and keys per head; 0 = no such norm', low=0.0)
  bias: bool = option(False, 'biases on the query, key and value projections')
  out_bias: bool = option(False, 'bias on the output projection')
  persistent: int = option(0, 'learned keys and values, without position, that every token sees', low=0)
  backend: str = option('auto', 'flash attention by cuDNN where a call begins every row anew (else, and otherwise, XLA); auto = cudnn for '
                        'bfloat16 on a GPU where it applies; cudnn_rows leaves the form in XLA out: what a row does not begin reads NaN',
                        choices=('auto', 'xla', 'cudnn', 'cudnn_rows'))

  def __post_init__(self):
    refuse(bool(self.kv_heads) and self.heads % self.kv_heads != 0,
           f'kv_heads={self.kv_heads} does not divide heads={self.heads}')
    refuse(self.rotary and self.head_width % 2 == 1, f'head_width={self.head_width} is odd; rotary needs pairs')
    refuse(self.rope.kind != 'default' and not self.rotary, f'rope.kind={self.rope.kind!r} needs rotary')
    refuse(self.rope.kind == 'yarn' and self.rotary_base <= 1, "rope.kind='yarn' needs rotary_base above 1")
    refuse(self.backend.startswith('cudnn') and self.persistent > 0, f'backend={self.backend!r} has no persistent tokens; use xla or auto')


@mixer('window')
class WindowConfig(AttentionConfig):
  """Sliding-window attention: each token sees itself and the window - 1 tokens before it (Beltagy et al. 2020)."""
  window: int = option(128, 'tokens seen, the current one included', low=1)


@config
class BindingConfig:
  """How a value is tied to its key (specification section 2)."""
  kind: str = option('phasor', 'algebra of bind and unbind',
                     choices=('phasor', 'bipolar', 'hrr', 'unitary', 'hlb', 'none'))
  transform: str = option('', "how hrr and unitary convolve; '' = dft where one is needed",
                          choices=('', 'dft', 'fft', 'folded'))
  squash: str = option('tanh', 'key map of bipolar', choices=('tanh', 'sign'))
  identity_bias: float = option(2.0, 'added to the real parts of the raw key, to start near the identity; 0 = off',
                                low=0.0)
  eps: float = option(1e-6, 'inside the square root of unit-modulus projections', low=1e-12)
  tie_query: bool = option(False, 'query and key share their projection (their conv taps stay apart)')
  position: str = option('', 'position code multiplied into key and query', choices=('', 'fractional', 'random'))
  position_heads: int = option(0, 'only the first heads carry positions; 0 = all', low=0)
  frequencies: str = option('uniform', 'phases of fractional codes', choices=('uniform', 'geometric'))
  seed: int = option(0, 'seed of all random keys and permutations', low=0, high=SEEDS)

  def __post_init__(self):
    refuse(bool(self.transform) and self.kind not in ('hrr', 'unitary'),
           f'transform={self.transform!r} applies to hrr and unitary, not to {self.kind}')
    refuse(bool(self.position) and self.kind in ('none', 'hlb'),
           f'position={self.position!r} is not supported by kind {self.kind}')
    refuse(self.position == 'fractional' and self.kind == 'bipolar',
           "position='fractional' needs phases; kind bipolar has none (use 'random')")
    refuse(self.squash != 'tanh' and self.kind != 'bipolar',
           f'squash={self.squash!r} applies to bipolar, not to {self.kind}')
    refuse(self.position_heads > 0 and not self.position, 'position_heads is set but position is off')
    refuse(self.frequencies != 'uniform' and self.position != 'fractional',
           f"frequencies={self.frequencies!r} applies to position='fractional'")


@config
class AddressConfig:
  """Where to write (address), where to read (pick) and how strongly (gate); specification section 3."""
  kind: str = option('content', 'address map',
                     choices=('content', 'signed', 'softmax', 'sigmoid', 'top1', 'topk', 'scored', 'copies'))
  source: str = option('own', 'own projections, or the raw key and query streams', choices=('own', 'key'))
  tie: bool = option(False, 'one router matrix for write and read')
  after_conv: bool = option(True, 'routers see the short convolution')
  temperature: float = option(1.0, 'divides softmax logits', low=1e-3)
  top_k: int = option(0, 'slots of topk; 0 = 2', low=0)
  rotary: bool = option(False, 'rotate pairs of address and pick channels by position')
  gate: str = option('head', 'write strength', choices=('', 'head', 'channel'))
  gate_bias: float = option(4.0, 'bias of the write gate at initialisation')

  def __post_init__(self):
    slots_only = ('softmax', 'scored')
    refuse(self.source == 'key' and self.kind != 'content', f"source='key' needs kind content, not {self.kind}")
    refuse(self.source == 'key' and self.tie, "source='key' has no router to tie")
    refuse(self.top_k > 0 and self.kind != 'topk', f'top_k applies to kind topk, not to {self.kind}')
    refuse(self.temperature != 1.0 and self.kind not in slots_only,
           f'temperature applies to softmax and scored, not to {self.kind}')
    refuse(self.kind == 'copies' and (self.tie or self.rotary), 'kind copies has no addresses to tie or rotate')


@config
class KeepConfig:
  """Forgetting: the factor `keep` on the state before each write (specification section 3.2)."""
  kind: str = option('head', 'granularity of keep', choices=('none', 'static', 'head', 'slot', 'tied', 'channel'))
  bias: float = option(0.0, 'logit of keep at initialisation; 0 = log-spaced over heads (or slots)')
  fast: float = option(0.0, '1 - keep of the fastest; 0 = 2^-6 (static 2^-5)', low=0.0, high=1.0)
  slow: float = option(0.0, '1 - keep of the slowest; 0 = 2^-12', low=0.0, high=1.0)
  floor: float = option(0.0, 'lowest log keep; 0 = -2.5 for slot and tied, else -20', high=0.0)
  tie_strength: float = option(0.1, 'share of a written slot that tied keep forgets', low=0.0, high=1.0)
  form: str = option('auto', 'decay inside a chunk', choices=('auto', 'exact', 'factored'))
  erase: str = option('', "'slot' = gated delta rule over slots", choices=('', 'slot'))

  def __post_init__(self):
    refuse(self.tie_strength != 0.1 and self.kind != 'tied', f'tie_strength applies to kind tied, not to {self.kind}')
    refuse(self.form != 'auto' and self.kind not in ('slot', 'tied', 'static'),
           f'form={self.form!r} applies to slot, tied and static keep')
    spaced = self.kind != 'none' and self.bias == 0
    refuse((self.fast > 0 or self.slow > 0) and not spaced,
           'fast and slow apply to log-spaced keep (bias 0, kind not none)')
    refuse(self.bias != 0 and self.kind in ('none', 'static'), f'bias does not apply to keep kind {self.kind}')
    refuse(self.floor < 0 and self.kind in ('none', 'static'), f'floor does not apply to keep kind {self.kind}')

  @property
  def log_floor(self) -> float:
    """The lowest log keep in force."""
    return self.floor or (-2.5 if self.kind in ('slot', 'tied') else -20.0)


@config
class MemoryLossConfig:
  """Weights of the auxiliary losses; 0 = off and not traced (specification section 6)."""
  replay: float = option(0.0, 'weight of delayed replay', low=0.0)
  window: int = option(256, 'longest delay of replay, in tokens', low=1)
  contrastive: float = option(0.0, 'weight of the contrastive replay loss', low=0.0)
  temperature: float = option(0.1, 'of the contrastive loss', low=1e-3)
  balance: float = option(0.0, 'weight of the slot balance loss', low=0.0)
  gate: float = option(0.0, 'weight of the mean write gate', low=0.0)


@config
class TiersConfig:
  """Fast and slow slots with consolidation (specification section 7)."""
  kind: str = option('', "'' = one tier", choices=('', 'consolidate'))
  interval: int = option(64, 'valid tokens between consolidations', low=1)
  rate: float = option(0.1, 'share written into the slow tier', low=0.0, high=1.0)
  threshold: float = option(0.5, 'of the hard consolidation gate', low=0.0, high=1.0)
  hard: bool = option(False, 'hard gate with a straight-through gradient')
  source: str = option('fast', 'what is consolidated: the fast state or the current item', choices=('fast', 'item'))
  mix: str = option('fixed', 'share of the fast read', choices=('fixed', 'learned'))
  fast_share: float = option(0.7, 'that share, or its start', low=0.01, high=0.99)
  controller: bool = option(False, 'state-dependent write, read and consolidation gates (sequential only)')

  def __post_init__(self):
    changed = [n for n in ('interval', 'rate', 'threshold', 'hard', 'source', 'mix', 'fast_share', 'controller')
               if not self.kind and getattr(self, n) != type(self).__dataclass_fields__[n].default]
    refuse(bool(changed), f"{changed[0] if changed else ''} is set but kind is '' (no tiers)")
    refuse(self.threshold != 0.5 and not self.hard, 'threshold applies only with hard')


@config
class ReadConfig:
  """Order of read and write, and what happens to the read vector."""
  order: str = option('after', 'read after or before the write of the same token', choices=('after', 'before'))
  norm: str = option('head', 'RMS norm of the read, per head or over all of it', choices=('head', 'full', ''))
  out_gate: str = option('', "'silu' multiplies the read by silu(W x)", choices=('', 'silu'))


@config
class FormConfig:
  """How the recurrence over tokens is computed; every form gives the same result."""
  kind: str = option('auto', 'auto = chunk where it is possible', choices=('auto', 'scan', 'associative', 'chunk'))
  chunk: int = option(0, 'tokens a chunk; 0 = automatic', low=0)
  remat: bool = option(True, 'recompute inside the backward pass')
  backend: str = option('auto', 'fused kernels or XLA; auto = pallas for bfloat16 on a GPU where it applies; one token at a time: XLA',
                        choices=('auto', 'xla', 'pallas'))

  def __post_init__(self):
    refuse(self.backend == 'pallas' and self.kind not in ('auto', 'chunk'),
           f"backend='pallas' computes chunks, not kind={self.kind!r}")


@mixer('holographic')
class HolographicConfig:
  """Holographic associative memory: slots of superposed bound pairs."""
  heads: int = option(8, 'independent memories', low=1)
  key_width: int = option(0, 'channels per head; 0 = width / heads', low=0)
  slots: int = option(0, 'slots per head; 0 = key_width', low=0)
  reads: int = option(1, 'read groups, each with its own query and pick', low=1)
  conv_width: int = option(4, 'taps of the causal short convolution; 0 = none', low=0)
  binding: BindingConfig = option(BindingConfig(), 'how values are tied to keys')
  address: AddressConfig = option(AddressConfig(), 'where to write and read')
  keep: KeepConfig = option(KeepConfig(), 'forgetting')
  loss: MemoryLossConfig = option(MemoryLossConfig(), 'auxiliary losses')
  tiers: TiersConfig = option(TiersConfig(), 'fast and slow memory')
  read: ReadConfig = option(ReadConfig(), 'order, norm and gate of the read')
  form: FormConfig = option(FormConfig(), 'how it is computed')

  def __post_init__(self):
    b, a, k, f, slots = self.binding, self.address, self.keep, self.form, self.slots or self.key_width
    refuse(b.kind == 'phasor' and self.key_width % 2 == 1,
           f'key_width={self.key_width} is odd; binding kind phasor needs pairs')
    refuse(a.source == 'key' and self.slots > 0 and self.key_width not in (0, self.slots),
           f"address.source='key' needs slots == key_width, not {slots} and {self.key_width}")
    refuse(a.rotary and slots % 2 == 1, f'address.rotary needs an even number of slots, not {slots}')
    refuse(b.position_heads > self.heads, f'binding.position_heads={b.position_heads} exceeds heads={self.heads}')
    refuse(a.kind == 'topk' and bool(slots) and (a.top_k or 2) > slots,
           f'address.top_k={a.top_k or 2} exceeds slots={slots}')
    refuse(self.loss.gate > 0 and not a.gate, "loss.gate needs a write gate; address.gate is ''")
    refuse(self.loss.balance > 0 and a.kind == 'copies', "loss.balance needs addresses; address.kind is 'copies'")
    sequential = k.kind == 'channel' or self.tiers.controller
    refuse(sequential and f.kind == 'chunk',
            "form.kind='chunk' does not exist for channel keep and tiers.controller; use form.kind='scan'")
    by_token = f.kind in ('scan', 'associative') or sequential
    refuse(f.chunk > 0 and by_token, f'form.chunk={f.chunk} applies to the chunked form alone')
    refuse(k.form != 'auto' and by_token, f'keep.form={k.form!r} applies to the chunked form alone')
    refuse(not f.remat and (f.kind == 'scan' or self.tiers.controller), 'form.remat does not apply to the sequential form')
    refuse(self.tiers.controller and f.kind == 'associative',
           "tiers.controller depends on the state; use form.kind='scan'")
    refuse(k.erase == 'slot' and a.kind not in ('content', 'signed'),
           f"keep.erase='slot' needs signed unit addresses, not {a.kind}")
    refuse(k.erase == 'slot' and a.gate != 'head', "keep.erase='slot' uses address.gate='head' as its step size")
    refuse(k.erase == 'slot' and (f.kind == 'associative' or k.kind in ('channel', 'static')),
           "keep.erase='slot' runs as scan or chunk, with keep none, head, slot or tied")
    refuse(a.kind == 'copies' and k.kind not in ('none', 'head'),
           "address.kind='copies' takes keep none or head")
    refuse(a.kind == 'scored' and self.binding.kind in ('hrr', 'hlb', 'none'),
           "address.kind='scored' needs binding phasor, bipolar or unitary")
    refuse(bool(self.tiers.kind) and a.kind in ('copies', 'scored'), f'tiers do not go with address.kind={a.kind!r}')
    refuse(bool(self.tiers.kind) and (k.erase == 'slot' or k.kind == 'channel' or f.kind == 'associative'),
           'tiers do not go with keep.erase, channel keep or the associative form')
    refuse(bool(self.tiers.kind) and f.chunk > 0 and self.tiers.interval % f.chunk != 0,
           f'tiers.interval={self.tiers.interval} is not a multiple of form.chunk={f.chunk}')
    fused = (b.kind != 'none' and a.kind not in ('copies', 'scored') and self.reads == 1 and not (k.erase or self.tiers.kind or sequential)
             and k.form != 'exact')
    refuse(f.backend == 'pallas' and not fused, "form.backend='pallas' takes one read, a binding, addresses, and neither keep.erase, "
           "keep.form='exact', channel keep nor tiers; use auto or xla")
    refuse(k.form == 'factored' and (f.chunk or 64) * -k.log_floor > 160,
           f'keep.form=factored needs chunk x |floor| <= 160, not {(f.chunk or 64) * -k.log_floor:g}')


@mixer('holographic_seed')
class HolographicSeedConfig:
  """The original HAMT model: nonlinear write, read before write (specification section 11)."""
  key_width: int = option(1024, "the seed's hcm_dim", low=1)
  slots: int = option(8, 'memory slots', low=1)
  binding: str = option('bipolar', 'elementwise or circular convolution', choices=('bipolar', 'hrr'))
  unitary: bool = option(False, 'unit-modulus random keys, for hrr')
  gating: bool = option(True, 'learned write gates; off = 1')
  decay: float = option(1e-4, 'forgetting per write', low=0.0, high=1.0)
  norm: str = option('rms', 'of the state after each write', choices=('rms', 'layer', 'none'))
  retrieval_hidden: int = option(-1, 'hidden width of the retrieval MLP; -1 = 2 key_width, 0 = one projection', low=-1)
  dropout: float = option(0.1, 'inside the retrieval MLP', low=0.0, high=0.999)
  immediate: float = option(0.05, 'weight of the immediate reconstruction loss; 0 = off', low=0.0)
  key_seed: int = option(0, 'seed of the position keys', low=0, high=SEEDS)

  def __post_init__(self):
    refuse(self.unitary and self.binding != 'hrr', f"unitary applies to binding='hrr', not to {self.binding}")
