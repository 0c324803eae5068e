// Direct solves with A = I − γP_π by Grassmann-Taksar-Heyman elimination: subtraction free.
//
// A is an M-matrix with off-diagonals −|a_ij| and row defects d_i = Σ_j a_ij >= 1 − γ > 0. Instead
// of the diagonal the elimination carries d: the pivot is d_k + Σ_{j>k} |a_kj|, and
//     l = |a_ik| / pivot_k,   |a_ij| += l |a_kj|,   d_i += l d_k.
// Only sums and products of non-negative numbers occur, so every entry of L and U keeps full
// relative accuracy however close γ is to one (O'Cinneide 1993), and no pivoting is needed.
//
// The square `magnitudes` holds |L| below and |U| above the diagonal; its diagonal is not used.
// A = LU with unit L, so Aᵀ = UᵀLᵀ comes from the same factors.
#pragma once

#include <algorithm>
#include <vector>

#include "core/system.h"
#include "cpu/isa/columns.h"
#include "cpu/isa/dense.h"
#include "cpu/support/parallel.h"

namespace birl {

class SlowPivots {
 public:
  void add(double inverse_pivot) {
    second_ = std::max(second_, std::min(first_, inverse_pivot));
    first_ = std::max(first_, inverse_pivot);
  }
  double condition() const { return second_; }

 private:
  double first_ = 0.0, second_ = 0.0;  // the largest reciprocals
};

class Elimination {
 public:
  explicit Elimination(Index n)
      : n_(n),
        stride_((n + EliminationRoutines::kPadding + 7) / 8 * 8),
        magnitudes_(n * stride_),
        defect_(n),
        inverse_pivot_(n) {}

  Index size() const { return n_; }
  double* row(Index i) {
    return magnitudes_.data() + i * stride_;
  }  // to be filled with γ P_π(i, ·)
  double* defect() { return defect_.data(); }  // to be filled with d

  // Row s of I − γP_π from π(·|s) and 1/σ(s,·); `scaled` is scratch of A numbers.
  template <class Model>
  void set_row(const Model& model, Index s, const double* policy, const double* inverse_sum,
               double discount, double* scaled) {
    RowMass mass;
    for (Index a = 0; a < model.actions; ++a) {
      scaled[a] = discount * (policy[a] * inverse_sum[a]);
      mass.add(policy[a], inverse_sum[a]);
    }
    std::fill(row(s), row(s) + n_, 0.0);
    model.policy_row(s, scaled, row(s));
    defect_[s] = mass.defect(discount, model.actions);
  }

  // Factors in place.
  void factor(Team& team, Interrupt& interrupt) {
    constexpr Index kPanel = 32;
    const EliminationRoutines& routines = dense_routines().elimination;
    // Whole vectors reach past a row's end, where a singular system before may have left its NaN.
    for (Index i = 0; i < n_; ++i) std::fill(row(i) + n_, row(i) + stride_, 0.0);
    for (Index k0 = 0; k0 < n_; k0 += kPanel) {
      interrupt.check();
      const Index k1 = std::min(n_, k0 + kPanel), below = n_ - k1;
      routines.panel(magnitudes_.data(), n_, stride_, k0, k1, defect_.data(),
                     inverse_pivot_.data());
      constexpr Index kRows = 16;
      const double work = 2.0 * static_cast<double>((k1 - k0) * below * below);
      team.run((below + kRows - 1) / kRows, work, [&](Index c, int) {
        const Index i0 = k1 + c * kRows, i1 = std::min(n_, i0 + kRows);
        routines.below(magnitudes_.data(), n_, stride_, k0, k1, i0, i1, defect_.data(),
                       inverse_pivot_.data());
      });
    }
  }

  // x := A⁻¹x, or A⁻ᵀx, on `columns` interleaved columns (cpu/isa/columns.h).
  void solve(double* x, bool transpose, Index columns = 1) const {
    if (columns > 1) {
      const ColumnDense& dense = column_routines().dense(columns);
      return (transpose ? dense.solve_transpose : dense.solve)(magnitudes_.data(), n_, stride_,
                                                               inverse_pivot_.data(), x);
    }
    const EliminationRoutines& routines = dense_routines().elimination;
    (transpose ? routines.solve_transpose : routines.solve)(magnitudes_.data(), n_, stride_,
                                                            inverse_pivot_.data(), x);
  }

  // How much a solution whose mass along the slow mode is known (M20) magnifies what rounding does
  // to the right-hand side, by the pivots: the smallest is the slow mode's own, and a second one as
  // small is a part of the chain that is hardly ever left.
  double condition() const {
    SlowPivots slow;
    for (Index i = 0; i < n_; ++i) slow.add(inverse_pivot_[i]);
    return slow.condition();
  }

 private:
  Index n_, stride_;
  std::vector<double> magnitudes_, defect_, inverse_pivot_;
};

}  // namespace birl
