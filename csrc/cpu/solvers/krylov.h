// Krylov methods for A = I − γP_π, written against PolicyOperator.
#pragma once

#include <algorithm>
#include <array>
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

using KrylovResults = std::array<KrylovResult, kMostColumns>;

// BiCGStab from x = 0 (van der Vorst 1992) on columns that share the products. A column
// stops at its target, or for good when its residual has grown a thousandfold; x is then the best
// of the iterates kept on the way, one for each halving of the residual.
template <class Operator>
class BiCgStab {
 public:
  BiCgStab(const Operator& op, const std::vector<double>& b, std::vector<double>& x,
           const Columns& target, KrylovResults& results)
      : op_(op),
        columns_(op.columns()),
        target_(target),
        results_(results),
        x_(x),
        r_(b),
        shadow_(b),
        p_(b.size(), 0.0),
        v_(b.size(), 0.0),
        s_(b.size()),
        t_(b.size()),
        best_(b.size(), 0.0),
        shadow_r_(op.dots(b.data(), b.data())) {
    std::fill(x.begin(), x.end(), 0.0);
    for (Index w = 0; w < columns_; ++w) {
      start_[w] = origin_[w] = kept_[w] = std::sqrt(shadow_r_[w]);
      rho_[w] = alpha_[w] = omega_[w] = 1.0;
      results[w] = {start_[w], 0};
      going_[w] = start_[w] > target[w];
    }
  }

  void run(Index limit) {
    for (Index products = 0; any() && products < limit; products += 2) {
      turn();
      measure_slope();
      stabilise();
      advance(products + 2);
    }
    for (Index w = 0; w < columns_; ++w)
      if (!(results_[w].residual <= kept_[w])) {
        copy_column(w, columns_, best_, x_);
        results_[w].residual = kept_[w];
      }
  }

 private:
  static const ColumnVectors& vectors() { return Operator::vectors(); }
  bool any() const {
    return std::any_of(going_.begin(), going_.end(), [](bool g) { return g; });
  }

  // A column that has stopped goes on with steps of length zero.
  void stop(Index w) {
    going_[w] = false;
    alpha_[w] = omega_[w] = beta_[w] = 0.0;
  }

  // p = r + β (p − ω v)
  void turn() {
    for (Index w = 0; w < columns_; ++w) {
      if (!going_[w]) continue;
      const double now = results_[w].residual;
      const bool broken = !(std::abs(shadow_r_[w]) > 1e-14 * origin_[w] * now);
      if (broken) {  // the shadow has become orthogonal: start afresh from here
        copy_column(w, columns_, r_, shadow_);
        origin_[w] = now;
        shadow_r_[w] = now * now;
      }
      beta_[w] = broken ? 0.0 : (shadow_r_[w] / rho_[w]) * (alpha_[w] / omega_[w]);
      rho_[w] = shadow_r_[w];
    }
    const PerColumn beta(beta_, columns_), omega(omega_, columns_);
    op_.sweep([&](Index, Index at, Index m) {
      vectors().direction(m, r_.data() + at, beta.repeated, omega.repeated, v_.data() + at,
                          p_.data() + at);
    });
  }

  // v = Ap and α
  void measure_slope() {
    Columns slope, square;
    op_.apply(p_.data(), v_.data(), shadow_.data(), slope, square);
    for (Index w = 0; w < columns_; ++w) {
      if (!going_[w]) continue;
      if (slope[w] == 0.0 || !std::isfinite(slope[w])) {
        if (slope[w] != 0.0) results_[w].residual = slope[w] - slope[w];  // x is lost
        stop(w);
      } else {
        alpha_[w] = rho_[w] / slope[w];
      }
    }
  }

  // s = r − α v, t = As and ω
  void stabilise() {
    const PerColumn alpha(alpha_, columns_);
    op_.sweep([&](Index, Index at, Index m) {
      vectors().subtract(m, r_.data() + at, alpha.repeated, v_.data() + at, s_.data() + at);
    });
    Columns slope, square;
    op_.apply(s_.data(), t_.data(), s_.data(), slope, square);
    for (Index w = 0; w < columns_; ++w)
      if (going_[w]) omega_[w] = square[w] > 0.0 ? slope[w] / square[w] : 0.0;
  }

  // x += α p + ω s, r = s − ω t
  void advance(Index products) {
    const PerColumn alpha(alpha_, columns_), omega(omega_, columns_);
    ChunkSums<2> sums(op_.sweep_chunks());
    op_.sweep([&](Index c, Index at, Index m) {
      vectors().advance(m, alpha.repeated, p_.data() + at, omega.repeated, s_.data() + at,
                        t_.data() + at, x_.data() + at, r_.data() + at, shadow_.data() + at,
                        sums.of(c));
    });
    shadow_r_ = sums.total(columns_, 0);
    const Columns square = sums.total(columns_, 1);
    for (Index w = 0; w < columns_; ++w) {
      if (!going_[w]) continue;
      const double now = std::sqrt(square[w]);
      results_[w] = {now, products};
      if (now <= 0.5 * kept_[w]) {
        kept_[w] = now;
        copy_column(w, columns_, x_, best_);
      }
      if (!(now > target_[w]) || omega_[w] == 0.0 || !(now < 1e3 * start_[w])) stop(w);
    }
  }

  const Operator& op_;
  const Index columns_;
  const Columns& target_;
  KrylovResults& results_;
  std::vector<double>& x_;
  std::vector<double> r_, shadow_, p_, v_, s_, t_, best_;
  Columns shadow_r_, rho_{}, alpha_{}, omega_{}, beta_{};
  Columns start_{}, origin_{}, kept_{};  // ‖r‖ at first, of the shadow, and of the best x
  std::array<bool, kMostColumns> going_{};
};

// Least squares with the Hessenberg matrix of an Arnoldi process, column by column, by Givens
// rotations.
class HessenbergFit {
 public:
  explicit HessenbergFit(int most)
      : most_(most), h_(most * most), cosine_(most), sine_(most), g_(most + 1), y_(most) {}

  void start(double size) {
    std::fill(g_.begin(), g_.end(), 0.0);
    g_[0] = size;
  }
  double& at(int row, int column) { return h_[row * most_ + column]; }
  double residual(int columns) const { return std::abs(g_[columns]); }

  // Takes column k, below whose diagonal `length` stands; false where that leaves nothing.
  bool take(int k, double length) {
    for (int i = 0; i < k; ++i) {
      const double upper = at(i, k), lower = at(i + 1, k);
      at(i, k) = cosine_[i] * upper + sine_[i] * lower;
      at(i + 1, k) = cosine_[i] * lower - sine_[i] * upper;
    }
    const double diagonal = at(k, k), radius = std::hypot(diagonal, length);
    if (!(radius > 0.0) || !std::isfinite(radius)) return false;
    cosine_[k] = diagonal / radius;
    sine_[k] = length / radius;
    at(k, k) = radius;
    g_[k + 1] = -sine_[k] * g_[k];
    g_[k] *= cosine_[k];
    return true;
  }

  // The weights of the first k vectors.
  const std::vector<double>& solve(int k) {
    for (int i = k - 1; i >= 0; --i) {
      double rest = g_[i];
      for (int j = i + 1; j < k; ++j) rest -= at(i, j) * y_[j];
      y_[i] = rest / at(i, i);
    }
    return y_;
  }

 private:
  int most_;
  std::vector<double> h_, cosine_, sine_, g_, y_;
};

// Restarted GMRES from x as given, whose residual is `r` (Saad & Schultz 1986, modified
// Gram-Schmidt). Its residual never grows.
template <class Apply>
KrylovResult gmres(Apply&& apply, std::vector<double> r, std::vector<double>& x, double target,
                   Index limit, int restart = 40) {
  const std::size_t n = r.size();
  std::vector<std::vector<double>> basis(restart + 1);
  HessenbergFit fit(restart);
  std::vector<double> step(n), image(n);
  KrylovResult result{norm2(r), 0};
  while (result.residual > target && result.products < limit) {
    const double before = result.residual;
    basis[0] = r;
    for (double& e : basis[0]) e /= before;
    fit.start(before);
    int k = 0;
    while (k < restart && result.products < limit && fit.residual(k) > target) {
      basis[k + 1].resize(n);
      apply(basis[k], basis[k + 1]);
      ++result.products;
      for (int i = 0; i <= k; ++i) {
        const double projection = fit.at(i, k) = dot(basis[i], basis[k + 1]);
        for (std::size_t j = 0; j < n; ++j) basis[k + 1][j] -= projection * basis[i][j];
      }
      const double length = norm2(basis[k + 1]);
      if (length > 0.0)
        for (double& e : basis[k + 1]) e /= length;
      if (!fit.take(k, length)) break;
      ++k;
      if (length == 0.0) break;
    }
    const std::vector<double>& weight = fit.solve(k);
    std::fill(step.begin(), step.end(), 0.0);
    for (int i = 0; i < k; ++i)
      for (std::size_t j = 0; j < n; ++j) step[j] += weight[i] * basis[i][j];
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
