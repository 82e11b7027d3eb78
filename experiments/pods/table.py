"""The table of compiled runs."""

from collections.abc import Mapping
from typing import Any

_HEAD = '''# Training steps compiled for TPU slices

Written by `python -m experiments.pods --out experiments/evidence/pods`: the whole training step of
each config (forward, backward, optimizer) compiled from shapes by the TPU compiler of the libtpu
wheel, with no TPU at hand. Nothing was run. GiB a chip are the compiler's. TFLOP a chip are the
matrix products of the traced program under even routing, recomputation included, as are the blocks
of scores that the attention kernel skips, and in brackets with every buffer of the experts full,
which no routing asks of all chips at once; beside them the share that the model asks for.
Collectives are executions in a step and the GiB of their largest array times that, loops with a
constant bound counted as often as they run; what goes between slices (sent and received over the
data centre's network) is not among them.

'''
_COLUMNS = (
    'config', 'chips', 'mesh', 'samples', 'kept GiB', 'temporary GiB', 'of', 'fits',
    'TFLOP a chip', 'asked', 'collectives (count, GiB)',
)


def row(name: str, result: Mapping[str, Any]) -> list[str]:
  """The cells of one run."""
  gib = lambda n: f'{n / 2**30:.1f}'
  fits = result['fits']
  moved = [
      f'{kind} {total["count"]:.0f}, {gib(total["bytes"])}'
      for kind, total in result.get('collectives', {}).items()
  ]
  return [
      name, str(result['chips']),
      ' '.join(f'{axis}={n}' for axis, n in result['mesh'].items()), str(result['samples']),
      gib(result['kept_bytes']) if fits else '', gib(result['temporary_bytes']) if fits else '',
      gib(result['chip_bytes']), 'yes' if fits else f'no: {result["why"]}',
      f'{result["flops_a_chip"] / 1e12:.0f} '
      f'({result["flops_of_full_buffers_a_chip"] / 1e12:.0f})',
      f'{result["model_flops_a_chip"] / result["flops_a_chip"]:.0%}',
      '; '.join(moved),
  ]


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
  """The page of all runs."""
  rows = [row(name, result) for name, result in results.items()]
  lines = [_COLUMNS, ['---'] * len(_COLUMNS), *rows]
  return _HEAD + '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) + '\n'
