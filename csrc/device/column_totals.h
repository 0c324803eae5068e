// Sums and maxima over all states, one for each column of a vector (S, K), for a team of several
// blocks: partial results over Pieces, joined in one order. Where there are few numbers every block
// works on all of them for itself, which is faster than a barrier of the team; else the pieces are
// dealt out to the team, with one barrier. The bits are the same. Nothing waits for the other
// blocks afterwards: a vector that was read here may be written only behind the team's next
// barrier.
#pragma once

#include "device/wide_layer.h"

namespace birl::device {

constexpr int kMostSums = 5;
constexpr Index kReplicated = 8192;  // numbers up to which every block works for itself

BIRL_HD constexpr bool sums_replicated(Index states, Index right) {
  return states * right <= kReplicated;
}

struct Sum {
  BIRL_DEVICE static void add(double& total, double x) { total += x; }

  template <int kCount, class Group, class F>
  BIRL_DEVICE static void over(const Group& g, double (&out)[kCount], F&& f) {
    g.sums(out, f);
  }
};

// Of numbers >= 0; NaN wins.
struct Largest {
  BIRL_DEVICE static void add(double& total, double x) { total = higher(total, x); }

  template <int kCount, class Group, class F>
  BIRL_DEVICE static void over(const Group& g, double (&out)[kCount], F&& f) {
    static_assert(kCount == 1, "one at a time");
    out[0] = g.template join<double>(
        [&](int lane) {
          double part[1] = {0.0};
          f(lane, part);
          return part[0];
        },
        higher);
  }

 private:
  BIRL_DEVICE static double higher(double x, double y) { return y > x || y != y ? y : x; }
};

// `terms(block, s, k, part)` adds to part[j] what state s contributes to column k, with Fold::add;
// `use(block, k, total)` is called for each column in every block, by one lane. `far` has room for
// the partial results in common memory, block.chip.partial on chip where they are replicated.
template <class Fold, int kCount, class Team, class Terms, class Use>
BIRL_STAGE void column_totals(Team& team, Index states, Index K, double* far, Terms&& terms,
                              Use&& use) {
  static_assert(kCount <= kMostSums, "enlarge kMostSums");
  using Block = typename Team::Block;
  const Pieces pieces(states);
  const bool replicated = sums_replicated(states, K);
  team.local([&](Block& block) {
    double* const partial = replicated ? block.chip.partial : far;
    block.template groups<32>([&](const auto& g) {
      const Index first = replicated ? g.rank : g.place, stride = replicated ? g.count : g.places;
      for (Index piece = first; piece < pieces.count; piece += stride)
        for (Index k = 0; k < K; ++k) {
          double total[kCount];
          Fold::over(g, total, [&](int lane, double (&part)[kCount]) {
            for (Index s = pieces.begin(piece) + lane; s < pieces.end(piece); s += 32)
              terms(block, s, k, part);
          });
          g.each([&](int lane) {
            if (lane != 0) return;
            BIRL_UNROLL
            for (int j = 0; j < kCount; ++j) partial[(j * K + k) * pieces.count + piece] = total[j];
          });
        }
    });
  });
  if (!replicated) team.step([](Block&) {});
  team.local([&](Block& block) {
    const double* const partial = replicated ? block.chip.partial : far;
    block.template groups<32>([&](const auto& g) {
      for (Index k = g.rank; k < K; k += g.count) {
        double total[kCount];
        Fold::over(g, total, [&](int lane, double (&part)[kCount]) {
          for (Index piece = lane; piece < pieces.count; piece += 32) {
            BIRL_UNROLL
            for (int j = 0; j < kCount; ++j)
              Fold::add(part[j], partial[(j * K + k) * pieces.count + piece]);
          }
        });
        g.each([&](int lane) {
          if (lane == 0) use(block, k, total);
        });
      }
    });
  });
}

}  // namespace birl::device
