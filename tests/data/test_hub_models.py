"""Models by their name on the hub: which names ask it, what is fetched, and one line for whatever goes wrong. Nothing reaches a hub."""
import sys

import pytest

from memjax.config.errors import UserError
from memjax.data.hub import local_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A hub whose only repository lies in `tmp_path / 'copy'`; the calls are recorded."""
  import huggingface_hub
  calls, copy = [], tmp_path / 'copy'
  copy.mkdir()
  def snapshot_download(name, *, allow_patterns):
    calls.append((name, allow_patterns))
    return str(copy)
  def hf_hub_download(name, file):
    calls.append((name, file))
    return str(copy / file)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
  monkeypatch.chdir(tmp_path)
  return calls, copy


def test_folders_of_safetensors(hub):
  calls, copy = hub
  (copy / 'config.json').write_text('{}')
  (copy / 'model-00001-of-00002.safetensors').write_text('')
  assert local_model('Qwen/Qwen2.5-1.5B-Instruct') == str(copy)
  [(name, patterns)] = calls
  assert name == 'Qwen/Qwen2.5-1.5B-Instruct' and {'config.json', 'tokenizer.json', 'model-*-of-*.safetensors'} <= set(patterns)
  assert not any(pattern in ('*', '*.bin', '*.gguf') for pattern in patterns)


def test_one_gguf_file(hub):
  calls, copy = hub
  assert local_model('a/b-GGUF:q/m.Q4_1.gguf') == str(copy / 'q/m.Q4_1.gguf') and calls == [('a/b-GGUF', 'q/m.Q4_1.gguf')]


def test_paths_stay_paths(hub, tmp_path):
  (tmp_path / 'here').mkdir()
  (tmp_path / 'owner').mkdir()
  (tmp_path / 'owner' / 'name').write_text('')
  for path in ('here', 'here/missing', 'owner/name', '/a/b', './a/b', '../a', 'a/b/c', 'a/b.gguf', 'model.gguf', ''):
    assert local_model(path) == path
  assert not hub[0]


def test_what_goes_wrong_is_one_line(hub, monkeypatch):
  import huggingface_hub
  with pytest.raises(UserError, match=r'a/b on the hub has no config\.json with safetensors; a GGUF file in it is a/b:FILE\.gguf'):
    local_model('a/b')
  def offline(*_, **__): raise OSError('no route\nto the hub')
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
  for name in ('a/b', 'a/b:c.gguf'):
    with pytest.raises(UserError, match=rf'^there is no file or folder {name}, and the hub does not give it \(OSError: no route\); check'):
      local_model(name)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"huggingface_hub is not installed; pip install 'memjax\[hub\]'"): local_model('a/b')
