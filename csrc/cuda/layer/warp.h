// A few lanes of one warp working on one thing together: a row of P, a state's actions.
//
//   g.each(f)          f(lane) in every lane, then what they wrote is visible to all of them;
//   g.sums(out, f)     out[j] = Σ over lanes of part[j] as left by f(lane, part);
//   g.largest(out, f)  the largest part[j] >= 0 instead, or NaN;
//   g.join<T>(f, join) join of f(lane) over the lanes.
// The last three hand their result to every lane. A sum is always the same butterfly over the
// lanes, so its bits depend on kLanes and on nothing else; the host double adds in that order too.
//
// rank and count number the groups of a block, place and places those of a whole team: a loop
// `for (i = g.place; i < n; i += g.places)` deals n things to them.
#pragma once

#include "core/soft_maximum.h"
#include "cuda/layer/primitives.h"

#if !defined(__CUDACC__)
#include <algorithm>
#include <numeric>
#include <random>
#endif

namespace birl::device {

#if defined(__CUDACC__)

template <int kLanes_>
class LaneGroup {
 public:
  static constexpr int kLanes = kLanes_;
  const Index rank, count, place, places;

  BIRL_DEVICE LaneGroup(Index block, Index blocks)
      : rank(threadIdx.x / kLanes),
        count(blockDim.x / kLanes),
        place(block * count + rank),
        places(blocks * count) {}

  template <class F>
  BIRL_DEVICE void each(F&& f) const {
    f(lane());
    __syncwarp(mask());
  }

  template <int kCount, class F>
  BIRL_DEVICE void sums(double (&out)[kCount], F&& f) const {
    BIRL_UNROLL
    for (int j = 0; j < kCount; ++j) out[j] = 0.0;
    f(lane(), out);
    BIRL_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      BIRL_UNROLL
      for (int j = 0; j < kCount; ++j) out[j] += __shfl_xor_sync(mask(), out[j], distance, kWarp);
    }
  }

  template <int kCount, class F>
  BIRL_DEVICE void largest(double (&out)[kCount], F&& f) const {
    BIRL_UNROLL
    for (int j = 0; j < kCount; ++j) out[j] = 0.0;
    f(lane(), out);
    BIRL_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      BIRL_UNROLL
      for (int j = 0; j < kCount; ++j)
        out[j] = higher(out[j], __shfl_xor_sync(mask(), out[j], distance, kWarp));
    }
  }

  template <class T, class F, class Join>
  BIRL_DEVICE T join(F&& f, Join&& together) const {
    T x = f(lane());
    BIRL_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      x = together(x, __shfl_xor_sync(mask(), x, distance, kWarp));
    return x;
  }

 private:
  BIRL_DEVICE static int lane() { return static_cast<int>(threadIdx.x % kLanes); }
  // Groups of one warp may go different ways: only the lanes of this one wait for each other.
  BIRL_DEVICE static unsigned mask() {
    if (kLanes == kWarp) return 0xffffffffu;
    return ((1u << (kLanes % kWarp)) - 1u) << (threadIdx.x % kWarp / kLanes * kLanes);
  }
};

#else

// The lanes run one after another, in an order that must not matter.
template <int kLanes_>
class LaneGroup {
 public:
  static constexpr int kLanes = kLanes_;
  const Index rank, count, place, places;

  LaneGroup(Index rank, Index count, Index block, Index blocks, unsigned seed)
      : rank(rank), count(count), place(block * count + rank), places(blocks * count) {
    std::iota(order_, order_ + kLanes, 0);
    if (seed == 1) std::reverse(order_, order_ + kLanes);
    std::mt19937 random(seed);
    if (seed > 1) std::shuffle(order_, order_ + kLanes, random);
  }

  template <class F>
  void each(F&& f) const {
    for (const int lane : order_) f(lane);
  }

  template <int kCount, class F>
  void sums(double (&out)[kCount], F&& f) const {
    double part[kLanes][kCount] = {};
    for (const int lane : order_) f(lane, part[lane]);
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      for (int lane = 0; lane < distance; ++lane)
        for (int j = 0; j < kCount; ++j) part[lane][j] += part[lane + distance][j];
    for (int j = 0; j < kCount; ++j) out[j] = part[0][j];
  }

  template <int kCount, class F>
  void largest(double (&out)[kCount], F&& f) const {
    double part[kLanes][kCount] = {};
    for (const int lane : order_) f(lane, part[lane]);
    for (int j = 0; j < kCount; ++j) {
      out[j] = part[0][j];
      for (int lane = 1; lane < kLanes; ++lane) out[j] = higher(out[j], part[lane][j]);
    }
  }

  template <class T, class F, class Join>
  T join(F&& f, Join&& together) const {
    T x = f(order_[0]);
    for (int i = 1; i < kLanes; ++i) x = together(x, f(order_[i]));
    return x;
  }

 private:
  int order_[kLanes];
};

#endif

}  // namespace birl::device
