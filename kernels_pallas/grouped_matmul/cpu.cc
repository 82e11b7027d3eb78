// Rows sorted by group times their group's matrix, and the gradient of the matrices.
// See __init__.py for the arrays.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../extension/gemm.h"
#include "../extension/work.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

// Rows and columns that a unit of work has at most and at least, and rows that read the matrix once.
constexpr int64_t kUnitRows = 384, kLeastRows = 192, kLeastColumns = 128, kFewRows = 14;

bool is_half(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::BF16; }

int64_t width_of(const ffi::AnyBuffer& buffer) { return is_half(buffer) ? 2 : 4; }

// A part of one group's product.
struct Unit {
  int64_t group, first_row, rows, first_column, columns;
};

// Divides a group's product, rows [first, first + rows) by `columns`, into at least `wanted` units
// where it is large enough.
void divide(int64_t group, int64_t first, int64_t rows, int64_t columns, int64_t wanted,
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
std::vector<Group> groups_of(const S32& sizes, int64_t rows) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(sizes.element_count()); ++e) {
    const int64_t own = std::min(rows - first, std::max<int64_t>(0, sizes.typed_data()[e]));
    groups.push_back({e, first, own});
    first += own;
  }
  return groups;
}

// Units wanted of one of `groups` groups: so many that all threads end together, but of few rows
// one for each thread, since a matrix is read fastest in whole rows.
int64_t wanted_units(const ffi::ThreadPool& pool, int64_t groups, int64_t rows) {
  const int64_t threads = pool.num_threads();
  if (threads < 2) return 1;
  return ((rows > kFewRows ? 4 * threads : threads) + groups - 1) / groups;
}

// x [m][d], w [e][d][f] or with `transpose` [e][f][d]; y [m][f].
ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, S32 group_sizes,
                   bool transpose, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1], f = y->dimensions()[1];
  const std::vector<Group> groups = groups_of(group_sizes, m);
  int64_t active = 0, end = 0;
  for (const Group& group : groups) {
    active += group.rows > 0;
    end = group.first + group.rows;
  }
  const Output out{y->untyped_data(), is_half(*y), f};
  std::memset(out.from(end, 0).data, 0, (m - end) * f * width_of(*y));
  std::vector<Unit> units;
  for (const Group& group : groups) {
    if (group.rows == 0) continue;
    divide(group.index, group.first, group.rows, f, wanted_units(pool, active, group.rows), units);
  }
  const Operand left{x.untyped_data(), is_half(x), d, 1};
  share(pool, units.size(), [&](int64_t i) {
    const Unit& unit = units[i];
    const Operand right{static_cast<const char*>(w.untyped_data()) +
                            unit.group * d * f * width_of(w),
                        is_half(w), transpose ? d : 1, transpose ? 1 : f};
    multiply(left.from(unit.first_row), right.from(unit.first_column), unit.rows, unit.columns, d,
             out.from(unit.first_row, unit.first_column));
  });
  return ffi::Error::Success();
}

// x [m][d], dy [m][f]; dw [e][d][f].
ffi::Error outer(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, S32 group_sizes,
                 ffi::Result<ffi::AnyBuffer> dw) {
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1], f = dy.dimensions()[1];
  const std::vector<Group> groups = groups_of(group_sizes, m);
  const int64_t count = groups.size();
  std::vector<Unit> units;
  for (const Group& group : groups) {
    divide(group.index, 0, d, f, wanted_units(pool, count, d), units);
  }
  const Operand left{x.untyped_data(), is_half(x), 1, d};
  const Operand right{dy.untyped_data(), is_half(dy), 1, f};
  const Output out{dw->untyped_data(), is_half(*dw), f};
  share(pool, units.size(), [&](int64_t i) {
    const Unit& unit = units[i];
    const Group& group = groups[unit.group];
    const auto rows_of = [&](Operand a) {
      a.data = static_cast<const char*>(a.data) + group.first * a.depth * (a.half ? 2 : 4);
      return a;
    };
    multiply(rows_of(left).from(unit.first_row), rows_of(right).from(unit.first_column), unit.rows,
             unit.columns, group.rows,
             out.from(unit.group * d + unit.first_row, unit.first_column));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_grouped_product, moejax::product,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::S32>()
        .Attr<bool>("transpose")
        .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_grouped_outer, moejax::outer,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::S32>()
        .Ret<ffi::AnyBuffer>());
