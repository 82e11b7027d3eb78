"""The codec bench measures every row it promises."""

from experiments import bench_codec
from kernels_pallas.subbit_matmul import cases


def test_rows_of_a_small_shape():
  rows = bench_codec.run((cases.Case('small', 48, 96, 0.885),), repeats=1)
  names = [(r['bench'].split(',')[0], r['implementation']) for r in rows]
  assert len(names) == len(set(names)) == 14
  assert all(r['weights_per_second'] > 0 and r['median_ms'] > 0 for r in rows)
  rates = {r['implementation']: r['bits_per_weight'] for r in rows if 'bits_per_weight' in r}
  assert set(rates) == {'moejax', 'QMoE v1'}
