// What is asked of an operation, once for every device: N transitions with G problems each, and
// what to write where. Pointers are the device's.
#pragma once

#include "core/common.h"

namespace birl {

struct Batch {
  bool is_double;                                // storage type of P and r
  Index transitions, problems, states, actions;  // N, G, S, A
  const void* transition;                        // (N,S,A,S), or (N,nnz) when crow is given
  const Index* crow;                             // (S·A + 1)
  const Index* col;                              // (nnz)
  Index nnz;
  const void* reward;           // (N,G,S,A)
  const double* log_reference;  // (N,G,S,A) or null
  const double* discount;       // (N,G)
  const double* temperature;    // (N,G)

  bool sparse() const { return crow != nullptr; }
  Index total() const { return transitions * problems; }
};

constexpr Index kSweep = 5;  // a method: T of the start as it is, in one pass

struct Solve {
  const double* initial;  // (N,G,S) or null
  double* value;          // (N,G,S)
  double* relative;       // (N,G,S): value − the constant kOffset of info, to full digits; or null
  void* q;                // (N,G,S,A), as the next three in the type of P and r
  void* advantage;        // q − value, from the relative form and so more exact
  void* policy;
  void* log_policy;
  double* info;   // (N,G,kInfo + S), see core/common.h
  Index* status;  // (N,G)
  Index method;   // 0 auto, 1 value iteration, 2 Newton direct, 3 Newton-Krylov, 4 MPI; on a GPU
                  // 2, 3 and 4 are Newton with an elimination
  double tol;     // relative and certified; 0: as far as rounding allows
  Index max_iterations;  // passes over P; 0: enough for the contraction to reach rounding level
  Rigour validate;
  int threads = 1;  // of a CPU
};

struct PolicySolve {
  Index right_sides;     // K
  const double* policy;  // (N,G,S,A)
  const double* rhs;     // (N,G,K,S)
  double* out;           // (N,G,K,S)
  double* residual;      // (N,G,K): ‖b − Ax‖∞, or ‖b − Aᵀx‖₁ if transpose
  bool transpose;
  double tol;  // relative to ‖b‖; 0: as far as rounding allows
  // Of a CPU:
  Index method = 0;          // 0 auto, 2 direct, 3 Krylov, 5 Richardson with exact mass
  Index max_iterations = 0;  // products with P_π per right-hand side; 0: a default
  int threads = 1;
};

struct Outer {
  const double* weight;  // (N,G,S,A)
  const double* vector;  // (N,G,S)
  const double* shift;   // (N,S,A)
  void* out;             // as the transition
};

}  // namespace birl
