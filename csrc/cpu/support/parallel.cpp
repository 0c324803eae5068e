#include "cpu/support/parallel.h"

#if defined(__unix__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace birl {

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry by which compiled OpenMP code starts a parallel region, of whichever OpenMP library the
// process has loaded for everyone. Threads of our own would share their cores with that library's,
// which spin for a while after every parallel operation. Not in a forked child, where the library's
// threads no longer exist but it waits for them.
Parallel openmp() {
#if defined(__unix__)
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const pid_t home = getpid();
  return getpid() == home ? found : nullptr;
#else
  return nullptr;
#endif
}
[[maybe_unused]] const Parallel at_load = openmp();  // remembers the process that loaded us

}  // namespace

Team::Team(int threads)
    : size_(threads > 0 ? threads : static_cast<int>(std::thread::hardware_concurrency())) {
  if (size_ < 1) size_ = 1;
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::start() {
  try {
    for (int worker = static_cast<int>(threads_.size()) + 1; worker < size_; ++worker)
      threads_.emplace_back([this, worker] { serve(worker); });
  } catch (const std::system_error&) {
    size_ = static_cast<int>(threads_.size()) + 1;  // no more threads to be had: go on with fewer
  }
}

void Team::drain(int worker) {
  try {
    for (Index i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      (*body_)(i, worker);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
    next_.store(count_, std::memory_order_relaxed);
  }
}

void Team::serve(int worker) {
  Index seen = 0;
  for (;;) {
    // Sweeps follow each other closely: look for the next one a little before going to sleep.
    for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spin)
      std::this_thread::yield();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      seen = generation_.load(std::memory_order_acquire);
      if (closing_) return;
    }
    drain(worker);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

void Team::run(Index count, double work, const Body& body) {
  if (size_ == 1 || count < 2 || work < kWorthIt) {
    for (Index i = 0; i < count; ++i) body(i, 0);
    return;
  }
  if (const Parallel parallel = openmp()) {
    body_ = &body;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(0, std::memory_order_relaxed);
    parallel(
        [](void* team) {
          Team& self = *static_cast<Team*>(team);
          self.drain(self.busy_.fetch_add(1, std::memory_order_relaxed));
        },
        this, static_cast<unsigned>(size_), 0);
    return rethrow();
  }
  if (static_cast<int>(threads_.size()) + 1 < size_) start();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  drain(0);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_.load(std::memory_order_acquire) == 0; });
  }
  rethrow();
}

void Team::rethrow() {
  if (!failure_) return;
  std::exception_ptr failure = failure_;
  failure_ = nullptr;
  std::rethrow_exception(failure);
}

}  // namespace birl
