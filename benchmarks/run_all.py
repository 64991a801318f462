"""Runs every benchmark at a size for the machine, each in a process of its own, and writes docs/numbers.md from their JSON.

A CPU gets the small sizes, an accelerator the full ones. Texts are the plays in the package. What needs a pretrained host or texts of
your own is left out, and said so, unless --set gives it. A benchmark that fails is named at the end, and the others still run.

  python -m benchmarks.run_all --list
  python -m benchmarks.run_all [--small] [--only holographic,recall] [--set decode_host='--model MODEL.gguf']
"""
import argparse
import lzma
import pathlib
import re
import shlex
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
CORPUS = ROOT / 'memjax' / 'data' / 'corpora'
TEXT = pathlib.Path('runs') / 'benchmarks'                # from the root: commands in the page name no folder of a machine
SPLITS = {'train': 'train', 'valid': 'val', 'test': 'test'}
TOOLS = ('join', 'report', 'run_all')
TEXTS = ('banks', 'language')                             # these take a training, a validation and a test text
NEEDS = {'adapters': '--host MODEL --target FOLDER --other FOLDER', 'decode_host': '--model MODEL'}
SIZES = {'resume': ('--kills 2 --steps 20', '')}          # (small, full), where these are not '--small' and ''


def benchmarks() -> dict[str, str]:
  """{name: first line of its description} of every program of this folder that measures something."""
  found = {}
  for path in sorted(HERE.glob('[a-z]*.py')):
    text = path.read_text(encoding='utf-8')
    if path.stem not in TOOLS and "if __name__ == '__main__'" in text:
      found[path.stem] = re.match(r'"""(.*?)(?:(?<! al)\.\s|\n\n|:\s|"""|$)', text, re.S)[1].replace('\n', ' ')
  return found


def write_texts() -> list[str]:
  """The words that name the training, validation and test text, unpacked into runs/benchmarks."""
  words = ['--name', 'shakespeare']
  (ROOT / TEXT).mkdir(parents=True, exist_ok=True)
  for split, name in SPLITS.items():
    (ROOT / TEXT / f'{split}.txt').write_bytes(lzma.decompress((CORPUS / f'shakespeare.{name}.xz').read_bytes()))
    words += [f'--{split}', str(TEXT / f'{split}.txt')]
  return words


def machine() -> tuple[str, bool]:
  """(short name of the device, whether it is a GPU), asked in another process: this one must not hold the device."""
  ask = 'from benchmarks import common; print(common.machine(), int(common.on_gpu()))'
  done = subprocess.run([sys.executable, '-c', ask], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
  name, gpu = done.stdout.split()[-2:]
  return name, gpu == '1'


def command(name: str, a: argparse.Namespace, device: str) -> list[str]:
  """What runs one benchmark from the root; what --set gives comes last, and so wins."""
  words = shlex.split(SIZES.get(name, ('--small', ''))[0 if a.small else 1])
  stem, given = (f'{name}-shakespeare', write_texts()) if name in TEXTS else (name, [])
  path = a.results / f'{stem}-{device}.json'
  output = ['--output', str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)]
  return [sys.executable, '-m', f'benchmarks.{name}', *words, *given, *output, *shlex.split(a.set.get(name, ''))]


def run(name: str, words: list[str], seconds: float) -> str:
  """'' or why the benchmark failed; its output goes where this one's goes."""
  started = time.perf_counter()
  try: status = subprocess.run(words, cwd=ROOT, timeout=seconds or None, check=False).returncode
  except subprocess.TimeoutExpired: status = f'more than {seconds:g} seconds'
  fault = f'{name}: {status if isinstance(status, str) else f"status {status}"}' if status else ''
  print(f'{name}: {"FAILED" if fault else "done"} after {time.perf_counter() - started:.0f} s', flush=True)
  return fault


def options(argv: list[str] | None, known: dict[str, str]) -> argparse.Namespace:
  """The command line; unknown names end it."""
  make = argparse.ArgumentParser(prog='python -m benchmarks.run_all', description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  make.add_argument('--list', action='store_true', help='name the benchmarks and run none')
  make.add_argument('--only', default='', help='names, separated by commas')
  make.add_argument('--small', action='store_true', help='the small sizes; a CPU always gets them')
  make.add_argument('--set', action='append', default=[], help="NAME='words': options of one benchmark; may be repeated")
  make.add_argument('--seconds', type=float, default=0, help='that one benchmark may take; 0 = no limit')
  make.add_argument('--results', type=pathlib.Path, default=HERE / 'results', help='folder of the JSON')
  make.add_argument('--docs', type=pathlib.Path, default=ROOT / 'docs', help='folder of numbers.md')
  a = make.parse_args(argv)
  a.set = {name: words for name, _, words in (text.partition('=') for text in a.set)}
  a.only = [name for name in a.only.split(',') if name]
  for name in (*a.only, *a.set):
    if name not in known: make.error(f'no benchmark {name!r}; there are {", ".join(known)}')
  return a


def main(argv: list[str] | None = None) -> int:
  """0, or 1 if a benchmark or the page failed."""
  known = benchmarks()
  a = options(argv, known)
  if a.list:
    for name, about in known.items(): print(f'{name:16}{about}' + (f" (--set {name}='{NEEDS[name]}')" if name in NEEDS else ''))
    return 0
  chosen = [name for name in known if not a.only or name in a.only]
  missing = [name for name in chosen if name in NEEDS and name not in a.set]
  device, gpu = machine()
  a.small, a.results = a.small or not gpu, a.results.resolve()
  for name in missing: print(f"{name}: left out; it wants --set {name}='{NEEDS[name]}'", flush=True)
  chosen, faults = [name for name in chosen if name not in missing], []
  for number, name in enumerate(chosen, 1):
    words = command(name, a, device)
    print(f'\n[{number}/{len(chosen)}] {shlex.join(words)}', flush=True)
    faults += [fault for fault in [run(name, words, a.seconds)] if fault]
  page = [sys.executable, '-m', 'benchmarks.report', '--results', str(a.results), '--docs', str(a.docs.resolve())]
  faults += [fault for fault in [run('report', page, 0)] if fault]
  print(f'\n{len(chosen)} benchmarks; ' + (f'FAILED: {"; ".join(faults)}' if faults else 'all done'), flush=True)
  return 1 if faults else 0


if __name__ == '__main__': sys.exit(main())
