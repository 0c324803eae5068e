// The host doubles of a team: the same kernel bodies under sanitizers, without a GPU.
//
// SerialTeam   runs the threads of a phase one after another, forward, backward or shuffled. A
//              missing phase boundary makes bits depend on that order. Items can be dealt to host
//              threads, so that ThreadSanitizer sees two items that write the same place.
// ThreadTeam   runs every thread of the team as a host thread, with real barriers: what a block
//              does. ThreadSanitizer sees a missing barrier, and also control flow that reads an
//              array between phases.
//
// Every array is an allocation of its own, exactly as long as asked for, and starts as NaN: an
// AddressSanitizer build sees each overrun, and any build sees the use of what was never written.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda/layer/layer.h"

namespace birl::device {

class HostMemory {
 public:
  template <class T>
  T* take(Index count) {
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(count);
    pieces_.emplace_back(new unsigned char[bytes]);
    std::memset(pieces_.back().get(), 0xff, bytes);
    return reinterpret_cast<T*>(pieces_.back().get());
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> pieces_;
};

enum class Order { kForward, kBackward, kShuffled };

class SerialTeam {
 public:
  SerialTeam(int threads, Order order, unsigned seed) : order_(order), random_(seed) {
    ranks_.resize(threads);
    std::iota(ranks_.begin(), ranks_.end(), 0);
    if (order == Order::kBackward) std::reverse(ranks_.begin(), ranks_.end());
  }

  template <class T>
  class Private {
   public:
    explicit Private(const SerialTeam& team) : values_(team.ranks_.size()) {}
    T& operator()(Thread t) { return values_[t.rank]; }

   private:
    std::vector<T> values_;
  };

  template <class Phase>
  void phase(Phase&& f) {
    if (order_ == Order::kShuffled) std::shuffle(ranks_.begin(), ranks_.end(), random_);
    for (const int rank : ranks_) f(Thread{rank, static_cast<int>(ranks_.size())});
  }

  template <class T, class Local, class Join>
  T reduce(Local&& local, Join&& join) {
    std::vector<T> parts;
    phase([&](Thread t) { parts.push_back(local(t)); });
    T total = parts[0];
    for (std::size_t i = 1; i < parts.size(); ++i) total = join(total, parts[i]);
    return total;
  }

  template <class Answer>
  int decide(Answer&& answer) {
    return answer();
  }

 private:
  Order order_;
  std::mt19937 random_;
  std::vector<int> ranks_;
};

// Atomics alone order the threads here. A mutex would also order a thread that comes late to one
// barrier after a thread that is already at the next, and hide the race between the two.
class Barrier {
 public:
  // `skipped`: the number of a barrier that lets everyone through, a fault planted by tests.
  Barrier(int threads, int skipped) : threads_(threads), skipped_(skipped) {}

  void wait(int& passed) {
    if (passed++ == skipped_) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      while (generation_.load(std::memory_order_acquire) == generation) std::this_thread::yield();
    }
  }

 private:
  int threads_, skipped_;
  std::atomic<int> arrived_{0}, generation_{0};
};

// What the threads of one ThreadTeam share.
class ThreadTeam {
 public:
  struct Shared {
    Shared(int threads, int skipped) : barrier(threads, skipped) {
      for (auto& slots : reduced) slots.resize(threads * kLargestReduced);
    }
    Barrier barrier;
    std::vector<unsigned char> reduced[2];
    int decided[2];
  };

  ThreadTeam(Shared& shared, Thread thread) : shared_(shared), thread_(thread) {}

  template <class T>
  class Private {
   public:
    explicit Private(const ThreadTeam&) {}
    T& operator()(Thread) { return value_; }

   private:
    T value_;
  };

  template <class Phase>
  void phase(Phase&& f) {
    f(thread_);
    shared_.barrier.wait(barriers_);
  }

  template <class T, class Local, class Join>
  T reduce(Local&& local, Join&& join) {
    static_assert(sizeof(T) <= kLargestReduced, "enlarge kLargestReduced");
    unsigned char* const slots = shared_.reduced[reductions_++ & 1].data();
    const T mine = local(thread_);
    std::memcpy(slots + thread_.rank * kLargestReduced, &mine, sizeof(T));
    shared_.barrier.wait(barriers_);
    T total, part;
    std::memcpy(&total, slots, sizeof(T));
    for (int rank = 1; rank < thread_.count; ++rank) {
      std::memcpy(&part, slots + rank * kLargestReduced, sizeof(T));
      total = join(total, part);
    }
    return total;
  }

  template <class Answer>
  int decide(Answer&& answer) {
    int& slot = shared_.decided[decisions_++ & 1];
    if (thread_.rank == 0) slot = answer();
    shared_.barrier.wait(barriers_);
    return slot;
  }

  int barriers() const { return barriers_; }

 private:
  Shared& shared_;
  Thread thread_;
  unsigned reductions_ = 0, decisions_ = 0;
  int barriers_ = 0;
};

// work(i) for i < count, each on a host thread of its own.
template <class Work>
void on_threads(int count, Work&& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

struct HostRun {
  int threads = 32;  // of each team
  Order order = Order::kForward;
  unsigned seed = 0;
  int workers = 1;  // host threads that share the items
};

// Solves all items with SerialTeams.
template <class Kernel>
void run_serial(const Kernel& kernel, Index items, const HostRun& how) {
  on_threads(how.workers, [&](int worker) {
    HostMemory chip, spill;
    const auto arrays = kernel.lay_out(chip, spill);
    SerialTeam team(how.threads, how.order, how.seed + static_cast<unsigned>(worker));
    for (Index item = worker; item < items; item += how.workers) kernel.run(team, arrays, item);
  });
}

// Solves all items with one ThreadTeam; returns how many barriers it passed.
template <class Kernel>
int run_threads(const Kernel& kernel, Index items, int threads, int skipped_barrier = -1) {
  HostMemory chip, spill;
  const auto arrays = kernel.lay_out(chip, spill);
  ThreadTeam::Shared shared(threads, skipped_barrier);
  int barriers = 0;
  on_threads(threads, [&](int rank) {
    ThreadTeam team(shared, {rank, threads});
    for (Index item = 0; item < items; ++item) kernel.run(team, arrays, item);
    if (rank == 0) barriers = team.barriers();
  });
  return barriers;
}

}  // namespace birl::device
