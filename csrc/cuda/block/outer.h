// P̄(t|s,a) = Σ_g w(s,a) v(t) − shift(s,a), on the pattern of P: the cotangent of the transition
// (M12), folded over the problems that share it.
//
// Work: a block owns a few rows of one transition, a thread neighbouring entries. Bytes: writes P̄
// once, in the storage type; reads G·S weights' rows and vectors, which L1 holds. Floor: writing P̄.
// Invariant: the sum over g runs in its own order, so bits do not depend on the launch.
#pragma once

#include "core/request.h"
#include "cuda/layer/layer.h"

namespace birl::device {

template <class Real>
struct OuterKernel {
  static constexpr int kTeamsPerProcessor = 4;
  static constexpr Index kEntries = 4096;  // dense entries of one item, about

  Batch batch;
  Outer request;

  struct Arrays {};
  template <class Chip, class Spill>
  BIRL_HD Arrays lay_out(Chip&, Spill&) const {
    return {};
  }

  BIRL_HD Index rows() const { return batch.states * batch.actions; }
  BIRL_HD Index rows_per_item() const {
    const Index fitting = kEntries / (batch.crow ? (batch.nnz + rows()) / rows() : batch.states);
    return fitting < 1 ? 1 : fitting;
  }
  BIRL_HD Index items_per_transition() const {
    return (rows() + rows_per_item() - 1) / rows_per_item();
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays&, Index item) const {
    const Index n = item / items_per_transition();
    const Index row0 = item % items_per_transition() * rows_per_item();
    const Index row1 = row0 + rows_per_item() < rows() ? row0 + rows_per_item() : rows();
    const Index S = batch.states;
    Real* const out = static_cast<Real*>(request.out) + n * (batch.crow ? batch.nnz : rows() * S);
    team.phase([&](Thread t) {
      if (batch.crow)
        for (Index row = row0 + t.rank; row < row1; row += t.count)
          for (Index k = batch.crow[row]; k < batch.crow[row + 1]; ++k)
            out[k] = entry(n, row, batch.col[k]);
      else
        for (Index e = row0 * S + t.rank; e < row1 * S; e += t.count)
          out[e] = entry(n, e / S, e % S);
    });
  }

 private:
  BIRL_DEVICE Real entry(Index n, Index row, Index next) const {
    double sum = 0.0;
    for (Index i = n * batch.problems; i < (n + 1) * batch.problems; ++i)
      sum += request.weight[i * rows() + row] * request.vector[i * batch.states + next];
    return static_cast<Real>(sum - request.shift[n * rows() + row]);
  }
};

}  // namespace birl::device
