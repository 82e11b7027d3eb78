// Rows sorted by group times weights in symbols of a few bits. See __init__.py for the arrays.

#include "../extension/groups.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

// x [m][d], words [e][w][f], scale and zero [e][f][groups]; y [m][f].
ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, U32 words, ffi::AnyBuffer scale,
                         ffi::AnyBuffer zero, S32 group_sizes, int64_t bits, int64_t group_size,
                         ffi::Result<ffi::AnyBuffer> y) {
  const int64_t d = x.dimensions()[1], f = y->dimensions()[1];
  const int64_t expert_words = words.dimensions()[1] * f, groups = scale.dimensions()[2];
  const auto levels_of = [&](const ffi::AnyBuffer& levels, int64_t e) {
    return static_cast<const char*>(levels.untyped_data()) + e * f * groups * width_of(levels);
  };
  grouped_product(pool, x, group_sizes, *y, [&](int64_t e) {
    return Packed{words.typed_data() + e * expert_words,
                  f, d, bits, levels_of(scale, e), levels_of(zero, e), is_half(scale), groups,
                  group_size};
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_packed_matmul, moejax::packed_matmul,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::U32>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::S32>()
        .Attr<int64_t>("bits")
        .Attr<int64_t>("group_size")
        .Ret<ffi::AnyBuffer>());
