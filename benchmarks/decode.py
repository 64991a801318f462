"""Tokens per second and bytes of state of greedy decoding, by context: holographic memory beside a KV cache of equal width.

Tokens fed back inside one compiled scan, the state donated, so that it can be updated in place. Contexts are filled
with random numbers: what is stored does not change the work. Memories that learn at test time rewrite their weights where a chunk is
complete, which the timed tokens include. Two models: one layer without feed-forward network, and a decoder of four layers with
one. Attention is measured in several forms, and the fastest counts: the library's, and caches in the compute dtype written for this
comparison alone: [H, K, M] in plain products (on a CPU other layouts are copied or read many times slower) and, on a GPU, [M, H, K]
through cuDNN. With --kernels neural memories also take each token by their fused kernels: first in float32 beside XLA, across the end
of a chunk, for the largest difference of logits; then, on a GPU (a CPU interprets them), as rows of their own.

  python -m benchmarks.decode --small        two CPU cores, contexts to 32k, a few minutes
  python -m benchmarks.decode                contexts to 128k
  python -m benchmarks.decode --batch 64 --contexts 32768 --layers 1 --width 1024 --kernels
"""
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, neural_models
from memjax.config.mixers import AddressConfig, AttentionConfig, HolographicConfig, KeepConfig
from memjax.config.neural import NeuralConfig
from memjax.config.schema import ModelConfig
from memjax.models.decoder import build_decoder, init_params
from memjax.ops.rope import frequencies, rotate

VOCABULARY = 256
MIXERS = {
  'holographic': HolographicConfig(),
  'holographic small_state': HolographicConfig(heads=1, slots=8, keep=KeepConfig(kind='slot', bias=4.0),
                                               address=AddressConfig(kind='sigmoid', tie=True, gate='')),
  'attention': AttentionConfig(),
}
NEURAL = {'neural': 'LMM', 'MAC': 'MAC', 'MAG': 'MAG'}      # row -> name in neural_models
PLAIN, CUDNN, KERNELS = 'attention, plain cache', 'attention, cuDNN', ', kernels'
CHECKED = 70                                                # tokens that are compared: one chunk of the neural memory and some more


def library_model(row: str, *, width: int, layers: int, dtype: str, batch: int):
  """(parameters, empty state by context, step) of a decoder whose layers are unrolled, so that no stack of caches is sliced."""
  row, kernels, _ = row.partition(KERNELS)
  config = ModelConfig(width=width, hidden=0 if layers > 1 else -1, vocabulary=VOCABULARY, pattern=(), repeats=0, dtype=dtype,
                       mixers={'memory': MIXERS.get(row, AttentionConfig())}, prefix=('memory',) * layers)
  if row in NEURAL:
    found = neural_models.model_config(NEURAL[row], width=width, layers=1, heads=8, window=512, vocabulary=VOCABULARY, dtype=dtype,
                                       aligned=False)
    config = dataclasses.replace(config, mixers=found.mixers, prefix=found.pattern * layers)
  def build(backend):
    return build_decoder(dataclasses.replace(config, mixers={name: with_backend(mixer, backend) for name, mixer in config.mixers.items()}))
  model, plain = build('pallas' if kernels else 'xla'), build('xla')      # for parameters: kernels of whole chunks take no float32
  def step(params, state, token_B, position_B):
    logits, state, _ = model.apply({'params': params}, token_B[:, None], state, position_BxL=position_B[:, None],
                                   reset_BxL=jnp.zeros((token_B.size, 1), bool))       # as the sampler does: no text begins here
    return logits[:, 0], state
  params = jax.jit(lambda key: init_params(plain, key)[0])(jax.random.key(0))
  return params, lambda context: model.init_state(batch, context), step


def with_backend(mixer: Any, backend: str) -> Any:
  """The mixer with this backend, if it is a memory that has kernels for a token."""
  if not isinstance(mixer, NeuralConfig): return mixer
  return dataclasses.replace(mixer, exec=dataclasses.replace(mixer.exec, backend=backend))


def plain_attend(q_BxHxK, k_BxHxK, v_BxHxK, cache, position_B):
  """(reads [B, H, K], cache) of one token against keys and values [B H, K, M]; all rows are at the same position.

  One batch axis: with two a CPU copies both caches for every token.
  """
  flat = lambda x: x.reshape(-1, x.shape[-1])
  put = lambda old, new: jax.lax.dynamic_update_slice(old, flat(new)[..., None], (0, 0, position_B[0]))
  keys, values = put(cache[0], k_BxHxK), put(cache[1], v_BxHxK)
  logits_NxM = jnp.einsum('nk,nkm->nm', flat(q_BxHxK), keys, preferred_element_type=jnp.float32) * q_BxHxK.shape[-1] ** -0.5
  seen = jnp.arange(keys.shape[2])[None] <= position_B[0]
  weight_NxM = jax.nn.softmax(jnp.where(seen, logits_NxM, -jnp.inf), -1).astype(q_BxHxK.dtype)
  return jnp.einsum('nm,nkm->nk', weight_NxM, values).reshape(q_BxHxK.shape), (keys, values)


def cudnn_attend(q_BxHxK, k_BxHxK, v_BxHxK, cache, position_B):
  """The same for keys and values [B, M, H, K], through cuDNN."""
  put = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, position_B[0], 0, 0))
  cache = put(cache[0], k_BxHxK), put(cache[1], v_BxHxK)
  y = jax.nn.dot_product_attention(q_BxHxK[:, None], *cache, key_value_seq_lengths=position_B + 1, implementation='cudnn')
  return y[:, 0], cache


def plain_model(row: str = PLAIN, *, width: int, layers: int, dtype: str, batch: int, heads: int = 8):
  """The same for a plain cache; weights are random, shapes those of the library's decoder."""
  K, hidden = width // heads, -(-8 * width // 96) * 32 if layers > 1 else 0
  shapes = {'qkv': (width, 3 * width), 'out': (width, width)}
  if hidden: shapes |= {'up': (width, 2 * hidden), 'down': (hidden, width)}
  draw = lambda name, shape: jax.random.normal(jax.random.key(len(name)), shape) * shape[-2] ** -0.5
  params = {name: draw(name, (layers, *shape)) for name, shape in shapes.items()} | {'embed': draw('embed', (VOCABULARY, width))}
  norm = lambda x: (x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)).astype(dtype)

  def attend(layer, x_BxD, cache, position_B):
    q, k, v = jnp.split((x_BxD @ layer['qkv'].astype(dtype)).reshape(batch, 1, 3 * heads, K), 3, 2)
    q, k = (rotate(a, position_B[:, None], frequencies(K, 10_000.0)) for a in (q, k))
    y, cache = (plain_attend if row == PLAIN else cudnn_attend)(q[:, 0], k[:, 0], v[:, 0], cache, position_B)
    return y.reshape(batch, -1) @ layer['out'].astype(dtype), cache

  def step(params, state, token_B, position_B):
    x, new = params['embed'][token_B].astype(dtype), []
    for number, cache in enumerate(state):
      layer = {name: params[name][number] for name in shapes}
      y, cache = attend(layer, norm(x), cache, position_B)
      x, new = x + y, [*new, cache]
      if hidden:
        gate, up = jnp.split(norm(x) @ layer['up'].astype(dtype), 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ layer['down'].astype(dtype)
    return norm(x) @ params['embed'].T.astype(dtype), tuple(new)
  shape = lambda context: (batch * heads, K, context) if row == PLAIN else (batch, context, heads, K)
  return params, lambda context: ((jnp.zeros(shape(context), dtype),) * 2,) * layers, step


def filled(empty, context: int, ahead: int):
  """A state as after context - ahead tokens: small random floats, counters set, chunks and segments at their start."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: empty(context)))
  def fill(number, path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.integer): return 0.01 * jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype)
    return jnp.full(leaf.shape, 0 if 'slot' in jax.tree_util.keystr(path) else context - ahead, leaf.dtype)
  return jax.tree.unflatten(tree, [fill(number, *leaf) for number, leaf in enumerate(leaves)])


def decode(step, tokens: int, params, state, token_B, position_B):
  """(state, last token, position) after `tokens` greedy tokens."""
  def body(carry, _):
    state, token_B, position_B = carry
    logits, state = step(params, state, token_B, position_B)
    return (state, jnp.argmax(logits, -1).astype(jnp.int32), position_B + 1), None
  return jax.lax.scan(body, (state, token_B, position_B), None, length=tokens)[0]


def compile_all(models: dict[str, tuple], contexts: list[int], tokens: int, batch: int) -> dict[tuple[str, int], common.Case]:
  """The decoding of every row at every context; one compilation serves all contexts where the state has one shape."""
  jobs, like = {}, {}
  one = jax.ShapeDtypeStruct((batch,), jnp.int32)
  for row, (params, empty, step) in models.items():
    for context in contexts:
      state = jax.eval_shape(functools.partial(empty, context))
      shape = (row, str(state))
      like[row, context] = shape
      jobs[shape] = functools.partial(decode, step, tokens), (params, state, one, one)
  cases = common.compile_cases(jobs, donate_argnums=(1,))
  return {key: cases[shape] for key, shape in like.items()}


def measure(model, case: common.Case, context: int, *, tokens: int, repeats: int, batch: int) -> dict[str, Any]:
  """{'tokens_per_second', 'state_bytes', 'temporary_mib', ...} at one context; the first call is left out."""
  params, empty, _ = model
  state = filled(empty, context, tokens * (repeats + 1))
  carry = (state, jnp.zeros((batch,), jnp.int32), jnp.full((batch,), context - tokens * (repeats + 1), jnp.int32))
  del state                                              # the calls give its memory away
  times = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    carry = jax.block_until_ready(case.call(params, *carry))
    times.append(time.perf_counter() - started)
  seconds = statistics.median(times[1:])
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry[0]))
  return {'tokens_per_second': batch * tokens / seconds, 'best': batch * tokens / min(times[1:]), 'us_per_token': 1e6 * seconds / tokens,
          'state_bytes': size, 'temporary_mib': case.temporary_mib, 'compile_s': case.compile_s}


def compare(row: str, **sizes: Any) -> float:
  """The largest difference between logits by kernels and by XLA in float32, over the largest logit."""
  token_LxB = jax.random.randint(jax.random.key(1), (CHECKED, sizes['batch']), 0, VOCABULARY)
  def logits(row):
    params, empty, step = library_model(row, **sizes, dtype='float32')
    def body(state, item):
      logits, state = step(params, state, item[1], jnp.full((sizes['batch'],), item[0]))
      return state, logits
    return jax.jit(lambda state: jax.lax.scan(body, state, (jnp.arange(CHECKED), token_LxB))[1])(empty(CHECKED))
  with jax.default_matmul_precision('highest'): ours, plain = logits(row + KERNELS), logits(row)
  return float(jnp.abs(ours - plain).max() / jnp.abs(plain).max())


def targets(rows: list[dict[str, Any]], batch: int = 1) -> list[dict[str, Any]]:
  """>= 5 times the fastest attention at 32k (10 in batches), and a state that does not grow; None where this run lacks a row."""
  out = []
  for layers in sorted({r['layers'] for r in rows}):
    at = {r['row']: r['tokens_per_second'] for r in rows if r['layers'] == layers and r['context'] == 32768}
    peers = [value for row, value in at.items() if row.startswith('attention')]
    out.append({'what': f'{layers} layers, context 32768: holographic over the fastest attention', 'target': 10.0 if batch > 1 else 5.0,
                'value': at['holographic'] / max(peers) if peers and 'holographic' in at else None})
  speed = {(r['layers'], r['context'], r['row']): r['tokens_per_second'] for r in rows}
  out += [{'what': f'{layers} layers, context {context}: {row} over that by XLA', 'target': 1.0,
           'value': value / speed[layers, context, row.removesuffix(KERNELS)]}
          for (layers, context, row), value in speed.items() if (layers, context, row.removesuffix(KERNELS)) in speed and KERNELS in row]
  if len({r['context'] for r in rows}) == 1: return out
  for row in ('holographic', 'neural'):
    sizes = [r['state_bytes'] for r in rows if r['row'] == row and r['layers'] == 1]
    out.append({'what': f'{row} state, smallest over largest context (1 = constant)', 'target': 1.0,
                'value': min(sizes) / max(sizes) if sizes else None})
  for layers in sorted({r['layers'] for r in rows if r['row'] == 'neural'}):
    speed = {r['context']: r['tokens_per_second'] for r in rows if r['row'] == 'neural' and r['layers'] == layers}
    out.append({'what': f'{layers} layers: neural, tokens/s at context {max(speed)} over those at {min(speed)}', 'target': 0.9,
                'value': speed[max(speed)] / speed[min(speed)]})
  return out


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the tables; returns the result."""
  make = common.parser('decode', __doc__)
  make.add_argument('--contexts', type=common.numbers, default=[])
  make.add_argument('--layers', type=common.numbers, default=[1, 4])
  make.add_argument('--width', type=int, default=512)
  make.add_argument('--batch', type=int, default=1, help='rows decoded together')
  make.add_argument('--tokens', type=int, default=0, help='tokens a timed call; default 64 (CPU), 128 (GPU)')
  make.add_argument('--repeats', type=int, default=3)
  make.add_argument('--rows', type=lambda text: text.split(';'), default=[], help='names of rows, separated by ;')
  make.add_argument('--kernels', action='store_true', help='compares fused kernels with XLA, and on a GPU measures both')
  a = make.parse_args(argv)
  contexts = a.contexts or ([1024, 8192, 32768] if a.small else [1024, 4096, 16384, 32768, 65536, 131072])
  dtype, tokens = ('bfloat16', a.tokens or 128) if common.on_gpu() else ('float32', a.tokens or 64)
  rows, names = [], a.rows or [*MIXERS, *NEURAL, PLAIN, *([CUDNN] if common.on_gpu() else [])]
  fused = [row for row in names if a.kernels and row in NEURAL]
  checks = [{'row': row, 'batch': a.batch, 'difference': compare(row, width=a.width, layers=1, batch=a.batch)} for row in fused]
  if checks: common.show('Kernels and XLA, float32, 1 layer', checks, ('row', 'batch', 'difference'))
  if common.on_gpu(): names += [row + KERNELS for row in fused]
  for layers in a.layers:
    sizes = dict(width=a.width, layers=layers, dtype=dtype, batch=a.batch)
    models = {row: (plain_model if row in (PLAIN, CUDNN) else library_model)(row, **sizes) for row in names}
    cases = compile_all(models, contexts, tokens, a.batch)
    table = [{'layers': layers, 'row': row, 'context': context,
              **measure(model, cases[row, context], context, tokens=tokens, repeats=a.repeats, batch=a.batch)}
             for context in contexts for row, model in models.items()]
    title = f'Decoding, batch {a.batch}, width {a.width}, {layers} layer{"s" if layers > 1 else ""}, {dtype}'
    common.show(title, table, ('context', 'row', 'tokens_per_second', 'us_per_token', 'state_bytes', 'temporary_mib', 'compile_s'))
    rows += table
  judged = targets(rows, a.batch)
  common.judge(judged)
  result = {'dtype': dtype, 'width': a.width, 'batch': a.batch, 'tokens': tokens, 'repeats': a.repeats, 'seeds': [0], 'rows': rows,
            'checks': checks, 'targets': judged}
  common.save('decode', a.output, result, commit=a.commit)
  return result


if __name__ == '__main__':
  main()
