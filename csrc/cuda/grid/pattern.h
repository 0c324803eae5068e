// The pattern of a sparse P_π = Σ_a π(a|s) P(·|s,a), or of its transpose: for each row the union of
// what adds to it, the same for every policy. Columns have 32 bits, because products with P_π read
// little else.
#pragma once

#include "core/common.h"

namespace birl {

struct GridPattern {
  const Index* crow;        // (S + 1)
  const std::int32_t* col;  // (count)
  const Index* slot;        // (nnz) entry k of P adds to entry slot[k]
  Index count;              // of entries, or any number above it
};

}  // namespace birl
