// P_π(s,t) = Σ_a π(a|s) P(t|s,a)/σ(s,a), formed once and multiplied often.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "sparse.h"
#include "transition.h"

namespace birl {

template <class Stored>
class DensePolicyMatrix {
 public:
  // With `keep_mass`, products see rows that sum to what they did before they were rounded.
  explicit DensePolicyMatrix(Index states, bool keep_mass = false)
      : n_(states), values_(new Stored[states * states]), excess_(keep_mass ? states : 0) {}

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
          kernels().rows<Real>().policy_row(model.values + s * size, A, n_, weight + s * A,
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
    kernels().rows<double>().sums(row, 1, n_, &before, &least);
    kernels().rows<Stored>().sums(stored, 1, n_, &after, &least);
    excess_[s] = before - after;
  }

  // out += scale · row s, its diagonal entry apart
  void add_row(Index s, double scale, double* out) const {
    kernels().rows<Stored>().combine(values_.get() + s * n_, n_, 1, n_, &scale, out);
  }

  void apply(const double* x, double* y, Team& team) const {
    constexpr Index kRows = 64;
    team.run((n_ + kRows - 1) / kRows, 2.0 * work(), [&](Index c, int) {
      const Index s0 = c * kRows, s1 = std::min(n_, s0 + kRows);
      kernels().rows<Stored>().products(values_.get() + s0 * n_, s1 - s0, n_, x, y + s0);
      add_excess(s0, s1, x, y);
    });
  }

  void apply_transpose(const double* x, double* y, Team& team) const {
    constexpr Index kCols = 128;
    team.run((n_ + kCols - 1) / kCols, 2.0 * work(), [&](Index c, int) {
      const Index t0 = c * kCols, t1 = std::min(n_, t0 + kCols);
      std::fill(y + t0, y + t1, 0.0);
      kernels().rows<Stored>().combine(values_.get() + t0, n_, n_, t1 - t0, x, y + t0);
      add_excess(t0, t1, x, y);
    });
  }

 private:
  void add_excess(Index s0, Index s1, const double* x, double* y) const {
    if (excess_.empty()) return;
    for (Index s = s0; s < s1; ++s) y[s] += excess_[s] * x[s];
  }

  Index n_;
  std::unique_ptr<Stored[]> values_;  // each row is written before it is read
  std::vector<double> excess_;        // what rounding took from each row, put on the diagonal
};

class CsrPolicyMatrix {
 public:
  explicit CsrPolicyMatrix(const PolicyPattern& pattern)
      : pattern_(pattern), values_(pattern.col.size()) {}

  Index size() const { return pattern_.states; }
  double work() const { return 2.0 * static_cast<double>(values_.size()); }

  template <class Real>
  void form_rows(const CsrTransition<Real>& model, const double* weight, Index s0, Index s1,
                 double*) {
    std::fill(values_.begin() + pattern_.crow[s0], values_.begin() + pattern_.crow[s1], 0.0);
    for (Index row = s0 * model.actions; row < s1 * model.actions; ++row)
      for (Index k = model.crow[row]; k < model.crow[row + 1]; ++k)
        values_[pattern_.slot[k]] += weight[row] * static_cast<double>(model.values[k]);
  }

  void add_row(Index s, double scale, double* out) const {
    for (Index k = pattern_.crow[s]; k < pattern_.crow[s + 1]; ++k)
      out[pattern_.col[k]] += scale * values_[k];
  }

  void apply(const double* x, double* y, Team& team) const {
    run(team, [&](Index s) {
      y[s] = sparse_dot(values_.data(), pattern_.col.data(), pattern_.crow[s], pattern_.crow[s + 1],
                        x);
    });
  }

  void apply_transpose(const double* x, double* y, Team& team) const {
    run(team, [&](Index t) {
      double total = 0.0;
      for (Index k = pattern_.transpose_crow[t]; k < pattern_.transpose_crow[t + 1]; ++k)
        total += values_[pattern_.transpose_slot[k]] * x[pattern_.transpose_col[k]];
      y[t] = total;
    });
  }

 private:
  template <class Row>
  void run(Team& team, Row&& row) const {
    constexpr Index kRows = 2048;
    const Index n = size();
    team.run((n + kRows - 1) / kRows, 2.0 * work(), [&](Index c, int) {
      for (Index s = c * kRows; s < std::min(n, (c + 1) * kRows); ++s) row(s);
    });
  }

  const PolicyPattern& pattern_;
  std::vector<double> values_;
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
