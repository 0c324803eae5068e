// (I − γP_π) x = b or its transpose, for all right-hand sides of one problem (n, g), by one block:
// subtraction-free elimination (cpu/solvers/elimination.h), the residual from P again, one
// refinement.
//
// Work: N = γP_π is formed with a thread per entry, eliminated together with the K columns of b,
// and formed once more for the residual, which the elimination has overwritten. Bytes: P twice or
// three times (once from memory where it fits on chip), π once, b and x once. Floor: reading P and
// S barriers for each elimination.
// Invariants: where π sums to one up to rounding the row defects are exactly (1 − γ) + γ(mass that
// ends), so γ close to one costs no accuracy; bits do not depend on the block's size. A right-hand
// side that is not finite makes its own solution NaN and no other.
#pragma once

#include "core/system.h"
#include "cuda/block/elimination.h"
#include "cuda/block/rows.h"
#include "cuda/block/selection.h"

namespace birl::device {

template <class Home>
struct PolicySolveKernel {
  static constexpr int kTeamsPerProcessor = 2;

  Home home;
  Batch batch;
  PolicySolve request;
  Plan plan;

  struct Arrays {
    typename Home::Memory rows;
    double* matrix;       // (S, S) N, or Nᵀ if transposed
    double* weight;       // (S, A) γπ/σ
    double* inverse_sum;  // (S, A)
    double* defect;       // (S) Σ_j a_ij
    double* work;         // (S) the same, eliminated
    double* pivot;        // (S)
    double* correction;   // (K, S) residual, then what it adds to x
    double* middle;       // (K) constant taken off x in the residual, 0 unless it is an eigenvector
    int* wanting;         // (K) whether the column needs another correction
  };

  template <class Chip, class Spill>
  BIRL_HD Arrays lay_out(Chip& chip, Spill& spill) const {
    Arrays m{};
    m.rows = home.lay_out(chip, spill);
    const Index S = home.states;
    m.matrix =
        plan.spill_matrix ? spill.template take<double>(S * S) : chip.template take<double>(S * S);
    if (plan.spill_vectors)
      lay_out_vectors(spill, m);
    else
      lay_out_vectors(chip, m);
    return m;
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays& m, Index item) const {
    typename Home::template Local<Team> rows(home, team, m.rows, item / batch.problems);
    using Entries = typename Home::template Local<Team>::Entries;
    rows.load();
    team.phase([&](Thread t) {
      rows.each(t, [&](int row, const Entries& entries) {
        const double sum = entries.sum();
        m.inverse_sum[row] = inverse_row_sum(sum);
      });
    });
    const bool constants = weigh(team, m, item) && !request.transpose;
    // The first residual is b itself; after a correction the second says whether it was enough.
    for (int corrections = 0;; ++corrections) {
      if (constants) find_middles(team, m, item);
      rows.form(m.weight, MatrixView{m.matrix, home.states, request.transpose});
      residuals(team, m, item);
      if (!measure(team, m, item) || corrections == kCorrections) return;
      eliminate(team, Elimination{home.states, m.matrix, m.work, m.pivot}, request.transpose,
                static_cast<int>(request.right_sides), m.correction);
      correct(team, m, item);
    }
  }

 private:
  static constexpr int kCorrections = 3;

  BIRL_DEVICE Index columns() const { return request.right_sides * batch.states; }

  template <class Memory>
  BIRL_HD void lay_out_vectors(Memory& memory, Arrays& m) const {
    const Index S = home.states, rows = S * home.actions, K = request.right_sides;
    m.weight = memory.template take<double>(rows);
    m.inverse_sum = memory.template take<double>(rows);
    m.defect = memory.template take<double>(S);
    m.work = memory.template take<double>(S);
    m.pivot = memory.template take<double>(S);
    m.correction = memory.template take<double>(K * S);
    m.middle = memory.template take<double>(K);
    m.wanting = memory.template take<int>(K);
  }

  // γπ/σ and the row defects; x := 0. Whether every row defect is exactly 1 − γ.
  template <class Team>
  BIRL_DEVICE bool weigh(Team& team, const Arrays& m, Index item) const {
    const int S = home.states, A = home.actions;
    const double* const policy = request.policy + item * S * A;
    const double discount = batch.discount[item];
    return team.template reduce<int>(
               [&](Thread t) {
                 int all = 1;
                 for (int s = t.rank; s < S; s += t.count) {
                   RowMass mass;
                   for (int row = s * A; row < (s + 1) * A; ++row) {
                     mass.add(policy[row], m.inverse_sum[row]);
                     m.weight[row] = discount * (policy[row] * m.inverse_sum[row]);
                   }
                   m.defect[s] = mass.defect(discount, A);
                   all = all && mass.closed(A);
                 }
                 for (Index i = t.rank; i < columns(); i += t.count)
                   request.out[item * columns() + i] = 0.0;
                 for (int k = t.rank; k < request.right_sides; k += t.count) m.middle[k] = 0.0;
                 return all;
               },
               [](int x, int y) { return x && y ? 1 : 0; }) != 0;
  }

  // The middle of each column of x.
  template <class Team>
  BIRL_DEVICE void find_middles(Team& team, const Arrays& m, Index item) const {
    const int S = home.states;
    const double* const x = request.out + item * columns();
    team.phase([&](Thread t) {
      for (int k = t.rank; k < request.right_sides; k += t.count) {
        double low = kInf, high = -kInf;
        for (int s = 0; s < S; ++s) {
          low = smaller(low, x[static_cast<Index>(k) * S + s]);
          high = larger(high, x[static_cast<Index>(k) * S + s]);
        }
        m.middle[k] = is_finite(high - low) ? 0.5 * (low + high) : 0.0;
      }
    });
  }

  // correction := b − Ax. Where every row continues, A(α + z) = (1 − γ)α + Az is used as it stands,
  // so that a large constant α in x does not drown the rest.
  template <class Team>
  BIRL_DEVICE void residuals(Team& team, const Arrays& m, Index item) const {
    const int S = home.states;
    const double* const b = request.rhs + item * columns();
    const double* const x = request.out + item * columns();
    const double discount = batch.discount[item];
    team.phase([&](Thread t) {
      for (Index i = t.rank; i < columns(); i += t.count) {
        const Index k = i / S, s = i % S;
        const double* const column = x + k * S;
        const double middle = m.middle[k];
        const double* const row = m.matrix + s * S;
        const double product = chained_sum(S, [&](int j) { return row[j] * (column[j] - middle); });
        m.correction[i] = (b[i] - (1.0 - discount) * middle) - ((column[s] - middle) - product);
      }
      for (int s = t.rank; s < S; s += t.count) m.work[s] = m.defect[s];
    });
  }

  // Norms of the residuals, and whether any column needs a correction.
  template <class Team>
  BIRL_DEVICE bool measure(Team& team, const Arrays& m, Index item) const {
    const int S = home.states;
    const Index K = request.right_sides;
    const double* const b = request.rhs + item * columns();
    const double* const x = request.out + item * columns();
    return team.template reduce<int>(
               [&](Thread t) {
                 int any = 0;
                 for (int k = t.rank; k < K; k += t.count) {
                   const Index at = static_cast<Index>(k) * S;
                   const double left = norm(m.correction + at), size = norm(b + at);
                   request.residual[item * K + k] = left;
                   // NaN wants, and gets, NaN.
                   m.wanting[k] = !Tolerance(0.0, size, norm(x + at)).met(left);
                   any = any || m.wanting[k];
                 }
                 return any;
               },
               [](int x, int y) { return x || y ? 1 : 0; }) != 0;
  }

  BIRL_DEVICE double norm(const double* x) const {
    if (request.transpose) return chained_sum(home.states, [&](int i) { return magnitude(x[i]); });
    double largest = 0.0, sum = 0.0;  // the sum brings NaN along
    for (int i = 0; i < home.states; ++i) {
      largest = larger(largest, magnitude(x[i]));
      sum += x[i];
    }
    return sum == sum ? largest : sum;
  }

  template <class Team>
  BIRL_DEVICE void correct(Team& team, const Arrays& m, Index item) const {
    double* const x = request.out + item * columns();
    team.phase([&](Thread t) {
      for (Index i = t.rank; i < columns(); i += t.count)
        if (m.wanting[i / home.states]) x[i] += m.correction[i] / m.pivot[i % home.states];
    });
  }
};

}  // namespace birl::device
