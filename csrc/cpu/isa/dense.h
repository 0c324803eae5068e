// Inner loops on dense tables (cpu/isa/isa.h). Every reduction has a fixed shape: 16 lanes, then a
// tree, then the tail.
#pragma once

#include "core/certificate.h"
#include "cpu/isa/by_precision.h"

namespace birl {

template <class Real>
struct RowRoutines {
  // y[i] = Σ_t p[i,t] w[t]
  void (*products)(const Real* p, Index rows, Index cols, const double* w, double* y);
  // sum[i] = Σ_t p[i,t], least[i] = min_t p[i,t] (NaN entries show in the sum)
  void (*sums)(const Real* p, Index rows, Index cols, double* sum, double* least);
  // products and sums in one reading
  void (*products_and_sums)(const Real* p, Index rows, Index cols, const double* w, double* y,
                            double* sum, double* least);
  // out[t] += Σ_k weight[k] p[k,t]
  void (*combine)(const Real* p, Index stride, Index rows, Index cols, const double* weight,
                  double* out);
  // out[t] = Σ_k weight[k] p[k,t] in p's own precision, for consecutive rows. While it works it
  // asks the memory for as much from `ahead` on, unless that is null.
  void (*policy_row)(const Real* p, Index rows, Index cols, const double* weight, const Real* ahead,
                     Real* out);
  // out[t] = Σ_k weight[k] p[k,t] for consecutive rows, and if there is a second weight also
  // more[t] += Σ_k second[k] p[k,t].
  void (*two_policy_rows)(const Real* p, Index rows, Index cols, const double* weight,
                          const double* second, double* out, double* more);
  // q[i] = reward[i] + discount · product[i] · inverse_sum[i]
  void (*q_values)(Index rows, const Real* reward, const double* product, const double* inverse_sum,
                   double discount, double* q);
};

// GTH elimination of A = D - N, N >= 0 off the diagonal: rows of magnitudes, nothing is subtracted.
// See cpu/solvers/elimination.h. Rows are `stride` apart, at least kPadding more than n, and zero
// beyond n.
struct EliminationRoutines {
  static constexpr Index kPadding = 8;
  static constexpr Index kLargestPanel = 64;
  // Rows [k0, k1) to their final form, over columns [k0, n).
  void (*panel)(double* a, Index n, Index stride, Index k0, Index k1, double* defect,
                double* inverse_pivot);
  // Rows [i0, i1) below that panel: multipliers in columns [k0, k1), update of columns [k1, n).
  void (*below)(double* a, Index n, Index stride, Index k0, Index k1, Index i0, Index i1,
                double* defect, const double* inverse_pivot);
  void (*solve)(const double* a, Index n, Index stride, const double* inverse_pivot, double* x);
  void (*solve_transpose)(const double* a, Index n, Index stride, const double* inverse_pivot,
                          double* x);
};

struct SoftMaximum {
  Index states, actions;
  const double* q;
  const double* log_reference;  // null: the reference is one everywhere
  double temperature;
  double* value;       // τ log Σ_a μ exp(q/τ)
  double* policy;      // optional; e / Σe
  double* log_policy;  // optional
  double* advantage;   // optional; q - value, zero where masked; may be q itself
  double* scratch;     // soft_maximum_scratch(actions) numbers
};

struct DenseRoutines : ByPrecision<RowRoutines> {
  void (*soft_maximum)(const SoftMaximum&);
  EliminationRoutines elimination;
  double (*dot)(Index n, const double* x, const double* y);
  // d = a - b - shift, its range and that of a
  SweepRange (*difference)(Index n, const double* a, const double* b, double shift, double* d);
};

constexpr Index kSoftMaximumChunk = 512;
inline Index soft_maximum_scratch(Index actions) {
  return 2 * kSoftMaximumChunk + (actions > kSoftMaximumChunk ? actions : kSoftMaximumChunk);
}

const DenseRoutines& dense_routines();

}  // namespace birl
