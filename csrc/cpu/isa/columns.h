// Inner loops on interleaved columns (cpu/isa/isa.h).
//
// 1, 4 or 8 vectors lie interleaved, [state][column], so that one reading of a matrix serves them
// all. The loops on vectors see one flat array: `n` counts its numbers, and a coefficient per
// column is given as kColumnLanes numbers, repeated with the period of the columns. They start at a
// multiple of kColumnLanes. Sums and largest magnitudes come per lane too: the caller folds.
#pragma once

#include "core/common.h"

namespace birl {

constexpr int kColumnLanes = 16;
constexpr Index kMostColumns = 8;

// Norms, per lane.
struct ColumnNorms {
  double sum[kColumnLanes];      // Σ |x|
  double largest[kColumnLanes];  // max |x|; what is not a number shows in the sum
};

struct ColumnVectors {
  // y := γ y, sum += y
  void (*accumulate)(Index n, double discount, double* y, double* sum);
  // r := (b − constant) − (x − γ r), and its norms
  void (*residual)(Index n, const double* b, const double* constant, double discount,
                   const double* x, double* r, ColumnNorms* norms);
  void (*norms)(Index n, const double* x, ColumnNorms* norms);
  // y := x − γ y, sum = Σ y
  void (*defect)(Index n, double discount, const double* x, double* y, double* sum);
  // y := y − mean; products = Σ y u and Σ y y
  void (*centre)(Index n, const double* mean, double* y, const double* u, double* products);
  // p := r + β (p − ω v)
  void (*direction)(Index n, const double* r, const double* beta, const double* omega,
                    const double* v, double* p);
  // s := r − α v
  void (*subtract)(Index n, const double* r, const double* alpha, const double* v, double* s);
  // x += α p + ω s; r := s − ω t; products = Σ r u and Σ r r
  void (*advance)(Index n, const double* alpha, const double* p, const double* omega,
                  const double* s, const double* t, double* x, double* r, const double* u,
                  double* products);
  // x += α y
  void (*add)(Index n, const double* alpha, const double* y, double* x);
  // low and high of x, per lane
  void (*range)(Index n, const double* x, double* low, double* high);
};

// Products of a dense matrix with columns, and triangular solves with eliminated factors.
struct ColumnDense {
  // y[i] = Σ_t p[i,t] x[t] for rows [0, rows) of `cols` columns
  void (*rows)(const double* p, Index rows, Index cols, const double* x, double* y);
  // y[t] = Σ_s p[s,t] x[s] for columns [0, cols) of `rows` rows, `stride` apart
  void (*columns)(const double* p, Index stride, Index rows, Index cols, const double* x,
                  double* y);
  // As EliminationRoutines::solve and solve_transpose.
  void (*solve)(const double* a, Index n, Index stride, const double* inverse_pivot, double* x);
  void (*solve_transpose)(const double* a, Index n, Index stride, const double* inverse_pivot,
                          double* x);
};

struct ColumnRoutines {
  ColumnVectors vectors;
  ColumnDense four, eight;

  const ColumnDense& dense(Index columns) const { return columns == 4 ? four : eight; }
};

const ColumnRoutines& column_routines();

}  // namespace birl
