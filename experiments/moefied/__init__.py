"""What splitting a dense model costs: `python -m experiments.moefied`."""
