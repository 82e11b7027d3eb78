// Products of matrices kept in float32 or bfloat16, summed in float32, by the calling thread.

#pragma once

#include <cstdint>

namespace moejax {

// A matrix whose element (i, k) is data[i * lane + k * depth]; products sum over k. One of the
// strides is 1.
struct Operand {
  const void* data;
  bool half;  // bfloat16, or else float32.
  int64_t lane, depth;
  const int32_t* index = nullptr;  // Of a left matrix with depth 1: its lane i is lane index[i].

  // The same from its element (i, 0) on.
  Operand from(int64_t i) const {
    if (index) return {data, half, lane, depth, index + i};
    return {static_cast<const char*>(data) + i * lane * (half ? 2 : 4), half, lane, depth};
  }

  // The same from its element (0, k) on.
  Operand after(int64_t k) const {
    return {static_cast<const char*>(data) + k * depth * (half ? 2 : 4), half, lane, depth, index};
  }
};

// A right matrix in symbols of 2, 3, 4 or 8 bits, as `packed_matmul/layout.py` packs them: element
// (j, k) is scale(j, group of k) * (symbol - zero(j, group of k)).
struct Packed {
  const uint32_t* words;  // [words][columns], of which this matrix begins at one.
  int64_t columns, inputs, bits;
  const void *scale, *zero;  // [columns][groups].
  bool half;
  int64_t groups, group_size;  // 0 where there is one group.

  Packed from(int64_t j) const {
    Packed part = *this;
    const int64_t skipped = j * groups * (half ? 2 : 4);
    part.words += j;
    part.scale = static_cast<const char*>(scale) + skipped;
    part.zero = static_cast<const char*>(zero) + skipped;
    return part;
  }
};

// A right matrix of two levels and zeros, two bits a weight as in `ternary_matmul/layout.py`.
struct Ternary {
  const uint32_t* words;  // [words][columns], of which this matrix begins at one.
  int64_t columns;
  const void *low, *high;  // Of each column; low is 0 for minus high.
  bool half;

  Ternary from(int64_t j) const {
    const auto skip = [&](const void* levels) -> const void* {
      return levels ? static_cast<const char*>(levels) + j * (half ? 2 : 4) : nullptr;
    };
    return {words + j, columns, skip(low), skip(high), half};
  }
};

// A matrix whose element (i, j) is data[i * row + j].
struct Output {
  void* data;
  bool half;
  int64_t row;
  bool add = false;  // Float32 only: the product is added to what is there.
  const int32_t* index = nullptr;  // Row i is row index[i].

  Output from(int64_t i, int64_t j) const {
    const int64_t skipped = (index ? j : i * row + j) * (half ? 2 : 4);
    return {static_cast<char*>(data) + skipped, half, row, add, index ? index + i : nullptr};
  }
};

// out(i, j) = or += sum over k < depth of a(i, k) b(j, k), for i < rows and j < columns; with more
// than one matrix b, lane 1, the same for each: of the next the elements lie depth * b.depth
// further, the columns of its product b.depth further.
void multiply(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out, int64_t matrices = 1);
void multiply(const Operand& a, const Packed& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out);
void multiply(const Operand& a, const Ternary& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out);

}  // namespace moejax
