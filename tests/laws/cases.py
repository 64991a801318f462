"""The memories that the laws are tested on: every registered kind, and the options of each that change its recurrence."""
import dataclasses

from memjax.config.mixers import (
  AddressConfig,
  AttentionConfig,
  BindingConfig,
  FormConfig,
  HolographicConfig,
  HolographicSeedConfig,
  KeepConfig,
  MemoryLossConfig,
  ReadConfig,
  TiersConfig,
  WindowConfig,
)

SMALL = HolographicConfig(heads=2, slots=4, form=FormConfig(chunk=4), conv_width=3)


def holographic(**options) -> HolographicConfig:
  """Two heads, four slots, chunks of four tokens, and the given options."""
  return dataclasses.replace(SMALL, **options)


SMALL_STATE = holographic(heads=1, binding=BindingConfig(), address=AddressConfig(kind='sigmoid', tie=True, gate=''),
                          keep=KeepConfig(kind='slot', bias=4.0))

# Every law runs on these.
FULL = {
    'attention': AttentionConfig(heads=4, kv_heads=2),
    'attention-plain': AttentionConfig(heads=2, rotary=False, qk_norm=True, bias=True, out_bias=True),
    'window': WindowConfig(heads=2, window=3),
    'holographic': SMALL,
    'holographic-small-state': SMALL_STATE,
    'holographic-delta': holographic(keep=KeepConfig(kind='slot', erase='slot')),
    'holographic-tiers': holographic(tiers=TiersConfig(kind='consolidate', interval=4), form=FormConfig()),
    'holographic-seed': HolographicSeedConfig(key_width=8, slots=2, dropout=0.0),
}

# Scan, Step, Split, Mask and Causal run on these.
MORE = {
    'bipolar-before': holographic(binding=BindingConfig(kind='bipolar'), read=ReadConfig(order='before', norm='full', out_gate='silu')),
    'unitary-reads': holographic(binding=BindingConfig(kind='unitary'), reads=2, keep=KeepConfig(kind='static')),
    'hrr-fft-tied': holographic(binding=BindingConfig(kind='hrr', transform='fft', tie_query=True), reads=2,
                                keep=KeepConfig(kind='tied')),
    'hlb-softmax': holographic(binding=BindingConfig(kind='hlb'), address=AddressConfig(kind='softmax')),
    'none-key-source': holographic(binding=BindingConfig(kind='none'), address=AddressConfig(source='key', gate='channel')),
    'copies': holographic(address=AddressConfig(kind='copies')),
    'scored': holographic(address=AddressConfig(kind='scored'), keep=KeepConfig(kind='slot')),
    'signed-rotary': holographic(address=AddressConfig(kind='signed', rotary=True, tie=True), keep=KeepConfig(kind='none')),
    'topk-channel': holographic(address=AddressConfig(kind='topk'), keep=KeepConfig(kind='channel'), form=FormConfig()),
    'fractional': holographic(binding=BindingConfig(position='fractional', position_heads=1), conv_width=0,
                              form=FormConfig(kind='associative')),
    'tiers-learned': holographic(tiers=TiersConfig(kind='consolidate', interval=2, mix='learned', source='item', hard=True),
                                 form=FormConfig()),
    'tiers-controller': holographic(tiers=TiersConfig(kind='consolidate', interval=3, controller=True), form=FormConfig()),
    'losses': holographic(loss=MemoryLossConfig(replay=.1, contrastive=.1, balance=.1, gate=.1)),
}
