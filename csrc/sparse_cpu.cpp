#include "sparse.h"

#include <algorithm>

namespace birl {

Index longest_row(const Index* crow, Index rows) {
  Index longest = 0;
  for (Index row = 0; row < rows; ++row) longest = std::max(longest, crow[row + 1] - crow[row]);
  return longest;
}

const char* csr_defect(const Index* crow, const Index* col, Index nnz, Index rows, Index cols) {
  if (crow[0] != 0) return "crow does not start at 0";
  for (Index row = 0; row < rows; ++row)
    if (crow[row + 1] < crow[row]) return "crow decreases";
  if (crow[rows] != nnz) return "crow does not end at the number of entries";
  for (Index k = 0; k < nnz; ++k)
    if (col[k] < 0 || col[k] >= cols) return "a column lies outside [0, S)";
  return nullptr;
}

PolicyPattern::PolicyPattern(const Index* p_crow, const Index* p_col, Index n, Index actions)
    : states(n), crow(n + 1, 0), slot(p_crow[n * actions]) {
  std::vector<Index> place(n, -1);  // column -> merged entry of the current state
  std::vector<Index> merged;
  for (Index s = 0; s < n; ++s) {
    const Index begin = p_crow[s * actions], end = p_crow[(s + 1) * actions];
    merged.clear();
    for (Index k = begin; k < end; ++k)
      if (place[p_col[k]] < crow[s]) {
        place[p_col[k]] = crow[s];
        merged.push_back(p_col[k]);
      }
    std::sort(merged.begin(), merged.end());
    for (std::size_t i = 0; i < merged.size(); ++i)
      place[merged[i]] = crow[s] + static_cast<Index>(i);
    for (Index k = begin; k < end; ++k) slot[k] = place[p_col[k]];
    col.insert(col.end(), merged.begin(), merged.end());
    crow[s + 1] = crow[s] + static_cast<Index>(merged.size());
  }

  transpose_crow.assign(n + 1, 0);
  for (const Index t : col) ++transpose_crow[t + 1];
  for (Index t = 0; t < n; ++t) transpose_crow[t + 1] += transpose_crow[t];
  transpose_col.resize(col.size());
  transpose_slot.resize(col.size());
  std::vector<Index> next(transpose_crow.begin(), transpose_crow.end() - 1);
  for (Index s = 0; s < n; ++s)
    for (Index k = crow[s]; k < crow[s + 1]; ++k) {
      const Index at = next[col[k]]++;
      transpose_col[at] = s;
      transpose_slot[at] = k;
    }
}

}  // namespace birl
