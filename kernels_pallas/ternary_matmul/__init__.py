"""y[rows of e] = x[rows of e] W_e for ternary experts of two bits a weight.

    x_md          [m, d]               bfloat16 or float32, the rows of group 0 first
    words_ewf     uint32 [e, w, f]     16 weights of a column each, see `layout`; w = 16 ceil(d/256)
    levels_enf    [e, n, f]            of each output the values of a low and of a high weight
                                       (n = 2), or of a high one, a low one being minus that (1)
    group_sizes_e int32 [e]            rows of each expert; rows past their sum give 0

A weight's two bits lie where a shift and a mask make them the sign and the top exponent bit of a
bfloat16, so that decoding converts nothing: 0, 2.0 and -2.0.

`api` is what to call, `cpu` the C++ implementation, `ref` that in XLA where C++ was not built,
`tpu` the kernel; `gpu` expands experts and has a kernel for Hopper, `layout` packs and unpacks,
`cases` are the shapes that all are checked on.
"""
