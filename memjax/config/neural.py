"""The neural memory that learns at test time (Titans)."""
import dataclasses

from memjax.config.errors import refuse
from memjax.config.mixers import mixer
from memjax.config.options import config, option
from memjax.config.registered import FEATURES, NETWORKS, check_registered

PLAIN_KINDS = ('linear', 'mlp')                     # whose layers may have fast biases
STREAMS = ('qkv', 'qk', 'qv', 'kv', 'q', 'k', 'v')
LAYERED_KINDS = ('mlp', 'gated', 'factorised', 'low_rank')


def _only(part, names: tuple, applies: bool, reason: str) -> None:
  """Refuses the first of some fields that is away from its default where it cannot apply."""
  for field in dataclasses.fields(part):
    if field.name in names: refuse(not applies and getattr(part, field.name) != field.default, f'{field.name} applies to {reason}')


@config
class NeuralNetConfig:
  """The network whose weights are the memory (specification section 6)."""
  kind: str = option('mlp', 'architecture', choices=('linear', 'mlp', 'swiglu', 'gated', 'factorised', 'low_rank', 'attention',
                                                        'custom'))
  function: str = option('', "name of a network of kind custom (Python: memjax.ops.neural_custom)")
  depth: int = option(2, 'layers of mlp, gated, factorised and low_rank', low=1, high=4)
  expansion: int = option(4, 'inner width in key widths', low=1)
  activation: str = option('silu', 'between the layers', choices=('silu', 'gelu', 'relu', 'tanh'))
  rank: int = option(16, 'of factorised and low_rank layers', low=1)
  residual: str = option('', "M(x) = x + (1 + gain) norm(net(x)); '' = on, unless the memory is one matrix", choices=('', 'on', 'off'))
  gain: str = option('slow', 'whether the gain of that norm learns at test time; fast ones diverge at a tenth of the usual step size',
                     choices=('fast', 'slow'))
  bias: bool = option(False, 'fast biases: they shrink the stable step size many times')
  weight_norm: bool = option(False, 'rescale the columns of matrices at the end of a chunk to their norm at the start (mode block)')
  per_head: bool = option(True, 'each head has a learned start of its own; otherwise all begin alike and differ by their keys and values')
  learn_init: bool = option(True, 'train the weights that every document starts from')

  def __post_init__(self):
    _only(self, ('depth',), self.kind in LAYERED_KINDS, f'{", ".join(LAYERED_KINDS)}, not to {self.kind}')
    refuse((self.kind == 'custom') != bool(self.function), "function goes with kind 'custom', and only with it")
    if self.function: check_registered('function', self.function, NETWORKS)
    _only(self, ('expansion',), self.kind not in ('linear', 'custom'), f'networks with an inner width, not to {self.kind}')
    _only(self, ('activation',), self.kind not in ('linear', 'swiglu', 'custom'),
          f'mlp, gated, factorised, low_rank and attention, not to {self.kind}')
    _only(self, ('rank',), self.kind in ('factorised', 'low_rank'), f'factorised and low_rank, not to {self.kind}')
    _only(self, ('gain',), self.has_residual, 'the residual form, which is off')
    refuse(self.bias and self.kind not in PLAIN_KINDS, f'bias applies to linear and mlp, not to {self.kind}')

  @property
  def has_residual(self) -> bool:
    """Whether norm and residual surround the network."""
    return self.residual == 'on' or (self.residual == '' and self.kind != 'linear')


@config
class NeuralRuleConfig:
  """The inner optimiser (specification sections 3 and 5)."""
  mode: str = option('token', 'gradients at the start of the chunk, or (exact) at the last token; block also reads at the start; '
                     'chunk_gates: one momentum and forgetting a chunk, gradients at the learned start, as in titans-pytorch; '
                     'tnt: block, plus the token memories of `locals`',
                     choices=('token', 'exact', 'block', 'chunk_gates', 'tnt'))
  loss: str = option('l2', 'of the prediction for a key against its value', choices=('l2', 'dot', 'huber', 'lp', 'kl'))
  loss_scale: str = option('half', 'factor on l2, huber and lp: 1/2, 1, or 1 / value width', choices=('half', 'sum', 'mean'))
  loss_argument: float = option(0.0, 'where huber turns linear (0 = 1), p of lp (0 = 3)', low=0.0)
  momentum: str = option('first', 'of the gradients: none, first, nesterov; cascade: gates.order of them, each the sum of the one before, '
                         'of which W follows a learned mixture; second: cascade of 2; muon (modes block and chunk_gates): first, '
                         'orthogonalised where a chunk ends',
                         choices=('none', 'first', 'nesterov', 'second', 'cascade', 'muon'))
  forget: bool = option(True, 'learned forgetting')
  decay_to: str = option('init', 'what forgetting returns to: the learned start, or zero as in the paper', choices=('init', 'zero'))
  read: str = option('after', 'read after or before the write of the same token', choices=('after', 'before'))
  grad_at: str = option('previous', "the error of mode exact is taken at W_{t-1} or at what is left of it", choices=('previous', 'decayed'))
  clip: float = option(0.0, 'bound on the norm of the gradient of one token; 0 = off', low=0.0)
  clip_kind: str = option('hard', 'min(1, clip / norm) or 1 / (1 + norm / clip)', choices=('hard', 'soft'))
  first_order: bool = option(False, 'inner gradients are taken at weights without outer gradient')

  def __post_init__(self):
    exact = self.mode == 'exact'
    refuse(exact and self.clip > 0, "clip needs the gradient before the solve, which mode 'exact' does not have")
    refuse(exact and self.loss != 'l2', f"loss={self.loss!r} is not linear; mode 'exact' needs l2")
    refuse(exact and self.first_order, "first_order applies to modes 'token' and 'block'")
    refuse(self.grad_at != 'previous' and not exact, f"grad_at applies to mode 'exact', not to {self.mode!r}")
    refuse(self.grad_at != 'previous' and not self.forget, 'grad_at needs forget')
    refuse(self.clip_kind != 'hard' and not self.clip, 'clip_kind applies to clip, which is off')
    refuse(self.loss_scale != 'half' and self.loss in ('dot', 'kl'), f'loss_scale applies to l2, huber and lp, not to {self.loss}')
    refuse(self.loss_argument > 0 and self.loss not in ('huber', 'lp'), f'loss_argument applies to huber and lp, not to {self.loss}')
    refuse(self.loss == 'lp' and 0 < self.loss_argument < 1, f'loss_argument={self.loss_argument:g} of lp must be at least 1')
    refuse(self.decay_to != 'init' and not self.forget, 'decay_to needs forget')
    refuse(self.momentum == 'muon' and self.mode not in ('block', 'chunk_gates'),
           f"momentum='muon' needs mode 'block' or 'chunk_gates', not {self.mode!r}")
    refuse(self.read != 'after' and self.mode not in ('token', 'exact'),
           "read applies to modes 'token' and 'exact'; others read whole chunks")


@config
class NeuralGatesConfig:
  """Step size, momentum and forgetting of each token and head (specification section 4)."""
  theta_base: float = option(0.0, 'largest step size before the divisors; 0 = 4 for networks with residual, 1 for others; '
                             'gram .7 and .3', low=0.0)
  theta_bias: float = option(0.0, 'logit of the step size at initialisation')
  theta_norm: str = option('', "divide step sizes by the chunk length; '' = chunk, in mode exact none; gram: by what the inputs of each "
                           'layer have in common with those of the chunk so far (mode token)', choices=('', 'chunk', 'none', 'gram'))
  theta_momentum_norm: bool = option(True, 'times 1 - eta, so that the effect of a gradient does not depend on the momentum')
  theta_raw: bool = option(False, 'theta = theta_base sigmoid(.) and nothing else')
  eta_bias: float = option(2.197, 'logit of the momentum at initialisation (0.9)')
  order: int = option(2, "momenta of rule.momentum='cascade'", low=1)
  alpha_bias: float = option(0.0, 'logit of the forgetting at initialisation; 0 = spread over heads from -4 to -8, -6 for decay_to zero')
  surprise: str = option('', "which tokens write: '' all; z: those whose gradient is so many standard deviations above the mean of "
                         'those before; norm: those whose gradient is so large', choices=('', 'z', 'norm'))
  threshold: float = option(0.0, 'of surprise')
  pool: str = option('mean', 'mode chunk_gates: momentum and forgetting of a chunk are those of the mean of its tokens, or of a learned '
                     'attention to them', choices=('mean', 'attention'))
  row_factor: bool = option(False, 'the steps of a chunk count for 1 / t + a learned number after t of its tokens (TTT; mode token)')

  def __post_init__(self):
    refuse(self.theta_raw and self.theta_norm != '', f'theta_norm={self.theta_norm!r} does not apply to theta_raw')
    refuse(self.threshold != 0 and not self.surprise, 'threshold applies to surprise, which is off')
    refuse(self.surprise == 'norm' and self.threshold <= 0, f"threshold={self.threshold:g} of surprise='norm' must be above 0")
    refuse(self.theta_raw and not self.theta_momentum_norm, 'theta_momentum_norm does not apply to theta_raw')


@config
class NeuralWriteConfig:
  """What one token writes (specification sections 4 and 5.5)."""
  pairs: int = option(1, 'pairs of key and value of each token', low=1)
  window: int = option(1, 'tokens whose gradients each step follows, taken at one anchor (omega rule; mode token)', low=1)
  window_weights: bool = option(False, 'a learned factor in (0, 2) on the gradients of each place in the window')
  persistent: int = option(0, 'learned tokens that every document begins with: they are written before it, in a chunk of their own', low=0)
  per_tensor: bool = option(False, 'a learned factor in (0, 2) on the step size for each fast tensor (not in mode exact)')
  refresh: int = option(0, 'mode chunk_gates: chunks between the weights at which gradients are taken; 0 = always the learned start', low=0)
  shrink: float = option(0.0, 'how far the end of a chunk moves every weight towards what forgetting returns to (L1; mode block)', low=0.0)
  detach: int = option(0, 'chunks of a call after which outer gradients stop flowing into the memory; 0 = they never stop', low=0)

  def __post_init__(self):
    refuse(self.window_weights and self.window == 1, 'window_weights applies to window, which is 1')


@config
class NeuralLocalsConfig:
  """The local memories of mode tnt, which start anew at every shard (specification section 8.2)."""
  chunks: tuple[int, ...] = option((8, 16), 'chunk of each; others may be given to trained parameters', low=1)
  shard: int = option(2048, 'tokens of a document after which they start anew', low=1)
  project: bool = option(True, 'their queries are seen through the keys of their chunk')


@config
class NeuralProjConfig:
  """From the layer's input to queries, keys and values, and from the read to its output (specification section 4)."""
  source: str = option('input', 'of keys, values and gates: what queries see, or the norm of the residual stream at the entry of the layer',
                       choices=('input', 'stream'))
  conv_width: int = option(4, 'taps of the causal short convolution; 0 = none', low=0)
  convolved: str = option('qkv', 'which of queries, keys and values are convolved')
  activation: str = option('silu', 'after the convolution', choices=('', 'silu'))
  activated: str = option('qkv', 'which of queries, keys and values the activation follows')
  qk_norm: str = option('l2', 'of queries and keys', choices=('l2', 'rms', 'none'))
  features: str = option('', "of queries and keys after their norm: polynomial, or a name (Python: memjax.ops.neural_custom); '' = none")
  degree: int = option(2, 'of polynomial features', low=2, high=4)
  rope: str = option('', "rotary positions of queries and keys: full, those in the document; chunk, modulo the chunk (TTT); '' = none",
                     choices=('', 'full', 'chunk'))
  lookahead: bool = option(False, 'store the value of a token under the key of the token before it')
  out_norm: bool = option(True, 'RMS norm of the read per head')
  out_gate: str = option('silu', 'what the read is multiplied by: act(W x)', choices=('', 'silu', 'sigmoid'))

  def __post_init__(self):
    refuse(self.conv_width == 1, 'conv_width=1 mixes no tokens; 0 is off')
    refuse(self.convolved not in STREAMS, f'convolved={self.convolved!r} is not one of {", ".join(STREAMS)}; conv_width=0 is off')
    refuse(self.convolved != 'qkv' and not self.conv_width, 'convolved applies to conv_width, which is 0')
    refuse(self.activated not in STREAMS, f"activated={self.activated!r} is not one of {', '.join(STREAMS)}; activation='' is off")
    refuse(self.activated != 'qkv' and not self.activation, 'activated applies to activation, which is off')
    is_own = self.features not in ('', 'polynomial')
    if is_own: check_registered('features', self.features, FEATURES)
    refuse(self.features == 'polynomial' and self.qk_norm != 'l2', f"features='polynomial' needs qk_norm='l2', not {self.qk_norm!r}")
    refuse(self.degree != 2 and self.features != 'polynomial', "degree applies to features='polynomial'")

  def taps(self, stream: str) -> int:
    """Taps of the convolution of 'q', 'k' or 'v'; 0 = none."""
    return self.conv_width if stream in self.convolved else 0

  def activates(self, stream: str) -> bool:
    """Whether the activation follows 'q', 'k' or 'v'."""
    return bool(self.activation) and stream in self.activated


@config
class NeuralExecConfig:
  """How it is computed; nothing here changes the result."""
  spare: int = option(0, 'chunks a row may spend on documents that begin inside it and on calls that begin inside a chunk', low=0)
  aligned: bool = option(False, 'the rows of training always fit into their chunks (documents begin with a row, or `spare` has room for '
                         'them): the form token by token, half of what is compiled, is left out, and what breaks this reads NaN')
  group: int = option(0, 'chunks recomputed together in the backward pass; 0 = automatic (none where all memories take 2 GiB or less), '
                      '-1 = none', low=-1)
  remat: str = option('products', 'what the gradient of a chunk keeps where XLA computes it: its matrix products, nothing, or all',
                      choices=('products', 'nothing', 'all'))
  unroll: int = option(0, 'chunks a step of the compiled loop; 0 = up to 4 on an accelerator, 1 on a CPU', low=0)
  solver: str = option('blocked', 'triangular solve of mode exact', choices=('blocked', 'lax'))
  backend: str = option('auto', 'xla, the reference, or fused kernels (pallas: mode token in bfloat16, networks of two layers; a CPU '
                        'interprets them); auto = kernels on H100 and H200, keys of at most 64 channels; one token at a time '
                        'where the gain is slow, with auto up to 128 rows x heads', choices=('auto', 'xla', 'pallas'))


@mixer('neural')
class NeuralConfig:
  """Neural long-term memory: a network trained by gradient descent while it reads (Titans, Behrouz et al. 2024)."""
  heads: int = option(0, 'independent memories; 0 = width / 64', low=0)
  key_width: int = option(0, 'channels of a query or key; 0 = width / heads', low=0)
  value_width: int = option(0, 'channels of a value; 0 = key_width', low=0)
  chunk: int = option(64, 'tokens between the points where gradients are taken; part of the model, except in mode exact', low=1)
  net: NeuralNetConfig = option(NeuralNetConfig(), 'the network')
  rule: NeuralRuleConfig = option(NeuralRuleConfig(), 'the inner optimiser')
  gates: NeuralGatesConfig = option(NeuralGatesConfig(), 'step size, momentum, forgetting')
  write: NeuralWriteConfig = option(NeuralWriteConfig(), 'what one token writes')
  locals: NeuralLocalsConfig = option(NeuralLocalsConfig(), 'the local memories of mode tnt')
  proj: NeuralProjConfig = option(NeuralProjConfig(), 'projections')
  exec: NeuralExecConfig = option(NeuralExecConfig(), 'how it is computed')

  @property
  def cascade(self) -> int:
    """Momenta that sum up each other, 0 where there is no cascade."""
    return self.gates.order if self.rule.momentum in ('second', 'cascade') else 0

  @property
  def waits(self) -> bool:
    """Whether writes wait for the end of their chunk."""
    return self.net.kind == 'attention' or self.rule.mode == 'chunk_gates'

  @property
  def whole(self) -> 'NeuralConfig':
    """The large memory of mode tnt."""
    return dataclasses.replace(self, rule=dataclasses.replace(self.rule, mode='block'), locals=NeuralLocalsConfig())

  def local(self, number: int) -> 'NeuralConfig':
    """A local memory of mode tnt, which takes projections as they are."""
    proj = NeuralProjConfig(conv_width=0, activation='', qk_norm=self.proj.qk_norm, out_norm=False, out_gate='')
    return dataclasses.replace(self, chunk=self.locals.chunks[number], rule=dataclasses.replace(self.rule, mode='token'), proj=proj,
                               locals=NeuralLocalsConfig())

  def _check_tnt(self):
    here, mode = self.locals, self.rule.mode
    if mode != 'tnt':
      refuse(here != NeuralLocalsConfig(), f"locals applies to rule.mode='tnt', not to {mode!r}")
      return
    refuse(not here.chunks, "locals.chunks is empty; without local memories use rule.mode='block'")
    for name, size in (('chunk', self.chunk), *((f'locals.chunks[{n}]', size) for n, size in enumerate(here.chunks))):
      refuse(here.shard % size != 0, f'locals.shard={here.shard} must be a multiple of {name}={size}')
    refuse(self.write.pairs > 1, "write.pairs does not apply to rule.mode='tnt'")
    refuse(self.proj.features != '', "proj.features does not apply to rule.mode='tnt'")

  def _check_whole(self):
    mixes, mode = self.net.kind == 'attention', self.rule.mode
    refuse(mixes and mode != 'block', f"net.kind='attention' needs rule.mode='block', not {mode!r}")
    refuse(mixes and (self.rule.clip > 0 or self.write.per_tensor), "net.kind='attention' has no gradients of single tokens for "
           'rule.clip and write.per_tensor')
    refuse(mode == 'chunk_gates' and not self.gates.theta_raw, "rule.mode='chunk_gates' needs gates.theta_raw: a token has no momentum")
    pools = mode == 'chunk_gates' and (self.rule.forget or self.rule.momentum != 'none')
    refuse(self.gates.pool != 'mean' and not pools, "gates.pool needs rule.mode='chunk_gates' with rule.momentum or rule.forget")
    refuse(self.write.refresh > 0 and mode != 'chunk_gates', f"write.refresh applies to rule.mode='chunk_gates', not to {mode!r}")

  def __post_init__(self):
    net, rule, gates, write = self.net, self.rule, self.gates, self.write
    refuse(rule.mode == 'exact' and (net.kind != 'linear' or net.has_residual),
           f"rule.mode='exact' needs net.kind='linear' without residual, not {net.kind!r}")
    refuse(rule.mode == 'exact' and gates.theta_norm == 'chunk',
           "gates.theta_norm='chunk' would make the result of rule.mode='exact' depend on the chunk")
    refuse(net.weight_norm and rule.mode != 'block', f"net.weight_norm applies to rule.mode='block', not to {rule.mode!r}")
    refuse(write.shrink > 0 and rule.mode != 'block', f"write.shrink applies to rule.mode='block', not to {rule.mode!r}")
    refuse(self.exec.backend == 'pallas' and gates.surprise != '', "gates.surprise does not apply to exec.backend='pallas'")
    refuse(self.exec.backend == 'pallas' and rule.mode != 'token', f"exec.backend='pallas' computes rule.mode='token', not {rule.mode!r}")
    refuse(self.exec.solver != 'blocked' and rule.mode != 'exact', f"exec.solver applies to rule.mode='exact', not to {rule.mode!r}")
    refuse(write.window > 1 and rule.mode != 'token', f"write.window={write.window} needs rule.mode='token', not {rule.mode!r}")
    refuse(write.window > self.chunk, f'write.window={write.window} reaches back beyond one chunk={self.chunk}')
    refuse(write.persistent > self.chunk, f'write.persistent={write.persistent} does not fit into one chunk={self.chunk}')
    refuse(write.persistent > 0 and (self.waits or rule.mode == 'tnt'),
           f'write.persistent does not apply to net.kind={net.kind!r} in rule.mode={rule.mode!r}')
    refuse(write.per_tensor and rule.mode == 'exact', "write.per_tensor does not apply to rule.mode='exact'")
    refuse(gates.theta_norm == 'gram' and (rule.mode != 'token' or write.window > 1 or write.pairs > 1),
           "gates.theta_norm='gram' needs rule.mode='token' with write.window=1 and write.pairs=1")
    constant = rule.mode == 'token' and rule.momentum == 'none' and not rule.forget
    judges = rule.mode in ('token', 'block') and net.kind != 'attention' and write.window == 1 and not gates.row_factor
    refuse(gates.surprise != '' and (not judges or gates.theta_norm == 'gram'), "gates.surprise needs rule.mode 'token' or 'block' with "
           "write.window=1, and neither gates.theta_norm='gram' nor gates.row_factor nor net.kind='attention'")
    refuse(gates.row_factor and not constant, "gates.row_factor needs rule.mode='token', rule.momentum='none' and no rule.forget")
    refuse(self.proj.features != '' and net.has_residual, "net.residual must be 'off' with proj.features, which widen keys")
    self._check_whole()
    self._check_tnt()
    refuse(net.has_residual and self.value_width not in (0, self.key_width), 'value_width must be key_width in the residual form of net')
    refuse(gates.alpha_bias != 0 and not rule.forget, 'gates.alpha_bias needs rule.forget')
    refuse(gates.order != 2 and rule.momentum != 'cascade', f"gates.order applies to rule.momentum='cascade', not to {rule.momentum!r}")
    refuse(gates.eta_bias != 2.197 and rule.momentum == 'none', 'gates.eta_bias needs rule.momentum')
    refuse(not gates.theta_momentum_norm and rule.momentum == 'none', 'gates.theta_momentum_norm needs rule.momentum')
