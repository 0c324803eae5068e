// One kernel body for the GPU and for the host.
//
// A kernel is a plain struct, copied to the device by value, with two templates:
//
//   template <class Chip, class Spill> Arrays lay_out(Chip& chip, Spill& spill) const;
//       takes its arrays from on-chip memory and from the workspace in global memory;
//   template <class Team> void run(Team& team, const Arrays& arrays, Index item) const;
//       solves one item with the threads of one team (a warp, a block, a cluster, a grid);
//
// and kTeamsPerProcessor, the teams a multiprocessor should have registers for.
//
// `run` is executed by every thread of the team and is a sequence of
//
//   team.phase(f)              f(thread) in every thread, then a barrier;
//   team.reduce<T>(f, join)    join of f(thread) over all threads, handed to every thread;
//   team.decide(f)             f() in one thread, its answer handed to every thread.
//
// Rules, which the host teams check (cuda/layer/host_team.h):
//   1. Inside a phase the threads may run in any order. A thread reads what earlier phases wrote,
//      and writes what no other thread touches in this phase.
//   2. Between phases no array is touched. What the control flow depends on comes out of `reduce`
//      or `decide`, so all threads take the same way.
//   3. What a thread keeps in registers from one phase to the next is a Team::Private<T>.
//   4. `join` is associative and commutative to the last bit (minimum, maximum, and), and a sum is
//      computed by one thread in a fixed order (cuda/layer/chained_sum.h). So bits depend neither
//      on the number of threads nor on their order.
//
// The teams: WarpTeam, BlockTeam (cuda/layer/cuda_team.cuh); SerialTeam, ThreadTeam
// (cuda/layer/host_team.h). What only exists on a GPU (shuffles, barriers, vector loads) is in the
// former and in cuda/layer/primitives.h.
#pragma once

#include <cstddef>

#include "core/common.h"

#if defined(__CUDACC__)
#define BIRL_DEVICE __device__ __forceinline__
#define BIRL_UNROLL _Pragma("unroll")
#else
#define BIRL_DEVICE inline
#define BIRL_UNROLL
#endif

namespace birl::device {

// One thread of a team in one phase.
struct Thread {
  int rank, count;
};

constexpr std::size_t kAlignment = 16;       // of every array: the widest vector load
constexpr std::size_t kLargestReduced = 96;  // bytes of what a team reduces

BIRL_HD constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Hands out consecutive pieces of memory.
class Arena {
 public:
  BIRL_HD explicit Arena(void* start) : next_(static_cast<char*>(start)) {}

  template <class T>
  BIRL_HD T* take(Index count) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += aligned(sizeof(T) * static_cast<std::size_t>(count));
    return array;
  }

 private:
  char* next_;
};

// Hands out nothing, and adds up what an Arena would need.
class Footprint {
 public:
  template <class T>
  BIRL_HD T* take(Index count) {
    bytes_ += aligned(sizeof(T) * static_cast<std::size_t>(count));
    return nullptr;
  }

  BIRL_HD std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

// What a team needs of both memories.
struct Bytes {
  std::size_t chip, spill;
};

// How a kernel is launched: teams in flight, threads of each, bytes of each.
struct LaunchConfig {
  unsigned blocks, threads;
  Bytes bytes;

  std::size_t workspace() const { return bytes.spill * blocks; }
};

template <class Kernel>
Bytes footprint(const Kernel& kernel) {
  Footprint chip, spill;
  kernel.lay_out(chip, spill);
  return {chip.bytes(), spill.bytes()};
}

}  // namespace birl::device
