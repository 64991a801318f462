"""The memories that the laws are tested on: every registered kind, and the options of each that change its recurrence."""
import dataclasses

from memjax.config.banks import (
  BankConfig,
  BankLossConfig,
  BankQuantConfig,
  BankShapeConfig,
  MixingConfig,
  ProductKeyConfig,
  RouterConfig,
)
from memjax.config.context import ContextConfig
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
from memjax.config.neural import (
  NeuralConfig,
  NeuralExecConfig,
  NeuralGatesConfig,
  NeuralLocalsConfig,
  NeuralNetConfig,
  NeuralProjConfig,
  NeuralRuleConfig,
  NeuralWriteConfig,
)
from memjax.config.titans import TitansConfig
from memjax.ops.neural_custom import custom
from tests.laws.wired import Wiring

custom('gated_pair', lambda ops, x: ops.bias('b_out', ops.linear('down', ops.linear('up', x) * ops.scale('g_side', ops.linear('side', x)))),
       fast=lambda K, V: {'up': (K, 3), 'side': (K, 3), 'g_side': (3,), 'down': (3, V), 'b_out': (V,)})
SMALL = HolographicConfig(heads=2, slots=4, form=FormConfig(chunk=4), conv_width=3)


def holographic(**options) -> HolographicConfig:
  """Two heads, four slots, chunks of four tokens, and the given options."""
  return dataclasses.replace(SMALL, **options)


SMALL_STATE = holographic(heads=1, binding=BindingConfig(), address=AddressConfig(kind='sigmoid', tie=True, gate=''),
                          keep=KeepConfig(kind='slot', bias=4.0))

def bank(mixing: MixingConfig = MixingConfig(), shape: BankShapeConfig = BankShapeConfig(entries=20, chapters=5), **router) -> BankConfig:
  """Five chapters of four entries, two read, and the given router."""
  options = {name: router.pop(name) for name in ('quant', 'loss', 'kv_heads', 'projection_rank', 'form') if name in router}
  return BankConfig(heads=2, shape=shape, mixing=mixing, router=RouterConfig(**{'top_k': 2, **router}), **options)


def neural(**options) -> NeuralConfig:
  """Two heads, chunks of four tokens, a chunk for each token if need be, and the given options."""
  return NeuralConfig(**{'heads': 2, 'chunk': 4, 'net': NeuralNetConfig(expansion=2), 'exec': NeuralExecConfig(spare=9), **options})


ONE_MATRIX = NeuralNetConfig(kind='linear')

# Every law runs on these.
FULL = {
    'attention': AttentionConfig(heads=4, kv_heads=2),
    'attention-plain': AttentionConfig(heads=2, rotary=False, qk_norm=1e-6, bias=True, out_bias=True),
    'window': WindowConfig(heads=2, window=3),
    'window-persistent': WindowConfig(heads=2, window=3, persistent=2),
    'holographic': SMALL,
    'holographic-small-state': SMALL_STATE,
    'holographic-delta': holographic(keep=KeepConfig(kind='slot', erase='slot')),
    'holographic-tiers': holographic(tiers=TiersConfig(kind='consolidate', interval=4), form=FormConfig()),
    'holographic-seed': HolographicSeedConfig(key_width=8, slots=2, dropout=0.0),
    'neural': neural(net=ONE_MATRIX, exec=NeuralExecConfig(spare=9, group=-1)),
    'neural-deep': neural(),
    'neural-exact': neural(net=ONE_MATRIX, rule=NeuralRuleConfig(mode='exact')),
    'neural-block': neural(exec=NeuralExecConfig(spare=2), rule=NeuralRuleConfig(mode='block', momentum='nesterov')),
    'neural-steps': neural(chunk=3, exec=NeuralExecConfig(), rule=NeuralRuleConfig(read='before', decay_to='zero'),
                           net=NeuralNetConfig(expansion=2, residual='off')),
    'bank': bank(),
    'bank-chunk': bank(strategy='chunk', block=3),
    'product-key': ProductKeyConfig(heads=2, keys=4, top_k=3, key_width=8),
    'context': ContextConfig(heads=2, kv_heads=1, slots=3, ratio=2, out_gate='silu'),
    'mag': Wiring('mag', WindowConfig(heads=2, window=3), neural(net=ONE_MATRIX, exec=NeuralExecConfig(spare=9, group=-1))),
    'mac': Wiring('mac', WindowConfig(heads=2, window=4, persistent=1), neural(net=ONE_MATRIX, exec=NeuralExecConfig(spare=9, group=-1))),
    'mac-deep': Wiring('mac', WindowConfig(heads=2, window=4, persistent=1),
                       neural(chunk=2, net=NeuralNetConfig(expansion=1, residual='off'))),
    'mac-lookback': Wiring('mac', WindowConfig(heads=2, window=4, persistent=2),
                           neural(chunk=2, net=ONE_MATRIX, exec=NeuralExecConfig(spare=1)),
                           TitansConfig(lookback=1)),
    'mac-input': Wiring('mac', WindowConfig(heads=2, window=4), neural(chunk=2, net=ONE_MATRIX, exec=NeuralExecConfig(spare=9, group=-1)),
                        TitansConfig(write='input', lookback=1)),
    'mac-previous': Wiring('mac', WindowConfig(heads=4, kv_heads=2, window=4), neural(chunk=2, net=ONE_MATRIX),
                           TitansConfig(asked='previous')),
}

# Of these, one of each kind in the default suite; all others are slow tests.
QUICK = ('attention', 'window', 'holographic', 'holographic-seed', 'neural', 'bank', 'product-key', 'context')

# Of these, Step and Causal.
WIRED = ('mag', 'mac')

# Scan, Step, Mask and Reach run on these, as slow tests.
MORE = {
    'attention-persistent': AttentionConfig(heads=4, kv_heads=2, qk_norm=1e-6, persistent=3),
    'bipolar-before': holographic(binding=BindingConfig(kind='bipolar'), read=ReadConfig(order='before', norm='full', out_gate='silu')),
    'unitary-reads': holographic(binding=BindingConfig(kind='unitary'), reads=2, keep=KeepConfig(kind='static')),
    'hrr-fft-tied': holographic(binding=BindingConfig(kind='hrr', transform='fft', tie_query=True), reads=2,
                                keep=KeepConfig(kind='tied')),
    'hlb-softmax': holographic(binding=BindingConfig(kind='hlb'), address=AddressConfig(kind='softmax')),
    'none-key-source': holographic(binding=BindingConfig(kind='none'), address=AddressConfig(source='key', gate='channel')),
    'attention-flash': AttentionConfig(heads=4, kv_heads=2, backend='cudnn'),
    'window-flash': WindowConfig(heads=2, window=3, backend='cudnn'),
    'fused': holographic(form=FormConfig(chunk=4, backend='pallas')),
    'fused-unitary': holographic(binding=BindingConfig(kind='unitary'), address=AddressConfig(gate='channel'), keep=KeepConfig(kind='tied'),
                                 read=ReadConfig(order='before'), form=FormConfig(backend='pallas', chunk=8)),
    'copies': holographic(address=AddressConfig(kind='copies')),
    'scored': holographic(address=AddressConfig(kind='scored'), keep=KeepConfig(kind='slot')),
    'signed-rotary': holographic(address=AddressConfig(kind='signed', rotary=True, tie=True), keep=KeepConfig(kind='none')),
    'topk-channel': holographic(address=AddressConfig(kind='topk'), keep=KeepConfig(kind='channel'), form=FormConfig()),
    'fractional': holographic(binding=BindingConfig(position='fractional', position_heads=1), conv_width=0,
                              form=FormConfig(kind='associative')),
    'tiers-learned': holographic(tiers=TiersConfig(kind='consolidate', interval=2, mix='learned', source='item', hard=True),
                                 form=FormConfig()),
    'tiers-controller': holographic(tiers=TiersConfig(kind='consolidate', interval=3, controller=True), form=FormConfig()),
    'bank-dense': BankConfig(heads=2, shape=BankShapeConfig(entries=12)),
    'bank-prefix': bank(strategy='prefix-mean'),
    'bank-rolling': bank(strategy='rolling', window=3),
    'bank-hybrid': bank(strategy='hybrid', inference='hybrid', window=2),
    'bank-shared': bank(MixingConfig(combine='joint_bias', shared=1, scale=2.0, norm='rms'), kv_heads=1, input='stream'),
    'bank-joint': bank(MixingConfig(combine='joint', shared=1), loss=BankLossConfig(balance=.1, auxiliary=.1, z=.1)),
    'bank-legacy': bank(MixingConfig(combine='legacy_scale', shared=1), loss=BankLossConfig(bias_rate=.1, balance_form='legacy')),
    'bank-factorized': bank(shape=BankShapeConfig(entries=16, chapters=4, low_rank='factorized', rank=4), kind='product_key',
                            projection_rank=3),
    'bank-reduced': bank(shape=BankShapeConfig(entries=20, chapters=5, low_rank='reduced', rank=4), weight_norm='full'),
    'bank-qat': bank(quant=BankQuantConfig(bits=4, group=4, train='straight')),
    'context-clusters': ContextConfig(heads=2, slots=4, ratio=2, merge='evict', clusters=2, top_k=1),
    'context-lloyd': ContextConfig(heads=2, slots=3, ratio=2, merge='sum', clusters=2, top_k=1, iterations=1),
    'neural-norms': neural(rule=NeuralRuleConfig(mode='block', momentum='nesterov'), net=NeuralNetConfig(expansion=1, weight_norm=True),
                           write=NeuralWriteConfig(shrink=.001)),
    'neural-clip': neural(rule=NeuralRuleConfig(clip=0.05, momentum='second', loss='huber'), proj=NeuralProjConfig(lookahead=True)),
    'neural-swiglu': neural(net=NeuralNetConfig(kind='swiglu', gain='fast'), proj=NeuralProjConfig(qk_norm='rms', out_gate='sigmoid'),
                            rule=NeuralRuleConfig(momentum='none', forget=False), exec=NeuralExecConfig(spare=2, group=2)),
    'neural-omega': neural(write=NeuralWriteConfig(window=3, pairs=2, per_tensor=True)),
    'neural-window': neural(net=ONE_MATRIX, chunk=3, write=NeuralWriteConfig(window=3, window_weights=True),
                            proj=NeuralProjConfig(lookahead=True)),
    'neural-pairs': neural(net=ONE_MATRIX, rule=NeuralRuleConfig(mode='exact'), write=NeuralWriteConfig(pairs=2)),
    'neural-rates': neural(net=NeuralNetConfig(expansion=1), rule=NeuralRuleConfig(mode='block'),
                           write=NeuralWriteConfig(pairs=2, per_tensor=True)),
    'neural-attention': neural(net=NeuralNetConfig(kind='attention', expansion=1), rule=NeuralRuleConfig(mode='block'),
                               gates=NeuralGatesConfig(theta_base=1.0), exec=NeuralExecConfig(spare=2)),
    'neural-pooled': neural(net=ONE_MATRIX, rule=NeuralRuleConfig(mode='chunk_gates', decay_to='zero'), chunk=3,
                            gates=NeuralGatesConfig(theta_raw=True, theta_base=.3)),
    'neural-refresh': neural(rule=NeuralRuleConfig(mode='chunk_gates', loss_scale='mean'), chunk=2, write=NeuralWriteConfig(refresh=2),
                             gates=NeuralGatesConfig(theta_raw=True, theta_base=.1)),
    'neural-pooled-cascade': neural(rule=NeuralRuleConfig(mode='chunk_gates', momentum='cascade'), write=NeuralWriteConfig(pairs=2),
                                    gates=NeuralGatesConfig(theta_raw=True, theta_base=.1, pool='attention')),
    'neural-tnt': neural(net=ONE_MATRIX, rule=NeuralRuleConfig(mode='tnt'), locals=NeuralLocalsConfig(chunks=(2, 4), shard=4),
                         exec=NeuralExecConfig(spare=2), proj=NeuralProjConfig(lookahead=True)),
    'neural-tnt-long': neural(net=NeuralNetConfig(expansion=1), rule=NeuralRuleConfig(mode='tnt'), exec=NeuralExecConfig(spare=1),
                              locals=NeuralLocalsConfig(chunks=(3,), shard=12, project=False)),
    'neural-gram': neural(gates=NeuralGatesConfig(theta_norm='gram'), proj=NeuralProjConfig(lookahead=True)),
    'neural-rope': neural(net=ONE_MATRIX, proj=NeuralProjConfig(rope='chunk', lookahead=True, convolved='kv', activated='v'), chunk=3,
                          write=NeuralWriteConfig(persistent=2, pairs=2, window=2)),
    'neural-stream': neural(net=ONE_MATRIX, proj=NeuralProjConfig(source='stream')),
    'neural-persistent': neural(rule=NeuralRuleConfig(mode='block'), write=NeuralWriteConfig(persistent=3),
                                proj=NeuralProjConfig(rope='full')),
    'mac-features': Wiring('mac', WindowConfig(heads=2, window=4), neural(chunk=2, net=ONE_MATRIX, proj=NeuralProjConfig(
        features='polynomial', rope='chunk', convolved='kv', activated='q'))),
    'neural-surprise': neural(gates=NeuralGatesConfig(surprise='z'), rule=NeuralRuleConfig(clip=.5), write=NeuralWriteConfig(pairs=2)),
    'neural-surprise-block': neural(gates=NeuralGatesConfig(surprise='norm', threshold=2.0), exec=NeuralExecConfig(spare=2, group=2),
                                    rule=NeuralRuleConfig(mode='block', momentum='nesterov'), proj=NeuralProjConfig(lookahead=True)),
    'neural-features': neural(proj=NeuralProjConfig(features='polynomial', lookahead=True),
                              net=NeuralNetConfig(expansion=1, residual='off'), rule=NeuralRuleConfig(momentum='cascade'),
                              gates=NeuralGatesConfig(order=3)),
    'neural-custom': neural(net=NeuralNetConfig(kind='custom', function='gated_pair')),
    'neural-low-rank': neural(net=NeuralNetConfig(kind='low_rank', expansion=1, rank=3),
                              rule=NeuralRuleConfig(loss='kl', clip=.1, clip_kind='soft', read='before'),
                              proj=NeuralProjConfig(qk_norm='none', out_norm=False, out_gate='')),
    'neural-exact-cascade': neural(net=NeuralNetConfig(kind='linear', learn_init=False),
                                   rule=NeuralRuleConfig(mode='exact', momentum='cascade'), write=NeuralWriteConfig(persistent=2),
                                   proj=NeuralProjConfig(features='polynomial', lookahead=True)),
    'neural-ttt': neural(gates=NeuralGatesConfig(row_factor=True), rule=NeuralRuleConfig(momentum='none', forget=False),
                         write=NeuralWriteConfig(pairs=2)),
    'neural-gated': neural(net=NeuralNetConfig(kind='gated', depth=1, expansion=1, per_head=False),
                           gates=NeuralGatesConfig(theta_raw=True, theta_base=.1), rule=NeuralRuleConfig(first_order=True),
                           proj=NeuralProjConfig(conv_width=0, activation='')),
    'neural-decayed': neural(net=NeuralNetConfig(kind='linear', bias=True), exec=NeuralExecConfig(solver='lax'),
                             rule=NeuralRuleConfig(mode='exact', grad_at='decayed', decay_to='zero', loss_scale='mean')),
    'mag-mix': Wiring('mag', AttentionConfig(heads=2), SMALL, TitansConfig(fuse='mix')),
    'mac-learned': Wiring('mac', WindowConfig(heads=2, window=3), neural(chunk=3, net=ONE_MATRIX, rule=NeuralRuleConfig(read='before')),
                          TitansConfig(learned=2, fuse='silu')),
    'mac-segment': Wiring('mac', WindowConfig(heads=4, kv_heads=2, window=6), neural(chunk=3, net=ONE_MATRIX),
                          TitansConfig(read='segment', fuse='sigmoid')),
    'mac-block': Wiring('mac', WindowConfig(heads=2, window=4), neural(chunk=2, net=ONE_MATRIX, rule=NeuralRuleConfig(mode='block')),
                        TitansConfig(lookback=1)),
    'mac-sum': Wiring('mac', WindowConfig(heads=2, window=4), neural(chunk=4, net=ONE_MATRIX), TitansConfig(write='sum', fuse='mix')),
    'mac-exact': Wiring('mac', WindowConfig(heads=2, window=4, qk_norm=1e-6), neural(net=ONE_MATRIX, rule=NeuralRuleConfig(mode='exact')),
                        TitansConfig(fuse='mix')),
    'losses': holographic(loss=MemoryLossConfig(replay=.1, contrastive=.1, balance=.1, gate=.1)),
}
