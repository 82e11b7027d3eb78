"""Checkpoints: bit-exact, onto another mesh, refused for another model, broken ones named."""

import contextlib
import resource

import jax
import numpy as np
import pytest

from moejax import errors
from moejax.train import checkpoint


def opened(folder, experiment):
  return contextlib.closing(checkpoint.Checkpoints(folder, experiment, keep=2))


def _target(made):
  return checkpoint.target_of(made.abstract, made.places)


@pytest.fixture
def trained(common):
  """An unbroken run of four steps on one device, its state after two copied to the host."""
  made = common.setup(common.experiment())
  state, first = made.run(made.fresh(), 0, 2)
  middle = jax.device_get(state)
  state, second = made.run(state, 2, 4)
  return made, middle, jax.device_get(state), second


def _save(folder, made, middle):
  with opened(folder, made.experiment) as saved:
    saved.save(jax.device_put(middle, made.places), 2, 2)


def test_resume_is_bit_exact(trained, tmp_path):
  made, middle, final, losses = trained
  _save(tmp_path, made, middle)
  with opened(tmp_path, made.experiment) as saved:
    state, index, changed = saved.restore(_target(made))
  assert (index, int(state.step), changed) == (2, 2, [])
  state, again = made.run(state, index, 4)
  assert again == losses
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), final)


def test_saving_survives_donation(trained, tmp_path):
  made, middle, _, _ = trained
  state = jax.device_put(middle, made.places)
  with opened(tmp_path, made.experiment) as saved:
    saved.save(state, 2, 2)
    made.run(state, 2, 4)  # donates the state while it is being written
  with opened(tmp_path, made.experiment) as saved:
    restored, _, _ = saved.restore(_target(made))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), middle)


def test_restores_onto_another_mesh(common, trained, tmp_path):
  made, middle, _, losses = trained
  _save(tmp_path, made, middle)
  other = common.setup(common.experiment(mesh__data=2, mesh__expert=2, mesh__tensor=2))
  with opened(tmp_path, other.experiment) as saved:
    state, index, changed = saved.restore(_target(other))
  assert changed == ['mesh.data: 1 -> 2', 'mesh.expert: 1 -> 2', 'mesh.tensor: 1 -> 2']
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), middle)
  wi = state.params['encoder']['layers_0']['ffn']['experts']['wi']
  assert wi.addressable_shards[0].data.size == wi.size // 8
  _, again = other.run(state, index, 4)
  np.testing.assert_allclose(again, losses, rtol=1e-5)


def test_keeps_the_newest(trained, tmp_path):
  made, middle, _, _ = trained
  with opened(tmp_path, made.experiment) as saved:
    for step in (2, 4, 6):
      saved.save(jax.device_put(middle, made.places), step, step)
    saved.wait()
    assert saved.latest() == 6
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['00000004', '00000006']


def test_another_model_is_refused_by_field(common, trained, tmp_path):
  made, middle, _, _ = trained
  _save(tmp_path, made, middle)
  for field, value, named in (
      ('model__d_ff', 128, r'model\.d_ff = 64'),
      ('optim__optimizer', 'adafactor', r"optim\.optimizer = 'adamw'"),
  ):
    with opened(tmp_path, common.experiment(**{field: value})) as saved:
      with pytest.raises(errors.UserError, match=named):
        saved.restore(_target(made))


def test_settings_of_the_optimizer_may_change(common, trained, tmp_path):
  made, middle, _, _ = trained
  _save(tmp_path, made, middle)
  changed = common.setup(common.experiment(
      optim__clip_norm=0.0, optim__weight_decay=0.0, optim__scale_by_param_rms=True,
      optim__learning_rate_rules=[['.*norm', 0.5], ['.*', 1.0]],
  ))
  with opened(tmp_path, changed.experiment) as saved:
    state, _, lines = saved.restore(_target(changed))
  assert len(lines) >= 4 and any('optim.clip_norm: 1.0 -> 0.0' in line for line in lines)
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(middle), strict=True):
    np.testing.assert_array_equal(got, want)


def test_a_broken_checkpoint_is_named(trained, tmp_path):
  made, middle, _, _ = trained
  with opened(tmp_path, made.experiment) as saved:
    with pytest.raises(errors.UserError, match='no checkpoint in'):
      saved.restore(_target(made))
  _save(tmp_path, made, middle)
  written = tmp_path.glob('00000002/manifest/*')
  (manifest,) = [p for p in written if b'"data_index"' in p.read_bytes()]
  content = manifest.read_bytes()
  for wrong in (b'{}', b'[]', b'{"experiment": {}, "data_index": null}', b'{"'):
    manifest.write_bytes(wrong)
    with opened(tmp_path, made.experiment) as saved:
      with pytest.raises(errors.UserError, match=r'00000002 cannot be read'):
        saved.restore(_target(made))
  manifest.write_bytes(content)
  victims = [p for p in tmp_path.glob('00000002/state/**/d/*') if p.is_file()]
  assert victims
  for victim in victims:
    victim.write_bytes(victim.read_bytes()[:10])
  with opened(tmp_path, made.experiment) as saved:
    with pytest.raises(errors.UserError, match=r'00000002 cannot be read'):
      saved.restore(_target(made))


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(trained, tmp_path):
  """No file can grow past 4 kB: the weights' files fail in the writing thread."""
  made, middle, _, _ = trained
  _save(tmp_path, made, middle)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpoints(tmp_path, made.experiment) as saved:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
      with pytest.raises(errors.UserError, match=f'cannot write {tmp_path}: the file is') as error:
        saved.save(jax.device_put(middle, made.places), 4, 4)
        saved.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['00000002']
  with opened(tmp_path, made.experiment) as saved:
    assert saved.latest() == 2
    saved.save(jax.device_put(middle, made.places), 4, 4)
    saved.wait()
    assert saved.latest() == 4


def test_what_is_being_saved_is_finished_after_an_error(trained, tmp_path):
  made, middle, _, _ = trained
  with pytest.raises(KeyError), checkpoint.Checkpoints(tmp_path, made.experiment) as saved:
    saved.save(jax.device_put(middle, made.places), 2, 2)
    raise KeyError('x')
  assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ['00000002']
