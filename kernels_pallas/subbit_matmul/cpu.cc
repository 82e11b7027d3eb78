// x by ternary weights in codes of blocks: a column's weights are found, then rows of x added up.
// See layout/__init__.py for the code.

#include <array>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../extension/work.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

constexpr int64_t kTile = 128;
constexpr int64_t kSublanes = 8;
constexpr int64_t kWordWeights = 16;
constexpr uint32_t kMore = 2, kLow = 3;

// What a class and the bits that follow it say: places of high and of low weights in the block, two
// of each in the halves of a word, and how many of them there are.
struct Meaning {
  uint64_t high, low;
  uint8_t highs, lows;
  bool has_entry;
};

// What follows from a block's size, as `layout.Form`.
template <int kSize>
struct Form {
  static constexpr int kPlace = kSize == 4 ? 2 : kSize == 8 ? 3 : 4;
  static constexpr int kBlocks = kSize == 16 ? 2 : 4;
  static constexpr int kWords = kBlocks * kSize / 16;
  static constexpr int kEntry = 2 * kSize - kPlace - 1;
  static constexpr int kField = 2 * kPlace + 1;
  static constexpr int kTogether = 16 / kBlocks;

  // Of a class: a table, since a branch would be guessed wrong every other time.
  static constexpr int kFieldBits[] = {0, kPlace, kField, kPlace};

  static constexpr int class_shift(int step) { return 2 * (step % 4) + 16 * (step / 4); }

  static Meaning meaning(uint32_t kind, uint32_t field) {
    Meaning m = {};
    if (kind == 0) return m;
    const uint32_t mask = (1u << kPlace) - 1, a = field & mask, b = (field >> kPlace) & mask;
    auto add = [&m](bool is_low, uint64_t at) {
      if (is_low) {
        m.low |= at << (32 * m.lows++);
      } else {
        m.high |= at << (32 * m.highs++);
      }
    };
    if (kind != kMore) {
      add(kind == kLow, a);
    } else if (a == b) {
      m.has_entry = true;
    } else {
      const bool sign = (field >> (2 * kPlace)) & 1;
      add(sign, a);
      add(sign != (a > b), b);
    }
    return m;
  }

  // By class, then field.
  static const Meaning* meanings() {
    static const auto table = [] {
      std::array<Meaning, 4 << kField> made;
      for (uint32_t i = 0; i < made.size(); ++i) made[i] = meaning(i >> kField, i % (1 << kField));
      return made;
    }();
    return table.data();
  }
};

struct Tail {
  int64_t group, steps, lanes, bits, end;

  int64_t at(int64_t lane_step) const {
    return bits * (lane_step * (steps - 1) + std::min(lane_step, lanes));
  }
};

// Bits of one column, between zeros enough to read 64 anywhere.
struct Stream {
  const uint8_t* first;
  int64_t bits;

  uint64_t at(int64_t bit) const {
    bit = std::clamp<int64_t>(bit, 0, bits);
    uint64_t window;
    std::memcpy(&window, first + (bit >> 3), sizeof(window));
    return window >> (bit & 7);
  }
};

// Places of a column's weights.
struct Places {
  std::vector<uint32_t> high, low;
  int64_t highs = 0, lows = 0;

  // Makes room; two places are always written and perhaps not counted.
  void reserve(int64_t most) {
    high.resize(most + 2);
    low.resize(most + 2);
  }

  void clear() { highs = lows = 0; }
};

// 16 weights at two bits, or some of them.
inline void add_word(uint32_t word, uint32_t first, uint32_t*& high, uint32_t*& low) {
  while (word) {
    const int bit = __builtin_ctz(word);
    const bool is_low = (word >> bit) & 2;
    *high = *low = first + bit / 2;
    high += !is_low;
    low += is_low;
    word &= ~(3u << bit);
  }
}

// What the code of every strip has in common.
struct Code {
  Tail tail;
  int64_t steps, depth;  // Of a strip; its places.

  int64_t head() const { return tail.group * kSublanes; }  // Rows of classes.
};

// Where the tiles of a strip are: its record, and its first row among `all_rows`.
struct Record {
  const int32_t* headers;
  int64_t tiles, header, words, start, all_rows;

  const int32_t* rest() const { return headers + tiles * header; }
  int64_t first(int64_t tile) const { return start + headers[tile * header]; }
  int64_t end(int64_t tile) const {
    return tile + 1 < tiles ? first(tile + 1) : start + rest()[0];
  }
  int64_t first_patch(int64_t tile) const { return tile ? headers[tile * header - 1] : 0; }
  int64_t last_patch(int64_t tile) const { return headers[(tile + 1) * header - 1]; }
};

// A strip of a tile: its rows of 128 words column by column, and its patches lane by lane.
struct Strip {
  int64_t rows = 0;
  std::vector<uint32_t> words;
  std::array<int32_t, kTile + 1> patch_starts;
  std::vector<std::array<uint32_t, 2>> patches;

  static constexpr int64_t kPad = 4;  // Words of zeros on either side.

  // Whether what the record says lies within the arrays; nothing else may be read of it.
  bool take_tile(const Code& code, const Record& record, const uint32_t* source, int64_t tile) {
    const int64_t first = record.first(tile), count = record.end(tile) - first;
    const int64_t patch = record.first_patch(tile), last = record.last_patch(tile);
    const bool inside = first >= 0 && count >= code.head() && first + count <= record.all_rows &&
                        patch >= 0 && last >= patch &&
                        record.tiles * record.header + 1 + 2 * last <= record.words;
    if (!inside) return false;
    take(source + first * kTile, count);
    take_patches(record.rest() + 1 + 2 * patch, last - patch);
    return std::all_of(patches.begin(), patches.end(), [&](const auto& one) {
      return one[0] * kWordWeights < code.depth;
    });
  }

  int64_t pitch() const { return rows + 2 * kPad; }
  const uint32_t* column(int64_t lane) const { return words.data() + lane * pitch() + kPad; }

  void take(const uint32_t* source, int64_t count) {
    rows = count;
    words.assign(kTile * pitch(), 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t lane = 0; lane < kTile; ++lane) {
        words[lane * pitch() + kPad + r] = source[r * kTile + lane];
      }
    }
  }

  // From pairs: row << 7 | lane, bits.
  void take_patches(const int32_t* listed, int64_t count) {
    patch_starts.fill(0);
    patches.resize(count);
    for (int64_t i = 0; i < count; ++i) ++patch_starts[(listed[2 * i] & (kTile - 1)) + 1];
    for (int64_t lane = 0; lane < kTile; ++lane) patch_starts[lane + 1] += patch_starts[lane];
    auto next = patch_starts;
    for (int64_t i = 0; i < count; ++i) {
      const auto place = static_cast<uint32_t>(listed[2 * i]);
      patches[next[place & (kTile - 1)]++] = {place >> 7, static_cast<uint32_t>(listed[2 * i + 1])};
    }
  }
};

// Appends the weights of one column of a strip whose first place is `base`.
template <int kSize>
inline __attribute__((always_inline)) void read(const Code& code, const Strip& strip, int64_t lane,
                                                uint32_t base, Places& places) {
  using F = Form<kSize>;
  constexpr int kPerWord = F::kBlocks / F::kWords;
  const Meaning* meanings = F::meanings();
  const Tail& tail = code.tail;
  const uint32_t* column = strip.column(lane);
  const Stream stream{reinterpret_cast<const uint8_t*>(column + code.head()),
                      32 * (strip.rows - code.head())};
  const Stream whole{reinterpret_cast<const uint8_t*>(column), 32 * strip.rows};
  int64_t field_at = tail.end, entry_end = 32 * strip.rows;
  uint32_t *high = places.high.data() + places.highs, *low = places.low.data() + places.lows;

  // One lane-step, whose classes lie kApart bits from each other.
  auto read_step = [&](auto apart, uint64_t kinds, int64_t t, int64_t s) {
    constexpr int kApart = decltype(apart)::value;
    const uint64_t window = stream.at(field_at);
    const uint32_t row = base + (t * F::kWords * kSublanes + s) * kWordWeights;
    int read = 0;
#pragma GCC unroll 4
    for (int j = 0; j < F::kBlocks; ++j) {
      const uint32_t first = row + j / kPerWord * kSublanes * kWordWeights + j % kPerWord * kSize;
      const uint32_t kind = (kinds >> (kApart * j)) & 3;
      const uint32_t field = (window >> read) & ((1u << F::kField) - 1);
      read += F::kFieldBits[kind];
      const Meaning& m = meanings[(kind << F::kField) | field];
      const uint64_t both = (uint64_t{first} << 32) + first;
      const uint64_t highs = both + m.high, lows = both + m.low;
      std::memcpy(high, &highs, sizeof(highs));
      std::memcpy(low, &lows, sizeof(lows));
      high += m.highs;
      low += m.lows;
      if (__builtin_expect(m.has_entry, 0)) {
        entry_end -= F::kEntry;
        const uint32_t rest = whole.at(entry_end) & ((1u << F::kEntry) - 1);
        add_word(field >> F::kPlace << F::kEntry | rest, first, high, low);
      }
    }
    field_at += read;
  };

  for (int64_t group = 0; group < tail.group; ++group) {
    for (int in_group = 0; in_group < F::kTogether; ++in_group) {
      for (int64_t s = 0; s < kSublanes; ++s) {
        const uint32_t word = column[group * kSublanes + s] >> F::class_shift(in_group);
        read_step(std::integral_constant<int, 8>(), word, group * F::kTogether + in_group, s);
      }
    }
  }
  if (tail.steps) {
    uint64_t kinds[kSublanes];  // Of all steps of the tail.
    for (int64_t s = 0; s < kSublanes; ++s) kinds[s] = stream.at(tail.at(s));
    for (int64_t t = 0; t < tail.steps; ++t) {
      const int64_t there = t < tail.steps - 1 ? kSublanes : tail.lanes;
      for (int64_t s = 0; s < there; ++s) {
        read_step(std::integral_constant<int, 2>(), kinds[s] >> (tail.bits * t),
                  tail.group * F::kTogether + t, s);
      }
    }
  }

  for (int32_t i = strip.patch_starts[lane]; i < strip.patch_starts[lane + 1]; ++i) {
    add_word(strip.patches[i][1], base + strip.patches[i][0] * kWordWeights, high, low);
  }
  places.highs = high - places.high.data();
  places.lows = low - places.low.data();
}

#define DEFINE_READ(NAME, SIZE)                                                               \
  FOR_EACH_CPU("bmi2")                                                                        \
  void NAME(const Code& code, const Strip& strip, int64_t lane, uint32_t base, Places& out) { \
    read<SIZE>(code, strip, lane, base, out);                                                 \
  }

DEFINE_READ(read_4, 4)
DEFINE_READ(read_8, 8)
DEFINE_READ(read_16, 16)

// Of an expert's kept columns, the output that each is, -1 where none.
template <typename Home>
std::vector<int64_t> outputs_of(const Home* homes, int64_t tiles, int64_t outputs) {
  std::vector<int64_t> found(tiles * kTile, -1);
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t lane = homes[o] & (kTile - 1);
    const int64_t tile = int64_t{homes[o / kTile * kTile + lane]} >> 7;
    if (tile < tiles) found[tile * kTile + lane] = o;
  }
  return found;
}

// x [strips * places][m], in the order in which the code has the places of words; y [m][outputs].
ffi::Error subbit_matmul(ffi::ThreadPool pool, F32 x, U32 rows, S32 starts, S32 records,
                         ffi::AnyBuffer levels, ffi::AnyBuffer homes, S32 group_sizes,
                         int64_t size, int64_t steps, int64_t header, int64_t tail_group,
                         int64_t tail_steps, int64_t tail_lanes, int64_t tail_bits,
                         int64_t tail_end, ffi::Result<F32> y) {
  const int64_t m = y->dimensions()[0], outputs = y->dimensions()[1];
  const int64_t experts = homes.dimensions()[0], tiles = homes.dimensions()[1];
  const int64_t strips = starts.dimensions()[1], record = records.dimensions()[3];
  const int64_t places = x.dimensions()[0], depth = places / strips;
  const int64_t of_levels = levels.dimensions()[1], columns = tiles * kTile;
  const Code code{{tail_group, tail_steps, tail_lanes, tail_bits, tail_end}, steps, depth};
  const int64_t step_places = kSublanes * kWordWeights * (size == 4 ? 1 : 2);
  if (steps * step_places > depth) {
    return ffi::Error::InvalidArgument("subbit_matmul: x has fewer places than the code");
  }
  std::memset(y->typed_data(), 0, y->size_bytes());
  const std::vector<Piece> pieces = pieces_of(group_sizes.typed_data(), experts, m);
  std::vector<std::vector<int64_t>> output(experts);
  for (const Piece& piece : pieces) {
    if (output[piece.expert].size()) continue;
    const int64_t first = piece.expert * columns;
    const void* all = homes.untyped_data();
    output[piece.expert] =
        homes.element_type() == ffi::U16
            ? outputs_of(static_cast<const uint16_t*>(all) + first, tiles, outputs)
            : outputs_of(static_cast<const uint32_t*>(all) + first, tiles, outputs);
  }
  const auto read = size == 4 ? read_4 : size == 8 ? read_8 : read_16;
  const Values level(levels);
  std::atomic<bool> damaged{false};

  auto multiply = [&](const Piece& piece, const float* x_piece, int64_t first, int64_t last) {
    const int64_t e = piece.expert, lanes = piece.lanes();
    const int64_t low_level = e * of_levels * columns;
    const int64_t high_level = low_level + (of_levels - 1) * columns;
    const float low_sign = of_levels == 2 ? 1 : -1;
    std::vector<Strip> held(strips);
    Places found;
    for (int64_t t = first; t < last; ++t) {
      int64_t most = places;
      for (int64_t i = 0; i < strips; ++i) {
        const Record own{records.typed_data() + (e * strips + i) * record, tiles, header, record,
                         starts.typed_data()[e * strips + i], rows.dimensions()[0]};
        if (!held[i].take_tile(code, own, rows.typed_data(), t)) {
          damaged = true;
          return;
        }
        most += kWordWeights * held[i].patches.size();
      }
      found.reserve(most);
      for (int64_t lane = 0; lane < kTile; ++lane) {
        const int64_t column = t * kTile + lane, o = output[e][column];
        if (o < 0) continue;
        found.clear();
        for (int64_t i = 0; i < strips; ++i) read(code, held[i], lane, i * depth, found);
        const float high = level[high_level + column];
        const float low = low_sign * level[low_level + column];
        float highs[kMostLanes], lows[kMostLanes];
        sum_rows(lanes, x_piece, found.high.data(), found.highs, highs);
        sum_rows(lanes, x_piece, found.low.data(), found.lows, lows);
        for (int64_t r = 0; r < piece.rows; ++r) {
          y->typed_data()[(piece.first + r) * outputs + o] = highs[r] * high + lows[r] * low;
        }
      }
    }
  };
  share_pieces(pool, x.typed_data(), places, m, pieces, tiles, multiply);
  if (damaged) return ffi::Error::InvalidArgument("subbit_matmul: the codes are damaged");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_subbit_matmul, moejax::subbit_matmul,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<moejax::F32>()
        .Arg<moejax::U32>()
        .Arg<moejax::S32>()
        .Arg<moejax::S32>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::S32>()
        .Attr<int64_t>("size")
        .Attr<int64_t>("steps")
        .Attr<int64_t>("header")
        .Attr<int64_t>("tail_group")
        .Attr<int64_t>("tail_steps")
        .Attr<int64_t>("tail_lanes")
        .Attr<int64_t>("tail_bits")
        .Attr<int64_t>("tail_end")
        .Ret<moejax::F32>());
