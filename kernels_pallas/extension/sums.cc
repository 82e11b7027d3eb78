#include "sums.h"

#include <cstring>

namespace moejax {
namespace {

typedef float V4 __attribute__((vector_size(16)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V16 __attribute__((vector_size(64)));

// `COUNT` vectors V side by side, held in registers for the whole sum.
#define DEFINE_SUM(NAME, V, COUNT)                                                       \
  FOR_EACH_CPU("avx512f", "avx2")                                                        \
  void NAME(const float* x, const uint32_t* at, int64_t n, float* sums) {                \
    constexpr int64_t kWidth = sizeof(V) / sizeof(float);                                \
    V total[COUNT] = {};                                                                 \
    for (int64_t i = 0; i < n; ++i) {                                                    \
      const float* row = x + int64_t{at[i]} * (kWidth * COUNT);                          \
      for (int j = 0; j < COUNT; ++j) {                                                  \
        V part;                                                                          \
        std::memcpy(&part, row + j * kWidth, sizeof(V));                                 \
        total[j] += part;                                                                \
      }                                                                                  \
    }                                                                                    \
    std::memcpy(sums, total, sizeof(total));                                             \
  }

DEFINE_SUM(sum_4, V4, 1)
DEFINE_SUM(sum_8, V8, 1)
DEFINE_SUM(sum_16, V16, 1)
DEFINE_SUM(sum_32, V16, 2)
DEFINE_SUM(sum_64, V16, 4)

// Four sums, since one addition waits for the one before.
void sum_1(const float* x, const uint32_t* at, int64_t n, float* sums) {
  float a = 0, b = 0, c = 0, d = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    a += x[at[i]];
    b += x[at[i + 1]];
    c += x[at[i + 2]];
    d += x[at[i + 3]];
  }
  for (; i < n; ++i) a += x[at[i]];
  *sums = (a + b) + (c + d);
}

}  // namespace

void sum_rows(int64_t lanes, const float* x, const uint32_t* at, int64_t n, float* sums) {
  switch (lanes) {
    case 1: return sum_1(x, at, n, sums);
    case 4: return sum_4(x, at, n, sums);
    case 8: return sum_8(x, at, n, sums);
    case 16: return sum_16(x, at, n, sums);
    case 32: return sum_32(x, at, n, sums);
    default: return sum_64(x, at, n, sums);
  }
}

}  // namespace moejax
