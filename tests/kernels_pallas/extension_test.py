"""The C++ library: built where it can be, and said to be missing where it cannot."""

import importlib.util
import shutil

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


def test_another_library_is_not_taken(anew, monkeypatch, tmp_path):
  path = tmp_path / '_cpu.so'
  path.write_bytes(b'not a library')
  spec = importlib.util.spec_from_loader('_cpu', None, origin=str(path))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
  assert f'{path} does not go with this jaxlib' in extension.missing()
