// Right matrices in codes, laid out for tiles. Included by gemm_tiles.h, once for each kind of CPU.

typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

// Words of `count` columns, zeros past them. Those of the panels to come are fetched meanwhile.
TARGET inline Bits words_at(const uint32_t* from, int64_t count) {
  __builtin_prefetch(from + 2 * kPanel);
  Bits words = {};
  if (count >= kWidth) {
    std::memcpy(&words, from, sizeof(words));
  } else if (count > 0) {
    std::memcpy(&words, from, count * sizeof(uint32_t));
  }
  return words;
}

// Values data[first + i * stride] of `count` columns, zeros past them.
TARGET inline Vector values_at(const void* data, bool half, int64_t first, int64_t stride,
                               int64_t count) {
  Vector values = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, kWidth); ++i) {
    const int64_t at = first + i * stride;
    values[i] = half ? widen(static_cast<const uint16_t*>(data)[at])
                     : static_cast<const float*>(data)[at];
  }
  return values;
}

// kCount symbols of kLow bits and, above them, of kHigh bits, of 32 inputs of kWidth columns, as
// floats: those of input `begin` on.
template <int kLow, int kHigh, int kCount>
TARGET inline void symbols_of(const uint32_t* low, const uint32_t* high, int64_t stride,
                              int64_t count, int begin, Vector* to) {
  constexpr int kLows = 32 / kLow, kHighs = kHigh ? 32 / kHigh : 32;
  const Bits lows = words_at(low + begin / kLows * stride, count) >> (begin % kLows * kLow);
  Bits highs = {};
  if constexpr (kHigh > 0) {
    highs = words_at(high + begin / kHighs * stride, count) >> (begin % kHighs * kHigh);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    Bits symbol = (lows >> (i * kLow)) & ((1u << kLow) - 1);
    if constexpr (kHigh > 0) symbol |= ((highs >> (i * kHigh)) & ((1u << kHigh) - 1)) << kLow;
    to[i] = __builtin_convertvector(reinterpret_cast<Ints&>(symbol), Vector);
  }
}

template <int kLow, int kHigh>
TARGET void pack_symbols(const Packed& b, int64_t first, int64_t lanes, int64_t k, int64_t depth,
                         float* to, int64_t width) {
  constexpr int kStep = 32 / std::max(kLow, kHigh);  // Inputs that are in one word of each field.
  const int64_t above = ceil_div(b.inputs * kLow, 32);  // Words of the lower fields.
  for (int64_t v = 0; v < width; v += kWidth) {
    const int64_t count = lanes - v;
    Vector scale = {}, zero = {};
    int64_t group = -1, group_end = k;
    for (int64_t i = 0; i < depth; i += kStep) {
      const int64_t unit = (k + i) / 32, begin = (k + i) % 32;
      const uint32_t* low = b.words + unit * kLow * b.columns + first + v;
      const uint32_t* high = b.words + (above + unit * kHigh) * b.columns + first + v;
      Vector symbols[kStep];
      symbols_of<kLow, kHigh, kStep>(low, high, b.columns, count, begin, symbols);
      const int64_t inputs = std::min<int64_t>(kStep, depth - i);
      for (int64_t j = 0; j < inputs;) {
        if (k + i + j == group_end) {
          group = b.group_size ? (k + i + j) / b.group_size : 0;
          group_end = b.group_size ? (group + 1) * b.group_size : b.inputs;
          const int64_t at = (first + v) * b.groups + group;
          scale = values_at(b.scale, b.half, at, b.groups, count);
          zero = values_at(b.zero, b.half, at, b.groups, count);
        }
        const int64_t end = std::min(inputs, group_end - k - i);
        for (; j < end; ++j) {
          const Vector weights = scale * (symbols[j] - zero);
          std::memcpy(to + (i + j) * width + v, &weights, sizeof(weights));
        }
      }
    }
  }
}

TARGET void pack(const Packed& b, int64_t first, int64_t lanes, int64_t k, int64_t depth,
                 float* to, int64_t width) {
  switch (b.bits) {
    case 2: return pack_symbols<2, 0>(b, first, lanes, k, depth, to, width);
    case 3: return pack_symbols<2, 1>(b, first, lanes, k, depth, to, width);
    case 4: return pack_symbols<4, 0>(b, first, lanes, k, depth, to, width);
    default: return pack_symbols<4, 4>(b, first, lanes, k, depth, to, width);
  }
}

// Chunks of 256 inputs whose 16 words hold the inputs 32 i + 2 r and 32 i + 2 r + 1 of word r.
TARGET void pack(const Ternary& b, int64_t first, int64_t lanes, int64_t k, int64_t depth,
                 float* to, int64_t width) {
  constexpr int64_t kWords = 16, kSteps = 8;
  constexpr uint32_t kHigh = 0x40000000, kLow = 0xC0000000;
  for (int64_t v = 0; v < width; v += kWidth) {
    const int64_t count = lanes - v;
    const Vector high = values_at(b.high, b.half, first + v, 1, count), zero = {};
    const Vector low = b.low ? values_at(b.low, b.half, first + v, 1, count) : -high;
    for (int64_t i = 0; i < depth; i += kUnit<Ternary>) {
      const uint32_t* words = b.words + (k + i) / kUnit<Ternary> * kWords * b.columns + first + v;
      for (int64_t r = 0; r < kWords; ++r) {
        const Bits word = words_at(words + r * b.columns, count);
        float* row = to + (i + 2 * r) * width + v;
        for (int64_t step = 0; step < kSteps; ++step, row += 32 * width) {
          for (int64_t second = 0; second < 2; ++second) {
            const Bits code = (word << (2 * step + (second ? 0 : 16))) & kLow;
            const Vector weights = code == kHigh ? high : (code == kLow ? low : zero);
            std::memcpy(row + second * width, &weights, sizeof(weights));
          }
        }
      }
    }
  }
}
