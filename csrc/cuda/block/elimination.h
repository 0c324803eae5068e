// (D − N) X = B, or its transpose, by subtraction-free Gauss-Jordan elimination.
//
// D − N is an M-matrix given by its magnitudes N >= 0 and its row defects d = Σ_j a_ij >= 1 − γ.
// Step k removes state k: with the pivot d_k + Σ_{j>k} n_kj (Grassmann, Taksar & Heyman 1985)
//     l_i = n_ik / pivot,   n_ij += l_i n_kj  (j > k),   b_i += l_i b_k   for all i ≠ k,
//     d_i += l_i d_k  for i > k,
// and leaves x_i = b_i / pivot_i to whoever reads b next.
// Only sums and products of non-negative numbers occur in N and d, so both keep full relative
// accuracy however close γ is to one. Eliminating above the diagonal as well makes back
// substitution disappear: half as many barriers for one and a half times the arithmetic, and the
// barriers are what small systems wait for.
//
// The transposed system has the same censored chain: with `matrix` holding Nᵀ the update is the
// same, only the pivot's sum runs down a column and d takes its multiplier from a row.
//
// Work: a tile of threads owns (i, j), 16 columns wide. Every thread sums the pivot for itself:
// n/2 broadcast loads on average, cheaper than a second barrier. Memory: reads and writes about
// n³/2 numbers of the matrix. Invariant: every number is computed by one thread in a fixed order.
#pragma once

#include "cuda/layer/chained_sum.h"

namespace birl::device {

struct Elimination {
  int n;
  double* matrix;  // n², row by row: N, or Nᵀ if transposed; the diagonal is never read
  double* defect;
  double* pivot;  // n, written
};

template <class Team>
BIRL_DEVICE void eliminate(Team& team, const Elimination& system, bool transposed, int columns,
                           double* rhs) {
  const int n = system.n;
  double* const matrix = system.matrix;
  for (int k = 0; k < n; ++k) {
    team.phase([&](Thread t) {
      const double* const row = matrix + static_cast<Index>(k) * n;
      const double pivot = system.defect[k] + chained_sum(n - k - 1, [&](int j) {
                             return matrix[transposed ? static_cast<Index>(k + 1 + j) * n + k
                                                      : static_cast<Index>(k) * n + k + 1 + j];
                           });
      const double inverse = 1.0 / pivot;
      if (t.rank == 0) system.pivot[k] = pivot;
      for (int i = k + 1 + t.rank; i < n; i += t.count) {
        const double link = transposed ? row[i] : matrix[static_cast<Index>(i) * n + k];
        system.defect[i] += link * inverse * system.defect[k];
      }
      const int width = t.count < 16 ? t.count : 16, height = t.count / width;
      const int x = t.rank % width, y = t.rank / width;
      if (y >= height) return;
      for (int i = y; i < n; i += height) {
        if (i == k) continue;
        double* const target = matrix + static_cast<Index>(i) * n;
        const double multiplier = target[k] * inverse;
        for (int j = k + 1 + x; j < n; j += width) target[j] += multiplier * row[j];
        for (int c = x; c < columns; c += width) {
          double* const b = rhs + static_cast<Index>(c) * n;
          b[i] += multiplier * b[k];
        }
      }
    });
  }
}

}  // namespace birl::device
