// Rows sorted by group times their group's matrix, and the gradient of the matrices.
// See __init__.py for the arrays.

#include "../extension/groups.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

// x [m][d], w [e][d][f] or with `transpose` [e][f][d]; y [m][f].
ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, S32 group_sizes,
                   bool transpose, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t d = x.dimensions()[1], f = y->dimensions()[1];
  const char* first = static_cast<const char*>(w.untyped_data());
  grouped_product(pool, x, group_sizes, *y, [&](int64_t e) {
    return Operand{first + e * d * f * width_of(w), is_half(w), transpose ? d : 1,
                   transpose ? 1 : f};
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
    divide(group.index, 0, d, f, wanted_units(pool, count, false), units);
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
