"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer`, whose names of cuts it goes by."""
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memjax.config.errors import UserError, shown
from memjax.data.gguf_tokenizer import CONTROL, NORMAL, PRE, PREFIX, UNUSED, USER, gguf_tokenizer
from memjax.data.subword import SubwordTokenizer

PARTS = ('normalizer', 'pre_tokenizer')
SETTINGS = ('ignore_merges', 'byte_fallback', 'dropout')          # of byte-level BPE; a cut may ask for the first
FILLER = '[PAD{}]'                                                 # rows of the embedding that no token has, as llama.cpp calls them


def gguf_vocabulary(tokenizer: SubwordTokenizer, rows: int) -> dict[str, Any]:
  """`tokenizer.ggml.*` of a byte-level BPE for an embedding of `rows` rows: tokens, their kinds, merges and the name of the cut.

  Raises UserError for another model of tokens and for a cut that has no name.
  """
  tree = json.loads(tokenizer.inner.to_str())
  if tree['model'].get('type') != 'BPE' or (tree.get('decoder') or {}).get('type') != 'ByteLevel':
    raise UserError(f'GGUF is written with byte-level BPE alone; the tokenizer is {shown(tree["model"].get("type"))} '
                    f'with the decoder {shown((tree.get("decoder") or {}).get("type"))}')
  added = {token['id']: CONTROL if token['special'] else USER for token in tree['added_tokens']}
  texts = {index: text for text, index in tokenizer.inner.get_vocab(with_added_tokens=True).items()}
  if max(texts) >= rows: raise UserError(f'the tokenizer has {max(texts) + 1} tokens, the embedding {rows} rows')
  kinds = [added.get(index, NORMAL) if index in texts else UNUSED for index in range(rows)]
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in tree['model']['merges']]
  found = {'model': 'gpt2', 'pre': cut_name(tree), 'tokens': [texts.get(index, FILLER.format(index)) for index in range(rows)],
           'token_type': np.array(kinds, np.int32), 'merges': merges, 'add_space_prefix': False}
  return {f'{PREFIX}{name}': value for name, value in found.items()}


def gguf_ends(ends: Sequence[int], first: int) -> dict[str, int]:
  """The keys of the tokens that end a text or a turn, `first` as eos where it is one of them.

  Raises UserError for more than the three that GGUF has keys for.
  """
  ends = sorted(dict.fromkeys(ends), key=lambda token: token != first)
  kinds = ('eos', 'eot', 'eom')
  if len(ends) > len(kinds): raise UserError(f'GGUF has keys for {len(kinds)} tokens that end a text; there are {len(ends)}: {shown(ends)}')
  return {f'{PREFIX}{kind}_token_id': token for kind, token in zip(kinds, ends, strict=False)}


def cut_name(tree: Mapping[str, Any]) -> str:
  """The `tokenizer.ggml.pre` whose normaliser, cut and settings are those of a tokenizer.json. Raises UserError where none is."""
  wanted = _rules(tree)
  for name in PRE:
    keys = {'model': 'gpt2', 'pre': name, 'tokens': ['a'], 'merges': [], 'bos_token_id': 0}
    if _rules(json.loads(gguf_tokenizer({PREFIX + key: value for key, value in keys.items()}).inner.to_str())) == wanted: return name
  said = json.dumps({part: tree.get(part) for part in PARTS})
  raise UserError(f'GGUF has no name for how the tokenizer cuts text, {shown(said, 120)}; known are {", ".join(PRE)}')


def _rules(tree: Mapping[str, Any]) -> list:
  """What decides the cut, without what only moves offsets."""
  return [_bare(tree.get(part)) for part in PARTS] + [tree['model'].get(name) or False for name in SETTINGS]


def _bare(part: Any) -> Any:
  """A normaliser or cut without trim_offsets; a sequence of one is that one, of none nothing."""
  if isinstance(part, list): return [_bare(one) for one in part]
  if not isinstance(part, dict): return part
  for inner in ('pretokenizers', 'normalizers'):
    if part.get('type') != 'Sequence' or inner not in part: continue
    steps = _bare(part[inner])
    return steps[0] if len(steps) == 1 else {'type': 'Sequence', 'steps': steps} if steps else None
  return {name: _bare(value) for name, value in part.items() if name != 'trim_offsets'}
