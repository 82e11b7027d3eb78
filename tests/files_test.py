"""Folders and files appear whole or not at all, also after a kill or on a full disk."""

import contextlib
import errno
import json
import math
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


@contextlib.contextmanager
def full_disk(size):
  """Within it no file can grow past `size` bytes: a write fails in the middle of the file."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('write', [
    lambda partial: (partial / 'model.safetensors').write_bytes(bytes(200_000)),
    lambda partial: files.write_json(partial / 'config.json', {'a': 'x' * 200_000}),
])
def test_a_full_disk_is_one_line_and_leaves_nothing(write, tmp_path):
  target = tmp_path / 'model'
  with full_disk(100_000):
    with pytest.raises(UserError) as error, files.atomic_folder(target) as partial:
      write(partial)
  assert str(error.value).startswith(f'cannot write {target}: ') and '\n' not in str(error.value)
  assert names(tmp_path) == []


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
  file = tmp_path / 'a.txt'
  files.write_whole(file, 'the old text')
  with full_disk(1000), pytest.raises(UserError, match=rf'cannot write {file}: '):
    files.write_whole(file, 'x' * 5000)
  assert file.read_text() == 'the old text' and names(tmp_path) == ['a.txt']
  with pytest.raises(UserError, match=r'cannot write .*/a\.txt/b\.txt: a part of this path is a'):
    files.write_whole(file / 'b.txt', 'x')
  files.write_whole(file, b'new\xff' * 100_000)
  assert file.read_bytes() == b'new\xff' * 100_000


def test_whether_there_is_a_place_to_write_to_is_known_beforehand(tmp_path):
  (tmp_path / 'file').write_text('x')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.tex').write_text('years of work')
  files.require_writable(tmp_path / 'file')
  files.require_writable(tmp_path / 'a' / 'b' / 'c.json')
  files.require_target(tmp_path / 'a' / 'b' / 'model')
  for check, path, message in (
      (files.require_writable, tmp_path, 'is a folder'),
      (files.require_writable, tmp_path / 'file' / 'x', 'a part of this path is a file'),
      (files.require_writable, pathlib.Path('/sys/x.json'), 'not writable|read-only'),
      (files.require_target, pathlib.Path('/sys/model'), 'not writable|read-only'),
      (files.require_target, tmp_path / 'file', 'is a file'),
      (files.require_target, tmp_path / 'full', 'thesis'),
  ):
    with pytest.raises(UserError, match=message) as error:
      check(path)
    assert str(path) in str(error.value)
  assert names(tmp_path) == ['file', 'full'] and names(tmp_path / 'full') == ['thesis.tex']


def test_a_record_that_does_not_fit_is_not_begun(tmp_path):
  file = tmp_path / 'log'
  log = files.Appender(file)
  log.append(b'first\n')
  with full_disk(1000), pytest.raises(UserError, match=rf'cannot write {file}: '):
    log.append(b'y' * 5000)
  assert file.read_bytes() == b'first\n'
  log.append(b'third\n')
  log.close()
  assert file.read_bytes() == b'first\nthird\n'
  with pytest.raises(UserError, match='cannot write'):
    files.Appender(tmp_path / 'no' / 'log')


def test_json_has_no_nan(tmp_path):
  file = tmp_path / 'a.json'
  files.write_json(file, {'b': [1.5, math.inf, (math.nan, 'NaN')], 'a': {'c': -math.inf, 'd': 0}})

  def refuse(name):
    raise AssertionError(f'{name} in JSON')

  read = json.loads(file.read_text(), parse_constant=refuse)
  assert read == {'a': {'c': None, 'd': 0}, 'b': [1.5, None, [None, 'NaN']]}


def test_a_full_disk_is_known_in_whatever_it_was_wrapped():
  inner = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  outer = RuntimeError('checkpointing failed')
  outer.__cause__ = ValueError('a thread died')
  outer.__cause__.__context__ = inner
  text = ValueError(f'UNKNOWN: writing "x" [OS error 27: EFBIG {os.strerror(errno.EFBIG)}]')
  assert 'the disk is full' in str(files.no_room('there', outer))
  assert 'larger than this system allows' in str(files.no_room('there', text))
  assert files.no_room('there', ValueError('another')) is None
  assert files.no_room('there', OSError(errno.ENOENT, 'x')) is None


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


def test_a_link_is_followed_and_a_mount_point_refused(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  for content in ('first', 'second'):
    with files.atomic_folder(tmp_path / 'link') as partial:
      (partial / 'config.json').write_text(content)
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'real' / 'config.json').read_text() == 'second'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['link', 'real']
  with pytest.raises(UserError, match='mount point'):
    files.require_target('/proc')


def test_json_too_deep_to_read_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('[' * 200_000)
  with pytest.raises(UserError, match='not valid JSON'):
    files.read_json(tmp_path / 'config.json')
