// Included once for each kind of CPU, in a namespace that defines kWidth floats a vector, kMostRows
// rows a tile, kLanes places that a packed row of them takes, and TARGET, the attribute that lets
// a function use the kind's instructions.

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

constexpr int kPanelVectors = 2, kPanel = kPanelVectors * kWidth;
constexpr int kMostSums = kMostRows * kPanelVectors;

TARGET inline void load(const float* from, Vector& to) { std::memcpy(&to, from, sizeof(to)); }

TARGET inline void load(const uint16_t* from, Vector& to) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}

// c [kRows][kVectors * kWidth] = or += the product of a [depth][kLanes] and b [depth][b_row].
// Meanwhile it fetches what lies `stride` bytes apart from `ahead` on, a line for `every` k.
template <int kVectors, bool kPacked, typename B, int kRows>
TARGET void tile(const float* a, const B* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                 bool add, const Ahead& ahead) {
  // A packed panel's tile has a line to fetch at a time, another those beside what it reads.
  constexpr int kBytes = kVectors * kWidth * static_cast<int>(sizeof(B));
  constexpr int kFetched = kPacked || kBytes < kLine ? 1 : kBytes / kLine;
  Vector sum[kRows][kVectors] = {};
  const char* next = ahead.data;
  for (int64_t k = 0; k < depth; next += ahead.stride) {
    for (int line = 0; line < kFetched; ++line) __builtin_prefetch(next + line * kLine, 0, 2);
    const int64_t end = std::min(depth, k + ahead.every);
    for (; k < end; ++k, a += kLanes, b += b_row) {
      Vector right[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        load(b + v * kWidth, right[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r] * right[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_row + v * kWidth;
      if (add) {  // After the block's own sum, which keeps rounding small.
        Vector before;
        load(to, before);
        sum[r][v] += before;
      }
      std::memcpy(to, &sum[r][v], sizeof(Vector));
    }
  }
}

template <typename B>
using Tile = void (*)(const float*, const B*, int64_t, int64_t, float*, int64_t, bool,
                      const Ahead&);

template <int kVectors, bool kPacked, typename B, int... kRows>
inline Tile<B> tile_of(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<B> kTiles[] = {tile<kVectors, kPacked, B, kRows + 1>...};
  return kTiles[rows - 1];
}

// The tile of so many rows, at most kMostSums / kVectors.
template <int kVectors, bool kPacked, typename B>
inline Tile<B> tile_of(int64_t rows) {
  return tile_of<kVectors, kPacked, B>(
      rows, std::make_integer_sequence<int, kMostSums / kVectors>());
}

// Four elements of each of the rows, as columns at `to`.
TARGET inline void transpose_4(const float* const* rows, int64_t k, float* to, int64_t width) {
  V4 a, b, c, d;
  std::memcpy(&a, rows[0] + k, 16);
  std::memcpy(&b, rows[1] + k, 16);
  std::memcpy(&c, rows[2] + k, 16);
  std::memcpy(&d, rows[3] + k, 16);
  const V4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
  const V4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
  const V4 out[4] = {SHUFFLE(ab_low, cd_low, 0, 1, 4, 5), SHUFFLE(ab_low, cd_low, 2, 3, 6, 7),
                     SHUFFLE(ab_high, cd_high, 0, 1, 4, 5), SHUFFLE(ab_high, cd_high, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * width, &out[i], 16);
}

TARGET inline void transpose_4(const uint16_t* const* rows, int64_t k, float* to, int64_t width) {
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) to[j * width + i] = widen(rows[i][k + j]);
  }
}

// Lanes that lie along k, those of `index` where it is given: rows become columns. Places past the
// lanes repeat the last of them or, past the next four, stay as they are: nothing reads them.
template <typename T>
TARGET void pack_rows(const T* from, int64_t lane, const int32_t* index, int64_t lanes,
                      int64_t depth, float* to, int64_t width) {
  constexpr int kMostWidth = kLanes > kPanel ? kLanes : kPanel;
  const T* rows[kMostWidth];
  const int64_t places = std::min(width, ceil_div(lanes, 4) * 4);
  for (int64_t i = 0; i < places; ++i) {
    const int64_t own = std::min(i, lanes - 1);
    rows[i] = from + (index ? index[own] : own) * lane;
  }
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    for (int64_t i = 0; i < places; i += 4) transpose_4(rows + i, k, to + k * width + i, width);
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < places; ++i) to[k * width + i] = widen(rows[i][k]);
  }
}

// Lanes that lie beside each other; past them are zeros or what lies there, which nothing reads.
template <typename T>
TARGET void pack_columns(const T* from, int64_t stride, int64_t lanes, int64_t depth, float* to,
                         int64_t width) {
  int64_t k = 0;
  if (lanes < kWidth && width <= kWidth && stride >= kWidth) {
    // A vector goes no further than into the next k; of the last there is none.
    for (; k + 1 < depth; ++k, from += stride, to += width) {
      Vector part;
      load(from, part);
      std::memcpy(to, &part, sizeof(part));
    }
  }
  for (; k < depth; ++k, from += stride, to += width) {
    int64_t i = 0;
    for (; i + kWidth <= lanes; i += kWidth) {
      Vector part;
      load(from + i, part);
      std::memcpy(to + i, &part, sizeof(part));
    }
    for (; i < lanes; ++i) to[i] = widen(from[i]);
    for (; i < width; ++i) to[i] = 0;
  }
}

// to [depth][width] from `lanes` lanes of the matrix, which begins at `data`.
template <typename T>
TARGET void pack(const T* data, const Operand& from, int64_t lanes, int64_t depth, float* to,
                 int64_t width) {
  if (from.lane == 1 && !from.index) {
    return pack_columns(data, from.depth, lanes, depth, to, width);
  }
  pack_rows(data, from.lane, from.index, lanes, depth, to, width);
}

TARGET void pack(const Operand& whole, int64_t first, int64_t lanes, int64_t k, int64_t depth,
                 float* to, int64_t width) {
  const Operand from = whole.from(first);
  if (from.half) {
    pack(static_cast<const uint16_t*>(from.data) + k * from.depth, from, lanes, depth, to, width);
  } else {
    pack(static_cast<const float*>(from.data) + k * from.depth, from, lanes, depth, to, width);
  }
}

#include "gemm_codes.h"

// Copies c [rows][c_row] to the output, or adds it.
TARGET inline void write(const float* c, int64_t c_row, int64_t rows, int64_t columns,
                         const Output& out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = c + i * c_row;
    const int64_t at = (out.index ? out.index[i] : i) * out.row;
    if (out.half) {
      uint16_t* to = static_cast<uint16_t*>(out.data) + at;
      for (int64_t j = 0; j < columns; ++j) to[j] = narrow(row[j]);
      continue;
    }
    float* to = static_cast<float*>(out.data) + at;
    if (out.add) {
      for (int64_t j = 0; j < columns; ++j) to[j] += row[j];
    } else {
      std::memcpy(to, row, columns * sizeof(float));
    }
  }
}

// Rows of the left matrix as tiles of nearly one height, [tiles][depth][kLanes].
struct Left {
  const float* data;
  int64_t rows, depth, tiles;

  int64_t begin(int64_t t) const { return begin_of(t, tiles, rows); }
  const float* tile(int64_t t, int64_t k) const { return data + (t * depth + k) * kLanes; }
};

Left pack_left(const Operand& a, int64_t rows, int64_t depth, Scratch& memory) {
  const int64_t tiles = ceil_div(rows, kMostRows);
  float* data = memory.of(tiles * depth * kLanes);
  const Left left{data, rows, depth, tiles};
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = left.begin(t + 1) - left.begin(t);
    pack(a, left.begin(t), height, 0, depth, data + t * depth * kLanes, kLanes);
  }
  return left;
}

// Columns [j, columns) of the right matrix where it lies, as many as whole runs of vectors fill.
// What is fetched early goes on at `next`, the rows to come. Returns the first column that is left.
template <int kVectors, typename B>
int64_t in_place(const float* a, const B* b, int64_t b_row, int64_t rows, int64_t j,
                 int64_t columns, int64_t depth, float* c, int64_t c_row, bool add,
                 const B* next) {
  constexpr int64_t kColumns = kVectors * kWidth, kAhead = kAheadBytes / sizeof(B);
  const int64_t parts = ceil_div(rows, kMostSums / kVectors);
  for (; j + kColumns <= columns; j += kColumns) {
    const bool here = j + kAhead < columns;
    Ahead ahead{reinterpret_cast<const char*>(here ? b + j + kAhead : next + j + kAhead - columns),
                b_row * static_cast<int64_t>(sizeof(B)), 1};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = begin_of(part, parts, rows), end = begin_of(part + 1, parts, rows);
      tile_of<kVectors, false, B>(end - begin)(a + begin, b + j, b_row, depth,
                                               c + begin * c_row + j, c_row, add, ahead);
      ahead.stride = 0;
    }
  }
  return j;
}

// Tile t of the rows: the right matrix is read where it lies, some rows of it at a time. As in
// `many_tiles`, c = or with `adds` += the product.
template <typename B>
void one_tile(const Left& left, int64_t t, const Operand& b, int64_t columns, float* c,
              int64_t c_row, bool adds, Scratch& memory) {
  // Rows a multiple of 4096 bytes apart share the places of a cache of eight ways.
  const bool apart = b.depth * static_cast<int64_t>(sizeof(B)) % 4096 == 0;
  const int64_t span = kFewSpan / (columns * sizeof(B));
  const int64_t most = apart ? 8 : std::max<int64_t>(kFewBytes / sizeof(B), span);
  const int64_t rows = left.begin(t + 1) - left.begin(t);
  c += left.begin(t) * c_row;
  int64_t j = 0;
  for (int64_t k = 0; k < left.depth; k += most) {
    const int64_t deep = std::min(most, left.depth - k);
    const B* from = static_cast<const B*>(b.data) + k * b.depth;
    const float* a = left.tile(t, k);
    const bool add = adds || k > 0;
    const B* next = from + (k + deep < left.depth ? deep * b.depth : 0);
    const auto cover = [&](auto product) {
      j = product(a, from, b.depth, rows, j, columns, deep, c, c_row, add, next);
    };
    j = 0;
    if (rows * 8 <= kMostSums) cover(in_place<8, B>);
    cover(in_place<4, B>);
    cover(in_place<2, B>);
  }
  if (j == columns) return;
  float* packed = memory.of(left.depth * kPanel);
  pack(b, j, columns - j, 0, left.depth, packed, kPanel);
  const Ahead idle{reinterpret_cast<const char*>(packed), 0, left.depth};
  tile_of<kPanelVectors, true, float>(rows)(left.tile(t, 0), packed, kPanel, left.depth, c + j,
                                            c_row, adds, idle);
}

// The lines of the next block of the right matrix, dealt evenly to the tiles of this one: at once
// they would take the places that loads from near caches need.
class Fetch {
 public:
  // A block of `depth` by `columns` from element (i, k) on, fetched by `tiles` tiles.
  Fetch(const Operand& b, int64_t i, int64_t k, int64_t depth, int64_t columns, int64_t tiles) {
    const int64_t size = b.half ? 2 : 4, run = b.lane == 1 ? columns : depth;
    data_ = static_cast<const char*>(b.data) + (i * b.lane + k * b.depth) * size;
    stride_ = (b.lane == 1 ? b.depth : b.lane) * size;
    runs_ = b.lane == 1 ? depth : columns;
    lines_ = ceil_div(run * size, kLine);
    every_ = std::max<int64_t>(tiles * depth / std::max<int64_t>(lines_ * runs_, 1), 1);
    most_ = ceil_div(depth, every_);
  }

  // What the next tile fetches; the line at `idle` where nothing is left.
  Ahead turn(const void* idle) {
    if (line_ == lines_) return {static_cast<const char*>(idle), 0, every_};
    const Ahead part{data_ + kLine * line_ + stride_ * run_, stride_, every_};
    run_ += most_;
    if (run_ >= runs_) run_ = 0, ++line_;
    return part;
  }

 private:
  const char* data_;
  int64_t stride_, runs_, lines_, every_, most_, line_ = 0, run_ = 0;
};

// Nothing is fetched early of a matrix in codes: it is small.
template <typename Right>
struct NoFetch {
  NoFetch(const Right&, int64_t, int64_t, int64_t, int64_t, int64_t) {}
  Ahead turn(const void* idle) { return {static_cast<const char*>(idle), 0, kBlockDepth}; }
};

// Columns [j, j + width) of many rows: c [rows][c_row].
template <typename Right>
void many_tiles(const Left& left, const Right& b, int64_t j, int64_t width, int64_t columns,
                float* c, int64_t c_row, bool adds, Scratch& memory) {
  using Early = std::conditional_t<std::is_same_v<Right, Operand>, Fetch, NoFetch<Right>>;
  constexpr int64_t unit = kUnit<Right>;
  const int64_t blocks = std::max<int64_t>(ceil_div(left.depth, kBlockDepth), 1);
  const int64_t panels = ceil_div(width, kPanel), units = ceil_div(left.depth, unit);
  const int64_t most = ceil_div(units, blocks) * unit;  // Whole units are laid out.
  float* packed = memory.of(most * panels * kPanel);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = begin_of(block, blocks, units) * unit;
    const int64_t end = std::min(left.depth, begin_of(block + 1, blocks, units) * unit);
    const int64_t deep = end - k;
    for (int64_t p = 0; p < panels; ++p) {
      pack(b, j + p * kPanel, std::min<int64_t>(kPanel, width - p * kPanel), k, deep,
           packed + p * most * kPanel, kPanel);
    }
    // After the last columns comes what lies behind the matrix, which may be the next one.
    const bool down = block + 1 < blocks, beside = !down && j + width < columns;
    bool below = down;
    if constexpr (std::is_same_v<Right, Operand>) below = down || (!beside && b.lane == 1);
    const int64_t next = down ? j : beside ? j + width : below ? 0 : columns;
    Early early(b, next, below ? end : 0, deep, width, panels * left.tiles);
    for (int64_t t = 0; t < left.tiles; ++t) {
      for (int64_t p = 0; p < panels; ++p) {
        const float* panel = packed + p * most * kPanel;
        const int64_t begin = left.begin(t);
        tile_of<kPanelVectors, true, float>(left.begin(t + 1) - begin)(
            left.tile(t, k), panel, kPanel, deep, c + begin * c_row + p * kPanel, c_row,
            adds || block > 0, early.turn(panel));
      }
    }
  }
}

// One matrix's product, written or added.
template <typename Right>
void product(const Left& left, const Right& b, bool unpacked, int64_t columns,
             const Output& out) {
  static thread_local Scratch rights, sums;
  const int64_t deep = std::clamp<int64_t>(left.depth, 1, kBlockDepth);
  const int64_t panels = std::max<int64_t>(kBlockFloats / (deep * kPanel), 1);
  const int64_t wide = unpacked ? columns : panels * kPanel;
  for (int64_t j = 0; j < columns; j += wide) {
    const int64_t width = std::min(wide, columns - j);
    const Output part = out.from(0, j);
    // Whole vectors of float32 are summed where they belong.
    const bool there = !part.half && !part.index && width % kPanel == 0;
    const int64_t c_row = there ? part.row : ceil_div(width, kPanel) * kPanel;
    const bool adds = there && part.add;
    float* c = there ? static_cast<float*>(part.data) : sums.of(left.rows * c_row);
    if constexpr (std::is_same_v<Right, Operand>) {
      const auto at_once = b.half ? one_tile<uint16_t> : one_tile<float>;
      for (int64_t t = 0; unpacked && t < left.tiles; ++t) {
        at_once(left, t, b, columns, c, c_row, adds, rights);
      }
    }
    if (!unpacked) many_tiles(left, b, j, width, columns, c, c_row, adds, rights);
    if (!there) write(c, c_row, left.rows, width, part);
  }
}

template <typename Right>
void multiply(const Operand& a, const Right& b, int64_t all_rows, int64_t columns, int64_t depth,
              const Output& out, int64_t matrices) {
  static thread_local Scratch lefts;
  bool unpacked = false;
  if constexpr (std::is_same_v<Right, Operand>) {
    const bool near = all_rows <= kNearRows && depth * columns <= kNearFloats;
    unpacked = (all_rows <= kMostRows || near) && b.lane == 1 && depth > 0;
  }
  const int64_t fit = std::max<int64_t>(kMostRows, kMostChunk / std::max<int64_t>(depth, 1));
  const int64_t chunks = ceil_div(all_rows, std::min(fit, kChunkRows));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = begin_of(chunk, chunks, all_rows);
    const int64_t rows = begin_of(chunk + 1, chunks, all_rows) - first;
    const Left left = pack_left(a.from(first), rows, depth, lefts);
    product(left, b, unpacked, columns, out.from(first, 0));
    if constexpr (std::is_same_v<Right, Operand>) {
      for (int64_t i = 1; i < matrices; ++i) {
        product(left, b.after(i * depth), unpacked, columns, out.from(first, i * b.depth));
      }
    }
  }
}
