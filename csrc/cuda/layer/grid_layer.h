// The grid: many blocks that are one team. cuda/layer/layer.h with one more level.
//
// A kernel of the grid is a plain struct with
//
//   Chip                            what every block keeps in its shared memory;
//   template <class Memory> Arrays lay_out(Memory& memory) const;
//       what all blocks of the team see, in the workspace in global memory;
//   template <class Team> void run(Team& team, const Arrays& arrays, Index item) const;
//
// `run` is executed by every thread of every block and is a sequence of
//
//   team.step(f)             f(block) in every block, then a barrier of the team;
//   team.reduce<T>(f, join)  join of f(block) over all blocks, handed to every thread;
//   team.local(f)            f(block) in every block, no barrier of the team;
//   team.decide(f)           f(block) in one thread of each block, handed to the block's threads;
//
// and a block, inside those, executes
//
//   block.phase(f)           f(thread), then a barrier of the block;
//   block.reduce<T>(f, join) as in cuda/layer/layer.h;
//   block.groups<L>(f)       f(g) in every group of L lanes (cuda/layer/warp.h), then a barrier of
//                            the block;
//   block.spread(f)          f(first, stride) in every thread, numbered over the whole team, then a
//                            barrier of the block;
//   block.chip               its own Chip.
//
// Rules, beside those of cuda/layer/layer.h:
//   1. Between two barriers of the team a block reads of the common arrays what was written before
//      the first, or by itself.
//   2. `decide` and the scalars of `local` are computed by every block for itself, from the same
//      numbers by the same operations, so that all blocks take the same way without another
//      barrier.
//   3. A sum over all states is made of partial sums over pieces that depend on the number of
//      states alone (Pieces), added in one order by whoever needs the total.
//   4. A kernel calls each of its stages in one place: everything is inlined into one function, so
//      that nothing lives in local memory, and code grows with the calls.
#pragma once

#include "cuda/layer/warp.h"

namespace birl::device {

// Of a block; two of them on a multiprocessor leave each thread 168 registers.
constexpr unsigned kGridThreads = 192;

// States in pieces for partial sums: a function of their number, never of the team.
struct Pieces {
  Index states, length, count;

  BIRL_HD explicit Pieces(Index n) : states(n) {
    constexpr Index kMost = 2048;
    length = ((n + kMost - 1) / kMost + 31) / 32 * 32;
    count = (n + length - 1) / length;
  }
  BIRL_HD Index begin(Index piece) const { return piece * length; }
  BIRL_HD Index end(Index piece) const {
    return (piece + 1) * length < states ? (piece + 1) * length : states;
  }
};

// How a kernel of the grid is launched.
struct GridLaunchConfig {
  unsigned teams, blocks, threads;  // blocks of each team
  std::size_t bytes;                // of each team in the workspace

  std::size_t workspace() const { return bytes * teams; }
};

// What a team of so many blocks needs in the workspace.
template <class Kernel>
std::size_t grid_footprint(const Kernel& kernel, Index blocks) {
  Footprint common;
  common.take<char>(static_cast<Index>(2 * kLargestReduced) * blocks);
  kernel.lay_out(common);
  return common.bytes();
}

// The states that block `rank` of `count` owns.
struct Share {
  Index begin, end;
};
BIRL_HD constexpr Share share_of(Index states, Index rank, Index count) {
  return {states * rank / count, states * (rank + 1) / count};
}

}  // namespace birl::device
