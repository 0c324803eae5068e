// Norms over all states, one or more for each column of a vector (S, kRight), for the grid: partial
// results over Pieces, joined in one order, so the bits depend on the team in no way.
#pragma once

#include "cuda/layer/grid_layer.h"

namespace birl::device {

// `terms(s, c, part)` is the numbers >= 0 of state s in column c; out[c·kCount + j] on each block's
// chip becomes the sum of part[j] over the states, or the largest; NaN shows. `partial` has room
// for kCount·kRight·Pieces numbers in common memory. One barrier of the team, in the middle:
// between two calls there has to be another.
template <int kCount, int kRight, class Team, class Terms, class Out>
BIRL_DEVICE void column_norms(Team& team, Index states, bool sum, double* partial, Terms&& terms,
                              Out&& out) {
  using Block = typename Team::Block;
  const Pieces pieces(states);
  const auto fold = [&](const auto& g, double (&total)[kCount], Index first, Index last,
                        auto&& add) {
    const auto share = [&](int lane, double (&part)[kCount]) {
      for (Index i = first + lane; i < last; i += 32) {
        double term[kCount];
        add(i, term);
        BIRL_UNROLL
        for (int j = 0; j < kCount; ++j)
          part[j] = sum ? part[j] + term[j] : higher(part[j], term[j]);
      }
    };
    if (sum)
      g.sums(total, share);
    else
      g.largest(total, share);
  };
  team.step([&](Block& block) {
    block.template groups<32>([&](const auto& g) {
      for (Index i = g.place; i < pieces.count * kRight; i += g.places) {
        const Index piece = i / kRight, c = i % kRight;
        double total[kCount];
        fold(g, total, pieces.begin(piece), pieces.end(piece),
             [&](Index s, double (&term)[kCount]) { terms(s, c, term); });
        g.each([&](int lane) {
          if (lane != 0) return;
          BIRL_UNROLL
          for (int j = 0; j < kCount; ++j) partial[i * kCount + j] = total[j];
        });
      }
    });
  });
  team.local([&](Block& block) {
    block.template groups<32>([&](const auto& g) {
      for (Index c = g.rank; c < kRight; c += g.count) {
        double total[kCount];
        fold(g, total, 0, pieces.count, [&](Index piece, double (&term)[kCount]) {
          BIRL_UNROLL
          for (int j = 0; j < kCount; ++j) term[j] = partial[(piece * kRight + c) * kCount + j];
        });
        g.each([&](int lane) {
          if (lane != 0) return;
          BIRL_UNROLL
          for (int j = 0; j < kCount; ++j) out(block)[c * kCount + j] = total[j];
        });
      }
    });
  });
}

}  // namespace birl::device
