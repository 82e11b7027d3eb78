// Rows sorted by group times ternary weights of two bits. See __init__.py for the arrays.

#include "../extension/groups.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

// x [m][d], words [e][w][f], levels [e][1 or 2][f]; y [m][f].
ffi::Error ternary_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, U32 words, ffi::AnyBuffer levels,
                          S32 group_sizes, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t f = y->dimensions()[1], count = levels.dimensions()[1];
  const int64_t expert_words = words.dimensions()[1] * f;
  grouped_product(pool, x, group_sizes, *y, [&](int64_t e) {
    const char* first =
        static_cast<const char*>(levels.untyped_data()) + e * count * f * width_of(levels);
    return Ternary{words.typed_data() + e * expert_words, f, count == 2 ? first : nullptr,
                   first + (count - 1) * f * width_of(levels), is_half(levels)};
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_ternary_matmul, moejax::ternary_matmul,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::U32>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::S32>()
        .Ret<ffi::AnyBuffer>());
