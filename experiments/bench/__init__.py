"""Benches: `python -m experiments.bench --suite foundation`."""
