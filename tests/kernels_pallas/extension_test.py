"""The C++ library: built where it can be, and said to be missing where it cannot."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from kernels_pallas import extension


@pytest.fixture
def anew():
  """Looks for the library again, and once more afterwards."""
  extension.missing.cache_clear()
  yield
  extension.missing.cache_clear()


def test_it_is_built_where_there_is_a_compiler():
  assert not (shutil.which('c++') and extension.missing())


def test_it_may_be_missing(anew, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert 'setup.py builds it' in extension.missing()


def test_it_may_be_turned_off(anew, monkeypatch):
  monkeypatch.setenv('MOEJAX_CPU', 'xla')
  assert 'MOEJAX_CPU=xla' in extension.missing()


def test_a_kind_that_there_is_not(anew, monkeypatch):
  monkeypatch.setenv('MOEJAX_CPU', 'avx-512')
  with pytest.raises(ValueError, match='MOEJAX_CPU=avx-512 is none of xla, avx512'):
    extension.missing()


def test_another_library_is_not_taken(anew, monkeypatch, tmp_path):
  path = tmp_path / '_cpu.so'
  path.write_bytes(b'not a library')
  spec = importlib.util.spec_from_loader('_cpu', None, origin=str(path))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
  assert f'{path} does not go with this jaxlib' in extension.missing()


@pytest.mark.once
@pytest.mark.parametrize('kind', ('avx2', 'any'))
def test_products_of_other_kinds_of_cpu(kind):
  """Each in a process of its own, which takes the kind where this machine has it."""
  files = [
      str(pathlib.Path(__file__).with_name(f'{name}_matmul_test.py'))
      for name in ('grouped', 'packed', 'ternary')
  ]
  subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *files, '-k',
       'cpu and (height or ((product or outer) and (tails or groups or chunks)))'],
      env={**os.environ, 'MOEJAX_CPU': kind}, check=True, timeout=300,
  )
