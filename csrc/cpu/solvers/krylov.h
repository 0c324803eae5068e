// Krylov methods for A = I − γP_π, written against PolicyOperator.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/isa/dense.h"
#include "cpu/solvers/policy_operator.h"

namespace birl {

inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  return dense_routines().dot(static_cast<Index>(x.size()), x.data(), y.data());
}
inline double norm2(const std::vector<double>& x) { return std::sqrt(dot(x, x)); }

struct KrylovResult {
  double residual;  // 2-norm of b − Ax as the recursion has it; the caller measures afresh
  Index products;
};

// BiCGStab from x = 0 (van der Vorst 1992) on columns that share the products. A column
// stops at its target, or for good when its residual has grown a thousandfold; x is then the best
// of the iterates kept on the way, one for each halving of the residual.
template <class Operator>
void bicgstab(const Operator& op, const std::vector<double>& b, std::vector<double>& x,
              const Columns& target, Index limit, std::array<KrylovResult, kMostColumns>& results) {
  const ColumnVectors& vectors = Operator::vectors();
  const Index columns = op.columns();
  const std::size_t n = b.size();
  std::vector<double> r = b, shadow = b, p(n, 0.0), v(n, 0.0), s(n), t(n), best(n, 0.0);
  std::fill(x.begin(), x.end(), 0.0);
  Columns rho, alpha, omega, start, origin, kept, shadow_r = op.dots(b.data(), b.data()), beta{},
                                                  slope, tt;
  std::array<bool, kMostColumns> going{};
  for (Index w = 0; w < columns; ++w) {
    start[w] = origin[w] = kept[w] = std::sqrt(shadow_r[w]);
    rho[w] = alpha[w] = omega[w] = 1.0;
    results[w] = {start[w], 0};
    going[w] = start[w] > target[w];
  }
  const auto keep = [&](Index w, const std::vector<double>& from, std::vector<double>& to) {
    for (std::size_t i = static_cast<std::size_t>(w); i < n; i += columns) to[i] = from[i];
  };
  const auto any = [&] {
    return std::any_of(going.begin(), going.end(), [](bool g) { return g; });
  };
  // A column that has stopped goes on with steps of length zero.
  const auto stop = [&](Index w) {
    going[w] = false;
    alpha[w] = omega[w] = beta[w] = 0.0;
  };
  for (Index products = 0; any() && products < limit; products += 2) {
    for (Index w = 0; w < columns; ++w) {
      if (!going[w]) continue;
      const double now = results[w].residual;
      const bool broken = !(std::abs(shadow_r[w]) > 1e-14 * origin[w] * now);
      if (broken) {  // the shadow has become orthogonal: start afresh from here
        keep(w, r, shadow);
        origin[w] = now;
        shadow_r[w] = now * now;
      }
      beta[w] = broken ? 0.0 : (shadow_r[w] / rho[w]) * (alpha[w] / omega[w]);
      rho[w] = shadow_r[w];
    }
    const PerColumn each_beta(beta, columns), omega_before(omega, columns);
    op.sweep([&](Index, Index at, Index m) {
      vectors.direction(m, r.data() + at, each_beta.repeated, omega_before.repeated, v.data() + at,
                        p.data() + at);
    });
    op.apply(p.data(), v.data(), shadow.data(), slope, tt);
    for (Index w = 0; w < columns; ++w) {
      if (!going[w]) continue;
      if (slope[w] == 0.0 || !std::isfinite(slope[w])) {
        if (slope[w] != 0.0) results[w].residual = slope[w] - slope[w];  // x is lost
        stop(w);
      } else {
        alpha[w] = rho[w] / slope[w];
      }
    }
    const PerColumn each_alpha(alpha, columns);
    op.sweep([&](Index, Index at, Index m) {
      vectors.subtract(m, r.data() + at, each_alpha.repeated, v.data() + at, s.data() + at);
    });
    op.apply(s.data(), t.data(), s.data(), slope, tt);
    for (Index w = 0; w < columns; ++w)
      if (going[w]) omega[w] = tt[w] > 0.0 ? slope[w] / tt[w] : 0.0;
    const PerColumn each_omega(omega, columns);
    ChunkSums<2> sums(op.sweep_chunks());
    op.sweep([&](Index c, Index at, Index m) {
      vectors.advance(m, each_alpha.repeated, p.data() + at, each_omega.repeated, s.data() + at,
                      t.data() + at, x.data() + at, r.data() + at, shadow.data() + at, sums.of(c));
    });
    shadow_r = sums.total(columns, 0);
    const Columns square = sums.total(columns, 1);
    for (Index w = 0; w < columns; ++w) {
      if (!going[w]) continue;
      const double now = std::sqrt(square[w]);
      results[w] = {now, products + 2};
      if (now <= 0.5 * kept[w]) {
        kept[w] = now;
        keep(w, x, best);
      }
      if (!(now > target[w]) || omega[w] == 0.0 || !(now < 1e3 * start[w])) stop(w);
    }
  }
  for (Index w = 0; w < columns; ++w)
    if (!(results[w].residual <= kept[w])) {
      keep(w, best, x);
      results[w].residual = kept[w];
    }
}

// The same for one column.
template <class Operator>
KrylovResult bicgstab(const Operator& op, const std::vector<double>& b, std::vector<double>& x,
                      double target, Index limit) {
  std::array<KrylovResult, kMostColumns> results{};
  bicgstab(op, b, x, Columns{target}, limit, results);
  return results[0];
}

// Restarted GMRES from x as given, whose residual is `r` (Saad & Schultz 1986, modified
// Gram-Schmidt, Givens rotations). Its residual never grows.
template <class Apply>
KrylovResult gmres(Apply&& apply, std::vector<double> r, std::vector<double>& x, double target,
                   Index limit, int restart = 40) {
  const std::size_t n = r.size();
  std::vector<std::vector<double>> basis(restart + 1);
  std::vector<double> h(restart * restart), cosine(restart), sine(restart), g(restart + 1);
  std::vector<double> y(restart), step(n), image(n);
  KrylovResult result{norm2(r), 0};
  while (result.residual > target && result.products < limit) {
    const double before = result.residual;
    basis[0] = r;
    for (double& e : basis[0]) e /= before;
    std::fill(g.begin(), g.end(), 0.0);
    g[0] = before;
    int k = 0;
    while (k < restart && result.products < limit && std::abs(g[k]) > target) {
      basis[k + 1].resize(n);
      apply(basis[k], basis[k + 1]);
      ++result.products;
      for (int i = 0; i <= k; ++i) {
        const double projection = dot(basis[i], basis[k + 1]);
        h[i * restart + k] = projection;
        for (std::size_t j = 0; j < n; ++j) basis[k + 1][j] -= projection * basis[i][j];
      }
      const double length = norm2(basis[k + 1]);
      if (length > 0.0)
        for (double& e : basis[k + 1]) e /= length;
      for (int i = 0; i < k; ++i) {
        const double upper = h[i * restart + k], lower = h[(i + 1) * restart + k];
        h[i * restart + k] = cosine[i] * upper + sine[i] * lower;
        h[(i + 1) * restart + k] = cosine[i] * lower - sine[i] * upper;
      }
      const double diagonal = h[k * restart + k], radius = std::hypot(diagonal, length);
      if (!(radius > 0.0) || !std::isfinite(radius)) break;
      cosine[k] = diagonal / radius;
      sine[k] = length / radius;
      h[k * restart + k] = radius;
      g[k + 1] = -sine[k] * g[k];
      g[k] *= cosine[k];
      ++k;
      if (length == 0.0) break;
    }
    for (int i = k - 1; i >= 0; --i) {
      double rest = g[i];
      for (int j = i + 1; j < k; ++j) rest -= h[i * restart + j] * y[j];
      y[i] = rest / h[i * restart + i];
    }
    std::fill(step.begin(), step.end(), 0.0);
    for (int i = 0; i < k; ++i)
      for (std::size_t j = 0; j < n; ++j) step[j] += y[i] * basis[i][j];
    apply(step, image);
    ++result.products;
    for (std::size_t j = 0; j < n; ++j) {
      x[j] += step[j];
      r[j] -= image[j];
    }
    result.residual = norm2(r);
    if (!(result.residual < 0.99 * before)) break;  // stagnated: more of the same will not help
  }
  return result;
}

}  // namespace birl
