// The fixed point V* = TV*, to a certified tolerance.
#pragma once

#include "batch.h"
#include "parallel.h"

namespace birl {

struct Solve {
  const double* initial;   // (N,G,S) or null
  double* value;           // (N,G,S)
  double* q;               // (N,G,S,A)
  double* advantage;       // (N,G,S,A): q − value, from the relative form and so more exact
  double* policy;          // (N,G,S,A)
  double* log_policy;      // (N,G,S,A)
  double* offset;          // (N,G): a constant near the value
  double* info;            // (N,G,6): residual, error bound, passes over P, place, value, products
  Index* status;           // (N,G)
  Index method;            // 0 auto, 1 value iteration, 2 Newton direct, 3 Newton-Krylov, 4 MPI
  double tol;              // relative and certified; 0: as far as rounding allows
  Index max_iterations;    // passes over P; 0: enough for the contraction to reach rounding level
  Rigour validate;
  int threads;
};

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt);

}  // namespace birl
