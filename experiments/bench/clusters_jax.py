"""Worker: neurons into experts of equal size by `cluster_core`."""

from typing import Any

from experiments.bench import clusters_problem, timing
from moejax.compress import cluster_core


def main(quick: bool) -> list[dict[str, Any]]:
  rows, d, experts = clusters_problem.QUICK if quick else clusters_problem.SIZES
  data, found = clusters_problem.neurons(rows, d, experts), []
  seconds = timing.measure({
      'moejax': lambda: found.append(cluster_core.balanced_kmeans(data, experts)),
  }, repeats=1 if quick else 3, warmup=0)['moejax']
  case = f'{rows}x{d} into {experts}'
  return [
      timing.row(case, 'balanced clusters', 'moejax', seconds, ours=True),
      timing.row(
          case, 'their objective', 'moejax', [cluster_core.objective(data, found[0])], 'J',
          ours=True,
      ),
  ]


if __name__ == '__main__':
  timing.run(main)
