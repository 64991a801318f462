"""Saving, damage of every kind, falling back, reading, machines in trouble."""
import json
import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.config.errors import UserError
from memjax.config.schema import CheckpointConfig, MeshConfig
from memjax.runtime import checkpoint, checksum, sharding

CONFIG = CheckpointConfig(keep=3, best=1)
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(seed):
  draw = np.random.default_rng(seed)
  return {'params': {'w': jnp.asarray(draw.normal(size=(64, 96)), jnp.float32), 'b': jnp.asarray(draw.normal(size=8), jnp.bfloat16)},
          'memory': (jnp.zeros((2, 0, 3)), jnp.asarray(draw.integers(0, 2, 5), bool)),
          'key': jax.random.key_data(jax.random.key(seed)), 'step': jnp.int32(seed)}


def abstract(tree, place=PLACE):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


WANT = abstract(make_state(0))


def write(workdir, losses, config=CONFIG):
  writer = checkpoint.Checkpoints(str(workdir), config)
  for step, loss in losses.items(): writer.save(step, make_state(step), {'data': {'step': step}, 'config': {}}, loss)
  writer.close()


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('written')
  write(workdir, {1: 3.0, 2: None, 3: 5.0})
  return workdir


@pytest.fixture
def workdir(written, tmp_path):
  shutil.copytree(written / 'checkpoints', tmp_path / 'checkpoints')
  return tmp_path


def biggest(root):
  return max((p for p in (root / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, share=0.5):
  data = bytearray(path.read_bytes())
  data[int(len(data) * share)] ^= 16
  path.write_bytes(bytes(data))


def foreign(root):
  shutil.rmtree(root)
  root.mkdir()
  (root / 'notes.txt').write_text('mine')


def plain_file(root):
  shutil.rmtree(root)
  root.write_text('not a folder')


def edit_record(root):
  path = root / 'record' / 'metadata'
  record = json.loads(path.read_text())
  record['data']['step'] += 1
  path.write_text(json.dumps(record))


DAMAGE = {
    'truncated data': lambda root: os.truncate(biggest(root), biggest(root).stat().st_size // 2),
    'empty data': lambda root: os.truncate(biggest(root), 0),
    'flipped bit early': lambda root: flip(biggest(root), 0.3),
    'flipped bit late': lambda root: flip(biggest(root), 0.8),
    'deleted data': lambda root: biggest(root).unlink(),
    'deleted manifest': lambda root: (root / 'state' / 'manifest.ocdbt').unlink(),
    'deleted metadata': lambda root: (root / 'state' / '_METADATA').unlink(),
    'garbled metadata': lambda root: (root / 'state' / '_METADATA').write_text('{"tree'),
    'deleted state': lambda root: shutil.rmtree(root / 'state'),
    'deleted record': lambda root: shutil.rmtree(root / 'record'),
    'truncated record': lambda root: os.truncate(root / 'record' / 'metadata', 40),
    'edited record': edit_record,
    'record of another type': lambda root: (root / 'record' / 'metadata').write_text('[]'),
    'empty folder': lambda root: (shutil.rmtree(root), root.mkdir()),
    'foreign folder': foreign,
    'plain file': plain_file}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_put_aside_and_the_step_before_is_used(name, workdir, caplog, capfd):
  DAMAGE[name](workdir / 'checkpoints' / '3')
  with caplog.at_level(logging.WARNING): step, state, record = checkpoint.restore(str(workdir), WANT)
  assert step == 2 and record['data'] == {'step': 2}
  same(state, make_state(2))
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3.corrupt1']
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == 1 and lines[0].startswith('checkpoint 3 is damaged (') and '\n' not in lines[0], lines
  assert capfd.readouterr().err == ''
  write(workdir, {3: 4.0})                                                   # the step can be saved again
  assert checkpoint.restore(str(workdir), WANT)[0] == 3


@pytest.mark.parametrize('name', ['deleted data', 'truncated record', 'empty folder', 'plain file'])
def test_damage_of_an_older_step_does_not_disturb(name, workdir):
  DAMAGE[name](workdir / 'checkpoints' / '2')
  assert checkpoint.restore(str(workdir), WANT)[0] == 3
  write(workdir, {4: 4.0})
  assert checkpoint.restore(str(workdir), WANT)[0] == 4


def test_everything_comes_back_bit_for_bit_empty_leaves_included(workdir):
  step, state, record = checkpoint.restore(str(workdir), WANT)
  assert step == 3 and record['loss'] == 5.0
  same(state, make_state(3))
  assert state['memory'][0].shape == (2, 0, 3)


def test_all_damaged_and_none_yet(workdir, tmp_path):
  assert checkpoint.restore(str(tmp_path / 'new'), WANT) is None
  for step in (1, 2, 3): DAMAGE['deleted state'](workdir / 'checkpoints' / str(step))
  for _ in range(2):
    with pytest.raises(UserError, match='no usable checkpoint'): checkpoint.restore(str(workdir), WANT)


@pytest.mark.parametrize('change, words', [
    (lambda s: {**s, 'step': jnp.zeros((), jnp.uint32)}, r'step: the config wants uint32\[\], the checkpoint holds int32\[\]'),
    (lambda s: {**s, 'params': {'w': jnp.zeros((64, 97)), 'b': s['params']['b']}}, r'params/w: the config wants float32\[64, 97\]'),
    (lambda s: {**s, 'extra': jnp.zeros(2)}, r'extra: the config wants float32\[2\], the checkpoint holds nothing')])
def test_another_model_is_not_damage(workdir, change, words):
  with pytest.raises(UserError, match=words): checkpoint.restore(str(workdir), abstract(change(make_state(0))))
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3']


@pytest.mark.parametrize('error', [
    PermissionError(13, 'Permission denied'), OSError(5, 'Input/output error'), ValueError('PERMISSION_DENIED: open /x')])
def test_a_machine_in_trouble_renames_nothing(workdir, monkeypatch, error):
  def refuse(*_): raise error
  monkeypatch.setattr(checksum, '_read', refuse)
  with pytest.raises(UserError, match='cannot read checkpoint 3'): checkpoint.restore(str(workdir), WANT)
  with pytest.raises(UserError, match='cannot read checkpoints'):
    checkpoint.restore_for_reading(str(workdir), WANT['params'])
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3']


def test_a_save_that_is_refused_leaves_what_was_there(workdir, monkeypatch):
  writer = checkpoint.Checkpoints(str(workdir), CONFIG)
  def refuse(*_, **__): raise OSError(28, 'No space left on device')
  monkeypatch.setattr(writer.manager, 'save', refuse)
  with pytest.raises(UserError, match=r'cannot save checkpoint 4 .*No space left'): writer.save(4, make_state(4), {})
  writer.close()
  assert checkpoint.restore(str(workdir), WANT)[0] == 3


def test_newest_and_best_stay(tmp_path):
  write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0}, CheckpointConfig(keep=2, best=1))
  write(tmp_path, {4: 6.0, 5: 7.0, 6: None}, CheckpointConfig(keep=2, best=1))
  assert checkpoint.list_steps(str(tmp_path)) == [2, 5, 6]


def test_a_saved_step_stays_as_it_is(tmp_path):
  write(tmp_path, {1: 5.0})
  write(tmp_path, {1: 4.0})
  assert checkpoint.restore(str(tmp_path), WANT)[2]['loss'] == 5.0


def test_later_updates_do_not_leak_into_a_save(tmp_path):
  writer = checkpoint.Checkpoints(str(tmp_path), CONFIG)
  state = make_state(7)
  writer.save(7, state, {})
  jax.block_until_ready(jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state))
  writer.close()
  same(checkpoint.restore(str(tmp_path), WANT)[1], make_state(7))


def test_reading_takes_the_best_and_renames_nothing(workdir, caplog):
  step, params, record = checkpoint.restore_for_reading(str(workdir), WANT['params'])
  assert step == 1 and record['loss'] == 3.0
  same(params, make_state(1)['params'])
  assert checkpoint.restore_for_reading(str(workdir), WANT['params'], 2)[0] == 2
  DAMAGE['truncated data'](workdir / 'checkpoints' / '1')
  with caplog.at_level(logging.WARNING): assert checkpoint.restore_for_reading(str(workdir), WANT['params'])[0] == 3
  assert 'passed over' in caplog.text and sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3']


@pytest.mark.parametrize('step, words', [(9, r'no checkpoint 9; there are \[1, 2, 3\]'), (1, 'checkpoint 1 in .* is damaged')])
def test_reading_an_absent_or_damaged_step(workdir, step, words):
  DAMAGE['flipped bit late'](workdir / 'checkpoints' / '1')
  with pytest.raises(UserError, match=words): checkpoint.restore_for_reading(str(workdir), WANT['params'], step)


def test_reading_from_nothing_or_another_model(workdir, tmp_path):
  with pytest.raises(UserError, match='holds no checkpoint'):
    checkpoint.restore_for_reading(str(tmp_path / 'none'), WANT['params'])
  with pytest.raises(UserError, match='params/w: the config wants nothing'):
    checkpoint.restore_for_reading(str(workdir), {'b': WANT['params']['b']})


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
  place = lambda x: NamedSharding(mesh, P('fsdp') if x.ndim == 2 else P())
  state = make_state(4)
  writer = checkpoint.Checkpoints(str(tmp_path), CONFIG)
  writer.save(4, jax.tree.map(lambda x: jax.device_put(x, place(x)), state), {})
  writer.close()
  same(checkpoint.restore(str(tmp_path), WANT)[1], state)
  other = sharding.make_mesh(MeshConfig(data=1, fsdp=2, model=4))
  want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(other, P('fsdp', 'model') if x.ndim == 2 else P())), state)
  got = checkpoint.restore(str(tmp_path), want)[1]
  same(got, state)
  assert got['params']['w'].sharding == want['params']['w'].sharding


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool', 'float16', 'int8'])
def test_checksums_agree_and_see_every_flipped_bit(dtype):
  x = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2 if dtype == 'bool' else 100, (5, 7)), dtype))
  total = checksum.host_checksum(x)
  assert total == int(checksum.checksum(jnp.asarray(x)))
  assert total != checksum.host_checksum(x[::-1])
  raw = x.view(np.uint8)
  for bit in range(8 if dtype != 'bool' else 1):
    changed = raw.copy()
    changed[2, 3] ^= 1 << bit
    assert checksum.host_checksum(changed.view(x.dtype)) != total


def test_the_checksum_of_a_large_array_is_that_of_its_blocks(monkeypatch):
  x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  whole = checksum.host_checksum(x)
  monkeypatch.setattr(checksum, 'BLOCK', 64)
  assert checksum.host_checksum(x) == whole == int(checksum.checksum(jnp.asarray(x)))


def test_foreign_names_are_not_steps(tmp_path):
  for name in ('1.corrupt1', '007', 'x', '5.orbax-checkpoint-tmp', '12'):
    (pathlib.Path(tmp_path) / 'checkpoints' / name).mkdir(parents=True)
  assert checkpoint.list_steps(str(tmp_path)) == [12]
