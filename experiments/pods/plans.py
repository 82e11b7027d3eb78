"""Slices of TPU chips, and the runs that are compiled for them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Slice:
  """A topology of the compiler: its name, how many of it, and the memory of a chip in GiB.

  Memory is what the compiler itself allows a program.
  """

  topology: str
  slices: int
  chips: int
  chip_gib: float


SLICES = {
    'v5e-4': Slice('v5e:2x2', 1, 4, 15.75),
    'v5p-64': Slice('v5p:4x4x4', 1, 64, 95.74),
    'v5p-512': Slice('v5p:8x8x8', 1, 512, 95.74),
    'v6e-256': Slice('v6e:16x16', 1, 256, 31.25),
    'v6e-1024': Slice('v6e:16x16', 4, 1024, 31.25),
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config's variant, named for the slice that it is for."""

  config: str
  variant: str

  @property
  def slice(self) -> str:
    return '-'.join(self.variant.split('-')[:2])

  @property
  def name(self) -> str:
    return f'{self.config}:{self.variant}'


PLANS = tuple(
    Plan(config, f'{chips}{way}')
    for config, slices, ways in (
        ('grin_moe', ('v5p-64', 'v6e-256'), ('', '-fsdp', '-expert')),
        ('switch_c_2048', ('v5p-512', 'v6e-1024'), ('', '-data', '-tensor')),
    )
    for chips in slices
    for way in ways
)
