// Linear systems with A = I − γP_π and its transpose.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

// Solves all N·G·K systems; returns how many missed both the tolerance and the rounding level.
Index policy_solve(const Batch& batch, const PolicySolve& request, Interrupt& interrupt);

}  // namespace birl
