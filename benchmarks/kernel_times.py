"""Where the time of a compiled program goes on a GPU: a trace of it, summed up by kernel, by part of the model and by kind of work."""
import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

SCOPE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{.*?op_name="([^"]*)"', re.MULTILINE)
# The first pattern found in the scope of an operation names its part.
PARTS = (('loss and head', r'headless|Embed\.attend|head_losses|while/body.*_scores|/head'), ('feed-forward', r'/mlp'), ('norms', r'norm'),
         ('window', r'mixers/near'), ('attention', r'mixers/attention'), ('holographic', r'mixers/slots'), ('neural', r'mixers/learns'),
         ('embedding', r'embed'))
# The first pattern found in the name of a kernel names its kind.
KINDS = (('attention', r'cudnn|fmha|flash|sdpa'), ('pallas', r'write_kernel|read_kernel|back_kernel|pallas|push_|pull_'),
         ('matmul', r'nvjet|gemm|cublas|cutlass|xmma|dot'), ('copy', r'memcpy|memset|copy|transpose|concat'), ('reduce', r'reduce'),
         ('elementwise', r'fusion|loop|wrapped|input'))


def first(table: tuple, text: str) -> str:
  """The name of the first pattern of the table in the text, or 'other'."""
  return next((name for name, pattern in table if re.search(pattern, text, re.IGNORECASE)), 'other')


def scopes(program: Any) -> dict[str, str]:
  """{operation: its path in the model} of a compiled program."""
  return {name.replace('.', '_').replace('-', '_'): scope for name, scope in SCOPE.findall(program.as_text())}


def events(call: Callable[[], Any]) -> list[tuple[str, dict[str, Any], float]]:
  """(name, facts, milliseconds) of what ran on the first device during a call; on a CPU of what its threads ran."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder): jax.block_until_ready(call())
    path = next(pathlib.Path(folder).rglob('*.xplane.pb'))
    data, found = jax.profiler.ProfileData.from_file(str(path)), []
    planes = [plane for plane in data.planes if '/device:GPU' in plane.name]
    for plane in planes[:1]:
      for line in plane.lines:
        if 'Stream' not in line.name: continue           # others repeat the same time by module and by operation
        found += [(event.name, dict(event.stats), event.duration_ns / 1e6) for event in line.events]
  return found


def summarise(rows: list[tuple[str, dict[str, Any], float]], where: dict[str, str], steps: int) -> dict[str, Any]:
  """{'ms', 'parts', 'kinds', 'both', 'kernels'}: milliseconds a step in all, by part, by kind, by both, and of the 40 longest kernels."""
  parts, kinds, both, kernels, count = (collections.Counter() for _ in range(5))
  for name, facts, ms in rows:
    operation = str(facts.get('hlo_op', name)).replace('.', '_').replace('-', '_')
    scope = where.get(operation) or where.get(name.replace('.', '_')) or str(facts.get('name', ''))
    part, kind = first(PARTS, scope) if scope else 'unknown', first(KINDS, f'{name} {operation}')
    label = f'{name[:60]} | {operation[:40]} | {scope[-90:]}'
    for table, key in ((parts, part), (kinds, kind), (both, f'{part}: {kind}'), (kernels, label)): table[key] += ms / steps
    count[label] += 1 / steps
  top = [{'kernel': name, 'ms': ms, 'calls': count[name]} for name, ms in kernels.most_common(40)]
  return {'ms': sum(kinds.values()), 'parts': dict(parts.most_common()), 'kinds': dict(kinds.most_common()),
          'both': dict(both.most_common(40)), 'kernels': top}


def show(title: str, found: dict[str, Any]) -> None:
  """Prints a summary."""
  print(f'\n{title}: {found["ms"]:.1f} ms of kernels a step')
  for table in ('parts', 'kinds', 'both'):
    print(f'{table}: ' + ', '.join(f'{name} {ms:.2f}' for name, ms in found[table].items()), flush=True)
  for row in found['kernels']: print(f'  {row["ms"]:8.3f} ms {row["calls"]:6.0f} x  {row["kernel"]}', flush=True)
