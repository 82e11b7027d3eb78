"""y[rows of e] = x[rows of e] W_e for ternary experts below one bit a weight, from their codes.

    x_md          [m, d]                 bfloat16 or float32, the rows of group 0 first
    rows_rl       uint32 [r, 128]        codes, tile after tile; see `layout`
    starts_es     int32 [e, strips]      the first row of each strip of each expert
    records_es1w  int32 [e, strips, 1, w]  where its tiles are, their windows and patches
    levels_enc    [e, n, c]              of each column kept the values of a low and of a high
                                         weight (n = 2), or of a high one, a low one being minus
                                         that (1); c = 128 tiles
    homes_etl     uint16 [e, tiles, 128] which outputs the columns kept are; see `layout.homes`
    group_sizes_e int32 [e]              rows of each expert; rows past their sum give 0
    sizes         `layout.Sizes`

`api` is what to call, `tpu` the kernel, `cpu` the product in C++, `ref` the one in XLA for CPUs
where that was not built; `gpu` expands experts for want of a kernel, `cases` are the shapes that
all are checked on. In `layout`, `encode` writes codes, `decode` reads them in XLA, `block` has the
arithmetic that XLA and the kernel share, and `deal` says which columns lie together.
"""
