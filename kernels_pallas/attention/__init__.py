"""Softmax attention, a block of queries and of keys at a time.

Arrays: q [b, t, n, h], k and v [b, s, g, h], mask bool [b, 1, t, s], out [b, t, n, h]; query head i
looks at key head i * g // n. `cpu.cc` is the product and its gradients in C++, `tpu` calls JAX's
splash attention; `ref` says what they are, by XLA, and serves wherever they do not.
"""
