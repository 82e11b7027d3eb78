// Softmax attention and its gradients. See __init__.py for the arrays.
//
// A unit of work is a block of queries of one key head: the rows of its products are the query
// heads of that key head, of one token after the other. Keys that no query of the block sees are
// not multiplied, and no more scores are held than those of the block with a block of keys.

#include <cmath>
#include <limits>

#include "../extension/gemm.h"
#include "../extension/scratch.h"
#include "../extension/work.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

// Rows of a block, the most tokens of it, and keys of a block.
constexpr int64_t kBlockRows = 256, kBlockTokens = 128, kBlockKeys = 512;
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t kFloats = 16;

#define LOOPS FOR_EACH_CPU("avx512f", "avx2")
#define INLINE __attribute__((always_inline))

struct Shape {
  int64_t batch, tokens, keys, heads, groups, width;

  int64_t per() const { return heads / groups; }  // Query heads of a key head.
  int64_t block() const { return std::clamp<int64_t>(kBlockRows / per(), 1, kBlockTokens); }
  int64_t blocks() const { return (tokens + block() - 1) / block(); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(width)); }
};

Shape shape_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k) {
  const auto a = q.dimensions(), b = k.dimensions();
  return {a[0], a[1], b[1], a[2], b[2], a[3]};
}

// A matrix of rows that lie apart, of float32 or bfloat16.
struct Rows {
  void* data;
  bool half;
  int64_t row;  // From one to the next.

  Rows(const ffi::AnyBuffer& buffer, int64_t first, int64_t between)
      : half(buffer.element_type() == ffi::BF16), row(between) {
    data = static_cast<char*>(buffer.untyped_data()) + first * size();
  }
  int64_t size() const { return half ? 2 : 4; }
  const void* at(int64_t i) const { return static_cast<char*>(data) + i * row * size(); }

  // Rows from `i` on as lanes, to sum over their elements; or to sum over the rows.
  Operand by_rows(int64_t i) const { return {at(i), half, row, 1}; }
  Operand by_elements(int64_t i) const { return {at(i), half, 1, row}; }
};

Operand by_rows(const float* data, int64_t row) { return {data, false, row, 1}; }
Operand by_elements(const float* data, int64_t row) { return {data, false, 1, row}; }

// Keys [first, end) that a query sees; with holes not all of them.
struct Seen {
  int64_t first, end;
  bool holes;
};

Seen seen_of(const bool* mask, int64_t keys) {
  const auto find = [&](int64_t from, int value) {
    const void* found = from < keys ? std::memchr(mask + from, value, keys - from) : nullptr;
    return found ? static_cast<const bool*>(found) - mask : keys;
  };
  const int64_t first = find(0, 1);
  int64_t end = find(first, 0);
  const bool holes = find(end, 1) < keys;
  if (holes) {
    for (end = keys; !mask[end - 1];) --end;
  }
  return {first, end, holes};
}

INLINE inline void put(float value, float& to) { to = value; }
INLINE inline void put(float value, uint16_t& to) { to = narrow(value); }

// exp(x) for x <= 0, to an ulp or two (Cephes' expf): 0 below the least normal number, and of what
// is no number none.
INLINE inline Floats exponential(Floats x) {
  constexpr float kLeast = -87, kRound = 12582912;  // 1.5 * 2^23: what is added to it is rounded.
  const Ints least = x < kLeast;
  const Floats bounded = least ? Floats{} + kLeast : x;
  const Floats shifted = bounded * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats two;
  std::memcpy(&two, &power, sizeof(two));
  return least ? Floats{} : p * two;
}

// Calls work(j) for every vector that holds any of [first, end).
template <typename Work>
INLINE inline void by_vectors(int64_t first, int64_t end, Work work) {
  for (int64_t j = first / kFloats * kFloats; j < end; j += kFloats) work(j);
}

INLINE inline int64_t whole_vectors(int64_t n) { return (n + kFloats - 1) / kFloats * kFloats; }

// Elements of those vectors that are not in [first, end) become `value`, other elements before them
// and after them up to `keys` 0.
INLINE inline void surround(float* row, int64_t first, int64_t end, int64_t keys, float value) {
  const int64_t begin = first / kFloats * kFloats, rest = whole_vectors(end);
  std::fill(row, row + begin, 0.0f);
  std::fill(row + begin, row + first, value);
  std::fill(row + end, row + rest, value);
  if (rest < keys) std::fill(row + rest, row + keys, 0.0f);
}

// All elements by `operation` of two.
template <typename Operation>
INLINE inline float together(Floats x, Operation operation) {
  float parts[kFloats];
  std::memcpy(parts, &x, sizeof(x));
  for (int64_t n = kFloats / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) parts[i] = operation(parts[i], parts[i + n]);
  }
  return parts[0];
}

// Scores [first, end) of a row to exp(score - top), the rest of `keys` to 0. Returns their sum.
// `top` rises to the greatest score.
LOOPS float weigh(float* scores, int64_t first, int64_t end, int64_t keys, float& top) {
  surround(scores, first, end, keys, kNone);
  Floats most = Floats{} + kNone, total{}, part;
  by_vectors(first, end, [&](int64_t j) INLINE {
    std::memcpy(&part, scores + j, sizeof(part));
    most = part > most ? part : most;
  });
  top = std::max(top, together(most, [](float a, float b) INLINE { return a > b ? a : b; }));
  const float less = top == kNone ? 0 : top;
  by_vectors(first, end, [&](int64_t j) INLINE {
    std::memcpy(&part, scores + j, sizeof(part));
    part = exponential(part - less);
    total += part;
    std::memcpy(scores + j, &part, sizeof(part));
  });
  return together(total, [](float a, float b) INLINE { return a + b; });
}

// Scores [first, end) of a row to p = exp(score - whole), and their gradients to
// p (gradient - mean); the rest of `keys` to 0.
LOOPS void weigh_gradients(float* scores, float* gradients, int64_t first, int64_t end,
                           int64_t keys, float whole, float mean) {
  surround(scores, first, end, keys, kNone);
  surround(gradients, first, end, keys, 0);
  by_vectors(first, end, [&](int64_t j) INLINE {
    Floats part, gradient;
    std::memcpy(&part, scores + j, sizeof(part));
    std::memcpy(&gradient, gradients + j, sizeof(part));
    part = exponential(part - whole);
    gradient = part * (gradient - mean);
    std::memcpy(scores + j, &part, sizeof(part));
    std::memcpy(gradients + j, &gradient, sizeof(part));
  });
}

// to [n] = from [n] * factor, in the types of both.
template <typename From, typename To>
INLINE inline void scale(const From* from, int64_t n, float factor, To* to) {
  for (int64_t i = 0; i < n; ++i) put(widen(from[i]) * factor, to[i]);
}

LOOPS void scaled(const float* from, int64_t n, float factor, float* to) {
  scale(from, n, factor, to);
}
LOOPS void scaled(const uint16_t* from, int64_t n, float factor, float* to) {
  scale(from, n, factor, to);
}
LOOPS void scaled(const float* from, int64_t n, float factor, uint16_t* to) {
  scale(from, n, factor, to);
}

// A block of queries of one key head, and what they see.
class Block {
 public:
  Block(const Shape& shape, const ffi::Buffer<ffi::PRED>& mask, int64_t batch, int64_t group,
        int64_t index)
      : shape_(shape), keys_(shape.keys), per_(shape.per()) {
    const int64_t token = index * shape.block();
    tokens_ = std::min(shape.block(), shape.tokens - token);
    first_ = ((batch * shape.tokens + token) * shape.heads + group * per_) * shape.width;
    statistic_ = (batch * shape.heads + group * per_) * shape.tokens + token;
    const int64_t masks = mask.dimensions()[0] == 1 ? 0 : batch;
    mask_ = mask.typed_data() + (masks * shape.tokens + token) * keys_;
    begin_ = keys_, end_ = 0;
    for (int64_t i = 0; i < tokens_; ++i) {
      seen_.push_back(seen_of(mask_ + i * keys_, keys_));
      if (seen_[i].first == seen_[i].end) continue;
      begin_ = std::min(begin_, seen_[i].first);
      end_ = std::max(end_, seen_[i].end);
    }
  }

  int64_t rows() const { return tokens_ * per_; }
  // Keys that any of the queries sees.
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  // Where what there is one of for each row and head lies, [b][n][t].
  int64_t statistic(int64_t row) const {
    return statistic_ + row % per_ * shape_.tokens + row / per_;
  }

  // The rows of an array like q, times a factor; and back.
  void read(const ffi::AnyBuffer& from, float factor, float* to) const {
    each_token(from, [&](int64_t i, auto* at) {
      scaled(at, run(), factor, to + i * run());
    });
  }

  void write(const float* from, float factor, const ffi::AnyBuffer& to) const {
    each_token(to, [&](int64_t i, auto* at) { scaled(from + i * run(), run(), factor, at); });
  }

  // Which of the keys [k, k + keys) a row sees, from k on; scores that are in holes become none.
  Seen seen(int64_t row, int64_t k, int64_t keys, float* scores) const {
    const int64_t token = row / per_;
    const Seen all = seen_[token];
    const int64_t first = std::clamp<int64_t>(all.first - k, 0, keys);
    const int64_t end = std::clamp<int64_t>(all.end - k, first, keys);
    if (all.holes) {
      const bool* mask = mask_ + token * keys_ + k;
      for (int64_t j = first; j < end; ++j) scores[j] = mask[j] ? scores[j] : kNone;
    }
    return {first, end, all.holes};
  }

 private:
  int64_t run() const { return per_ * shape_.width; }

  template <typename Work>
  void each_token(const ffi::AnyBuffer& buffer, Work work) const {
    const auto run = [&](auto* data) {
      for (int64_t i = 0; i < tokens_; ++i) {
        work(i, data + first_ + i * shape_.heads * shape_.width);
      }
    };
    void* data = buffer.untyped_data();
    if (buffer.element_type() == ffi::BF16) return run(static_cast<uint16_t*>(data));
    run(static_cast<float*>(data));
  }

  const Shape shape_;
  const int64_t keys_, per_;
  int64_t tokens_, first_, statistic_, begin_, end_;
  const bool* mask_;
  std::vector<Seen> seen_;
};

// The keys, or values, of one head.
Rows head_of(const ffi::AnyBuffer& buffer, const Shape& shape, int64_t batch, int64_t group) {
  return Rows(buffer, (batch * shape.keys * shape.groups + group) * shape.width,
              shape.groups * shape.width);
}

// Floats from one row of scores to the next: whole vectors, for at most kBlockKeys keys.
int64_t score_row(int64_t keys) { return (std::min(keys, kBlockKeys) + 31) / 32 * 32; }

// out, and the logarithm of the sum of the exponentials of each query's scores, [b][n][t].
ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<F32> whole) {
  const Shape shape = shape_of(q, k);
  const int64_t h = shape.width, heads = shape.batch * shape.groups;
  share(pool, heads * shape.blocks(), [&](int64_t unit) {
    static thread_local Scratch queries, products, sums, tops;
    // The last blocks, which see the most keys, first.
    const int64_t index = shape.blocks() - 1 - unit / heads;
    const int64_t batch = unit % heads / shape.groups, group = unit % shape.groups;
    const Block block(shape, mask, batch, group, index);
    const int64_t rows = block.rows();
    const Rows keys = head_of(k, shape, batch, group), values = head_of(v, shape, batch, group);
    const int64_t row = score_row(block.end() - block.begin());
    float *own = queries.of(rows * h), *scores = products.of(rows * row);
    float *mixed = sums.of(rows * h), *top = tops.of(2 * rows), *sum = top + rows;
    block.read(q, shape.scale(), own);
    std::fill(mixed, mixed + rows * h, 0.0f);
    std::fill(top, top + rows, kNone);
    std::fill(sum, sum + rows, 0.0f);
    for (int64_t at = block.begin(); at < block.end(); at += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, block.end() - at);
      multiply(by_rows(own, h), keys.by_rows(at), rows, count, h, {scores, false, row});
      for (int64_t i = 0; i < rows; ++i) {
        float* mine = scores + i * row;
        const Seen seen = block.seen(i, at, count, mine);
        const float before = top[i];
        const float added = weigh(mine, seen.first, seen.end, count, top[i]);
        const float less = before == top[i] ? 1 : std::exp(before - top[i]);
        sum[i] = sum[i] * less + added;
        if (less == 1 || at == block.begin()) continue;
        scaled(mixed + i * h, h, less, mixed + i * h);
      }
      multiply(by_rows(scores, row), values.by_elements(at), rows, h, count,
               {mixed, false, h, true});
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool none = sum[i] == 0;
      whole->typed_data()[block.statistic(i)] = none ? -kNone : top[i] + std::log(sum[i]);
      scaled(mixed + i * h, h, none ? 0 : 1 / sum[i], mixed + i * h);
    }
    block.write(mixed, 1, *out);
  });
  return ffi::Error::Success();
}

// The gradients of q, k and v: of k and v [parts][b][s][g][h], to be summed over the parts. A part
// takes every parts-th block of queries, so that the order of sums follows from shapes alone.
ffi::Error gradients(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::PRED> mask, ffi::AnyBuffer out, F32 whole,
                     ffi::AnyBuffer dout, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<F32> dk,
                     ffi::Result<F32> dv) {
  const Shape shape = shape_of(q, k);
  const int64_t h = shape.width, heads = shape.batch * shape.groups;
  const int64_t parts = dk->dimensions()[0], between = shape.groups * h;
  share(pool, heads * parts, [&](int64_t unit) {
    static thread_local Scratch queries, outs, weights, slopes, sums, means;
    const int64_t part = unit / heads;
    const int64_t batch = unit % heads / shape.groups, group = unit % shape.groups;
    const Rows keys = head_of(k, shape, batch, group), values = head_of(v, shape, batch, group);
    const int64_t head = ((part * shape.batch + batch) * shape.keys * shape.groups + group) * h;
    float *key_sums = dk->typed_data() + head, *value_sums = dv->typed_data() + head;
    for (int64_t i = 0; i < shape.keys; ++i) {
      std::fill_n(key_sums + i * between, h, 0.0f);
      std::fill_n(value_sums + i * between, h, 0.0f);
    }
    for (int64_t index = part; index < shape.blocks(); index += parts) {
      const Block block(shape, mask, batch, group, index);
      const int64_t rows = block.rows(), row = score_row(block.end() - block.begin());
      float *own = queries.of(rows * h), *dmixed = outs.of(rows * h), *mean = means.of(rows);
      float *weight = weights.of(rows * row), *slope = slopes.of(rows * row);
      float* query_sums = sums.of(rows * h);
      block.read(out, 1, own);
      block.read(dout, 1, dmixed);
      for (int64_t i = 0; i < rows; ++i) {
        mean[i] = 0;
        for (int64_t j = 0; j < h; ++j) mean[i] += own[i * h + j] * dmixed[i * h + j];
      }
      block.read(q, shape.scale(), own);
      std::fill(query_sums, query_sums + rows * h, 0.0f);
      for (int64_t at = block.begin(); at < block.end(); at += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, block.end() - at);
        multiply(by_rows(own, h), keys.by_rows(at), rows, count, h, {weight, false, row});
        multiply(by_rows(dmixed, h), values.by_rows(at), rows, count, h, {slope, false, row});
        for (int64_t i = 0; i < rows; ++i) {
          const Seen seen = block.seen(i, at, count, weight + i * row);
          weigh_gradients(weight + i * row, slope + i * row, seen.first, seen.end, count,
                          whole.typed_data()[block.statistic(i)], mean[i]);
        }
        multiply(by_elements(weight, row), by_elements(dmixed, h), count, h, rows,
                 {value_sums + at * between, false, between, true});
        multiply(by_elements(slope, row), by_elements(own, h), count, h, rows,
                 {key_sums + at * between, false, between, true});
        multiply(by_rows(slope, row), keys.by_elements(at), rows, h, count,
                 {query_sums, false, h, true});
      }
      block.write(query_sums, shape.scale(), *dq);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_attention, moejax::attend,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::PRED>>()
        .Ret<ffi::AnyBuffer>()
        .Ret<moejax::F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_attention_gradients, moejax::gradients,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::PRED>>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::F32>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Ret<moejax::F32>()
        .Ret<moejax::F32>());
