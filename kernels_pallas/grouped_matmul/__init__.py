"""Matrix products of rows sorted by group, each with its group's matrix: dropless experts.

    x_md           [m, d]     rows of group 0 first, then of group 1, ...
    w_edf          [e, d, f]  one matrix a group
    group_sizes_e  int32 [e]  rows of each group; rows past their sum belong to none and give 0

Three products make a layer and its gradients: y = x w, dx = dy w^T and dw = x^T dy.

`api` picks an implementation by platform, `vjp` makes it differentiable. `cpu` is C++, with
`few_rows` for one matrix, `ref` the
product path on CPU where that was not built: a loop over the groups that have rows. `tpu` runs
JAX's megablox kernels, `gpu` XLA's `ragged_dot` or JAX's Mosaic GPU kernels. `cases` are the shapes
that all are checked on.
"""
