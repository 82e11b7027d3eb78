#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "halves.h"
#include "scratch.h"

namespace moejax {
namespace {

// What of the left matrix is laid out at a time stays in the outer caches, a block of the right in
// the inner ones.
constexpr int64_t kMostChunk = 1 << 20, kChunkRows = 384, kBlockDepth = 256, kBlockFloats = 1 << 16;
// Few rows: bytes of a column that go at a time, so many that their pages are known to the CPU at
// once, of narrow columns more, this many of all together; and how far ahead a row is fetched.
constexpr int64_t kFewBytes = 64, kFewSpan = 1 << 13, kAheadBytes = 512;

// So many rows read so small a matrix where it lies, again for each tile of them.
constexpr int64_t kNearRows = 42, kNearFloats = 1 << 18;

constexpr int kLine = 64;  // Bytes.

// What is fetched into the cache early, a line for so many k.
struct Ahead {
  const char* data;
  int64_t stride, every;
};

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (I4){__VA_ARGS__})
#endif

// Inputs that a right matrix is divided between.
template <typename Right>
constexpr int64_t kUnit = 1;
template <>
constexpr int64_t kUnit<Packed> = 32;
template <>
constexpr int64_t kUnit<Ternary> = 256;

// Begins of `parts` parts of nearly one size.
inline int64_t begin_of(int64_t part, int64_t parts, int64_t whole) { return whole * part / parts; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx512 {
#define TARGET __attribute__((target("avx512f,fma")))
constexpr int kWidth = 16, kMostRows = 14, kLanes = 16;
#include "gemm_tiles.h"
#undef TARGET
}  // namespace avx512

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int kWidth = 8, kMostRows = 6, kLanes = 8;
#include "gemm_tiles.h"
#undef TARGET
}  // namespace avx2
#endif

namespace any {
#define TARGET
constexpr int kWidth = 4, kMostRows = 6, kLanes = 8;
#include "gemm_tiles.h"
#undef TARGET
}  // namespace any

template <typename Right>
using Multiply = void (*)(const Operand&, const Right&, int64_t, int64_t, int64_t, const Output&,
                          int64_t);

// The best that this CPU has, or what the environment asks for and it has.
template <typename Right>
Multiply<Right> best() {
  const char* asked = std::getenv("MOEJAX_CPU");
  const auto wanted = [&](const char* kind) {
    return !asked || !*asked || std::strcmp(asked, kind) == 0;
  };
#if defined(__x86_64__) && defined(__GNUC__)
  if (wanted("avx512") && __builtin_cpu_supports("avx512f")) return avx512::multiply<Right>;
  const bool fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wanted("avx2") && fused) return avx2::multiply<Right>;
#endif
  return any::multiply<Right>;
}

template <typename Right>
void chosen(const Operand& a, const Right& b, int64_t rows, int64_t columns, int64_t depth,
            const Output& out, int64_t matrices) {
  static const Multiply<Right> multiply = best<Right>();
  multiply(a, b, rows, columns, depth, out, matrices);
}

}  // namespace

void multiply(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out, int64_t matrices) {
  chosen(a, b, rows, columns, depth, out, matrices);
}

void multiply(const Operand& a, const Packed& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out) {
  chosen(a, b, rows, columns, depth, out, 1);
}

void multiply(const Operand& a, const Ternary& b, int64_t rows, int64_t columns, int64_t depth,
              const Output& out) {
  chosen(a, b, rows, columns, depth, out, 1);
}

}  // namespace moejax
