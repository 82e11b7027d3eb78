"""What a process does with memory that it frees."""

import pathlib
import platform
import subprocess
import sys

import pytest

from moejax.train import host_memory

ROOT = pathlib.Path(__file__).parents[2]
_FAULTS = """
import resource, sys
import numpy as np
from moejax.train import host_memory
if sys.argv[1] == 'keep':
  assert host_memory.keep_freed()
step = lambda: np.empty(2**24, np.float32).fill(1)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='an option of glibc')
def test_a_step_takes_its_buffers_from_what_the_last_one_freed():
  def faults(how):
    done = subprocess.run(
        [sys.executable, '-c', _FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)

  huge_pages = 3 * 2**24 * 4 // 2**21
  assert faults('give back') >= huge_pages > 10 * faults('keep')


def test_the_platform_is_known_without_starting_jax(monkeypatch):
  monkeypatch.setattr(host_memory, '_ACCELERATORS', ())
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  assert host_memory.runs_on_cpu()
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu,cpu')
  assert not host_memory.runs_on_cpu()
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert host_memory.runs_on_cpu()
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(host_memory, '_ACCELERATORS', (str(ROOT / 'README*'),))
  assert not host_memory.runs_on_cpu()
