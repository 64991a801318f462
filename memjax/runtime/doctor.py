"""What can be said of a machine without touching its devices: versions, traps, extras, variables, the compilation cache."""
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

PROCESSES = ('MEMJAX_COORDINATOR', 'MEMJAX_NUM_PROCESSES', 'MEMJAX_PROCESS_ID')
CACHE = 'JAX_COMPILATION_CACHE_DIR'
PYTHON = (3, 11)
NVIDIA = '/dev/nvidiactl'
CUDA = ('jax-cuda13-plugin', 'jax-cuda12-plugin')
PLUGINS = {'cuda': CUDA, 'tpu': ('libtpu',), 'metal': ('metaljax',)}
METAL = ('jax-metal cannot work beside this jax: from jax 0.5.1 on its first array fails (default_memory_space is not supported)',
         'pip uninstall jax-metal; then the CPU is used, or on Python 3.12 and newer: pip install metaljax')


class Finding(NamedTuple):
  """One line: 'ok', 'note' (nothing is wrong) or 'FAIL', with what to do about it."""
  status: str
  name: str
  text: str
  remedy: str = ''


class Requirement(NamedTuple):
  """A distribution that memjax names: lowest and first too high version, and the extra that wants it ('' = always)."""
  name: str
  floor: tuple
  ceiling: tuple
  extra: str
  text: str


def version_of(text: str) -> tuple[int, ...]:
  """The leading numbers of a version: '0.10.2rc1' is (0, 10, 2)."""
  return tuple(int(part) for part in re.match(r'\d*(?:\.\d+)*', text)[0].split('.') if part)


def requirements() -> list[Requirement]:
  """What the installed memjax asks for; none where it is not installed."""
  try: lines = importlib.metadata.requires('memjax') or []
  except importlib.metadata.PackageNotFoundError: return []
  found = []
  for line in lines:
    name = re.match(r'[\w.-]+', line)[0]
    extra = re.search(r"extra == ['\"](\w+)['\"]", line)
    limits = dict(re.findall(r'(>=|<)\s*([\d.]+)', line.partition(';')[0]))
    found.append(Requirement(name, version_of(limits.get('>=', '')), version_of(limits.get('<', '')), extra[1] if extra else '',
                             ', '.join(f'{sign}{value}' for sign, value in sorted(limits.items(), reverse=True))))
  return found


def installed(name: str) -> str:
  """Version of a distribution, '' where there is none; nothing is imported."""
  try: return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError: return ''


def versions() -> Iterator[Finding]:
  """Python and the libraries against what memjax asks for."""
  low = sys.version_info[:2] < PYTHON
  yield Finding('FAIL' if low else 'ok', 'python', platform.python_version(), 'install Python 3.11 or newer' if low else '')
  wanted = [r for r in requirements() if not r.extra]
  if not wanted: yield Finding('FAIL', 'memjax', 'not installed', 'pip install -e . in its folder')
  for r in wanted:
    have = installed(r.name)
    fits = have and version_of(have) >= r.floor and (not r.ceiling or version_of(have) < r.ceiling)
    remedy = '' if fits else f"pip install '{r.name}{r.text.replace(' ', '')}'"
    yield Finding('ok' if fits else 'FAIL', r.name, f'{have or "not installed"} (wants {r.text})', remedy)


def traps() -> Iterator[Finding]:
  """Packages that break jax, found before any device is touched."""
  if have := installed('jax-metal'): yield Finding('FAIL', 'jax-metal', f'{have} is installed: {METAL[0]}', METAL[1])
  if os.path.exists(NVIDIA) and not any(map(installed, CUDA)):
    yield Finding('note', 'NVIDIA GPU', 'is here, and jax has no plugin for it: programs run on the CPU', "pip install -e '.[cuda]'")


def extras() -> Iterator[Finding]:
  """Each extra, with what is missing of it."""
  by_extra: dict[str, list[Requirement]] = {}
  for r in requirements():
    if r.extra and (r.extra != 'metal' or sys.platform == 'darwin'): by_extra.setdefault(r.extra, []).append(r)
  for extra, wanted in by_extra.items():
    missing = [r.name for r in wanted if version_of(installed(r.name)) < r.floor]
    if extra in PLUGINS: missing = [] if any(map(installed, PLUGINS[extra])) else [PLUGINS[extra][0]]
    yield Finding('note' if missing else 'ok', f'extra {extra}', f'without {", ".join(missing)}' if missing else 'present',
                  f"pip install -e '.[{extra}]'" if missing else '')


def variables() -> Iterator[Finding]:
  """The variables of several processes: all or none; and where XLA and jax were told something."""
  given = [name for name in PROCESSES if os.environ.get(name)]
  if given and len(given) < len(PROCESSES):
    missing = ', '.join(name for name in PROCESSES if name not in given)
    yield Finding('FAIL', 'processes', f'{", ".join(given)} without {missing}', 'set all three of them or none')
  elif given: yield Finding('ok', 'processes', ', '.join(f'{name}={os.environ[name]}' for name in given))
  else: yield Finding('ok', 'processes', 'one, or what jax detects')
  for name in ('JAX_PLATFORMS', 'XLA_FLAGS', 'JAX_ENABLE_X64'):
    if os.environ.get(name): yield Finding('note', name, os.environ[name])


def cache() -> Iterator[Finding]:
  """Whether compiled programs are kept, and can be."""
  folder = os.environ.get(CACHE, '')
  if not folder:
    yield Finding('note', 'compilation cache', 'off', f'{CACHE}=FOLDER keeps compiled programs between runs')
  elif '://' in folder: yield Finding('note', 'compilation cache', f'{folder}, not tried')
  else:
    try:
      os.makedirs(folder, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder): pass
    except OSError as error:
      yield Finding('FAIL', 'compilation cache', f'{folder}: {error.strerror}', f'name a folder you may write to in {CACHE}')
    else: yield Finding('ok', 'compilation cache', folder)


def machine() -> Finding:
  """Processor, cores and memory of the host."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  pages = {name: os.sysconf(name) for name in ('SC_PHYS_PAGES', 'SC_PAGE_SIZE') if name in getattr(os, 'sysconf_names', {})}
  memory = f', {pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"] / 2 ** 30:.1f} GiB of memory' if len(pages) == 2 else ''
  return Finding('ok', 'host', f'{platform.system()} {platform.machine()}, {cores} cores{memory}')
