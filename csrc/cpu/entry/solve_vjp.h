// Derivatives of a solution by the implicit function theorem, (M10) to (M12), in one call.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

// Tables (N,G,S,A) are in the type of P and r, everything else is double. A cotangent that is null
// is zero; a derivative that is null is not wanted.
struct SolveVjp {
  const double* relative;  // (N,G,S): V without the constant kOffset of info
  const void* advantage;
  const void* policy;
  const double* info;       // (N,G,kInfo + S)
  const Index* status;      // (N,G); where it is not zero, derivatives are NaN
  const double* value_bar;  // (N,G,S)
  const void* q_bar;
  const void* advantage_bar;
  const void* policy_bar;
  const void* log_policy_bar;
  void* transition_bar;       // as P: (N,S,A,S), or (N,nnz) on its pattern
  void* reward_bar;           // (N,G,S,A)
  double* log_reference_bar;  // (N,G,S,A)
  double* discount_bar;       // (N,G)
  double* temperature_bar;    // (N,G)
  int threads;
};

struct Conditioning {
  double condition = 0.0;  // the largest of the systems solved by elimination, see Elimination
  Index problem = 0;       // whose it is
};

// Where 1 − γ is not tiny no condition can be large, and none is looked for.
Conditioning solve_vjp(const Batch& batch, const SolveVjp& request, Interrupt& interrupt);

}  // namespace birl
