// The two storage forms of P. The solvers are templates over either; a model offers
//   products, row_sums       over rows [row0, row1), row = s·A + a
//   products_and_sums        both in one reading
//   policy_row               out[t] += Σ_a weight[a] P(t|s,a), out dense
//   values, count            the stored entries, for naming a bad one
//   work, longest_row        multiply-adds of one pass; terms in the longest row sum
#pragma once

#include <algorithm>

#include "cpu/isa/dense.h"
#include "cpu/isa/sparse.h"

namespace birl {

template <class Real_>
struct DenseTransition {
  using Real = Real_;
  const Real* values;
  Index states, actions;

  Index count() const { return states * actions * states; }
  double work() const { return static_cast<double>(count()); }
  // Sixteen lanes, their tree, and a tail of at most fifteen.
  double additions() const { return static_cast<double>(states / 16 + 4 + states % 16); }
  // States whose rows fit in half of a small second-level cache.
  Index chunk() const {
    const Index bytes = actions * states * static_cast<Index>(sizeof(Real));
    return std::max<Index>(1, 131072 / bytes);
  }

  void products(Index row0, Index row1, const double* w, double* y) const {
    dense_routines().rows<Real>().products(values + row0 * states, row1 - row0, states, w, y);
  }
  void row_sums(Index row0, Index row1, double* sum, double* least) const {
    dense_routines().rows<Real>().sums(values + row0 * states, row1 - row0, states, sum, least);
  }
  void products_and_sums(Index row0, Index row1, const double* w, double* y, double* sum,
                         double* least) const {
    dense_routines().rows<Real>().products_and_sums(values + row0 * states, row1 - row0, states, w,
                                                    y, sum, least);
  }
  void policy_row(Index s, const double* weight, double* out) const {
    dense_routines().rows<Real>().combine(values + s * actions * states, states, actions, states,
                                          weight, out);
  }
};

// Σ_k value[k] x[col[k]] in four interleaved sums.
template <class Real>
inline double sparse_dot(const Real* value, const Index* col, Index begin, Index end,
                         const double* x) {
  double part[4] = {0.0, 0.0, 0.0, 0.0};
  Index k = begin;
  for (; k + 4 <= end; k += 4)
    for (int i = 0; i < 4; ++i) part[i] += static_cast<double>(value[k + i]) * x[col[k + i]];
  double total = (part[0] + part[1]) + (part[2] + part[3]);
  for (; k < end; ++k) total += static_cast<double>(value[k]) * x[col[k]];
  return total;
}

template <class Real_>
struct CsrTransition {
  using Real = Real_;
  const Real* values;
  const Index* crow;
  const Index* col;
  Index states, actions;
  Index longest;
  const PolicyRows* rows = nullptr;  // of the pattern of its policies' matrices, where there is one

  Index count() const { return crow[states * actions]; }
  double work() const { return 2.0 * static_cast<double>(count()); }  // a gather costs two
  double additions() const { return static_cast<double>(longest / 4 + 6); }
  Index chunk() const { return std::max<Index>(1, 4096 / actions); }

  // With `rows`, of whole states.
  void products(Index row0, Index row1, const double* w, double* y) const {
    if (rows)
      return sparse_routines().rows<Real>().products(*rows, values, row0 / actions, row1 / actions,
                                                     w, y);
    for (Index row = row0; row < row1; ++row)
      y[row - row0] = sparse_dot(values, col, crow[row], crow[row + 1], w);
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
  void products_and_sums(Index row0, Index row1, const double* w, double* y, double* sum,
                         double* least) const {
    products(row0, row1, w, y);
    row_sums(row0, row1, sum, least);
  }
  void policy_row(Index s, const double* weight, double* out) const {
    for (Index a = 0; a < actions; ++a)
      for (Index k = crow[s * actions + a]; k < crow[s * actions + a + 1]; ++k)
        out[col[k]] += weight[a] * static_cast<double>(values[k]);
  }
};

}  // namespace birl
