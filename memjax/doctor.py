"""Says what this machine can do, tests it for about ten seconds, and names the remedy for what stands in the way.

  python -m memjax.doctor
  python -m memjax.doctor --json

Devices are touched in processes of their own, with a time limit: a broken plugin may abort or hang. Exit status: 0 training can run
here; 2 something that you can mend (versions, packages, variables) stands in the way; 1 the devices or the self-test failed.
"""
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from memjax.config.flags import Flag, run
from memjax.runtime import doctor
from memjax.runtime.doctor import Finding

PARTS = ('devices', 'probe', 'test')
FLAGS = (
    Flag('json', bool, False, 'one JSON object instead of lines'),
    Flag('seconds', int, 180, 'that each part that touches devices may take', low=1),
    Flag('part', str, '', 'only this part, in this process: a JSON object a line', choices=('', *PARTS)),
)
TITLES = {'environment': 'This installation', 'extras': 'Extras', 'devices': 'Devices', 'probe': 'What they can do',
          'test': 'Self-test: one step of training, saved, restored, decoded'}


def run_part(part: str) -> None:
  """Prints the facts of one part as they are found."""
  from memjax.runtime import capabilities
  for fact in {'devices': capabilities.devices, 'probe': capabilities.probe, 'test': capabilities.self_test}[part]():
    sys.stdout.write(json.dumps(fact) + '\n')
    sys.stdout.flush()


def facts_of(part: str, seconds: int) -> tuple[list[dict[str, Any]], str]:
  """(facts of one part found by another process, why it ended early or '')."""
  command = [sys.executable, '-m', 'memjax.doctor', f'--part={part}']
  try: done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
  except subprocess.TimeoutExpired as error:
    out, fault = error.stdout or b'', f'nothing more came within {seconds} seconds'
    out = out.decode() if isinstance(out, bytes) else out
  else:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1][:200]
    out, fault = done.stdout, f'ended with status {done.returncode}: {last}' if done.returncode else ''
  return [json.loads(line) for line in out.splitlines() if line.startswith('{') and line.endswith('}')], fault


def of_devices(fact: dict[str, Any]) -> Finding:
  """The line on a device."""
  memory = f', {fact["memory_bytes"] / 2 ** 30:.1f} GiB of memory' if fact['memory_bytes'] else ''
  return Finding('ok', f'{fact["platform"]} {fact["id"]}', fact['kind'] + memory + ('' if fact['default'] else ', when asked for'))


def of_probe(fact: dict[str, Any]) -> Finding:
  """The line on a capability."""
  if fact['works']: return Finding('ok', fact['name'], 'yes')
  return Finding('note', fact['name'], f'no ({fact["error"]})', fact['without'])


def of_test(fact: dict[str, Any]) -> Finding:
  """The line on a step of the self-test."""
  return Finding('ok' if fact['works'] else 'FAIL', fact['name'], f'{fact["seconds"]:.1f} s' if fact['works'] else fact['error'])


LINES: dict[str, Callable[[dict[str, Any]], Finding]] = {'devices': of_devices, 'probe': of_probe, 'test': of_test}


def examine(seconds: int) -> Iterator[tuple[str, list[Finding], list[dict[str, Any]]]]:
  """(section, its lines, facts behind them), one section after the other; devices last, and only where no trap would break them."""
  environment = [doctor.machine(), *doctor.versions(), *doctor.traps(), *doctor.variables(), *doctor.cache()]
  yield 'environment', environment, []
  yield 'extras', list(doctor.extras()), []
  if any(finding.status == 'FAIL' for finding in environment): return
  for part in PARTS:
    facts, fault = facts_of(part, seconds)
    lines = [LINES[part](fact) for fact in facts]
    if fault: lines.append(Finding('note' if part == 'probe' else 'FAIL', part, fault, 'JAX_PLATFORMS=cpu leaves the accelerator out'))
    yield part, lines, facts


def main(config, values) -> int:
  """Exit status: 0 training can run here, 2 what can be mended stands in the way, 1 devices or self-test failed."""
  del config
  if values['part']: return run_part(values['part'])
  failed, told = [], {}
  for section, findings, facts in examine(values['seconds']):
    failed += [section for finding in findings if finding.status == 'FAIL']
    told[section] = {'findings': [finding._asdict() for finding in findings], 'facts': facts}
    if not values['json']: show(TITLES[section], findings)
  status = 0 if not failed else 2 if 'environment' in failed else 1
  verdict = {0: 'Training can run here.', 2: 'Mend what FAILs above, then ask again.', 1: 'Training cannot run here.'}[status]
  sys.stdout.write(json.dumps({'status': status, 'verdict': verdict, **told}) + '\n' if values['json'] else f'\n{verdict}\n')
  return status


def show(title: str, findings: list[Finding]) -> None:
  """Prints one section as it is found."""
  width = max((len(finding.name) for finding in findings), default=0)
  lines = [f'  {f.status:4}  {f.name:{width}}  {f.text}' + (f'\n{"":{width + 10}}-> {f.remedy}' if f.remedy else '') for f in findings]
  sys.stdout.write('\n'.join([f'\n{title}', *lines]) + '\n')
  sys.stdout.flush()


if __name__ == '__main__': run(main, flags=FLAGS, takes_config=False)
