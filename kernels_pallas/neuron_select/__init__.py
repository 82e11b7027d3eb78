"""A feed-forward block that runs the chosen experts of each token and adds up what they give.

    x_md        [m, d]     tokens
    experts     wi [e, d, f], wo [e, f, d], and where there are some gate [e, d, f] and biases
                wi_bias, gate_bias [e, f], wo_bias [e, d]
    chosen_me   bool [m, e]  which experts a token meets; none gives 0

There are no gates to weigh experts by: with all of them chosen it is the dense block that they were
cut from. `api` picks an implementation, `vjp` makes it differentiable, `ref` is the XLA path, `cpu`
the products in C++, `tpu` the kernel for few tokens, `cases` are the shapes that all are checked
on.
"""
