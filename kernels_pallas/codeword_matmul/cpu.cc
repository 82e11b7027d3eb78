// x by ternary weights in codewords: a block's weights are found, then rows of x added up.
// See __init__.py for the arrays.

#include <atomic>
#include <cstdint>
#include <vector>

#include "../extension/work.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

constexpr int64_t kCodewords = 65536;
constexpr uint16_t kNone = 0xFFFF;
constexpr int64_t kAhead = 16;  // Codewords whose entries are fetched early.

// Places of a block's weights, counted from its first.
struct Found {
  std::vector<uint32_t> high, low;
  int64_t highs = 0, lows = 0;

  // Decodes codewords into places below `size`. An entry is a length and `kept` weights, each a
  // place << 1 | is high.
  void read(const uint16_t* words, int64_t count, const uint16_t* entries, int64_t kept,
            int64_t size) {
    high.resize(size + kept);
    low.resize(size + kept);
    highs = lows = 0;
    uint32_t first = 0;
    for (int64_t i = 0; i < count && first < size; ++i) {
      if (i + kAhead < count) __builtin_prefetch(entries + words[i + kAhead] * (kept + 1));
      const uint16_t* entry = entries + words[i] * (kept + 1);
      for (int64_t k = 1; k <= kept; ++k) {
        const uint32_t weight = entry[k], place = first + (weight >> 1);
        const bool there = weight != kNone && place < size, is_high = weight & 1;
        high[highs] = low[lows] = place;
        highs += there && is_high;
        lows += there && !is_high;
      }
      first += entry[0];
    }
  }
};

// Moves places below `end` to the front of a row that begins at `begin`; returns how many.
int64_t row_of(std::vector<uint32_t>& at, int64_t from, int64_t count, uint32_t begin,
               uint32_t end) {
  int64_t i = from;
  for (; i < count && at[i] < end; ++i) at[i] -= begin;
  return i - from;
}

// x [cols][m], words [shards][w], offsets [e][blocks + 1], table [e], levels [e][rows][2],
// entries [tables][65536][1 + kept]; y [m][rows].
ffi::Error codeword_matmul(ffi::ThreadPool pool, F32 x, U16 words, U32 offsets, S32 table,
                           ffi::AnyBuffer levels, U16 entries, S32 group_sizes, int64_t block_rows,
                           ffi::Result<F32> y) {
  const int64_t m = y->dimensions()[0], rows = y->dimensions()[1], cols = x.dimensions()[0];
  const int64_t experts = offsets.dimensions()[0], blocks = offsets.dimensions()[1] - 1;
  const int64_t shards = words.dimensions()[0], shard_words = words.dimensions()[1];
  const int64_t tables = entries.dimensions()[0], kept = entries.dimensions()[2] - 1;
  std::memset(y->typed_data(), 0, y->size_bytes());
  const std::vector<Piece> pieces = pieces_of(group_sizes.typed_data(), experts, m);
  const Values level(levels);
  std::atomic<bool> damaged{false};

  auto multiply = [&](const Piece& piece, const float* x_piece, int64_t first, int64_t last) {
    const int64_t e = piece.expert, lanes = piece.lanes();
    const uint32_t* own = offsets.typed_data() + e * (blocks + 1);
    const int64_t shard = own[0] / shard_words;
    const uint16_t* stored = words.typed_data() + shard % shards * shard_words;
    const int64_t which = table.typed_data()[e];
    if (which < 0 || which >= tables) {
      damaged = true;
      return;
    }
    const uint16_t* entry = entries.typed_data() + which * kCodewords * (kept + 1);
    Found found;
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = own[b] - shard * shard_words, end = own[b + 1] - shard * shard_words;
      if (begin < 0 || end < begin || end > shard_words) {
        damaged = true;
        return;
      }
      const int64_t first_row = b * block_rows, count = std::min(block_rows, rows - first_row);
      found.read(stored + begin, end - begin, entry, kept, count * cols);
      int64_t high_from = 0, low_from = 0;
      for (int64_t r = 0; r < count; ++r) {
        const uint32_t row_begin = r * cols, row_end = row_begin + cols;
        const int64_t n_high = row_of(found.high, high_from, found.highs, row_begin, row_end);
        const int64_t n_low = row_of(found.low, low_from, found.lows, row_begin, row_end);
        float highs[kMostLanes], lows[kMostLanes];
        sum_rows(lanes, x_piece, found.high.data() + high_from, n_high, highs);
        sum_rows(lanes, x_piece, found.low.data() + low_from, n_low, lows);
        high_from += n_high;
        low_from += n_low;
        const int64_t row = first_row + r;
        const float low = level[(e * rows + row) * 2], high = level[(e * rows + row) * 2 + 1];
        for (int64_t i = 0; i < piece.rows; ++i) {
          y->typed_data()[(piece.first + i) * rows + row] = lows[i] * low + highs[i] * high;
        }
      }
    }
  };
  share_pieces(pool, x.typed_data(), cols, m, pieces, blocks, multiply);
  if (damaged) return ffi::Error::InvalidArgument("codeword_matmul: the codes are damaged");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_codeword_matmul, moejax::codeword_matmul,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<moejax::F32>()
        .Arg<moejax::U16>()
        .Arg<moejax::U32>()
        .Arg<moejax::S32>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::U16>()
        .Arg<moejax::S32>()
        .Attr<int64_t>("block_rows")
        .Ret<moejax::F32>());
