"""Whole training steps compiled for TPU slices by the real compiler, on a machine without a TPU.

`plans` says what is compiled, `compile_step` compiles one, `hlo` reads its collectives, and the
command runs all and writes the table.
"""
