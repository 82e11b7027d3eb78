"""What the C library does with memory that a step frees."""

import ctypes
import glob
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h
_ACCELERATORS = '/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/kfd'


def keep_freed() -> bool:
  """Has this process keep what it frees, for its next step; returns whether glibc took that.

  XLA on CPU allocates the buffers of a program in each call. Given back after each, they are pages
  that the kernel clears anew: an eighth of a training step whose buffers take 1 GB. Call it before
  JAX is first asked for devices, for that starts the threads that allocate. The process stays as
  large as it was at its largest.
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(_TRIM_THRESHOLD, -1), mallopt(_MMAP_MAX, 0), mallopt(_ARENA_MAX, 1)])


def runs_on_cpu() -> bool:
  """Whether JAX will have no accelerator here, found without starting it."""
  wanted = os.environ.get('JAX_PLATFORMS')
  return wanted == 'cpu' if wanted else not any(map(glob.glob, _ACCELERATORS))
