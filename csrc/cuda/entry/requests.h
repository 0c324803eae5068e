// What is asked of each kernel besides the batch; device pointers.
#pragma once

#include "cuda/entry/batch.h"

namespace birl {

struct DeviceSolve {
  const double* initial;  // (N,G,S) or null
  double* value;          // (N,G,S)
  double* relative;       // (N,G,S): value − the constant kOffset of info
  void* q;                // (N,G,S,A), as the next three in the type of P and r
  void* advantage;
  void* policy;
  void* log_policy;
  double* info;          // (N,G,kInfo + S)
  Index* status;         // (N,G)
  Index method;          // 0 auto, 1 value iteration; 2, 3, 4 are Newton with an elimination
  double tol;            // relative and certified; 0: as far as rounding allows
  Index max_iterations;  // passes over P; 0: a default
  Rigour validate;
};

struct DevicePolicySolve {
  Index right_sides;     // K
  const double* policy;  // (N,G,S,A)
  const double* rhs;     // (N,G,K,S)
  double* out;           // (N,G,K,S)
  double* residual;      // (N,G,K): ‖b − Ax‖∞, or ‖b − Aᵀx‖₁ if transpose
  bool transpose;
  double tol;  // relative to ‖b‖; 0: as far as rounding allows
};

struct DeviceOuter {
  const double* weight;  // (N,G,S,A)
  const double* vector;  // (N,G,S)
  const double* shift;   // (N,S,A)
  void* out;             // as the transition
};

}  // namespace birl
