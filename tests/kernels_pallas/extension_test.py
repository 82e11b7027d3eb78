"""The C++ library: built where it can be, and said to be missing where it cannot."""

from concurrent import futures
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.grouped_matmul import cpu


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
      str(pathlib.Path(__file__).with_name(f'{name}_test.py'))
      for name in ('attention', 'grouped_matmul', 'packed_matmul', 'ternary_matmul')
  ]
  subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *files, '-k',
       'cpu and (height or attention_and or ((product or outer) and (tails or groups or chunks)))'],
      env={**os.environ, 'MOEJAX_CPU': kind}, check=True, timeout=300,
  )


@pytest.mark.skipif(bool(extension.missing()), reason=extension.missing())
def test_callers_at_once_share_the_threads_that_stay():
  """Products one after another from several callers, with pauses after which no thread stays."""
  rng = np.random.default_rng(0)
  sizes = jnp.array([1, 0, 2, 1], jnp.int32)
  of_row = np.repeat(np.arange(4), np.asarray(sizes))
  product = jax.jit(cpu.product)

  def call(seed):
    own = np.random.default_rng(seed)
    x = own.integers(-4, 5, (4, 96)).astype(np.float32)
    for turn in range(150):
      if turn % 50 == 49:
        time.sleep(0.01)
      y = np.asarray(product(x, weights, sizes))
      np.testing.assert_array_equal(y, np.einsum('md,mdf->mf', x, weights[of_row]))
    return seed

  weights = rng.integers(-4, 5, (4, 96, 272)).astype(np.float32)
  with futures.ThreadPoolExecutor(3) as pool:
    assert list(pool.map(call, range(6))) == list(range(6))
