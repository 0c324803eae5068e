// The fixed point V* = TV*, to a certified tolerance.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

struct Solve {
  const double* initial;  // (N,G,S) or null
  double* value;          // (N,G,S)
  double* relative;       // (N,G,S): value − the constant kOffset of info, to full digits; or null
  void* q;                // (N,G,S,A), as the next three in the type of P and r
  void* advantage;        // q − value, from the relative form and so more exact
  void* policy;
  void* log_policy;
  double* info;          // (N,G,kInfo + S), see core/common.h
  Index* status;         // (N,G)
  Index method;          // 0 auto, 1 value iteration, 2 Newton direct, 3 Newton-Krylov, 4 MPI
  double tol;            // relative and certified; 0: as far as rounding allows
  Index max_iterations;  // passes over P; 0: enough for the contraction to reach rounding level
  Rigour validate;
  int threads;
};

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt);

}  // namespace birl
