// CSR patterns: checks, and the pattern of a policy's transition matrix.
#pragma once

#include <memory>
#include <vector>

#include "cpu/isa/sparse.h"
#include "cpu/support/parallel.h"

namespace birl {

Index longest_row(const Index* crow, Index rows);

// Null if crow and col form a CSR pattern of `rows` rows and `nnz` entries with columns in
// [0, cols), else what is wrong.
const char* csr_defect(const Index* crow, const Index* col, Index nnz, Index rows, Index cols);

// Where the entries of a sparse matrix stand in the form SlicedMatrix. On grids and chains
// neighbouring states have neighbouring successors: eight rows abreast then need neither gathers
// nor column numbers.
class SlicedLayout {
 public:
  SlicedLayout(Index rows, const Index* crow, const std::int32_t* col, Team& team);

  Index entries() const { return start_.back() * kSlice; }
  Index slices() const { return static_cast<Index>(ragged_.size()); }
  // Entry `index` of a row.
  Index place(Index row, Index index) const;
  SlicedMatrix with(const double* value) const {
    return {rows_, start_.data(), ragged_.data(), ends_.data(), first_.get(), col_.get(), value};
  }

  static constexpr Index kSlice = 8;

 private:
  void fill(Index slice, const Index* crow, const std::int32_t* col);

  Index rows_;
  std::vector<Index> start_, ends_;
  std::vector<std::int32_t> ragged_;
  std::unique_ptr<std::int32_t[]> first_, col_;
};

// Pattern of P_π = Σ_a π(a|s) P(·|s,a), or of its transpose: for each state the union of its
// actions' successors, the same for every policy and every transition of a batch. Products with the
// transpose are gathers too, shared among threads and the same every time.
class PolicyPattern {
 public:
  PolicyPattern(const Index* crow, const Index* col, Index states, Index actions, bool transpose,
                Team& team);

  Index states() const { return states_; }
  bool transposed() const { return transposed_; }
  Index count() const { return merged_crow_.back(); }
  const SlicedLayout& layout() const { return *layout_; }
  const PolicyRows& rows() const { return rows_; }

 private:
  void merge(const Index* col, Team& team);
  void lay_out(Team& team);

  Index states_, actions_;
  bool transposed_;
  const Index* crow_;               // of P, the caller's
  std::vector<Index> merged_crow_;  // rows of P_π, columns ascending
  std::unique_ptr<std::int32_t[]> col_;
  std::unique_ptr<std::uint32_t[]> slot_;
  std::unique_ptr<unsigned char[]> alike_;
  std::unique_ptr<Index[]> place_;
  std::unique_ptr<SlicedLayout> layout_;
  PolicyRows rows_;
};

}  // namespace birl
