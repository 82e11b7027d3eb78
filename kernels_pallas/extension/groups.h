// Products of rows that are sorted by group, shared between threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace moejax {

// Rows and columns that a unit of work has at most and at least, and rows that read the matrix
// once.
constexpr int64_t kUnitRows = 384, kLeastRows = 192, kLeastColumns = 128, kFewRows = 14;

inline bool is_half(const xla::ffi::AnyBuffer& buffer) {
  return buffer.element_type() == xla::ffi::BF16;
}

inline int64_t width_of(const xla::ffi::AnyBuffer& buffer) { return is_half(buffer) ? 2 : 4; }

// A part of one group's product.
struct Unit {
  int64_t group, first_row, rows, first_column, columns;
};

// Divides a group's product, rows [first, first + rows) by `columns`, into at least `wanted` units
// where it is large enough.
inline void divide(int64_t group, int64_t first, int64_t rows, int64_t columns, int64_t wanted,
                   std::vector<Unit>& units) {
  const auto parts_of = [](int64_t whole, int64_t least, int64_t parts) {
    return std::max<int64_t>(1, std::min(whole / least, parts));
  };
  const int64_t by_rows = std::max((rows + kUnitRows - 1) / kUnitRows,
                                   parts_of(rows, kLeastRows, wanted));
  const int64_t by_columns = parts_of(columns, kLeastColumns, (wanted + by_rows - 1) / by_rows);
  // Whole runs of columns, so that all but the last fill vectors.
  const int64_t runs = (columns + kLeastColumns - 1) / kLeastColumns;
  for (int64_t r = 0; r < by_rows; ++r) {
    const int64_t row = rows * r / by_rows, end_row = rows * (r + 1) / by_rows;
    for (int64_t c = 0; c < by_columns; ++c) {
      const int64_t column = runs * c / by_columns * kLeastColumns;
      const int64_t end = std::min(columns, runs * (c + 1) / by_columns * kLeastColumns);
      units.push_back({group, first + row, end_row - row, column, end - column});
    }
  }
}

struct Group {
  int64_t index, first, rows;
};

// The rows of each group, empty ones too.
inline std::vector<Group> groups_of(const S32& sizes, int64_t rows) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(sizes.element_count()); ++e) {
    const int64_t own = std::min(rows - first, std::max<int64_t>(0, sizes.typed_data()[e]));
    groups.push_back({e, first, own});
    first += own;
  }
  return groups;
}

// Units wanted of one of `groups` groups, so many that all threads end together; with `whole` one
// for each thread.
inline int64_t wanted_units(const xla::ffi::ThreadPool& pool, int64_t groups, bool whole) {
  const int64_t threads = pool.num_threads();
  if (threads < 2) return 1;
  return ((whole ? threads : 4 * threads) + groups - 1) / groups;
}

// y[rows of e] = x[rows of e] right_of(e), x [m][d] and y [m][f]; rows that belong to no group
// give 0.
template <typename RightOf>
void grouped_product(xla::ffi::ThreadPool& pool, const xla::ffi::AnyBuffer& x,
                     const S32& group_sizes, xla::ffi::AnyBuffer& y, RightOf right_of) {
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1], f = y.dimensions()[1];
  const std::vector<Group> groups = groups_of(group_sizes, m);
  int64_t active = 0, end = 0;
  for (const Group& group : groups) {
    active += group.rows > 0;
    end = group.first + group.rows;
  }
  const Output out{y.untyped_data(), is_half(y), f};
  std::memset(out.from(end, 0).data, 0, (m - end) * f * width_of(y));
  std::vector<Unit> units;
  for (const Group& group : groups) {
    if (group.rows == 0) continue;
    // Few rows read a matrix fastest in whole rows of it.
    const bool whole = std::is_same_v<decltype(right_of(0)), Operand> && group.rows <= kFewRows;
    divide(group.index, group.first, group.rows, f, wanted_units(pool, active, whole), units);
  }
  const Operand left{x.untyped_data(), is_half(x), d, 1};
  share(pool, units.size(), [&](int64_t i) {
    const Unit& unit = units[i];
    multiply(left.from(unit.first_row), right_of(unit.group).from(unit.first_column), unit.rows,
             unit.columns, d, out.from(unit.first_row, unit.first_column));
  });
}

}  // namespace moejax
