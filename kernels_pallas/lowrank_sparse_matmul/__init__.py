"""y[rows of e] = x[rows of e] (left_e right_e + S_e): low rank plus a few outputs' own columns.

    x_md          [m, d]         bfloat16 or float32, the rows of group 0 first
    left_edr      [e, d, r]      the low rank's factors
    right_erf     [e, r, f]
    kept_eds      [e, d, s]      the columns of S that are not 0, compacted
    index_es      int32 [e, s]   the output of each of them, rising; f and more for none
    group_sizes_e int32 [e]      rows of each expert; rows past their sum give 0

(LoSparse, arXiv 2306.11222, eq. 4.) 2 m (r (d + f) + s d) operations where the dense weight takes
2 m d f; x is read once for left and kept together.

`api` is what to call, `ref` the XLA implementation for CPUs, `tpu` the kernels, `gpu` XLA's ragged
products; `cases` are the shapes that all are checked on.
"""
