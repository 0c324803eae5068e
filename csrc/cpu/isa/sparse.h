// Inner loops on sparse matrices (cpu/isa/isa.h).
#pragma once

#include "core/common.h"
#include "cpu/isa/by_precision.h"

namespace birl {

// A sparse matrix in slices of eight rows (SlicedLayout in cpu/model/sparse_pattern.h). Its entries
// stand in groups of eight: one of each row of a slice, or in a slice whose rows differ much in
// length, eight of one row.
struct SlicedMatrix {
  Index rows;
  const Index* start;          // of slice i: its first group; one more than there are slices
  const std::int32_t* ragged;  // of slice i: −1, or which one it is of those kept row by row
  const Index* ends;           // eight for each of those: the groups at which its rows end
  const std::int32_t* first;   // of a group: the column of its first entry if the others follow it
                               // one by one, else −1
  const std::int32_t* col;     // of an entry; any column if it only fills up a group
  const double* value;         // of an entry; zero there
};

// Where the rows of P and those of P_π find each other.
struct PolicyRows {
  Index actions;
  const Index* crow;           // of P, S·A + 1
  const Index* merged_crow;    // of P_π, S + 1
  const std::int32_t* col;     // of P_π
  const std::uint32_t* slot;   // of an entry of P: its place in the row of P_π; of the first
                               // action's entries only where the actions are alike
  const unsigned char* alike;  // of a state: its actions have the same successors in the same order
  const Index* place;          // of a merged entry: its place in the sliced matrix
};

template <class Real>
struct SparseRowRoutines {
  // y[i] = Σ_t P(i,t) x[t] for the rows i of states [s0, s1)
  void (*products)(const PolicyRows& rows, const Real* value, Index s0, Index s1, const double* x,
                   double* y);
  // Rows of P_π for states [s0, s1), into the places of a sliced matrix's values.
  void (*form)(const PolicyRows& rows, const Real* value, Index s0, Index s1, const double* weight,
               double* out);
};

struct SparseRoutines : ByPrecision<SparseRowRoutines> {
  using Multiply = void (*)(const SlicedMatrix& matrix, Index slice0, Index slice1, const double* x,
                            double* y);
  // y = Mx for the rows of slices [slice0, slice1); x and y hold 1, 4 or 8 columns interleaved
  Multiply one, four, eight;

  Multiply multiply(Index columns) const {
    return columns == 1 ? one : (columns == 4 ? four : eight);
  }
};

const SparseRoutines& sparse_routines();

}  // namespace birl
