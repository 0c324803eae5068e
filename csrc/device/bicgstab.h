// BiCGStab (van der Vorst 1992) for y = (I − γP_π)x or its transpose, all right-hand sides at once,
// by a team of several blocks. With `deflate` the operator is compressed to vectors of mean zero,
// implicitly: v stands for v − mean v wherever it is used, which costs nothing.
//
// Every column has scalars of its own and stops for itself; a column that stopped changes no more,
// so its bits do not depend on its neighbours. An iteration is two products and two updates, a
// barrier of the team after each; the sums in between are computed by every block for itself from
// all states where these are few (kReplicated), which is faster than a barrier, or from partial
// sums over pieces with one barrier more. Either way one order of additions (Pieces).
#pragma once

#include "device/column_totals.h"
#include "device/solve_control.h"

namespace birl::device {

// Vectors (S, K) and scalars of the linear solves of one team.
struct KrylovVectors {
  double *x, *r, *shadow, *p, *v, *s, *t;
  double* partial;  // (kMostSums, K, pieces)
};

// One column's scalars, the same in every block.
struct KrylovColumn {
  double start, target, residual;
  double rho, alpha, beta, omega, mean_v, mean_t;
  Index products;
  int active;
};

// Ends above where it started, or nowhere.
BIRL_DEVICE bool no_better(const KrylovColumn& column) {
  return !(column.residual <= column.start);
}

// x ≈ A⁻¹ r from x = 0. On entry m.r holds the right-hand side (of mean zero if `deflate`) and is
// of size start = ‖r‖₂, target and active are set in each block's columns, and nothing else is.
// apply(block, in, out) computes out = A in for the block's own states.
// A column whose residual ends above where it started gets x = 0.
template <class Team, class Apply>
BIRL_STAGE void bicgstab(Team& team, Index states, Index K, bool deflate, Index limit,
                         const KrylovVectors& m, Apply&& apply) {
  using Block = typename Team::Block;
  const Index total = states * K;
  const double n = static_cast<double>(states);
  const auto any_active = [&] {
    return team.decide([&](Block& block) {
      int any = 0;
      for (Index k = 0; k < K; ++k) any = any || block.chip.columns[k].active;
      return any;
    });
  };

  team.step([&](Block& block) {
    block.spread([&](Index first, Index stride) {
      for (Index i = first; i < total; i += stride) {
        m.x[i] = 0.0;
        m.shadow[i] = m.p[i] = m.r[i];
      }
    });
    block.phase([&](Thread t) {
      for (Index k = t.rank; k < K; k += t.count) {
        KrylovColumn& column = block.chip.columns[k];
        column.residual = column.start;
        column.rho = column.start * column.start;
        column.products = 0;
        column.active = column.active && column.start > column.target;
      }
    });
  });
  while (any_active()) {
    apply(m.p, m.v);
    column_totals<Sum, 2>(
        team, states, K, m.partial,
        [&](Block&, Index s, Index k, double (&part)[2]) {
          const double v = m.v[s * K + k];
          part[0] += v;
          part[1] += m.shadow[s * K + k] * v;
        },
        [&](Block& block, Index k, const double (&sum)[2]) {
          KrylovColumn& column = block.chip.columns[k];
          if (!column.active) return;
          column.mean_v = deflate ? sum[0] / n : 0.0;
          column.alpha = column.rho / sum[1];
          if (sum[1] == 0.0 || !is_finite(column.alpha)) column.active = 0;
        });
    team.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index i = first; i < total; i += stride) {
          const KrylovColumn& column = block.chip.columns[i % K];
          if (column.active) m.s[i] = m.r[i] - column.alpha * (m.v[i] - column.mean_v);
        }
      });
    });
    apply(m.s, m.t);
    column_totals<Sum, 5>(
        team, states, K, m.partial,
        [&](Block&, Index s, Index k, double (&part)[5]) {
          const Index i = s * K + k;
          const double t = m.t[i];
          part[0] += t;
          part[1] += t * m.s[i];
          part[2] += t * t;
          part[3] += m.shadow[i] * t;
          part[4] += m.shadow[i] * m.s[i];
        },
        [&](Block& block, Index k, const double (&sum)[5]) {
          KrylovColumn& column = block.chip.columns[k];
          if (!column.active) return;
          column.products += 2;
          column.mean_t = deflate ? sum[0] / n : 0.0;
          const double tt = sum[2] - n * column.mean_t * column.mean_t;
          column.omega = tt > 0.0 ? sum[1] / tt : 0.0;
          const double rho = sum[4] - column.omega * sum[3];
          column.beta = rho / column.rho * (column.alpha / column.omega);
          column.rho = rho;
        });
    team.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index i = first; i < total; i += stride) {
          const KrylovColumn& column = block.chip.columns[i % K];
          if (!column.active) continue;
          const double p = m.p[i], s = m.s[i];
          m.x[i] += column.alpha * p + column.omega * s;
          const double r = s - column.omega * (m.t[i] - column.mean_t);
          m.r[i] = r;
          m.p[i] = r + column.beta * (p - column.omega * (m.v[i] - column.mean_v));
        }
      });
    });
    column_totals<Sum, 1>(
        team, states, K, m.partial,
        [&](Block&, Index s, Index k, double (&part)[1]) {
          part[0] += m.r[s * K + k] * m.r[s * K + k];
        },
        [&](Block& block, Index k, const double (&sum)[1]) {
          KrylovColumn& column = block.chip.columns[k];
          if (!column.active) return;
          column.residual = __builtin_sqrt(sum[0]);
          const bool breakdown =
              column.omega == 0.0 ||
              !(magnitude(column.rho) > 1e-14 * column.start * column.residual) ||
              !(column.residual < 1e3 * column.start);
          column.active = !breakdown && column.residual > column.target && column.products < limit;
        });
  }
  const int worse = team.decide([&](Block& block) {
    int any = 0;
    for (Index k = 0; k < K; ++k) any = any || no_better(block.chip.columns[k]);
    return any;
  });
  if (!worse) return;
  team.step([&](Block& block) {
    block.spread([&](Index first, Index stride) {
      for (Index i = first; i < total; i += stride)
        if (no_better(block.chip.columns[i % K])) m.x[i] = 0.0;
    });
  });
}

}  // namespace birl::device
