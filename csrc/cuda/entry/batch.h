// What every launcher is given: N transitions with G problems each, device pointers.
#pragma once

#include "core/common.h"

namespace birl {

struct DeviceBatch {
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

}  // namespace birl
