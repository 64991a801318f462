"""The doctor: what it says of versions, traps, extras, variables and devices, and with which status it ends."""
import importlib.metadata
import json
import subprocess
import sys

import jax
import pytest

from memjax import doctor as command
from memjax.config.flags import call
from memjax.runtime import distributed, doctor

TESTS = ('training step', 'saving', 'inspecting', 'restoring', 'decoding')
WORKING = {'devices': [{'platform': 'gpu', 'kind': 'Some GPU', 'id': 0, 'memory_bytes': 2 ** 31, 'default': True},
                       {'platform': 'cpu', 'kind': 'cpu', 'id': 0, 'memory_bytes': 0, 'default': False}],
           'probe': [{'name': 'fft', 'works': False, 'error': 'UNIMPLEMENTED', 'without': 'a matmul instead'}],
           'test': [{'name': name, 'works': True, 'error': '', 'seconds': 1.0} for name in TESTS]}


@pytest.fixture
def packages(monkeypatch):
  """packages['jax-metal'] = '0.1.1' installs, '' removes; everything else is as it is."""
  changed = {}
  monkeypatch.setattr(doctor, 'installed', lambda name, real=doctor.installed: changed[name] if name in changed else real(name))
  for name in (*doctor.PROCESSES, doctor.CACHE): monkeypatch.delenv(name, raising=False)
  return changed


@pytest.fixture
def ask(packages, monkeypatch, capsys):
  """ask(*words, test=...) -> (status, output) with the devices of `WORKING`, changed by keyword."""
  def run(*words, faults=(), **facts):
    found = {**WORKING, **facts}
    monkeypatch.setattr(command, 'facts_of', lambda part, seconds: (found[part], dict(faults).get(part, '')))
    status = call(command.main, flags=command.FLAGS, takes_config=False, argv=list(words))
    return status, capsys.readouterr().out
  return run


def test_a_machine_that_can_train(ask):
  status, out = ask()
  assert status == 0 and 'gpu 0  Some GPU, 2.0 GiB of memory\n' in out and 'cpu 0  cpu, when asked for' in out
  assert out.endswith('Training can run here.\n')
  assert 'no (UNIMPLEMENTED)' in out and '-> a matmul instead' in out and 'FAIL' not in out
  assert f' {jax.__version__} (wants >=0.10.2, <0.13)' in out
  status, out = ask('--json')
  told = json.loads(out)
  assert status == told['status'] == 0 and told['probe']['facts'] == WORKING['probe'] and len(out.splitlines()) == 1
  assert {finding['status'] for part in TESTS for finding in told['test']['findings'] if finding['name'] == part} == {'ok'}


@pytest.mark.parametrize(('name', 'version', 'said', 'remedy'), [
  ('jax-metal', '0.1.1', 'jax-metal cannot work beside this jax', 'pip uninstall jax-metal'),
  ('jax', '0.9.9', '0.9.9 (wants >=0.10.2, <0.13)', "pip install 'jax>=0.10.2,<0.13'"),
  ('jax', '0.13.0', '0.13.0 (wants', "pip install 'jax>=0.10.2,<0.13'"),
  ('flax', '', 'not installed (wants', "pip install 'flax>=")])
def test_packages_that_stand_in_the_way(ask, packages, name, version, said, remedy):
  """Nothing is asked of the devices then: with jax-metal the first array would fail."""
  packages[name] = version
  status, out = ask()
  assert status == 2 and said in out and f'-> {remedy}' in out and 'Devices' not in out and 'Mend what FAILs' in out


def test_variables_of_processes(ask, monkeypatch):
  assert doctor.PROCESSES == distributed.VARIABLES
  monkeypatch.setenv('MEMJAX_COORDINATOR', 'host:1234')
  status, out = ask()
  assert status == 2 and 'MEMJAX_COORDINATOR without MEMJAX_NUM_PROCESSES, MEMJAX_PROCESS_ID' in out
  monkeypatch.setenv('MEMJAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('MEMJAX_PROCESS_ID', '0')
  status, out = ask()
  assert status == 0 and 'MEMJAX_PROCESS_ID=0' in out


def test_compilation_cache(ask, monkeypatch, tmp_path):
  monkeypatch.setenv(doctor.CACHE, str(tmp_path / 'a' / 'b'))
  assert ask()[0] == 0 and list((tmp_path / 'a' / 'b').iterdir()) == []
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv(doctor.CACHE, str(tmp_path / 'file' / 'b'))
  status, out = ask()
  assert status == 2 and 'Not a directory' in out and f'-> name a folder you may write to in {doctor.CACHE}' in out
  monkeypatch.setenv(doctor.CACHE, 'gs://bucket/cache')
  assert 'gs://bucket/cache, not tried' in ask()[1]


def test_extras_and_plugins(packages, monkeypatch, tmp_path):
  packages.update({'tokenizers': '0.20.9', 'jinja2': '3.1.6', 'libtpu': '', 'jax-cuda13-plugin': '', 'jax-cuda12-plugin': '0.10.2'})
  found = {finding.name: finding for finding in doctor.extras()}
  assert found['extra text'].status == 'note' and found['extra text'].text.startswith('without tokenizers')
  assert found['extra text'].remedy == "pip install -e '.[text]'"
  assert (found['extra cuda'].status, found['extra tpu'].text) == ('ok', 'without libtpu')
  monkeypatch.setattr(doctor, 'NVIDIA', str(tmp_path))
  assert not list(doctor.traps())
  packages['jax-cuda12-plugin'] = ''
  [finding] = doctor.traps()
  assert finding.status == 'note' and 'jax has no plugin for it' in finding.text


def test_not_installed(monkeypatch, packages):
  def requires(name): raise importlib.metadata.PackageNotFoundError(name)
  monkeypatch.setattr(importlib.metadata, 'requires', requires)
  assert [finding.name for finding in doctor.versions() if finding.status == 'FAIL'] == ['memjax'] and not list(doctor.extras())


def test_devices_and_self_test_that_fail(ask):
  bad = {'name': 'restoring', 'works': False, 'error': 'ValueError: it differs', 'seconds': 0.1}
  status, out = ask(test=[*WORKING['test'][:3], bad])
  assert status == 1 and 'FAIL  restoring      ValueError: it differs' in out and 'Training cannot run here.' in out
  assert ask(devices=[], faults={'devices': 'ended with status 134: abort'})[0] == 1
  status, out = ask(faults={'probe': 'nothing more came within 3 seconds'})      # what is missing is only said
  assert status == 0 and 'note  probe  nothing more came' in out


def test_another_process_that_hangs_or_dies(monkeypatch):
  """What it said before is kept."""
  program = "import sys, time; print('{\"a\": 1}'); print('noise', flush=True); "
  endings = {"sys.exit('gone')": 'ended with status 1: gone', 'time.sleep(60)': 'nothing more came within 1 seconds', '': ''}
  for ending, fault in endings.items():
    real = subprocess.run
    run = lambda words, real=real, ending=ending, **options: real([sys.executable, '-c', program + ending], **options)
    with monkeypatch.context() as patch:
      patch.setattr(command.subprocess, 'run', run)
      assert command.facts_of('probe', 1) == ([{'a': 1}], fault)


@pytest.mark.parametrize(('text', 'version'), [('0.10.2', (0, 10, 2)), ('1.0rc1', (1, 0)), ('2', (2,)), ('', ())])
def test_versions(text, version):
  assert doctor.version_of(text) == version


def test_the_command_itself_imports_no_jax():
  """It must be able to say what is wrong where the import of jax fails, or hangs."""
  program = 'import sys; sys.modules["jax"] = None; import memjax.doctor'
  assert subprocess.run([sys.executable, '-c', program], check=False).returncode == 0


@pytest.mark.slow
def test_for_real():
  """Every part in its own process; the probes find what a CPU has."""
  done = subprocess.run([sys.executable, '-m', 'memjax.doctor', '--json'], capture_output=True, text=True, check=False)
  told = json.loads(done.stdout)
  assert done.returncode == told['status'] == 0, told
  assert [fact['name'] for fact in told['test']['facts']] == list(TESTS) and told['devices']['facts'][0]['platform'] == 'cpu'
  probes = {fact['name']: fact['works'] for fact in told['probe']['facts']}
  assert all(works for name, works in probes.items() if name != 'pallas kernels')


@pytest.mark.slow
def test_probes_see_what_is_missing():
  """Beside FFT, complex numbers and top-k the rest still works."""
  program = ('from tests import without; without.take_away(without.LACKING); from memjax.runtime.capabilities import probe; '
             'print([fact["name"] for fact in probe() if fact["works"]])')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout.strip().splitlines()[-1] == "['int4', 'fp8', 'bf16 matmul']"
