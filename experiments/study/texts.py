"""Fetches the essays and manuals of the bigger mix: Debian packages, unpacked, never committed.

An Anarchist FAQ (GPL-2, markdown) and Python's documentation (PSF licence, reStructuredText), of
which every tenth file is kept for validation. The speeches of the mix lie in experiments/data.

Example:
  python -m experiments.study.texts --out runs/study/texts
"""

from collections.abc import Iterator
import gzip
import pathlib
import subprocess
import tempfile

from absl import flags

from experiments import flags as common
from moejax import files
from moejax.errors import UserError

# Kind: the package, and where its texts are.
PACKAGES = {
    'essays': ('anarchism', 'usr/share/doc/anarchism/markdown', '*.md*'),
    'manuals': ('python3.11-doc', 'usr', '**/_sources/**/*.rst.txt'),
}


def run(command: list[str], cwd: pathlib.Path) -> None:
  """Runs a command; UserError with its last line if it fails or is not there."""
  try:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
  except FileNotFoundError as error:
    raise UserError(f'{command[0]} is missing: the mix comes from Debian packages') from error
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'{" ".join(command)}: {last}')


def texts(package: str, folder: str, pattern: str) -> Iterator[tuple[str, str]]:
  """Downloads a package; yields name and text of each of its files, by name, none twice."""
  with tempfile.TemporaryDirectory() as made:
    place = pathlib.Path(made)
    run(['apt-get', 'download', package], place)
    (archive,) = place.glob('*.deb')
    run(['dpkg-deb', '-x', archive.name, 'unpacked'], place)
    seen = set()
    for path in sorted((place / 'unpacked' / folder).glob(pattern)):
      raw = path.read_bytes()
      text = (gzip.decompress(raw) if path.suffix == '.gz' else raw).decode(errors='replace')
      if path.is_file() and text not in seen:
        seen.add(text)
        yield path.name.split('.')[0] + f'_{len(seen)}', text


def main() -> None:
  out = pathlib.Path(flags.FLAGS.out)
  for kind, source in PACKAGES.items():
    if (out / kind).is_dir():
      continue
    files.require_target(out / kind)
    with files.atomic_folder(out / kind) as made:
      count = 0
      for count, (name, text) in enumerate(texts(*source), 1):
        folder = made / ('valid' if count % 10 == 0 else 'train')
        folder.mkdir(exist_ok=True)
        (folder / f'{name}.txt').write_text(text)
      if not count:
        raise UserError(f'{source[0]} holds no {source[2]} under {source[1]}')
    print(f'{out / kind}: {count} texts')


if __name__ == '__main__':
  flags.DEFINE_string('out', 'runs/study/texts', 'Folder for essays/ and manuals/.')
  common.run(main)
