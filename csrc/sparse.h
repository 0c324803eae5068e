// CSR patterns: checks, and the pattern of a policy's transition matrix.
#pragma once

#include <vector>

#include "core/common.h"

namespace birl {

Index longest_row(const Index* crow, Index rows);

// Null if crow and col form a CSR pattern of `rows` rows and `nnz` entries with columns in
// [0, cols), else what is wrong.
const char* csr_defect(const Index* crow, const Index* col, Index nnz, Index rows, Index cols);

// Pattern of P_π = Σ_a π(a|s) P(·|s,a): for each state the union of its actions' successors, the
// same for every policy and every transition of a batch. The transposed pattern makes products with
// P_πᵀ gathers too, so that they can be shared among threads and come out the same every time.
struct PolicyPattern {
  Index states = 0;
  std::vector<Index> crow, col;       // merged rows, columns ascending
  std::vector<Index> slot;            // entry k of P adds to merged entry slot[k]
  std::vector<Index> transpose_crow;  // column t of P_π as a row
  std::vector<Index> transpose_col;
  std::vector<Index> transpose_slot;  // its entries' places in the merged values

  PolicyPattern(const Index* crow, const Index* col, Index states, Index actions);
};

}  // namespace birl
