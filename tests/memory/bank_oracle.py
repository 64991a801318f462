"""A bank in numpy, one token at a time in the words of the specification, and the configs it is compared on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memjax.config.banks import BankConfig, BankFormConfig, BankLossConfig, BankShapeConfig, MixingConfig, RouterConfig
from memjax.memory.registry import make_memory
from tests.laws.test_laws import parameters

B, L, D, H = 2, 9, 8, 2
SHAPE = BankShapeConfig(entries=20, chapters=5)
GATHER = BankFormConfig(kind='gather')               # compiles fastest; that the forms agree is tested with them
NINE = dataclasses.replace(SHAPE, entries=18, chapters=9)
FACTORIZED, REDUCED = (dataclasses.replace(SHAPE, low_rank=kind, rank=4) for kind in ('factorized', 'reduced'))
STRATEGIES = {name: {'strategy': name} for name in ('token', 'prefix-mean')} | {
    'rolling': {'strategy': 'rolling', 'window': 3}, 'chunk': {'strategy': 'chunk', 'block': 2},
    'hybrid': {'strategy': 'hybrid', 'inference': 'hybrid', 'window': 2},
    'sequence': {'strategy': 'sequence', 'allow_noncausal': True},
    'sequence-rolling': {'strategy': 'sequence-rolling', 'allow_noncausal': True, 'window': 3}}
NONCAUSAL = ('sequence', 'sequence-rolling')


def routed(**options):
  """Two heads, five chapters of four entries, two of them read."""
  router = RouterConfig(**{'top_k': 2, **{k: options.pop(k) for k in list(options) if k in RouterConfig.__dataclass_fields__}})
  return BankConfig(**{'heads': H, 'shape': SHAPE, 'router': router, 'form': GATHER, **options})


def dense(low_rank='', rank=64, **options):
  return BankConfig(**{'heads': H, 'shape': BankShapeConfig(entries=12, low_rank=low_rank, rank=rank), 'form': GATHER, **options})


ORACLE = {
    'dense': dense(), 'grouped heads': dense(heads=4, kv_heads=2), 'factorized': dense('factorized', 4), 'reduced': dense('reduced', 4),
    'narrow': dense(head_width=3, projection_rank=2),
    'shared': routed(mixing=MixingConfig(shared=1, scale=2.5), kv_heads=1),
    'joint': routed(mixing=MixingConfig(combine='joint', shared=2, scale=2.5)),
    'joint with priors': routed(mixing=MixingConfig(combine='joint_bias', shared=1, scale=2.5, norm='rms', norm_epsilon=.1)),
    'legacy': routed(mixing=MixingConfig(combine='legacy_scale', shared=1, scale=2.5, norm='layernorm')),
    'weights over all': routed(weight_norm='full', shape=FACTORIZED, projection_rank=3), 'reduced chapters': routed(shape=REDUCED),
    'half-keys': routed(kind='product_key', shape=NINE, top_k=3),
    'selection bias': routed(loss=BankLossConfig(bias_rate=.1), mixing=MixingConfig(shared=1)),
    **{name: routed(**options) for name, options in STRATEGIES.items()},
}


def setting(config, x, **options):
  """(memory, parameters of the size of trained ones, empty state)."""
  memory = make_memory(config, D, **options)
  state = memory.init_state(x.shape[0])
  return memory, parameters(memory, x, state, jnp.ones(x.shape[:2], jnp.int32)), state


def inputs(dtype=jnp.float32, rows=B, length=L):
  return jax.random.normal(jax.random.key(1), (rows, length, D), dtype)


def matrix(p): return p['kernel'] if 'kernel' in p else p['down'] @ p['up']


def entries(config, p):
  table = p['bank']['entries'] @ p['bank']['mix'].T if 'mix' in p['bank'] else p['bank']['entries']
  if config.mixing.norm == 'layernorm': table = table - table.mean(-1, keepdims=True)
  if config.mixing.norm: table = table / np.sqrt((table ** 2).mean(-1, keepdims=True) + config.mixing.norm_epsilon)
  return table.reshape(max(config.shape.chapters, 1), -1, table.shape[1])


def statistic(router, v, t, prompt, start):
  """u_t of a row v [L, D]."""
  s, w, mean = router.strategy, router.window, lambda rows: np.mean(rows, 0)
  rolling = lambda t: mean(v[max(0, t - w + 1):t + 1])
  if s == 'token': return v[t]
  if s == 'prefix-mean' or (s == 'hybrid' and t < prompt): return mean(v[:t + 1])
  if s in ('rolling', 'hybrid'): return rolling(t)
  if s == 'sequence': return mean(v)
  if s == 'sequence-rolling': return mean([rolling(t) for t in range(len(v))])
  block = t // router.block
  return mean(v[(block - 1) * router.block:block * router.block]) if block else start


def choice(config, p, u):
  """(ids, weights) of the routed chapters."""
  r, shared = p['router'], config.mixing.shared
  z = (u @ r['kernel_0'])[:, None] + (u @ r['kernel_1'])[None] if 'kernel_0' in r else u @ r['kernel']
  z = (z.ravel() + r['bias'])[shared:]
  share = np.exp(z - z.max())
  share /= share.sum()
  ids = np.argsort(-(share + r.get('selection_bias', 0)))[:config.router.top_k]
  weight = share[ids] / (share[ids].sum() if config.router.weight_norm == 'topk' else 1)
  return ids + shared, weight


def softmax(x): return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def head(config, q, groups, scales):
  """One head's read of groups of (keys, values): each of a chapter with its weight; groups = (shared ones, routed ones)."""
  (shared, routed), (scale, weights), mode = groups, scales, config.mixing.combine if config.shape.chapters else 'joint'
  logit = lambda kv: kv[0] @ q / np.sqrt(len(q))
  if mode == 'mixture':
    together = [tuple(np.concatenate(part) for part in zip(*shared, strict=True))] if shared else []
    return sum(softmax(logit(kv)) @ kv[1] for kv in together) + scale * sum(
        w * softmax(logit(kv)) @ kv[1] for w, kv in zip(weights, routed, strict=True))
  if mode == 'legacy_scale':
    u = np.r_[np.ones(len(shared)), scale * weights]
    u /= u.sum()
    scaled = [(a * k, a * v) for a, (k, v) in zip(u, [*shared, *routed], strict=True)]
    return softmax(np.concatenate([logit(kv) for kv in scaled])) @ np.concatenate([v for _, v in scaled])
  prior = np.log(scale) + (np.log(weights) if mode == 'joint_bias' else 0 * weights)
  logits = [logit(kv) for kv in shared] + [logit(kv) + b for kv, b in zip(routed, prior, strict=True)]
  return softmax(np.concatenate(logits)) @ np.concatenate([v for _, v in [*shared, *routed]])


def oracle(config, params, x, prompt=0):
  """[B, L, D], and the chapters of every token."""
  p = jax.tree.map(np.float64, params['params'])
  q, (k, v) = x @ matrix(p['query']), (entries(config, p) @ matrix(p[name]) for name in ('key', 'value'))
  K, shared = q.shape[-1] // config.heads, config.mixing.shared
  out, ids = np.zeros((*x.shape[:2], q.shape[-1])), {}
  for b, t in np.ndindex(*x.shape[:2]):
    chosen, weights = np.array([0]), np.ones(1)
    if config.shape.chapters:
      chosen, weights = choice(config, p, statistic(config.router, x[b], t, prompt, p['router'].get('start')))
    ids[b, t] = {*range(shared), *chosen.tolist()}
    for h in range(config.heads):
      g = h * (k.shape[-1] // K) // config.heads
      pick = lambda which, g=g: [(k[c][:, g * K:][:, :K], v[c][:, g * K:][:, :K]) for c in which]
      out[b, t, h * K:][:K] = head(config, q[b, t, h * K:][:K], (pick(range(shared)), pick(chosen)), (config.mixing.scale, weights))
  return out @ matrix(p['out']), ids
