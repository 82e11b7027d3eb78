// The products of chosen experts with the tokens that chose them, read and written where they lie.
// See __init__.py for the arrays.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "../extension/groups.h"

namespace ffi = xla::ffi;

namespace moejax {
namespace {

using Chosen = ffi::Buffer<ffi::PRED>;

// Tokens that chose an expert, in order.
struct Tokens {
  const int32_t* data;
  int64_t size;

  bool operator==(const Tokens& other) const {
    return size == other.size && std::equal(data, data + size, other.data);
  }
};

// Experts [first, first + experts) that the same tokens chose.
struct Run {
  int64_t first, experts;
};

// A part of the product of experts that go together, from unit.group on.
struct Part {
  Unit unit;
  int64_t experts;
};

// Who chose whom, of chosen [m][e]; an expert that `most` tokens or more chose meets all.
class Choices {
 public:
  Choices(const Chosen& chosen, int64_t most)
      : m_(chosen.dimensions()[0]), experts_(chosen.dimensions()[1]), ends_(experts_ + 1) {
    const bool* of = chosen.typed_data();
    for (int64_t i = 0; i < m_ * experts_;) {
      for (int64_t e = 1; e <= experts_; ++e) ends_[e] += of[i++];
    }
    std::vector<char> meets_all(experts_);
    for (int64_t e = 0; e < experts_; ++e) {
      meets_all[e] = ends_[e + 1] >= most;
      if (meets_all[e]) ends_[e + 1] = m_;
    }
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    tokens_.resize(ends_.back());
    // Each entry moves from its expert's first place on to the next one's.
    std::vector<int64_t> next(ends_);
    for (int64_t i = 0, token = 0; token < m_; ++token) {
      for (int64_t e = 0; e < experts_; ++e, ++i) {
        if (of[i] || meets_all[e]) tokens_[next[e]++] = token;
      }
    }
  }

  Tokens tokens(int64_t e) const { return {tokens_.data() + ends_[e], ends_[e + 1] - ends_[e]}; }

  // All experts that any token chose.
  std::vector<Run> runs() const {
    std::vector<Run> runs;
    for (int64_t e = 0, next; e < experts_; e = next) {
      for (next = e + 1; next < experts_ && tokens(next) == tokens(e);) ++next;
      if (tokens(e).size) runs.push_back({e, next - e});
    }
    return runs;
  }

 private:
  const int64_t m_, experts_;
  std::vector<int64_t> ends_;  // Of the tokens of the expert before.
  std::vector<int32_t> tokens_;
};

// The products of the experts with their tokens, in so many parts that all threads end together.
std::vector<Part> parts_of(const ffi::ThreadPool& pool, const Choices& choices, int64_t f) {
  const std::vector<Run> runs = choices.runs();
  int64_t active = 0;
  for (const Run& run : runs) active += run.experts;
  std::vector<Part> parts;
  std::vector<Unit> units;
  for (const Run& run : runs) {
    const int64_t rows = choices.tokens(run.first).size;
    const bool whole = rows <= kFewRows;
    const int64_t wanted = wanted_units(pool, 1, whole), most = (active + wanted - 1) / wanted;
    for (int64_t e = 0; e < run.experts; e += most) {
      units.clear();
      divide(run.first + e, 0, rows, f, wanted_units(pool, active, whole), units);
      for (const Unit& unit : units) parts.push_back({unit, std::min(most, run.experts - e)});
    }
  }
  return parts;
}

// Where so large a part of few tokens chose a narrow expert all meet it: to read it costs more than
// their products, and neighbours go together.
constexpr double kMeetsAll = 0.4;

// Tokens whose unchosen hidden units are set to 0 at a time.
constexpr int64_t kBlankTokens = 64;

// x [m][d], chosen [m][e], w [e][d][f]; hidden [m][e][f], where not chosen 0 or the product.
ffi::Error up(ffi::ThreadPool pool, ffi::AnyBuffer x, Chosen chosen, ffi::AnyBuffer w,
              ffi::Result<ffi::BufferR3<ffi::F32>> hidden) {
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  const int64_t experts = w.dimensions()[0], f = w.dimensions()[2];
  const bool reads = m <= kFewRows && f < kLeastColumns;
  const Choices choices(chosen, reads ? std::ceil(kMeetsAll * m) : m);
  const std::vector<Part> parts = parts_of(pool, choices, f);
  float* to = hidden->typed_data();
  const Operand right{w.untyped_data(), is_half(w), 1, f};
  const int64_t products = parts.size(), blanks = (m + kBlankTokens - 1) / kBlankTokens;
  share(pool, products + blanks, [&](int64_t i) {
    if (i >= products) {
      const int64_t first = (i - products) * kBlankTokens;
      for (int64_t token = first; token < std::min(m, first + kBlankTokens); ++token) {
        for (int64_t e = 0; e < experts; ++e) {
          const int64_t at = token * experts + e;
          if (chosen.typed_data()[at] || choices.tokens(e).size == m) continue;
          std::memset(to + at * f, 0, f * sizeof(float));
        }
      }
      return;
    }
    const auto& [unit, matrices] = parts[i];
    const Tokens own = choices.tokens(unit.group);
    const int32_t* index = own.size == m ? nullptr : own.data;
    const Operand left{x.untyped_data(), is_half(x), d, 1, index};
    const Output out{to + unit.group * f, false, experts * f, false, index};
    multiply(left.from(unit.first_row), right.after(unit.group * d).from(unit.first_column),
             unit.rows, unit.columns, d, out.from(unit.first_row, unit.first_column), matrices);
  });
  return ffi::Error::Success();
}

// hidden [m][e][f], chosen [m][e], w [e][f][d]; y [m][d].
ffi::Error down(ffi::ThreadPool pool, ffi::AnyBuffer hidden, Chosen chosen, ffi::AnyBuffer w,
                ffi::Result<ffi::BufferR2<ffi::F32>> y) {
  const int64_t experts = w.dimensions()[0], f = w.dimensions()[1], d = w.dimensions()[2];
  const int64_t m = chosen.dimensions()[0];
  const Choices choices(chosen, m);
  const std::vector<Run> runs = choices.runs();
  std::vector<Unit> units;
  divide(0, 0, m, d, wanted_units(pool, 1, true), units);
  const Operand left{hidden.untyped_data(), is_half(hidden), experts * f, 1};
  const Operand right{w.untyped_data(), is_half(w), 1, d};
  share(pool, units.size(), [&](int64_t i) {
    const Unit& unit = units[i];
    const int64_t end = unit.first_row + unit.rows;
    float* to = y->typed_data() + unit.first_column;
    for (int64_t row = unit.first_row; row < end; ++row) {
      std::memset(to + row * d, 0, unit.columns * sizeof(float));
    }
    for (const Run& run : runs) {
      const Tokens all = choices.tokens(run.first);
      const int32_t* own = std::lower_bound(all.data, all.data + all.size, unit.first_row);
      const int64_t rows = std::lower_bound(own, all.data + all.size, end) - own;
      if (rows == 0) continue;
      const bool whole = rows == unit.rows;
      Operand a = left.after(run.first * f);
      Output out{to, false, d, true};
      if (whole) {
        a = a.from(unit.first_row), out = out.from(unit.first_row, 0);
      } else {
        a.index = out.index = own;
      }
      multiply(a, right.after(run.first * f).from(unit.first_column), rows, unit.columns,
               run.experts * f, out);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_chosen_up, moejax::up,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::Chosen>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::BufferR3<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_chosen_down, moejax::down,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<moejax::Chosen>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::BufferR2<ffi::F32>>());
