"""The configuration of the neural memory: every refusal has a case."""
import re

import pytest

from memjax.config import neural
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
from memjax.config.schema import ModelConfig
from tests.test_config import message_of, rules

TNT = NeuralRuleConfig(mode='tnt')
MATRIX, EXACT, CONSTANT = NeuralNetConfig(kind='linear'), NeuralRuleConfig(mode='exact'), NeuralRuleConfig(forget=False)


def model(width=64, **mixer): return ModelConfig(width=width, mixers={'mem': NeuralConfig(**mixer)}, pattern=('mem',))


REFUSED = [
  (lambda: NeuralNetConfig(kind='swiglu', depth=3), 'depth applies to mlp, gated, factorised, low_rank, not to swiglu'),
  (lambda: NeuralNetConfig(kind='linear', expansion=2), 'expansion applies to networks with an inner width, not to linear'),
  (lambda: NeuralNetConfig(kind='swiglu', activation='relu'), 'activation applies to mlp, gated, factorised, low_rank and'),
  (lambda: NeuralNetConfig(rank=3), 'rank applies to factorised and low_rank, not to mlp'),
  (lambda: NeuralNetConfig(residual='off', gain='fast'), 'gain applies to the residual form, which is off'),
  (lambda: NeuralNetConfig(kind='gated', bias=True), 'bias applies to linear and mlp, not to gated'),
  (lambda: NeuralRuleConfig(mode='exact', clip=1.0), "clip needs the gradient before the solve, which mode 'exact' does not have"),
  (lambda: NeuralRuleConfig(mode='exact', loss='huber'), "loss='huber' is not linear; mode 'exact' needs l2"),
  (lambda: NeuralRuleConfig(mode='exact', first_order=True), "first_order applies to modes 'token' and 'block'"),
  (lambda: NeuralRuleConfig(grad_at='decayed'), "grad_at applies to mode 'exact', not to 'token'"),
  (lambda: NeuralRuleConfig(mode='exact', grad_at='decayed', forget=False), 'grad_at needs forget'),
  (lambda: NeuralRuleConfig(clip_kind='soft'), 'clip_kind applies to clip, which is off'),
  (lambda: NeuralRuleConfig(loss='kl', loss_scale='sum'), 'loss_scale applies to l2, huber and lp, not to kl'),
  (lambda: NeuralRuleConfig(loss_argument=2.0), 'loss_argument applies to huber and lp, not to l2'),
  (lambda: NeuralRuleConfig(loss='lp', loss_argument=.5), 'loss_argument=0.5 of lp must be at least 1'),
  (lambda: NeuralRuleConfig(decay_to='zero', forget=False), 'decay_to needs forget'),
  (lambda: NeuralRuleConfig(mode='block', read='before'), "read applies to modes 'token' and 'exact'"),
  (lambda: NeuralRuleConfig(momentum='muon'), "momentum='muon' needs mode 'block' or 'chunk_gates', not 'token'"),
  (lambda: NeuralConfig(net=NeuralNetConfig(weight_norm=True)), "net.weight_norm applies to rule.mode='block', not to 'token'"),
  (lambda: NeuralConfig(write=NeuralWriteConfig(shrink=.1)), "write.shrink applies to rule.mode='block', not to 'token'"),
  (lambda: NeuralGatesConfig(theta_raw=True, theta_norm='none'), "theta_norm='none' does not apply to theta_raw"),
  (lambda: NeuralGatesConfig(theta_raw=True, theta_momentum_norm=False), 'theta_momentum_norm does not apply to theta_raw'),
  (lambda: NeuralProjConfig(conv_width=1), 'conv_width=1 mixes no tokens; 0 is off'),
  (lambda: NeuralProjConfig(convolved='kq'), "convolved='kq' is not one of qkv, qk, qv, kv, q, k, v; conv_width=0 is off"),
  (lambda: NeuralProjConfig(convolved='v', conv_width=0), 'convolved applies to conv_width, which is 0'),
  (lambda: NeuralProjConfig(activated='all'), "activated='all' is not one of qkv, qk, qv, kv, q, k, v; activation='' is off"),
  (lambda: NeuralProjConfig(activated='v', activation=''), 'activated applies to activation, which is off'),
  (lambda: NeuralConfig(rule=EXACT), "rule.mode='exact' needs net.kind='linear' without residual, not 'mlp'"),
  (lambda: NeuralConfig(rule=EXACT, net=NeuralNetConfig(kind='linear', residual='on')), "rule.mode='exact' needs"),
  (lambda: NeuralConfig(rule=EXACT, net=MATRIX, gates=NeuralGatesConfig(theta_norm='chunk')), "gates.theta_norm='chunk' would make"),
  (lambda: NeuralConfig(rule=NeuralRuleConfig(mode='block'), exec=NeuralExecConfig(backend='pallas')),
   "exec.backend='pallas' computes rule.mode='token', not 'block'"),
  (lambda: NeuralConfig(exec=NeuralExecConfig(solver='lax')), "exec.solver applies to rule.mode='exact', not to 'token'"),
  (lambda: NeuralConfig(rule=NeuralRuleConfig(mode='block'), write=NeuralWriteConfig(window=2)), "write.window=2 needs rule.mode='token'"),
  (lambda: NeuralConfig(chunk=4, write=NeuralWriteConfig(window=5)), 'write.window=5 reaches back beyond one chunk=4'),
  (lambda: NeuralWriteConfig(window_weights=True), 'window_weights applies to window, which is 1'),
  (lambda: NeuralConfig(rule=EXACT, net=MATRIX, write=NeuralWriteConfig(per_tensor=True)),
   "write.per_tensor does not apply to rule.mode='exact'"),
  (lambda: NeuralConfig(net=NeuralNetConfig(kind='attention')), "net.kind='attention' needs rule.mode='block', not 'token'"),
  (lambda: NeuralConfig(net=NeuralNetConfig(kind='attention'), rule=NeuralRuleConfig(mode='block', clip=1.0)),
   "net.kind='attention' has no gradients of single tokens for rule.clip and write.per_tensor"),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(pool='attention')), "gates.pool needs rule.mode='chunk_gates' with rule.momentum or"),
  (lambda: NeuralConfig(rule=NeuralRuleConfig(mode='chunk_gates')), "rule.mode='chunk_gates' needs gates.theta_raw"),
  (lambda: NeuralConfig(write=NeuralWriteConfig(refresh=2)), "write.refresh applies to rule.mode='chunk_gates', not to 'token'"),
  (lambda: NeuralConfig(locals=NeuralLocalsConfig(shard=64)), "locals applies to rule.mode='tnt', not to 'token'"),
  (lambda: NeuralConfig(rule=TNT, locals=NeuralLocalsConfig(chunks=())), 'locals.chunks is empty'),
  (lambda: NeuralConfig(rule=TNT, chunk=48), 'locals.shard=2048 must be a multiple of chunk=48'),
  (lambda: NeuralConfig(rule=TNT, locals=NeuralLocalsConfig(chunks=(8, 6))), 'locals.shard=2048 must be a multiple of locals.chunks[1]=6'),
  (lambda: NeuralConfig(rule=TNT, write=NeuralWriteConfig(pairs=2)), "write.pairs does not apply to rule.mode='tnt'"),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(theta_norm='gram'), write=NeuralWriteConfig(pairs=2)),
   "gates.theta_norm='gram' needs rule.mode='token' with write.window=1 and write.pairs=1"),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(row_factor=True)), "gates.row_factor needs rule.mode='token', rule.momentum='none'"),
  (lambda: NeuralConfig(key_width=8, value_width=4), 'value_width must be key_width in the residual form of net'),
  (lambda: NeuralConfig(rule=CONSTANT, gates=NeuralGatesConfig(alpha_bias=-5.0)), 'gates.alpha_bias needs rule.forget'),
  (lambda: NeuralConfig(rule=NeuralRuleConfig(momentum='none'), gates=NeuralGatesConfig(eta_bias=1.0)), 'gates.eta_bias needs'),
  (lambda: NeuralConfig(rule=NeuralRuleConfig(momentum='none'), gates=NeuralGatesConfig(theta_momentum_norm=False)),
   'gates.theta_momentum_norm needs rule.momentum'),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(order=3)), "gates.order applies to rule.momentum='cascade', not to 'first'"),
  (lambda: NeuralNetConfig(kind='custom'), "function goes with kind 'custom', and only with it"),
  (lambda: NeuralNetConfig(kind='custom', function='unheard'), "function='unheard' is not registered (memjax.ops.neural_custom)"),
  (lambda: NeuralNetConfig(kind='swiglu', function='unheard'), "function goes with kind 'custom', and only with it"),
  (lambda: NeuralProjConfig(features='unheard'), "features='unheard' is not registered (memjax.ops.neural_custom)"),
  (lambda: NeuralProjConfig(features='polynomial', qk_norm='rms'), "features='polynomial' needs qk_norm='l2', not 'rms'"),
  (lambda: NeuralProjConfig(degree=3), "degree applies to features='polynomial'"),
  (lambda: NeuralConfig(proj=NeuralProjConfig(features='polynomial')), "net.residual must be 'off' with proj.features, which widen keys"),
  (lambda: NeuralConfig(rule=TNT, net=NeuralNetConfig(residual='off'), proj=NeuralProjConfig(features='polynomial')),
   "proj.features does not apply to rule.mode='tnt'"),
  (lambda: NeuralConfig(chunk=4, write=NeuralWriteConfig(persistent=5)), 'write.persistent=5 does not fit into one chunk=4'),
  (lambda: NeuralConfig(rule=TNT, write=NeuralWriteConfig(persistent=2)),
   "write.persistent does not apply to net.kind='mlp' in rule.mode='tnt'"),
  (lambda: model(width=66, heads=2, proj=NeuralProjConfig(rope='full')), 'mixers.mem.heads=2 leaves 33 channels a head, an odd number'),
  (lambda: NeuralGatesConfig(threshold=1.0), 'threshold applies to surprise, which is off'),
  (lambda: NeuralGatesConfig(surprise='norm'), "threshold=0 of surprise='norm' must be above 0"),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(surprise='z'), rule=EXACT, net=MATRIX),
   "gates.surprise needs rule.mode 'token' or 'block'"),
  (lambda: NeuralConfig(gates=NeuralGatesConfig(surprise='z'), exec=NeuralExecConfig(backend='pallas')),
   "gates.surprise does not apply to exec.backend='pallas'"),
  (lambda: model(heads=7), 'mixers.mem.heads=7 does not divide width=64'),
]


@pytest.mark.parametrize('build, says', REFUSED, ids=[says for _, says in REFUSED])
def test_combination_is_refused(build, says):
  assert f'.{says}' in message_of(build)


def test_every_rule_has_a_case():
  messages = [message_of(build) for build, _ in REFUSED]
  missing = [line for line, rule in rules(neural) if not any(re.search(rf'\.{rule}', text) for text in messages)]
  assert not missing, f'no case for the rules of lines {missing}'


def test_heads_follow_the_width():
  """64 channels a head, or one head of all."""
  assert all(model(width=width).mixers['mem'].heads == 0 for width in (32, 64, 128))
  assert 'mixers.mem.heads=2 does not divide width=129' in message_of(lambda: model(width=129))
