"""y = W x for a ternary W kept in variable-to-fixed codewords, never expanded to a dense matrix.

W [rows, cols] lies in 16-bit codewords; each stands for a run of ternary weights and is looked up
as a length and a few signed positions. Blocks of whole rows begin at known codewords.

    words_w     uint16 [w]        codewords of the matrix, perhaps among others' (static window)
    offsets_b   int32 [blocks+1]  first codeword of each block, and the end of the last
    levels_r2   [rows, 2]         value of a low and of a high weight of each row
    length_u    int32 [65536]     weights a codeword stands for
    fields_ju   uint32 [j, 65536] 32 // field_bits fields a word, (position << 1 | is high), all
                                  ones where the codeword has no further nonzero
    max_length                    weights of the longest codeword

`api` is what to call, `ref` the XLA implementation (the product on CPU and on any device without a
kernel), `cases` the shapes that every implementation is checked and timed on.
"""
