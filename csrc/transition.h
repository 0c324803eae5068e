// The two storage forms of P. The solvers are templates over either; a model offers
//   products, row_sums       over rows [row0, row1), row = s·A + a
//   policy_row               out[t] += Σ_a weight[a] P(t|s,a), out dense
//   values, count            the stored entries, for naming a bad one
//   work, longest_row        multiply-adds of one pass; terms in the longest row sum
#pragma once

#include <algorithm>

#include "kernels.h"

namespace birl {

template <class Real_>
struct DenseTransition {
  using Real = Real_;
  const Real* values;
  Index states, actions;

  Index count() const { return states * actions * states; }
  double work() const { return static_cast<double>(count()); }
  Index longest_row() const { return states; }
  // States whose rows fit in half of a small second-level cache.
  Index chunk() const {
    const Index bytes = actions * states * static_cast<Index>(sizeof(Real));
    return std::max<Index>(1, 131072 / bytes);
  }

  void products(Index row0, Index row1, const double* w, double* y) const {
    kernels().rows<Real>().products(values + row0 * states, row1 - row0, states, w, y);
  }
  void row_sums(Index row0, Index row1, double* sum, double* least) const {
    kernels().rows<Real>().sums(values + row0 * states, row1 - row0, states, sum, least);
  }
  void policy_row(Index s, const double* weight, double* out) const {
    kernels().rows<Real>().combine(values + s * actions * states, states, actions, states, weight,
                                   out);
  }
};

template <class Real_>
struct CsrTransition {
  using Real = Real_;
  const Real* values;
  const Index* crow;
  const Index* col;
  Index states, actions;
  Index longest;

  Index count() const { return crow[states * actions]; }
  double work() const { return 2.0 * static_cast<double>(count()); }  // a gather costs two
  Index longest_row() const { return longest; }
  Index chunk() const { return std::max<Index>(1, 4096 / actions); }

  void products(Index row0, Index row1, const double* w, double* y) const {
    for (Index row = row0; row < row1; ++row) {
      double total = 0.0;
      for (Index k = crow[row]; k < crow[row + 1]; ++k)
        total += static_cast<double>(values[k]) * w[col[k]];
      y[row - row0] = total;
    }
  }
  void row_sums(Index row0, Index row1, double* sum, double* least) const {
    for (Index row = row0; row < row1; ++row) {
      double total = 0.0, smallest = 0.0;
      for (Index k = crow[row]; k < crow[row + 1]; ++k) {
        const double p = static_cast<double>(values[k]);
        total += p;
        smallest = p < smallest ? p : smallest;
      }
      sum[row - row0] = total;
      least[row - row0] = smallest;
    }
  }
  void policy_row(Index s, const double* weight, double* out) const {
    for (Index a = 0; a < actions; ++a)
      for (Index k = crow[s * actions + a]; k < crow[s * actions + a + 1]; ++k)
        out[col[k]] += weight[a] * static_cast<double>(values[k]);
  }
};

}  // namespace birl
