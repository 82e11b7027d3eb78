"""Static schedules of the TPU kernels, made by the real compiler on a machine without a TPU.

`python -m experiments.schedules` compiles every case of every kernel for v5e, v5p and v6e and
prints how many bundles (VLIW instructions; one a cycle where nothing stalls) a grid step takes.
"""
