// The host doubles of the grid, as in cuda/layer/host_team.h:
//
// SerialGrid   one block after another, one thread after another, one lane after another, each in
//              forward, reverse or random order.
// ThreadGrid   every thread of every block is a host thread, with real barriers of the block and of
//              the team. A group of lanes is one host thread.
#pragma once

#include <cstdlib>

#include "cuda/layer/grid_layer.h"
#include "cuda/layer/host_team.h"

namespace birl::device {

inline unsigned lane_seed(Order order, std::mt19937& random) {
  return order == Order::kForward ? 0 : order == Order::kBackward ? 1 : 2 + random() % 1000;
}

template <class Chip_>
class SerialBlock : public SerialTeam {
 public:
  const Index rank, count;
  Chip_& chip;

  SerialBlock(Index rank, Index count, Chip_& chip, int threads, Order order, unsigned seed)
      : SerialTeam(threads, order, seed),
        rank(rank),
        count(count),
        chip(chip),
        order_(order),
        random_(seed) {}

  template <int kLanes, class F>
  void groups(F&& f) {
    phase([&](Thread t) {
      f(LaneGroup<kLanes>(t.rank, t.count, rank, count, lane_seed(order_, random_)));
    });
  }

  template <class F>
  void spread(F&& f) {
    phase([&](Thread t) { f(rank * t.count + t.rank, count * t.count); });
  }

 private:
  Order order_;
  std::mt19937 random_;
};

template <class Kernel>
class SerialGrid {
 public:
  using Block = SerialBlock<typename Kernel::Chip>;

  SerialGrid(int blocks, int threads, Order order, unsigned seed) : order_(order), random_(seed) {
    for (int b = 0; b < blocks; ++b) chips_.push_back(std::make_unique<typename Kernel::Chip>());
    for (int b = 0; b < blocks; ++b)
      blocks_.push_back(std::make_unique<Block>(b, blocks, *chips_[b], threads, order, seed + b));
    turns_.resize(blocks);
    std::iota(turns_.begin(), turns_.end(), 0);
    if (order == Order::kBackward) std::reverse(turns_.begin(), turns_.end());
  }

  template <class F>
  void step(F&& f) {
    if (order_ == Order::kShuffled) std::shuffle(turns_.begin(), turns_.end(), random_);
    for (const int turn : turns_) f(*blocks_[turn]);
  }

  template <class F>
  void local(F&& f) {
    step(f);
  }

  template <class T, class F, class Join>
  T reduce(F&& f, Join&& join) {
    std::vector<T> parts;
    step([&](Block& block) { parts.push_back(f(block)); });
    T total = parts[0];
    for (std::size_t i = 1; i < parts.size(); ++i) total = join(total, parts[i]);
    return total;
  }

  template <class F>
  int decide(F&& f) {
    std::vector<int> answers;
    step([&](Block& block) { answers.push_back(f(block)); });
    for (const int answer : answers)
      if (answer != answers[0]) std::abort();  // blocks would go different ways
    return answers[0];
  }

 private:
  Order order_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<typename Kernel::Chip>> chips_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<int> turns_;
};

template <class Chip_>
class ThreadBlock : public ThreadTeam {
 public:
  const Index rank, count;
  Chip_& chip;

  ThreadBlock(Index rank, Index count, Chip_& chip, ThreadTeam::Shared& shared, Thread thread)
      : ThreadTeam(shared, thread), rank(rank), count(count), chip(chip) {}

  template <int kLanes, class F>
  void groups(F&& f) {
    phase([&](Thread t) { f(LaneGroup<kLanes>(t.rank, t.count, rank, count, 0)); });
  }

  template <class F>
  void spread(F&& f) {
    phase([&](Thread t) { f(rank * t.count + t.rank, count * t.count); });
  }
};

template <class Kernel>
class ThreadGrid {
 public:
  using Block = ThreadBlock<typename Kernel::Chip>;

  struct Shared {
    Shared(int blocks, int threads, int skipped) : barrier(blocks * threads, skipped) {
      for (auto& slots : reduced) slots.resize(blocks * kLargestReduced);
    }
    Barrier barrier;
    std::vector<unsigned char> reduced[2];
  };

  ThreadGrid(Shared& shared, Index block, Index blocks, typename Kernel::Chip& chip,
             ThreadTeam::Shared& inner, Thread thread)
      : shared_(shared), block_(block, blocks, chip, inner, thread), first_(thread.rank == 0) {}

  template <class F>
  void step(F&& f) {
    f(block_);
    shared_.barrier.wait(barriers_);
  }

  template <class F>
  void local(F&& f) {
    f(block_);
  }

  template <class T, class F, class Join>
  T reduce(F&& f, Join&& join) {
    static_assert(sizeof(T) <= kLargestReduced, "enlarge kLargestReduced");
    unsigned char* const slots = shared_.reduced[reductions_++ & 1].data();
    const T mine = f(block_);
    if (first_) std::memcpy(slots + block_.rank * kLargestReduced, &mine, sizeof(T));
    shared_.barrier.wait(barriers_);
    T total, part;
    std::memcpy(&total, slots, sizeof(T));
    for (Index b = 1; b < block_.count; ++b) {
      std::memcpy(&part, slots + b * kLargestReduced, sizeof(T));
      total = join(total, part);
    }
    return total;
  }

  template <class F>
  int decide(F&& f) {
    return block_.decide([&] { return f(block_); });
  }

  int barriers() const { return barriers_; }
  int block_barriers() const { return block_.barriers(); }

 private:
  Shared& shared_;
  Block block_;
  bool first_;
  unsigned reductions_ = 0;
  int barriers_ = 0;
};

struct GridRun {
  int blocks = 3, threads = 4;
  Order order = Order::kForward;
  unsigned seed = 0;
};

template <class Kernel>
void run_grid_serial(const Kernel& kernel, Index items, const GridRun& how) {
  HostMemory common;
  const auto arrays = kernel.lay_out(common);
  SerialGrid<Kernel> team(how.blocks, how.threads, how.order, how.seed);
  for (Index item = 0; item < items; ++item) kernel.run(team, arrays, item);
}

// How many barriers the team passed, and its first block.
struct Passed {
  int team, block;
};

// `skipped`: the number of a barrier to leave out, of the team or (`inner`) of every block.
template <class Kernel>
Passed run_grid_threads(const Kernel& kernel, Index items, int blocks, int threads,
                        int skipped = -1, bool inner = false) {
  HostMemory common;
  const auto arrays = kernel.lay_out(common);
  typename ThreadGrid<Kernel>::Shared shared(blocks, threads, inner ? -1 : skipped);
  std::vector<std::unique_ptr<typename Kernel::Chip>> chips;
  std::vector<std::unique_ptr<ThreadTeam::Shared>> within;
  for (int b = 0; b < blocks; ++b) {
    chips.push_back(std::make_unique<typename Kernel::Chip>());
    within.push_back(std::make_unique<ThreadTeam::Shared>(threads, inner ? skipped : -1));
  }
  Passed passed{};
  on_threads(blocks * threads, [&](int i) {
    const int b = i / threads, rank = i % threads;
    ThreadGrid<Kernel> team(shared, b, blocks, *chips[b], *within[b], {rank, threads});
    for (Index item = 0; item < items; ++item) kernel.run(team, arrays, item);
    if (i == 0) passed = {team.barriers(), team.block_barriers()};
  });
  return passed;
}

}  // namespace birl::device
