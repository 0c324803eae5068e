// Threads for the calling thread's work, and the caller's wish to stop.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "core/common.h"

namespace birl {

// The threads of the process's OpenMP library where it has one (PyTorch brings it), else a few of
// our own that live as long as one call and start at the first run() that is worth it.
// Which worker takes which index is unspecified: a body must not let results depend on it.
class Team {
 public:
  using Body = std::function<void(Index index, int worker)>;

  // threads <= 0 means one per processor.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // body(i, worker) for every i in [0, count); `work` is a rough number of floating-point
  // operations in total, and below kWorthIt the caller does it alone.
  void run(Index count, double work, const Body& body);

  static constexpr double kWorthIt = 1e6;

 private:
  void start();
  void serve(int worker);
  void drain(int worker);
  void rethrow();

  int size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<Index> generation_{0};
  std::atomic<Index> next_{0};
  std::atomic<int> busy_{0};
  Index count_ = 0;
  const Body* body_ = nullptr;
  std::exception_ptr failure_;
  bool closing_ = false;
};

struct Interrupted {};  // thrown by Interrupt::check

// Asks the caller about every 50 ms whether to stop. Only the thread that made it asks.
class Interrupt {
 public:
  explicit Interrupt(bool (*ask)()) : ask_(ask), owner_(std::this_thread::get_id()) {}

  void check() {
    if (!raised_.load(std::memory_order_relaxed) && std::this_thread::get_id() == owner_) {
      const auto now = std::chrono::steady_clock::now();
      if (now - asked_ > std::chrono::milliseconds(50)) {
        asked_ = now;
        if (ask_()) raised_.store(true, std::memory_order_relaxed);
      }
    }
    if (raised_.load(std::memory_order_relaxed)) throw Interrupted{};
  }

 private:
  bool (*ask_)();
  std::thread::id owner_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  std::atomic<bool> raised_{false};
};

}  // namespace birl
