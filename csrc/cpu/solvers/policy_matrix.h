// P_π(s,t) = Σ_a π(a|s) P(t|s,a)/σ(s,a), formed once and multiplied often.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/isa/columns.h"
#include "cpu/model/sparse_pattern.h"
#include "cpu/model/transition.h"
#include "cpu/support/huge_pages.h"
#include "cpu/support/parallel.h"

namespace birl {

template <class Stored>
class DensePolicyMatrix {
 public:
  // With `keep_mass`, products see rows that sum to what they did before they were rounded.
  explicit DensePolicyMatrix(Index states, bool keep_mass = false)
      : n_(states), values_(states * states), excess_(keep_mass ? states : 0) {}

  Index size() const { return n_; }
  double work() const { return static_cast<double>(n_ * n_); }

  // Rows [s0, s1) from weights π/σ (S,A); `row` is scratch of S numbers. The states whose rows of P
  // are likely to be read next, those after s1, are asked for meanwhile.
  template <class Real>
  void form_rows(const DenseTransition<Real>& model, const double* weight, Index s0, Index s1,
                 double* row) {
    const Index A = model.actions, size = A * n_;
    for (Index s = s0; s < s1; ++s) {
      if constexpr (std::is_same<Real, Stored>::value) {
        if (excess_.empty()) {
          const Index next = s + (s1 - s0);
          dense_routines().rows<Real>().policy_row(model.values + s * size, A, n_, weight + s * A,
                                                   next < n_ ? model.values + next * size : nullptr,
                                                   values_.get() + s * n_);
          continue;
        }
      }
      std::fill(row, row + n_, 0.0);
      model.policy_row(s, weight + s * model.actions, row);
      put_row(s, row);
    }
  }

  void put_row(Index s, const double* row) {
    Stored* const stored = values_.get() + s * n_;
    std::transform(row, row + n_, stored, [](double p) { return static_cast<Stored>(p); });
    if (excess_.empty()) return;
    double before, after, least;
    dense_routines().rows<double>().sums(row, 1, n_, &before, &least);
    dense_routines().rows<Stored>().sums(stored, 1, n_, &after, &least);
    excess_[s] = before - after;
  }

  // out += scale · row s, its diagonal entry apart
  void add_row(Index s, double scale, double* out) const {
    dense_routines().rows<Stored>().combine(values_.get() + s * n_, n_, 1, n_, &scale, out);
  }

  // States per piece of a product.
  Index chunk(bool transpose) const { return transpose ? 128 : 64; }

  // y = Mx or Mᵀx for states [s0, s1), on `columns` interleaved columns; more than one
  // only of a matrix in double.
  void apply(Index s0, Index s1, Index columns, bool transpose, const double* x, double* y) const {
    const Stored* const p = values_.get() + (transpose ? s0 : s0 * n_);
    if constexpr (std::is_same<Stored, double>::value) {
      if (columns > 1) {
        const ColumnDense& routines = column_routines().dense(columns);
        if (transpose)
          routines.columns(p, n_, n_, s1 - s0, x, y + s0 * columns);
        else
          routines.rows(p, s1 - s0, n_, x, y + s0 * columns);
        return;
      }
    }
    if (transpose) {
      std::fill(y + s0, y + s1, 0.0);
      dense_routines().rows<Stored>().combine(p, n_, n_, s1 - s0, x, y + s0);
    } else {
      dense_routines().rows<Stored>().products(p, s1 - s0, n_, x, y + s0);
    }
    add_excess(s0, s1, x, y);
  }

 private:
  void add_excess(Index s0, Index s1, const double* x, double* y) const {
    if (excess_.empty()) return;
    for (Index s = s0; s < s1; ++s) y[s] += excess_[s] * x[s];
  }

  Index n_;
  ScratchArray<Stored> values_;  // each row is written before it is read
  std::vector<double> excess_;   // what rounding took from each row, put on the diagonal
};

// In the orientation of its pattern: P_π, or its transpose.
class CsrPolicyMatrix {
 public:
  explicit CsrPolicyMatrix(const PolicyPattern& pattern)
      : pattern_(pattern), values_(pattern.layout().entries()) {}

  Index size() const { return pattern_.states(); }
  double work() const { return 2.0 * static_cast<double>(values_.size()); }

  template <class Real>
  void form_rows(const CsrTransition<Real>& model, const double* weight, Index s0, Index s1,
                 double*) {
    sparse_routines().rows<Real>().form(pattern_.rows(), model.values, s0, s1, weight,
                                        values_.data());
  }

  // out += scale · row s of P_π
  void add_row(Index s, double scale, double* out) const {
    const PolicyRows& rows = pattern_.rows();
    for (Index k = rows.merged_crow[s]; k < rows.merged_crow[s + 1]; ++k)
      out[rows.col[k]] += scale * values_[rows.place[k]];
  }

  Index chunk(bool) const { return 2048; }

  // `transpose` is the pattern's.
  void apply(Index s0, Index s1, Index columns, bool, const double* x, double* y) const {
    constexpr Index kSlice = SlicedLayout::kSlice;
    sparse_routines().multiply(columns)(pattern_.layout().with(values_.data()), s0 / kSlice,
                                        (s1 + kSlice - 1) / kSlice, x, y);
  }

 private:
  const PolicyPattern& pattern_;
  std::vector<double> values_;  // zero where an entry only fills up a group
};

// Which matrix a transition model's policies have, and the storage type of a dense one.
template <class Model, class Stored>
struct PolicyMatrixOf;
template <class Real, class Stored>
struct PolicyMatrixOf<DenseTransition<Real>, Stored> {
  using type = DensePolicyMatrix<Stored>;
};
template <class Real, class Stored>
struct PolicyMatrixOf<CsrTransition<Real>, Stored> {
  using type = CsrPolicyMatrix;
};

}  // namespace birl
