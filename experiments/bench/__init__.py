"""Benches: `python -m experiments.bench --suite foundation`.

`suites` says which worker processes a suite has and where they run, `*_jax` and `*_torch` are the
workers, `timing` is what they share, `tables` turns their rows into comparisons and tables.
"""
