// Krylov methods for one linear operator, written against `apply(x, y)`.
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"

namespace birl {

inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  return kernels().dot(static_cast<Index>(x.size()), x.data(), y.data());
}
inline double norm2(const std::vector<double>& x) { return std::sqrt(dot(x, x)); }

struct KrylovResult {
  double residual;  // 2-norm of b − Ax as the recursion has it; the caller measures afresh
  Index products;
};

// BiCGStab from x = 0 (van der Vorst 1992). Stops at `target` or after `limit` products, on
// breakdown, or when the residual has grown a thousandfold; x is then the best iterate it passed.
template <class Apply>
KrylovResult bicgstab(Apply&& apply, const std::vector<double>& b, std::vector<double>& x,
                      double target, Index limit) {
  const std::size_t n = b.size();
  std::vector<double> r = b, shadow = b, p(n, 0.0), v(n, 0.0), s(n), t(n), best(n, 0.0);
  std::fill(x.begin(), x.end(), 0.0);
  const double start = norm2(b);
  double rho = 1.0, alpha = 1.0, omega = 1.0, least = start;
  KrylovResult result{start, 0};
  while (result.residual > target && result.products < limit) {
    const double rho_next = dot(shadow, r);
    if (!(std::abs(rho_next) > 1e-14 * start * result.residual)) break;
    const double beta = (rho_next / rho) * (alpha / omega);
    rho = rho_next;
    for (std::size_t i = 0; i < n; ++i) p[i] = r[i] + beta * (p[i] - omega * v[i]);
    apply(p, v);
    const double slope = dot(shadow, v);
    if (slope == 0.0 || !std::isfinite(slope)) break;
    alpha = rho / slope;
    for (std::size_t i = 0; i < n; ++i) s[i] = r[i] - alpha * v[i];
    apply(s, t);
    result.products += 2;
    const double tt = dot(t, t);
    omega = tt > 0.0 ? dot(t, s) / tt : 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      x[i] += alpha * p[i] + omega * s[i];
      r[i] = s[i] - omega * t[i];
    }
    result.residual = norm2(r);
    if (result.residual < least) {
      least = result.residual;
      best = x;
    }
    if (omega == 0.0 || !(result.residual < 1e3 * start)) break;
  }
  if (result.residual != least) {
    x.swap(best);
    result.residual = least;
  }
  return result;
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
