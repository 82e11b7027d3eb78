// Memory of a thread that is kept from call to call.

#pragma once

#include <cstdint>
#include <vector>

namespace moejax {

class Scratch {
 public:
  // At least so many floats, on a cache line; what was there before is lost.
  float* of(int64_t floats) {
    constexpr int64_t kAlign = 64;
    if (static_cast<int64_t>(kept_.size()) < floats + kAlign) kept_.resize(floats + kAlign);
    const auto at = reinterpret_cast<uintptr_t>(kept_.data());
    return reinterpret_cast<float*>((at + kAlign - 1) / kAlign * kAlign);
  }

 private:
  std::vector<float> kept_;
};

}  // namespace moejax
