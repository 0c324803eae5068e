// The inner loops of solve_vjp (cpu/isa/isa.h).
#pragma once

#include "core/common.h"
#include "cpu/isa/by_precision.h"

namespace birl {

// What one problem brings and what its derivative rule makes of it, (S,A) unless said otherwise.
template <class Real>
struct VjpTables {
  Index states, actions;
  double discount, temperature;
  const Real *policy, *advantage;
  const double* value_bar;  // (S); a null cotangent is zero
  const Real *q_bar, *advantage_bar, *policy_bar, *log_policy_bar;
  double* probability;  // π in double, its rows summing to one
  double* score;        // cotangent of log π at fixed Q and V; only where that is not zero
  double* q;            // cotangent of Q
  double* source;       // (S): cotangent of V
  double* inflow;       // one number: Σ V̄ + Σ Q̄, what is asked of V itself
};

// What is wanted of one problem, (S,A) unless said otherwise; a null one is not.
template <class Real>
struct VjpOutputs {
  const double* flow;         // (S): λ, the cotangent of TV
  const double* inverse_sum;  // 1/σ, zero where nothing follows
  const double* expected;     // Σ_t P W / σ
  double offset, inflow;      // V = offset + W; see VjpTables
  Real* reward_bar;
  double* weight;  // γ r̄ / σ
  double* log_reference_bar;
  double* discount_bar;     // one number
  double* temperature_bar;  // one number
};

// Systems of up to kMostStates states, kAbreast of them side by side: entry (i,j) of all is one
// vector. The elimination of cpu/solvers/elimination.h without a sum across a vector.
struct PackedElimination {
  static constexpr Index kAbreast = 8;
  static constexpr Index kMostStates = 32;
  // Numbers begin on a cache line. Factors |off-diagonals| a (n,n,kAbreast) with row defects d
  // (n,kAbreast), in place, and solves the transposed systems for x (n,kAbreast).
  void (*solve_transpose)(Index n, double* a, double* defect, double* inverse_pivot, double* x);
  // With the factors: x += α z such that Σ d x = mass (kAbreast), z (n,kAbreast) what one start
  // leads to (M20). Rounding leaves an error along it, which 1/(1 − γ) magnifies. d as before the
  // factoring.
  void (*settle_mass)(Index n, const double* a, const double* defect, const double* mass, double* z,
                      double* x);
};

template <class Real>
struct AdjointRowRoutines {
  void (*fold)(const VjpTables<Real>&);
  void (*finish)(const VjpTables<Real>&, const VjpOutputs<Real>&);
  // inverse[i] = 1/Σ_t p[i,t], zero for an empty row, and expected[i] = inverse[i] Σ_t p[i,t] w[t]
  void (*moments)(const Real* p, Index rows, Index cols, const double* w, double* inverse,
                  double* expected);
  // out[i,t] = Σ_g x[g,i] (w[g,t] − e[g,i]); rows of x and e are `stride` apart.
  void (*outer)(Index rows, Index cols, Index groups, Index stride, const double* x,
                const double* e, const double* w, Real* out);
};

struct AdjointRoutines : ByPrecision<AdjointRowRoutines> {
  PackedElimination packed;
};

const AdjointRoutines& adjoint_routines();

}  // namespace birl
