"""Folders as Hugging Face writes them, made without its libraries, and the reference models of make_references."""
import functools
import json
import struct

import jax.numpy as jnp
import numpy as np

from tests.adapters.make_references import DATA, weights

TYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'float64': 'F64', 'int8': 'I8'}


def safetensors(tensors, **changes):
  """The bytes of a file; `changes` replaces entries of the header (None removes one)."""
  header, data = {'__metadata__': {'format': 'pt'}}, b''
  for name, value in tensors.items():
    raw = np.ascontiguousarray(value).tobytes()
    header[name] = {'dtype': TYPES[value.dtype.name], 'shape': list(value.shape), 'data_offsets': [len(data), len(data) + len(raw)]}
    data += raw
  header = {name: entry for name, entry in {**header, **changes}.items() if entry is not None}
  return framed(json.dumps(header).encode(), data)


def framed(header, data=b''):
  """A file of any header."""
  return struct.pack('<Q', len(header)) + header + data


def write_folder(folder, config, tensors, *, shards=1, dtype='float32'):
  """config.json and the tensors in one file, or dealt out over shards with an index; `dtype` may go by name."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  kind = lambda name: jnp.dtype(dtype[name] if isinstance(dtype, dict) else dtype)
  tensors = {name: np.asarray(value).astype(kind(name)) for name, value in tensors.items()}
  if shards == 1:
    (folder / 'model.safetensors').write_bytes(safetensors(tensors))
    return str(folder)
  names = [f'model-{i + 1:05}-of-{shards:05}.safetensors' for i in range(shards)]
  homes = {name: names[i % shards] for i, name in enumerate(tensors)}
  for shard in names: (folder / shard).write_bytes(safetensors({n: v for n, v in tensors.items() if homes[n] == shard}))
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {'total_size': 0}, 'weight_map': homes}))
  return str(folder)


@functools.cache
def cases():
  """{case: {'config', 'older', 'shapes'}}."""
  return json.loads((DATA / 'cases.json').read_text())


@functools.cache
def tensors_of(case):
  """The weights of a case by their Hugging Face names."""
  return weights(case, cases()[case]['shapes'])


def reference(case):
  """{'logits', 'loss', 'gradient/NAME'} that transformers computed."""
  with np.load(DATA / 'references.npz') as stored:
    return {name.removeprefix(f'{case}/'): stored[name] for name in stored.files if name.startswith(f'{case}/')}
