"""y[rows of e] = x[rows of e] W_e for experts of 2, 3, 4 or 8 bits a weight.

    x_md          [m, d]               bfloat16 or float32, the rows of group 0 first
    words_ewf     uint32 [e, w, f]     symbols packed along the inputs, see `layout`
    scale_efg     [e, f, g]            W = scale (symbol - zero); group j of an output's inputs has
    zero_efg      [e, f, g]            group_size of them, and there is one where that is 0
    group_sizes_e int32 [e]            rows of each expert; rows past their sum give 0

`api` is what to call, `cpu` the C++ implementation, `ref` that in XLA where C++ was not built,
`tpu` the kernel; `gpu` expands experts and has a kernel for Hopper, `layout` packs and unpacks,
`cases` are the shapes that all are checked on.
"""
