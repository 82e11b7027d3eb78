"""Folders appear whole or not at all, also when the process is killed or the disk is full."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from moejax import files
from moejax.errors import UserError


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_only_at_the_end(tmp_path):
  target = tmp_path / 'a' / 'model'
  with files.atomic_folder(target) as partial:
    (partial / 'config.json').write_text('{}')
    assert not target.exists()
  assert names(target) == ['config.json'] and names(tmp_path / 'a') == ['model']


def test_an_error_inside_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), files.atomic_folder(tmp_path / 'model') as partial:
    (partial / 'config.json').write_text('{}')
    raise KeyError('x')
  assert names(tmp_path) == []


def test_an_earlier_model_is_replaced_whole_or_kept_whole(tmp_path):
  target = tmp_path / 'model'
  for content in ('1', '2'):
    with files.atomic_folder(target) as partial:
      (partial / f'model-{content}.safetensors').write_text(content)
  assert names(target) == ['model-2.safetensors']
  with pytest.raises(UserError), files.atomic_folder(target) as partial:
    raise UserError('no')
  assert names(target) == ['model-2.safetensors'] and names(tmp_path) == ['model']


@pytest.mark.parametrize('stranger', ['thesis.tex', 'pytorch_model.bin', 'checkpoints'])
def test_a_folder_with_other_things_in_it_is_never_replaced(stranger, tmp_path):
  target = tmp_path / 'model'
  target.mkdir()
  (target / 'config.json').write_text('{}')
  if '.' in stranger:
    (target / stranger).write_text('years of work')
  else:
    (target / stranger).mkdir()
  with pytest.raises(UserError, match=stranger), files.atomic_folder(target):
    pass
  assert names(target) == sorted(['config.json', stranger])


def test_a_target_that_is_a_file_or_lies_in_one_is_refused(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='is a file'), files.atomic_folder(tmp_path / 'file'):
    pass
  with pytest.raises(UserError, match='is a file'), files.atomic_folder(tmp_path / 'file' / 'm'):
    pass


def test_a_folder_that_is_not_writable(tmp_path):
  read_only = tmp_path / 'read_only'
  read_only.mkdir(mode=0o555)
  # Root may write anywhere but into the kernel's own file systems.
  parent = read_only if os.geteuid() else pathlib.Path('/sys')
  with pytest.raises(UserError, match='not writable|read-only') as error:
    with files.atomic_folder(parent / 'model'):
      pass
  assert str(parent / 'model') in str(error.value) and '\n' not in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
  """A limit on file sizes makes the write itself fail, in the middle of a file."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(UserError, match='cannot write .*model') as error:
      with files.atomic_folder(tmp_path / 'model') as partial:
        (partial / 'model.safetensors').write_bytes(bytes(200_000))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert names(tmp_path) == []


def test_every_errno_we_know_has_a_remedy(tmp_path):
  for code in files._REMEDIES:
    error = files.os_error(tmp_path, OSError(code, os.strerror(code)))
    assert ': ' in str(error) and str(tmp_path) in str(error)


def test_after_a_kill_the_next_run_cleans_up(tmp_path):
  code = f'''
      import sys, time
      from moejax import files
      with files.atomic_folder({str(tmp_path / 'model')!r}) as partial:
        (partial / 'config.json').write_text('half')
        print('ready', flush=True)
        time.sleep(60)
  '''
  process = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
      cwd=pathlib.Path(__file__).parent.parent,
  )
  assert process.stdout.readline() == 'ready\n'
  (left,) = names(tmp_path)
  # A living process keeps its folder.
  with files.atomic_folder(tmp_path / 'model') as partial:
    (partial / 'config.json').write_text('{}')
  assert names(tmp_path) == sorted([left, 'model'])
  process.send_signal(signal.SIGKILL)
  process.wait()
  with files.atomic_folder(tmp_path / 'model') as partial:
    (partial / 'config.json').write_text('{}')
  assert names(tmp_path) == ['model']


def test_a_model_moved_aside_by_a_killed_swap_comes_back(tmp_path):
  process = subprocess.Popen([sys.executable, '-c', ''])
  process.wait()
  time.sleep(0.01)
  aside = tmp_path / f'.model.partial-{socket.gethostname()}-{process.pid}-0a0a0a0a-old'
  aside.mkdir()
  (aside / 'config.json').write_text('the old one')
  with pytest.raises(KeyError), files.atomic_folder(tmp_path / 'model'):
    raise KeyError('x')
  assert (tmp_path / 'model' / 'config.json').read_text() == 'the old one'
  assert names(tmp_path) == ['model']


@pytest.mark.parametrize('text', ['', '{', '[1]', '\x00\x01', 'null'])
def test_broken_json_names_its_file(text, tmp_path):
  file = tmp_path / 'config.json'
  file.write_text(text)
  with pytest.raises(UserError, match=str(file)):
    files.read_json(file)
  with pytest.raises(UserError, match='nothing.json'):
    files.read_json(tmp_path / 'nothing.json')
