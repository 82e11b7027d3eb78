"""Worker: the balanced clusters of k-means-constrained, which MoEfication's code calls."""

from typing import Any

from k_means_constrained import KMeansConstrained

from experiments.bench import clusters_problem, timing


def main(quick: bool) -> list[dict[str, Any]]:
  rows, d, experts = clusters_problem.QUICK if quick else clusters_problem.SIZES
  data, out = clusters_problem.neurons(rows, d, experts), []
  case = f'{rows}x{d} into {experts}'
  for starts in (1, 10):
    found: list[float] = []

    def run(starts=starts, found=found):
      model = KMeansConstrained(
          experts, size_min=rows // experts, size_max=rows // experts, random_state=0,
          n_init=starts,
      ).fit(data)
      found.append(float(model.inertia_))

    who = f'k-means-constrained, n_init {starts}'
    seconds = timing.measure({who: run}, repeats=1 if quick or starts > 1 else 3, warmup=0)[who]
    out += [
        timing.row(case, 'balanced clusters', who, seconds, ours=False),
        timing.row(case, 'their objective', who, [found[0]], 'J', ours=False),
    ]
  return out


if __name__ == '__main__':
  timing.run(main)
