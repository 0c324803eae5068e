// The pattern of P_π = Σ_a π(a|s) P(·|s,a) and of its transpose on the device: sparse.h's
// PolicyPattern, built on the host once per pattern of P, with columns of 32 bits, because products
// with P_π read little else. crow null: there is none, and products read P itself.
#pragma once

#include "core/common.h"

namespace birl {

struct WidePattern {
  const Index* crow;        // (S + 1)
  const std::int32_t* col;  // (nnz)
  const Index* slot;        // entry k of P adds to entry slot[k]
  const Index* transpose_crow;
  const std::int32_t* transpose_col;
  const Index* transpose_slot;  // entry of P_π that the transposed entry is
  Index nnz;
};

}  // namespace birl
