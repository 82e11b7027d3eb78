// Sums of rows of x: what a product with ternary weights is, once their places are known.

#pragma once

#include <cstdint>

// One build holds what each CPU is best at; the loader picks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FOR_EACH_CPU(...) __attribute__((target_clones(__VA_ARGS__, "default")))
#else
#define FOR_EACH_CPU(...)
#endif

namespace moejax {

// Rows of x that are summed at once, as lanes beside each other.
constexpr int64_t kLanes[] = {1, 4, 8, 16, 32, 64};
constexpr int64_t kMostLanes = 64;

// The least of kLanes that holds `rows`, or the most there is.
inline int64_t lanes_for(int64_t rows) {
  for (int64_t lanes : kLanes) {
    if (lanes >= rows) return lanes;
  }
  return kMostLanes;
}

// sums[lanes] = sum over i < n of x[at[i]][lanes], for x of [places][lanes].
void sum_rows(int64_t lanes, const float* x, const uint32_t* at, int64_t n, float* sums);

}  // namespace moejax
