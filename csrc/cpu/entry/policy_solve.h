// Linear systems with A = I − γP_π and its transpose.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

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
