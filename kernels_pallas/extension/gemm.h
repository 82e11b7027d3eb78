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

  // The same from its element (i, 0) on.
  Operand from(int64_t i) const {
    return {static_cast<const char*>(data) + i * lane * (half ? 2 : 4), half, lane, depth};
  }
};

// A matrix whose element (i, j) is data[i * row + j].
struct Output {
  void* data;
  bool half;
  int64_t row;

  Output from(int64_t i, int64_t j) const {
    return {static_cast<char*>(data) + (i * row + j) * (half ? 2 : 4), half, row};
  }
};

// out(i, j) = sum over k < depth of a(i, k) b(j, k), for i < rows and j < columns.
void multiply(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out);

}  // namespace moejax
