"""The models that `benchmarks.recall` compares: name -> mixer configs of a two-layer decoder, by width."""
import dataclasses
from collections.abc import Callable
from typing import Any

from memjax.config.mixers import (
  AddressConfig,
  AttentionConfig,
  BindingConfig,
  FormConfig,
  HolographicConfig,
  HolographicSeedConfig,
  KeepConfig,
  ReadConfig,
  WindowConfig,
)
from memjax.config.neural import (
  NeuralConfig,
  NeuralExecConfig,
  NeuralGatesConfig,
  NeuralNetConfig,
  NeuralProjConfig,
  NeuralRuleConfig,
)
from memjax.config.schema import BlockConfig, EmbeddingConfig, ModelConfig

FORM = FormConfig(remat=False)             # rows this short need no recomputation
Make = Callable[[int], Any]                # width -> mixer config


def holographic(binding: str = 'phasor', *, plain: bool = False, **options: Any) -> Make:
  """The default memory (content addresses, S = K); `plain` keeps everything and has no write gate."""
  def make(width):
    address = AddressConfig(gate='') if plain else AddressConfig()
    keep = KeepConfig(kind='none') if plain else KeepConfig()
    return HolographicConfig(binding=BindingConfig(kind=binding), address=address, keep=keep, form=FORM, **options)
  return make


def small_state(binding: str = 'phasor', *, slots: int = 8) -> Make:
  """The preset for recall per byte: one head as wide as the model, few slots, one router for write and read."""
  def make(width):
    return HolographicConfig(heads=1, key_width=width, slots=slots, binding=BindingConfig(kind=binding), form=FORM,
                             address=AddressConfig(kind='sigmoid', tie=True, gate=''), keep=KeepConfig(kind='slot', bias=4.0))
  return make


def varied(**changes: Any) -> Make:
  """small_state with fields changed; those of binding, address, keep and read by 'part__field'."""
  def make(width):
    config = small_state()(width)
    for name, value in changes.items():
      part, _, field = name.partition('__')
      config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value}) if field else value})
    return config
  return make


def linear(heads: int = 8, *, norm: str = 'head') -> Make:
  """Linear attention with unit keys and the short convolution: slots addressed by the key stream, no binding."""
  def make(width):
    return HolographicConfig(heads=heads, binding=BindingConfig(kind='none'), address=AddressConfig(source='key', gate=''),
                             keep=KeepConfig(kind='none'), read=ReadConfig(norm=norm), form=FORM)
  return make


def delta(heads: int = 8, *, keep: str = 'none', norm: str = 'head') -> Make:
  """The delta rule of the same shape; with keep 'head' the gated delta rule. Its step starts at one half."""
  def make(width):
    address = AddressConfig(source='key', gate='head', gate_bias=0.0)
    return HolographicConfig(heads=heads, binding=BindingConfig(kind='none'), address=address, read=ReadConfig(norm=norm),
                             keep=KeepConfig(kind=keep, erase='slot'), form=FORM)
  return make


def attention(width: int) -> AttentionConfig:
  """Full attention with rotary positions; its state grows with the text."""
  return AttentionConfig(heads=max(width // 32, 1))


def window(size: int) -> Make:
  """Sliding-window attention."""
  return lambda width: WindowConfig(heads=max(width // 32, 1), window=size)


def seed(width: int) -> HolographicSeedConfig:
  """The original memory: position keys, scalar gates, a norm in the recurrence."""
  return HolographicSeedConfig(key_width=width)


def neural_exact(heads: int = 8, *, lookahead: bool = False) -> Make:
  """The neural memory as one matrix a head under the online rule; `lookahead` stores values under the key of the token before."""
  return lambda width: NeuralConfig(heads=heads, chunk=16, net=NeuralNetConfig(kind='linear'), rule=NeuralRuleConfig(mode='exact'),
                                    proj=NeuralProjConfig(lookahead=lookahead), exec=NeuralExecConfig(group=-1, aligned=True))


def neural_deep(heads: int = 4, *, base: float = 1.0, bias: float = 0.0, chunk: int = 16, lookahead: bool = False) -> Make:
  """The neural memory as a network of two layers a head, gradients at the start of each chunk, reads after every token."""
  return lambda width: NeuralConfig(heads=heads, chunk=chunk, net=NeuralNetConfig(expansion=2), proj=NeuralProjConfig(lookahead=lookahead),
                                    gates=NeuralGatesConfig(theta_base=base, theta_bias=bias),
                                    exec=NeuralExecConfig(group=-1, aligned=True))


EQUAL = {                                  # width 64: 512 floats of state a layer
  'small_state': small_state(), 'small_state without binding': small_state('none'), 'linear attention': linear(),
  'linear attention, full norm': linear(norm='full'), 'delta rule': delta(), 'delta rule, full norm': delta(norm='full'),
  'gated delta rule': delta(keep='head'), 'holographic': holographic(),
  'holographic, keep none, no gate': holographic(plain=True), 'holographic without binding': holographic('none'),
}
CURVE = {
  **{f'small_state, {n} slots': small_state(slots=n) for n in (2, 4, 16, 32)},
  **{f'linear attention, {n} heads': linear(n) for n in (16, 4, 2, 1)},
  **{f'delta rule, {n} heads': delta(n) for n in (16, 4, 1)},
  **{f'window {n}': window(n) for n in (8, 16)}, 'attention': attention,
}
WIDE = {
  'holographic': holographic(), 'holographic, keep none, no gate': holographic(plain=True),
  'holographic without binding': holographic('none'), 'holographic bipolar': holographic('bipolar'),
  'holographic unitary': holographic('unitary'), 'small_state': small_state(), 'linear attention': linear(),
  'delta rule': delta(), 'gated delta rule': delta(keep='head'), 'attention': attention,
}
LARGE = {
  'holographic': holographic(), 'holographic, keep none, no gate': holographic(plain=True), 'small_state, 16 slots': small_state(slots=16),
  'linear attention': linear(), 'gated delta rule': delta(keep='head'), 'attention': attention,
}
PRESET = {                                 # small_state, one thing changed at a time
  'small_state': small_state(), 'identity 0': varied(binding__identity_bias=0.0), 'identity 1': varied(binding__identity_bias=1.0),
  'identity 4': varied(binding__identity_bias=4.0), 'conv 2': varied(conv_width=2), 'conv 3': varied(conv_width=3),
  'keep none': varied(keep=KeepConfig(kind='none')), 'keep bias 6': varied(keep__bias=6.0), 'keep bias 3': varied(keep__bias=3.0),
  'keep static': varied(keep=KeepConfig(kind='static')), 'keep head': varied(keep=KeepConfig(kind='head', bias=4.0)),
  'untied routers': varied(address__tie=False), 'gate head': varied(address__gate='head'), 'signed slots': varied(address__kind='signed'),
  'softmax slots': varied(address__kind='softmax'), 'content slots': varied(address__kind='content'), 'no norm': varied(read__norm=''),
  'bipolar': varied(binding__kind='bipolar'), 'unitary': varied(binding__kind='unitary'),
  '2 heads of 8 x 32': varied(heads=2, key_width=32), '4 heads of 8 x 16': varied(heads=4, key_width=16),
}
NEURAL = {
  **{f'neural exact, {n} heads': neural_exact(n) for n in (16, 8, 4, 2)},
  **{f'neural deep, {n} heads': neural_deep(n) for n in (8, 4, 2)}, 'neural exact, look-ahead': neural_exact(lookahead=True),
  'neural deep, look-ahead': neural_deep(base=16.0, bias=-3.0, lookahead=True),
}
KINDS = {
  'small_state': small_state(), 'holographic': holographic(), 'window 8': window(8), 'attention': attention,
  'holographic_seed': seed,
}


def model_config(make: Make, *, width: int, vocabulary: int, layers: int = 2) -> ModelConfig:
  """Mixing without feed-forward networks, as in zoology, with an output head of its own."""
  return ModelConfig(width=width, hidden=-1, vocabulary=vocabulary, mixers={'memory': make(width)}, pattern=(), repeats=0,
                     prefix=('memory',) * layers, block=BlockConfig(), embedding=EmbeddingConfig(tie=False, std=0.5))
