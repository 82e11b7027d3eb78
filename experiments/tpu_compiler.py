"""Processes that compile for TPUs which are not there."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from moejax import errors

ROOT = pathlib.Path(__file__).parents[1]


def environment() -> dict[str, str]:
  """With the TPU compiler that `make` installs beside the packages, where nothing else sees it."""
  beside = pathlib.Path(sys.prefix) / 'tpu'
  paths = [str(beside), os.environ.get('PYTHONPATH', '')] if beside.is_dir() else []
  extra = {'PYTHONPATH': os.pathsep.join(filter(None, paths))} if paths else {}
  return {**os.environ, **extra}


def run(module: str, *arguments: str, name: str) -> Any:
  """What a module prints last, as JSON, run in a process of its own.

  Raises:
    UserError: it failed; with `name` and its last line.
  """
  done = subprocess.run(
      [sys.executable, '-m', module, *arguments], cwd=ROOT, env=environment(),
      capture_output=True, text=True, check=False,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no output'])[-1]
    raise errors.UserError(f'{name}: {last[:400]}')
  return json.loads(done.stdout.splitlines()[-1])
