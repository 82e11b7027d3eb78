"""Text files as a stream of documents, through `datasets`; one file is one document.

A source is a file, a folder, a glob, or `archive::glob` for members of a .tar, .tar.gz, .tgz or
.zip. Of a folder it is every file below it that ends in .txt, .text or .md, or has no ending; what
begins with a dot is left out, and links to other folders are not followed.
"""

from collections.abc import Iterator, Sequence
import fnmatch
import glob
import lzma
import os
import pathlib
import tarfile
import zipfile
import zlib

from moejax import errors

_PROBE_BYTES = 1 << 20
_TEXT_ENDINGS = ('.txt', '.text', '.md', '')
_TAR_ENDINGS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz')
_BROKEN_ARCHIVE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError,
    RuntimeError,  # a zip with a password
)


def documents(sources: Sequence[str], field: str = 'data.train_files') -> Iterator[str]:
  """Yields the text of each document, files in sorted order within a source.

  Args:
    sources: files, folders, globs or 'archive::glob' entries.
    field: name of the setting they come from, for error messages.

  Raises:
    UserError: nothing matches, or a file is empty, binary, or not UTF-8; names the file.
  """
  if not sources:
    raise errors.UserError(f'{field} is empty: name at least one text file, folder or glob')
  for source in sources:
    if '::' in source:
      yield from _archive_documents(source, field)
    else:
      yield from _file_documents(_expand(source, field))


def _expand(source: str, field: str) -> list[str]:
  path = os.path.expanduser(source)
  if os.path.isdir(path):
    return _files_below(path, field)
  files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
  files = [file for file in files if os.path.isfile(file)]
  if not files:
    folder = pathlib.Path(path).parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    hint = errors.did_you_mean(pathlib.Path(path).name, names)
    raise errors.UserError(f'{field}: no file matches {source}{hint}')
  return files


def _files_below(folder: str, field: str) -> list[str]:
  """The text files below a folder, in the order of their paths."""

  def fail(error: OSError):
    raise errors.UserError(f'cannot read {error.filename}: {error.strerror}') from error

  found, endings = [], set()
  for parent, folders, names in os.walk(folder, onerror=fail):
    folders[:] = [name for name in folders if not name.startswith('.')]
    for name in names:
      if not name.startswith('.'):
        ending = pathlib.Path(name).suffix.lower()
        endings.add(ending)
        if ending in _TEXT_ENDINGS:
          found.append(os.path.join(parent, name))
  if not found:
    others = f', but {", ".join(sorted(endings))}' if endings else ''
    raise errors.UserError(
        f'{field}: no file below {folder} ends in .txt, .text, .md or nothing{others}; name other '
        f'files by a glob, e.g. {os.path.join(folder, "**", "*" + min(endings, default=".rst"))}'
    )
  return sorted(found)


def _file_documents(files: list[str]) -> Iterator[str]:
  import datasets  # slow to import, and optional for users of the library

  for file in files:
    try:
      with open(file, 'rb') as stream:
        check_text(stream.read(_PROBE_BYTES), file, whole=os.path.getsize(file) <= _PROBE_BYTES)
    except OSError as error:
      raise errors.UserError(f'cannot read {file}: {error.strerror}') from error
  stream = datasets.load_dataset(
      'text', data_files=[glob.escape(file) for file in files], split='train', streaming=True,
      sample_by='document',
  )
  try:
    for row in stream:
      if '\0' in row['text']:
        raise UnicodeError('a binary file')
      yield row['text']
  except UnicodeError:
    for file in files:  # past the probe, and the stream does not tell in which file
      check_text(pathlib.Path(file).read_bytes(), file)
    raise


def _archive_documents(source: str, field: str) -> Iterator[str]:
  import datasets

  path, _, pattern = source.partition('::')
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise errors.UserError(f'{field}: no archive at {path}')
  rows = datasets.IterableDataset.from_generator(
      _archive_rows, gen_kwargs={'path': path, 'pattern': pattern}
  )
  found = False
  for row in rows:
    found = True
    yield row['text']
  if not found:
    raise errors.UserError(f'{field}: no member of {path} matches {pattern!r}')


def _archive_rows(path: str, pattern: str) -> Iterator[dict[str, str]]:
  for name, content in _archive_members(path, pattern):
    where = f'{path}::{name}'
    check_text(content, where)
    yield {'text': content.decode('utf-8')}


def _archive_members(path: str, pattern: str) -> Iterator[tuple[str, bytes]]:
  try:
    if path.endswith('.zip'):
      with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
          if fnmatch.fnmatchcase(name, pattern) and not name.endswith('/'):
            yield name, archive.read(name)
    elif path.endswith(_TAR_ENDINGS):
      with tarfile.open(path) as archive:
        members = {m.name: m for m in archive.getmembers() if m.isfile()}
        while archive.fileobj is not None and archive.fileobj.read(_PROBE_BYTES):
          pass  # a checksum stands at the very end
        for name in sorted(fnmatch.filter(members, pattern)):
          stream = archive.extractfile(members[name])
          if stream is not None:
            yield name, stream.read()
    else:
      raise errors.UserError(f'{path}: unknown archive type; use one of {_TAR_ENDINGS} or .zip')
  except _BROKEN_ARCHIVE as error:
    reason = str(error).partition('\n')[0].rstrip(':')
    raise errors.UserError(
        f'{path} is not a whole, plain archive ({reason}): restore or download it again'
    ) from error


def check_text(content: bytes, name: str, whole: bool = True) -> None:
  """Raises UserError, naming the file, when bytes are empty, binary or not UTF-8.

  Args:
    content: the file, or its beginning.
    name: what to call it in the message.
    whole: False lets it begin with blanks only, and a UTF-8 character be cut at the end.
  """
  if whole and not content.strip():
    raise errors.UserError(f'{name} is empty; remove it from the list of text files')
  if b'\0' in content:
    raise errors.UserError(f'{name} is a binary file, not text; remove it from the list')
  try:
    content.decode('utf-8')
  except UnicodeDecodeError as error:
    if whole or error.start < len(content) - 4:
      raise errors.UserError(
          f'{name} is not UTF-8 text (byte {error.start}); convert it or remove it from the list'
      ) from error
