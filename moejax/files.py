"""Folders that appear whole or not at all, checksums, JSON files, OS errors in one clear line."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import fnmatch
import hashlib
import json
import math
import os
from pathlib import Path
import shutil
import socket
from typing import IO, Any
import uuid

from moejax.errors import UserError

TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'spiece.model', 'vocab.json', 'merges.txt', 'generation_config.json',
)
# What a model folder may hold; a folder with anything else in it is never replaced.
REPLACEABLE = (
    'config.json', 'manifest.json', '*.safetensors', '*.safetensors.index.json',
    'report.json', 'report.html', 'plan.json', *TOKENIZER_FILES,
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.ENOSPC: 'the disk is full: free some space, or choose another folder',
    errno.EDQUOT: 'the disk quota is used up: free some space, or choose another folder',
    errno.EFBIG: 'the file is larger than this system allows: choose another file system',
    errno.EACCES: 'not writable: choose another folder, or change its permissions',
    errno.EPERM: 'not writable: choose another folder, or change its permissions',
    errno.EROFS: 'the file system is read-only: choose another folder',
    errno.EEXIST: 'a part of this path is a file, not a folder: choose another folder',
    errno.ENOTDIR: 'a part of this path is a file, not a folder: choose another folder',
    errno.ENOENT: 'the folder cannot be made there: choose another one',
}


class WriteError(UserError):
  """A file or folder that could not be written; the OSError behind it is `reason`.

  left: what the message says of what is there now.
  """

  def __init__(
      self, target: Path | str, reason: OSError, left: str = 'nothing half-written was left'
  ):
    remedy = _REMEDIES.get(reason.errno or 0, f'{reason.strerror or reason}')
    super().__init__(f'cannot write {target}: {remedy} ({left})')
    self.reason = reason


def os_error(target: Path | str, error: OSError | WriteError, **left: str) -> WriteError:
  """Turns an error met while writing below `target` into a one-line UserError; see `WriteError`."""
  return WriteError(target, error.reason if isinstance(error, WriteError) else error, **left)


def no_room(target: Path | str, error: BaseException) -> WriteError | None:
  """The UserError for a full disk, quota or file size, however a library wrapped it; else None."""
  seen: list[BaseException] = []
  while error is not None and error not in seen:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
      return WriteError(target, error)
    for code in NO_ROOM:
      if os.strerror(code) in str(error):
        return WriteError(target, OSError(code, os.strerror(code)))
    seen.append(error)
    error = error.__cause__ or error.__context__  # type: ignore[assignment]
  return None


@contextlib.contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
  """Yields a temporary sibling folder that becomes `target` when the block ends well.

  Whatever goes wrong inside, the temporary folder is removed and `target` stays as it was. An
  earlier model folder at `target` is replaced; a folder that holds anything else is refused.

  Raises:
    UserError: the target cannot be written (full disk, permissions), or must not be replaced.
  """
  target = _own_place(target)
  _check_replaceable(target)
  prefix = f'.{target.name}.partial-{socket.gethostname()}-'
  partial = target.parent / f'{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}'
  try:
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      _clear_stale(target, prefix)
      partial.mkdir()
      yield partial
      for file in partial.rglob('*'):
        _sync(file)
      _sync(partial)
      _swap_in(partial, target)
    except (OSError, WriteError) as error:
      raise os_error(target, error) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def require_target(target: Path | str) -> None:
  """Raises UserError if `atomic_folder` could not end there now; makes nothing.

  For work that takes long: so that its end is not where that is found out.
  """
  target = _own_place(target)
  _check_replaceable(target)
  _probe(target)


def _own_place(target: Path | str) -> Path:
  """Where a target really lies: what a link points to is written, not the link replaced."""
  target = Path(target).absolute()
  if target.is_symlink():
    target = target.resolve()
  if target.is_mount():
    raise UserError(f'{target} is a mount point, which cannot be replaced: name a folder inside it')
  return target


def _check_replaceable(target: Path) -> None:
  try:
    if not target.exists():
      return
  except OSError as error:
    raise os_error(target, error) from error
  if not target.is_dir():
    raise UserError(f'{target} is a file: name a folder to write to')
  for entry in sorted(target.iterdir()):
    if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, p) for p in REPLACEABLE):
      raise UserError(
          f'{target} holds {entry.name!r}, which is no part of a model folder: '
          'name a new or empty folder'
      )


def _clear_stale(target: Path, prefix: str) -> None:
  """Removes what a killed process of this machine left; a model it had moved aside goes back."""
  for entry in sorted(target.parent.glob(prefix + '*')):
    pid = entry.name[len(prefix):].split('-')[0]
    if not pid.isdigit() or _alive(int(pid)):
      continue
    if entry.name.endswith('-old') and not target.exists():
      entry.rename(target)
    else:
      shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _swap_in(partial: Path, target: Path) -> None:
  if not target.exists():
    partial.rename(target)
    return
  old = partial.with_name(partial.name + '-old')
  target.rename(old)
  try:
    partial.rename(target)
  except OSError:
    old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
  """The SHA-256 of a file, as hex."""
  try:
    with open(path, 'rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; check its permissions') from error


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object; a missing or broken file raises UserError."""
  try:
    text = path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; is the folder complete?') from error
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not valid JSON ({error}): restore or download it again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object: restore or download it again')
  return value


def write_whole(path: Path | str, content: str | bytes) -> None:
  """Writes a file whole or not at all; what was there stays until the new content is on disk.

  Folders on the way to it are made.

  Raises:
    UserError: it cannot be written.
  """
  path = Path(path)
  partial = path.with_name(f'.{path.name}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'wb', buffering=0) as f:
      _write_all(f, content.encode() if isinstance(content, str) else content)
      os.fsync(f.fileno())
    partial.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise os_error(path, error) from error


def require_writable(path: Path | str) -> None:
  """Raises UserError if `write_whole` could not write there now; makes nothing."""
  path = Path(path).absolute()
  if path.is_dir():
    raise UserError(f'{path} is a folder: name a file to write')
  _probe(path)


def _probe(target: Path) -> None:
  """Tries to write beside `target`, or into the nearest folder above it that exists."""
  try:
    folder = next(p for p in target.parents if p.exists())
    probe = folder / f'.{target.name}.probe-{os.getpid()}'
    probe.write_bytes(b'')
    probe.unlink()
  except OSError as error:
    raise os_error(target, error) from error


def _write_all(file: IO[bytes], content: bytes) -> None:
  view = memoryview(content)
  while view:
    view = view[file.write(view):]


class Appender:
  """A file that grows by whole records: one that does not fit leaves the file as it was."""

  def __init__(self, path: Path | str):
    self._path = Path(path)
    try:
      self._file = open(self._path, 'ab', buffering=0)  # noqa: SIM115 - open as long as the run
    except OSError as error:
      raise os_error(self._path, error) from error

  def append(self, record: bytes) -> None:
    """Appends a record; raises UserError when it cannot be written."""
    size = os.fstat(self._file.fileno()).st_size
    try:
      _write_all(self._file, record)
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(size)
      raise os_error(self._path, error) from error

  def close(self) -> None:
    self._file.close()


def json_text(value: Any, **options: Any) -> str:
  """`json.dumps` with null in place of NaN and infinity, which JSON does not have."""
  return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _finite(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(entry) for entry in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
  """Writes a JSON object whole or not at all, the same bytes for the same value; NaN is null.

  Raises:
    UserError: it cannot be written.
  """
  write_whole(path, json_text(value, indent=2, sort_keys=True) + '\n')


def copy_tokenizer(source: Path | str, target: Path) -> list[str]:
  """Copies the tokenizer files that `source` has; returns their names."""
  names = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
  for name in names:
    shutil.copyfile(Path(source) / name, target / name)
  return names


def require_folder(folder: Path | str) -> Path:
  """The folder as a Path; raises UserError when there is none."""
  folder = Path(folder)
  try:
    found = folder.exists()
    if found and folder.is_dir():
      next(folder.iterdir(), None)
  except OSError as error:
    raise UserError(f'cannot read {folder}: {error.strerror}; check its permissions') from error
  if not found:
    raise UserError(f'{folder} does not exist: name a model folder')
  if not folder.is_dir():
    raise UserError(f'{folder} is a file, not a folder: name the folder that holds config.json')
  return folder
