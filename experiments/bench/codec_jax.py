"""Worker: encode, decode and multiply in both ternary formats."""

from experiments import bench_codec
from experiments.bench import timing


def main() -> None:
  timing.emit(bench_codec.run())


if __name__ == '__main__':
  main()
