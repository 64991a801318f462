"""Three steps of training and sixteen greedy tokens of each shipped config, kept in a JSON file beside this one.

python -m tests.golden [NAME ...]       writes them anew: only after a change that is meant to change results
"""
import json
from pathlib import Path

import jax
import numpy as np

from memjax.config.flags import load
from memjax.data.pipeline import train_batches
from memjax.data.tokenizers import make_tokenizer
from memjax.data.tokens import tokenize_split
from memjax.runtime import sharding
from memjax.runtime.sampling import Sampler, Sampling
from memjax.runtime.state import init_state, make_train_step
from memjax.runtime.workdir import fill_vocabulary
from memjax.train import build

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parent.parent / 'configs'
STEPS, TOKENS, PROMPT = 3, 16, 'ROMEO:'
ROWS = ('training.batch=2', 'training.length=64')
SMALL = (*ROWS, 'model.width=32', 'model.hidden=48', 'model.repeats=1')
NEURAL = ('model.mixers.near.heads=4', 'model.mixers.mem.heads=4')
FAST = lambda *groups: tuple(f'optimizer.groups.{group}.{field}' for group in groups for field in ('rate=1e-2', 'warmup=2'))
NUMBERS = (*SMALL, 'model.vocabulary=256', 'model.dtype=float32', 'training.accumulate=1', *FAST('main'), 'data.tokenizer.kind=bytes',
           'data.tokenizer.size=0')
PLAIN = (*SMALL, 'model.mixers.attention.heads=4', 'model.vocabulary=256', 'model.dtype=float32', 'training.accumulate=1',
         'data.tokenizer.kind=bytes', 'data.tokenizer.size=0', *FAST('base'))
BANK = (*PLAIN, 'model.mixers.bank.heads=4', 'model.mixers.bank.shape.entries=64', *FAST('memory', 'memory_bank'))
HOSTED = (*SMALL, 'model.vocabulary=256', *(f'model.mixers.attention.{field}' for field in ('heads=4', 'kv_heads=2', 'head_width=8')))
READ = (*(f'model.mixers.memory.{field}' for field in ('heads=4', 'kv_heads=2', 'shape.entries=64')), *FAST('memory', 'memory_bank'))
# What differs from the shipped config, so that it takes seconds and needs no text but the bundled one.
OVERRIDES = {
    'tiny': ROWS,
    'default': (*ROWS, 'model.width=64', 'model.repeats=1'),
    'hamt_small': (*SMALL, 'evaluation.length=512'),
    'attention_small': (*SMALL, 'evaluation.length=512'),
    'hamt_seed': (*SMALL, 'model.vocabulary=256', 'model.mixers.seed.key_width=48'),
    'mat_tiny': ROWS,
    'mat_small': BANK,
    'vanilla_control': PLAIN,
    'moc_371m': (*BANK, 'model.mixers.attention.kv_heads=2', 'model.mixers.bank.kv_heads=4', 'model.mixers.bank.shape.entries=68',
                 'model.mixers.bank.shape.chapters=17', 'model.mixers.bank.router.top_k=4'),
    'adapter_smollm2_135m': (*HOSTED, *READ),
    'adapter_qwen2p5_1p5b': (*HOSTED, *READ, 'model.dtype=float32', 'model.prefix=attention,memory:bare', 'model.suffix='),
    'lora_only': (*HOSTED, *FAST('lora')),
    'memory_lora_combined': (*HOSTED, *READ, *FAST('lora')),
    'titans_tiny': ROWS,
    'titans_linear_exact': (*SMALL, 'evaluation.length=512'),
    **{f'titans_{kind}_170m': (*NUMBERS, *NEURAL, 'model.mixers.near.window=32', 'model.mixers.mem.chunk=16')
       for kind in ('mac', 'mag', 'mal')},
    'attention_150m': (*NUMBERS, 'model.mixers.attention.heads=4'),
    'hybrid_150m': (*NUMBERS, *(f'model.mixers.{field}' for field in (
        'near.heads=4', 'near.window=32', 'slots.heads=4', 'slots.slots=4', 'learns.heads=4', 'learns.key_width=8', 'learns.chunk=16'))),
    'wikitext2': (*SMALL, 'data.source=shakespeare', 'data.hub=', 'data.separator=\n\n\n', 'data.tokenizer.kind=bytes'),
}


def compute(name: str, cache: str) -> dict:
  """{'jax', 'loss' of each step, 'token' drawn greedily after them}; token files are kept in the folder `cache`."""
  config = load(CONFIGS / f'{name}.py', *OVERRIDES[name], 'mesh.data=1', f'data.cache={cache}')
  tokenizer = make_tokenizer(config.data)
  parts = build(fill_vocabulary(config, tokenizer), tokenizer)
  losses, batches = [], train_batches(tokenize_split(config.data, tokenizer, 'train'), parts.config, 0)
  with jax.set_mesh(parts.mesh):
    state = init_state(parts.model, parts.optimizer, parts.config, parts.abstract)
    step = make_train_step(parts.model, parts.optimizer, parts.config, parts.abstract)
    for _ in range(STEPS):
      state, metrics = step(state, sharding.put_batch(next(batches), parts.mesh))
      losses.append(float(metrics['loss']))
    sampler = Sampler(parts.model, Sampling(temperature=0.0), chunk=TOKENS)
    token_BxL = np.concatenate(list(sampler.stream(state.params, [tokenizer.encode(PROMPT)], TOKENS)), 1)
  return {'jax': jax.__version__, 'loss': losses, 'token': token_BxL[0].tolist()}


def read(name: str) -> dict:
  """What was kept."""
  return json.loads((FOLDER / f'{name}.json').read_text())
