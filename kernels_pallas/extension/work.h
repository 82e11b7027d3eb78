// Work shared with the threads of XLA, and rows of x cut into pieces of one expert.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "halves.h"
#include "sums.h"
#include "xla/ffi/api/ffi.h"

namespace moejax {

using F32 = xla::ffi::Buffer<xla::ffi::F32>;
using S32 = xla::ffi::Buffer<xla::ffi::S32>;
using U32 = xla::ffi::Buffer<xla::ffi::U32>;
using U16 = xla::ffi::Buffer<xla::ffi::U16>;

// Threads look for a while before they sleep: a product of few rows takes less time than to wake
// one.
constexpr std::chrono::microseconds kStay{100};

// Looks again and again whether `ready`; false if for `wait` it has not been.
template <typename Ready>
bool until(std::chrono::microseconds wait, Ready ready) {
  using Clock = std::chrono::steady_clock;
  for (const auto end = Clock::now() + wait; !ready(); std::this_thread::yield()) {
    if (Clock::now() > end) return false;
  }
  return true;
}

// Threads of the pool that have helped and stay a while for more.
class Staying {
 public:
  using Job = std::function<void()>;

  // Hands the job to a thread that stays; false if all have one.
  bool hand(const Job& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_ == 0) return false;
    --free_;
    jobs_.push_back(job);
    handed_.store(true, std::memory_order_release);
    return true;
  }

  // Does the jobs that are handed over until for a while none has come.
  void stay() {
    join();
    while (until(kStay, [&] { return handed_.load(std::memory_order_acquire); })) {
      if (const Job job = take(false)) {
        job();
        join();
      }
    }
    if (const Job job = take(true)) job();
  }

 private:
  void join() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++free_;
  }

  // A job, or none; a thread that leaves without one is free no more.
  Job take(bool leaves) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (jobs_.empty()) {
      if (leaves) --free_;
      return nullptr;
    }
    const Job job = std::move(jobs_.back());
    jobs_.pop_back();
    handed_.store(!jobs_.empty(), std::memory_order_release);
    return job;
  }

  std::mutex mutex_;
  std::vector<Job> jobs_;
  int64_t free_ = 0;  // Threads that stay, less those that a job has been handed to.
  std::atomic<bool> handed_{false};
};

inline Staying& staying() {
  static Staying* const threads = new Staying;
  return *threads;
}

// Calls work(i) for each i < n, here and on the pool's threads. It never waits for a thread to
// start, so it may itself run on one of them: what no other thread has begun is done here.
template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t n, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // A thread that starts late finds nothing left and must not touch `work`, which is gone by then.
  auto run = [state, n, &work] {
    int64_t own = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < n; ++own) work(i);
    if (own && state->done.fetch_add(own) + own == n) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all_done.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    if (staying().hand(run)) continue;
    pool.Schedule([run] {
      run();
      staying().stay();
    });
  }
  run();
  const auto done = [&] { return state->done == n; };
  if (until(kStay, done)) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, done);
}

// Rows [first, first + rows) of x, all of one expert, at most kMostLanes of them.
struct Piece {
  int64_t expert, first, rows;

  int64_t lanes() const { return lanes_for(rows); }
};

// The rows of each expert in turn; those past the last group belong to none.
inline std::vector<Piece> pieces_of(const int32_t* group_sizes, int64_t experts, int64_t rows) {
  std::vector<Piece> pieces;
  int64_t first = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t end = std::min(rows, first + std::max<int64_t>(0, group_sizes[e]));
    for (; first < end; first += kMostLanes) {
      pieces.push_back({e, first, std::min(kMostLanes, end - first)});
    }
    first = end;
  }
  return pieces;
}

// A piece of x [places][m] as [places][lanes], zeros past its rows.
inline std::vector<float> gather(const float* x, int64_t places, int64_t m, const Piece& piece) {
  const int64_t lanes = piece.lanes();
  std::vector<float> out(places * lanes);
  for (int64_t p = 0; p < places; ++p) {
    std::memcpy(out.data() + p * lanes, x + p * m + piece.first, piece.rows * sizeof(float));
  }
  return out;
}

// Calls work(piece, x of it, first, end) for each piece and, between them, every tile in
// [0, tiles); a piece is divided where there are too few for the threads to end together.
template <typename Work>
void share_pieces(xla::ffi::ThreadPool& pool, const float* x, int64_t places, int64_t m,
                  const std::vector<Piece>& pieces, int64_t tiles, Work work) {
  const int64_t n = pieces.size(), wanted = pool.num_threads() > 1 ? 4 * pool.num_threads() : 1;
  if (n >= wanted) {
    share(pool, n, [&](int64_t i) {
      work(pieces[i], gather(x, places, m, pieces[i]).data(), int64_t{0}, tiles);
    });
    return;
  }
  std::vector<std::vector<float>> gathered;
  for (const Piece& piece : pieces) gathered.push_back(gather(x, places, m, piece));
  const int64_t parts = n ? std::min(tiles, (wanted + n - 1) / n) : 1;
  share(pool, n * parts, [&](int64_t unit) {
    const int64_t i = unit / parts, part = unit % parts;
    work(pieces[i], gathered[i].data(), tiles * part / parts, tiles * (part + 1) / parts);
  });
}

// Values kept in float32 or in bfloat16, its upper half.
class Values {
 public:
  explicit Values(const xla::ffi::AnyBuffer& buffer)
      : data_(buffer.untyped_data()), half_(buffer.element_type() == xla::ffi::BF16) {}

  float operator[](int64_t i) const {
    return half_ ? widen(static_cast<const uint16_t*>(data_)[i])
                 : static_cast<const float*>(data_)[i];
  }

 private:
  const void* data_;
  bool half_;
};

}  // namespace moejax
