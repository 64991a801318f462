"""Prefill seconds and tokens per second of greedy decoding with a pretrained host, beside transformers in the same run.

Both sides hold the same weights and are given the same prompts; they take turns, so that a busy machine hits both. Theirs is the
better of a dynamic and a static cache (and, with --compiled, of a static one under torch.compile), and counts where torch and
transformers are installed. The floor is the time in which the weights can be read once.

  python -m benchmarks.decode_host --model SmolLM2-135M-Instruct.Q4_1.gguf --small      CPU, prompts of 37 tokens
  python -m benchmarks.decode_host --model FOLDER --dtype bfloat16                      GPU
"""
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from memjax.adapters.graft import open_host as open_tensors
from memjax.adapters.pretrained import read_json
from memjax.runtime.host import open_host
from memjax.runtime.sampling import Sampler, Sampling

OURS = 'memjax'
HAS_PEER = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def make_prompts(vocabulary: int, batch: int, length: int) -> list[np.ndarray]:
  """Random tokens: what they are does not change the work."""
  return list(np.random.default_rng(length).integers(0, vocabulary, (batch, length)).astype(np.int32))


class Ours:
  """The library's sampler: a prefill, then chunks of tokens."""

  def __init__(self, host: Any):
    self.host, self.sampler = host, Sampler(host.model, Sampling(temperature=0.0))

  def run(self, prompts: list[np.ndarray], tokens: int) -> tuple[float, float, np.ndarray]:
    """(seconds of the prefill, seconds a step, the tokens)."""
    started = time.perf_counter()
    session = jax.block_until_ready(self.sampler.start(self.host.params, prompts, prompts[0].size + tokens))
    middle, out, row_B = time.perf_counter(), [], jnp.arange(len(prompts))
    for _ in range(0, tokens, self.sampler.chunk):
      session, token_BxN = self.sampler.advance(self.host.params, session, row_B)
      out.append(token_BxN)
    out = np.concatenate(out, 1)
    return middle - started, (time.perf_counter() - middle) / out.shape[1], out


class Theirs:
  """The same model in transformers on torch."""

  def __init__(self, path: str, dtype: str, *, compiled: bool):
    import torch
    import transformers
    config, tensors = open_tensors(path)
    tree = read_json(os.path.join(path, 'config.json')) if os.path.isdir(path) else tensors.tree
    tree = {**tree, 'tie_word_embeddings': config.embedding.tie}
    self.torch, self.device = torch, 'cuda' if common.on_gpu() else 'cpu'
    settings = transformers.AutoConfig.for_model(**{key: value for key, value in tree.items() if value is not None})
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    state = {name: torch.from_numpy(np.array(tensors.read(name)).astype(np.float32)) for name in tensors.names}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or set(missing) - {'lm_head.weight'}: raise ValueError(f'transformers lacks {unknown}, misses {missing}')
    self.model = model.to(self.device).eval()
    self.caches = {'dynamic': transformers.DynamicCache, 'static': transformers.StaticCache}
    self.fast = torch.compile(self.model, mode='reduce-overhead' if common.on_gpu() else 'default') if compiled else None
    if compiled: self.caches['compiled'] = transformers.StaticCache

  def run(self, kind: str, prompts: list[np.ndarray], tokens: int) -> tuple[float, float, np.ndarray]:
    """(seconds of the prefill, seconds a step, the tokens) with this cache."""
    torch, length = self.torch, prompts[0].size
    step = self.fast if kind == 'compiled' else self.model
    more = {} if kind == 'dynamic' else {'max_cache_len': length + tokens}
    cache, out = self.caches[kind](config=self.model.config, **more), []
    place = lambda at, size: torch.arange(at, at + size, device=self.device)
    with torch.inference_mode() if kind != 'compiled' else torch.no_grad():
      started = time.perf_counter()
      ids = torch.from_numpy(np.stack(prompts)).long().to(self.device)
      logits = self.model(ids, past_key_values=cache, cache_position=place(0, length), logits_to_keep=1).logits
      self.wait()
      middle = time.perf_counter()
      for number in range(tokens):
        ids = logits[:, -1].argmax(-1, keepdim=True)
        out.append(ids.clone())
        if kind == 'compiled': torch.compiler.cudagraph_mark_step_begin()
        logits = step(ids, past_key_values=cache, cache_position=place(length + number, 1)).logits
      self.wait()
      return middle - started, (time.perf_counter() - middle) / tokens, torch.cat(out, 1).cpu().numpy()

  def wait(self) -> None:
    """Until the device is done."""
    if self.device == 'cuda': self.torch.cuda.synchronize()


def bandwidth(size: int) -> float:
  """Bytes a second that this machine reads, from sums of an array of `size` bytes: the best of five."""
  x = jnp.ones((max(size // 4096, 1), 1024), jnp.float32)
  read = jax.jit(lambda x: x.sum())
  jax.block_until_ready(read(x))
  times = []
  for _ in range(5):
    started = time.perf_counter()
    jax.block_until_ready(read(x))
    times.append(time.perf_counter() - started)
  return x.nbytes / min(times)


def measure(runs: dict[str, Callable], prompts: list[np.ndarray], *, tokens: int, repeats: int) -> list[dict[str, Any]]:
  """A row for each of `runs`: medians over the repeats, the first of which compiles and is left out."""
  prefill, step, out = {}, {}, {}
  for number in range(repeats + 1):
    for name, run in runs.items():
      first, each, out[name] = run(prompts, tokens)
      print(f'{len(prompts)} x {prompts[0].size}, {name}: prefill {1000 * first:.1f} ms, {1000 * each:.2f} ms a step', flush=True)
      if number: prefill.setdefault(name, []).append(first), step.setdefault(name, []).append(each)
  ours = out[OURS][:, :tokens]
  return [{'row': name, 'batch': len(prompts), 'prompt': prompts[0].size, 'prefill_ms': 1000 * statistics.median(prefill[name]),
           'tokens_per_second': len(prompts) / statistics.median(step[name]), 'best': len(prompts) / min(step[name]),
           'ms_per_step': 1000 * statistics.median(step[name]), 'same_tokens': float((out[name][:, :tokens] == ours).mean())}
          for name in runs]


def targets(rows: list[dict[str, Any]], wanted: float, *, tokens: int = 0) -> list[dict[str, Any]]:
  """Ours over the better of theirs, at each batch and prompt: steps, and with `tokens` also a prefill with as many; None where
  theirs did not run."""
  judged, parts = [], {'decode': lambda row: row['batch'] / row['tokens_per_second']}
  if tokens: parts[f'prefill and {tokens} tokens'] = lambda row: row['prefill_ms'] / 1000 + tokens * parts['decode'](row)
  for batch, prompt in dict.fromkeys((row['batch'], row['prompt']) for row in rows):
    here = {row['row']: row for row in rows if (row['batch'], row['prompt']) == (batch, prompt)}
    for what, seconds in parts.items():
      best = min((seconds(row) for name, row in here.items() if name != OURS), default=None)
      judged.append({'what': f'{what}, batch {batch}, prompt {prompt}: memjax over transformers', 'target': wanted,
                     'value': best / seconds(here[OURS]) if best else None})
  return judged


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs, prints and saves the table; returns the result."""
  make = common.parser('decode_host', __doc__)
  make.add_argument('--model', required=True, help='GGUF file or Hugging Face folder')
  make.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of weights and computation, both sides')
  make.add_argument('--batches', type=common.numbers, default=[1, 8])
  make.add_argument('--prompts', type=common.numbers, default=[], help='tokens of the prompts; default 37,512, or 37 with --small')
  make.add_argument('--tokens', type=int, default=64, help='tokens a run')
  make.add_argument('--repeats', type=int, default=5)
  make.add_argument('--compiled', action='store_true', help='measures transformers under torch.compile as well')
  make.add_argument('--alone', action='store_true', help='measures the library alone')
  a = make.parse_args(argv)
  host = open_host(a.model, dtype=a.dtype)
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(host.params))
  runs, versions = {OURS: Ours(host).run}, {}
  if HAS_PEER and not a.alone:
    peer = Theirs(a.model, a.dtype, compiled=a.compiled)
    if not common.on_gpu(): peer.torch.set_num_threads(len(os.sched_getaffinity(0)))
    runs |= {f'transformers {kind}': lambda *given, kind=kind: peer.run(kind, *given) for kind in peer.caches}
    versions = {'torch': peer.torch.__version__, 'transformers': importlib.import_module('transformers').__version__}
  speed, rows = bandwidth(weights), []
  for prompt in a.prompts or ([37] if a.small else [37, 512]):
    for batch in a.batches:
      rows += measure(runs, make_prompts(host.tokenizer.vocabulary, batch, prompt), tokens=a.tokens, repeats=a.repeats)
  common.show(f'{os.path.basename(a.model)}, {a.dtype}: {weights / 1e6:.0f} MB of weights, {speed / 1e9:.1f} GB/s, '
              f'floor {1000 * weights / speed:.2f} ms a step', rows,
              ('prompt', 'batch', 'row', 'prefill_ms', 'ms_per_step', 'tokens_per_second', 'best', 'same_tokens'))
  judged = targets(rows, 3.0, tokens=a.tokens) if common.on_gpu() else targets(rows, 1.0)
  common.judge(judged)
  result = {'model': os.path.basename(a.model), 'dtype': a.dtype, 'weight_bytes': weights, 'read_bytes_per_second': speed,
            'floor_ms': 1000 * weights / speed, 'tokens': a.tokens, 'repeats': a.repeats, 'versions': versions, 'rows': rows,
            'targets': judged}
  common.save('decode_host', a.output, result, commit=a.commit)
  return result


if __name__ == '__main__':
  main()
