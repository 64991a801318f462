"""Joins the JSON files of processes that shared one machine, each with some of the models, into one result.

  python -m benchmarks.join --name needle benchmarks/results/needle-h200.json OUT/needle-*.json
"""
import argparse
import json
import pathlib
from typing import Any

OWN = ('models', 'name', 'rates', 'batches', 'eval_batch', 'like')          # options in which the processes of one run may differ


def join(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
  """One result with the rows of all, 'module' (the benchmark that was run) and 'processes' (the arguments of each).

  Raises ValueError where their options differ in more than what each process ran.
  """
  shared = [{key: value for key, value in r['options'].items() if key not in OWN} for r in results]
  for options, result in zip(shared, results, strict=True):
    differ = [key for key in options if options[key] != shared[0].get(key)]
    if differ: raise ValueError(f'{result["benchmark"]} differs from {results[0]["benchmark"]} in {", ".join(differ)}')
  first = {key: value for key, value in results[0].items() if key not in ('arguments', 'rows', 'benchmark')}
  return {'benchmark': name, 'module': results[0]['benchmark'].partition('-')[0], 'processes': [r['arguments'] for r in results],
          **first, 'options': {key: value for key, value in results[0]['options'].items() if key not in ('models', 'name', 'like')},
          'rows': [row for r in results for row in r['rows']]}


def main(argv: list[str] | None = None) -> pathlib.Path:
  """Writes the joined file; returns its path."""
  make = argparse.ArgumentParser(prog='python -m benchmarks.join', description=__doc__)
  make.add_argument('--name', required=True, help='of the joined result')
  make.add_argument('output', type=pathlib.Path)
  make.add_argument('inputs', type=pathlib.Path, nargs='+')
  a = make.parse_args(argv)
  joined = join([json.loads(path.read_text(encoding='utf-8')) for path in a.inputs], a.name)
  a.output.write_text(json.dumps(joined, indent=1) + '\n', encoding='utf-8')
  return a.output


if __name__ == '__main__':
  main()
