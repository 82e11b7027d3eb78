"""Products with ternary W kept in variable-to-fixed codewords, never expanded to a dense matrix.

W [rows, cols] lies in 16-bit codewords; each stands for a run of ternary weights and is looked up
as a length and a few signed positions. Blocks of whole rows begin at known codewords.

    words_w     uint16 [w]        codewords of the matrix, perhaps among others' (static window)
    offsets_b   int32 [blocks+1]  first codeword of each block, and the end of the last
    levels_r2   [rows, 2]         value of a low and of a high weight of each row
    length_u    int32 [65536]     weights a codeword stands for
    fields_ju   uint32 [j, 65536] 32 // field_bits fields a word, (position << 1 | is high), all
                                  ones where the codeword has no further nonzero
    max_length                    weights of the longest codeword

Of experts, one to a group of rows of x, `codeword_matmul` takes them all:

    words_sw     uint16 [s, w]        codewords in shards of whole experts
    offsets_eb   uint32 [e, blocks+1] first codeword of each block, all shards counted through
    table_e      int32 [e]            which of the tables is the expert's
    levels_er2   [e, rows, 2]
    entries_tuk  uint16 [t, 65536, k] of each table: the length, then (position << 1 | is high) of
                                      each nonzero, all ones past the last

`api` is what to call, `ref` the product of one row in XLA on any device, `cpu` the one of many rows
in C++, `cases` the shapes that both are checked and timed on.
"""
