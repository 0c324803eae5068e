// Linear systems with A = I − γP_π and its transpose.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

struct PolicySolve {
  Index right_sides;     // K
  const double* policy;  // (N,G,S,A)
  const double* rhs;     // (N,G,K,S)
  double* out;           // (N,G,K,S)
  double* residual;      // (N,G,K): ‖b − Ax‖, max norm, or 1-norm if transpose
  bool transpose;
  Index method;          // 0 auto, 2 direct, 3 Krylov, 5 Richardson with exact mass
  double tol;            // relative to ‖b‖; 0: as far as rounding allows
  Index max_iterations;  // products with P_π per right-hand side; 0: a default
  int threads;
};

// Solves all N·G·K systems; returns how many missed both the tolerance and the rounding level.
Index policy_solve(const Batch& batch, const PolicySolve& request, Interrupt& interrupt);

// 1/σ for every row, zero for a row without continuation.
template <class Model>
void inverse_row_sums(const Model& model, double* inverse) {
  const Index rows = model.states * model.actions;
  std::vector<double> least(rows);
  model.row_sums(0, rows, inverse, least.data());
  for (Index i = 0; i < rows; ++i) inverse[i] = inverse_row_sum(inverse[i]);
}

}  // namespace birl
